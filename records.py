"""
Files of records: JSON, one object in the whole file, or one a line.

Lines are added by one write, so several programs can add to a file at once (not on Windows), and one that is
stopped, or finds the disk full, spoils no line but its own. A damaged line is told of and passed over.

Leaves out: reading a long file piece by piece.
"""
import json
import os

from config import BadInput, check_file, check_schema, in_one_line, warn


def open_file(path):
    """For its bytes; BadInput for a pipe, which would be waited for, and a device, which may have no end."""
    check_file(path)
    return open(path, "rb")


def read_json(path, remedy, schema={}):
    """
    The object in a file of JSON, of 1 MB at most.
    remedy   what to do about a file that cannot be read: it ends the BadInput that says so
    schema   of the object, for check_schema()
    returns  dict
    """
    with in_one_line(f"cannot read {path}", remedy), open_file(path) as file:
        content = json.loads(file.read(1 << 20))
    check_schema(path, content, schema)
    return content


def read_lines(path, schema):
    """
    A file of JSON, an object a line; none if there is no file. Others are warned about and passed over.
    schema   of an object, for check_schema()
    returns  list of dicts; raises BadInput for what is no file
    """
    check_file(path)
    if path.exists() and path.stat().st_size > 1 << 30:
        raise BadInput(f"{path} is larger than 1 GB: move it away")
    read = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            check_schema(path, record, schema, f"line {number}")
            read.append(record)
        except (ValueError, RecursionError) as error:  # BadInput, too
            warn(f"passed over: {path}, line {number}: {error}")
    return read


def append_line(path, record):
    """record, a dict, becomes the last line of the file; on BadInput (a full disk) the file is as it was."""
    check_file(path)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with in_one_line(f"cannot write {path}", "is the disk full, or that a folder?", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # "a": whoever else is writing, this goes behind all that is there
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # a last line that was cut short stays one of its own
            if file.read(1) not in (b"", b"\n"):
                line = b"\n" + line
            # all of it, or nothing
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError("the disk is full")
