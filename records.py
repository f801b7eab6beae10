"""
Files of records: JSON, an object in the whole file or an object a line.

A program that is stopped, a full disk, or two that write at once cost no line but their own; a line that is
damaged is told of and passed over.

Leaves out: reading a long file piece by piece.
"""
import json
import os

from config import check_file, check_schema, in_one_line, warn


def read_json(path, remedy):
    """The object in a file of JSON, of 1 MB at most; remedy: what to do about one that cannot be read"""
    check_file(path)
    with in_one_line(f"cannot read {path}", remedy), open(path, "rb") as file:
        content = json.loads(file.read(1 << 20))
    check_schema(path, content, dict)
    return content


def read_lines(path, schema):
    """
    A file of JSON, an object a line -> list of those that are as check_schema() wants them; the others are
    warned about. Where there is no file: an empty list.
    """
    check_file(path)
    read = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(), 1):
        # two that ended a cut line at once leave an empty one
        if not line:
            continue
        try:
            record = json.loads(line)
            check_schema(path, record, schema, f"line {number}")
            read.append(record)
        except (ValueError, RecursionError) as error:  # BadInput, too
            warn(f"passed over: {path}, line {number}: {error}")
    return read


def append_line(path, record):
    """One line more, in one write, as another program may be adding its own; or the file as it was"""
    check_file(path)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with in_one_line(f"cannot write {path}", "is the disk full, or that a folder?", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # whoever writes, a line is added behind all that is there
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # a last line that was cut short stays one of its own
            if file.read(1) not in (b"", b"\n"):
                line = b"\n" + line
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError("the disk is full")
