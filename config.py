"""
What all scripts share at their border: options, errors with exit codes, devices, files that are written
whole.

A script's options are the fields of its dataclass; the comment behind a field is its help. Bad input of any
kind is a BadInput, which run() turns into one line on stderr and exit code 2.

    python sample.py --help

Leaves out: config files, nested options, environment variables.
"""
import argparse
import difflib
import inspect
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

STUDENT = "stage2"  # the weights that sample.py and evaluate.py take unless told otherwise


class BadInput(ValueError):
    """The user's input is wrong: the message says what, with the value, and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse(cls, argv=None):
    """
    cls      a dataclass; `name: int = 3  # help` becomes --name INT (a trailing underscore is dropped, _
             becomes -)
    argv     list of words, default sys.argv[1:]
    returns  an instance; raises BadInput for unknown names, missing values and wrong types
    """
    # the comment behind each field is its help
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    # the text of the file stands above the options
    parser = Parser(usage="%(prog)s [options]", description=inspect.getmodule(cls).__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # each field is an option
    options = []
    for field in fields(cls):
        option = "--" + field.name.strip("_").replace("_", "-")
        options.append(option)
        about = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(option, dest=field.name, action="store_true", help=about)
        else:
            parser.add_argument(option, dest=field.name, type=field.type, default=field.default, help=about,
                                metavar=field.type.__name__.upper())
    # what is left over is unknown
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        one_of("option", unknown[0].partition("=")[0], options)
    return cls(**vars(known))


def one_of(name, value, allowed):
    """Raises BadInput that names the nearest allowed value."""
    if value not in allowed:
        near = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"{name} {value!r} is unknown: {hint}choose from {', '.join(allowed)}")


def within(name, value, low, high):
    """Raises BadInput for a number outside; None, a default, is inside."""
    if value is not None and not low <= value <= high:
        raise BadInput(f"{name} must lie from {low} to {high}, not {value}")


def pick_device(name):
    """'' -> the best device there is; else the named one, which must be there."""
    # the fastest first
    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or max(known, key=known.get)
    one_of("--device", name, known)
    if not known[name]:
        raise BadInput(f"--device {name} is not available here: leave it out for the best there is")
    if name != "cuda":
        return torch.device(name)
    # torchrun starts a process for each device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def has_bf16(device):
    """
    Does the device multiply bfloat16 matrices in hardware? A CPU without AMX or AVX-512 BF16 emulates them:
    measured on one with AVX2 only, an update of the tiny autoencoder took 16 s in bf16 and 1.9 s in float32.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def fast_autocast(device):
    """Autocast to bfloat16 where that is faster than float32, and to nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


@contextmanager
def whole_or_absent(path):
    """
    with whole_or_absent(path) as part: write to `part`; it becomes `path` at the end, or vanishes on error.
    """
    path = Path(path)
    # the name is hidden, and ends as the whole one's, which tells the format
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise BadInput(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def run(main):
    """main() with the project's exit codes: 2 bad input (one line, no traceback), 130 Ctrl-C, 143 SIGTERM."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
