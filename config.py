"""
From a dataclass to a command line, and nothing else.

A script's options are the fields of its dataclass; the comment behind a field is its help. Bad input of any kind is a
BadInput, which main() turns into one line on stderr and exit code 2.

    python sample.py --help

Leaves out: config files, nested options, environment variables.
"""
import difflib
import inspect
import re
import sys
from dataclasses import fields

import torch


STUDENT = "stage2"  # the weights that sample.py and evaluate.py take unless told otherwise


class BadInput(ValueError):
    """The user's input is wrong: the message says what, with the value, and what to do."""


def parse(cls, argv=None):
    """
    cls   a dataclass; `name: int = 3  # help` becomes --name N (a trailing underscore in the name is dropped, _ is -)
    argv  list of words, default sys.argv[1:]
    returns an instance; raises BadInput for unknown names, missing values and wrong types
    """
    words = list(sys.argv[1:] if argv is None else argv)
    comments = dict(re.findall(r"^\s+(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    options = {"--" + f.name.strip("_").replace("_", "-"): f for f in fields(cls)}
    if "--help" in words or "-h" in words:
        print((inspect.getmodule(cls).__doc__ or "").strip() + "\n\noptions:")
        for name, f in options.items():
            print(f"  {name:20} {comments.get(f.name, '')} [{f.default}]")
        sys.exit(0)
    values = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            raise BadInput(f"unknown option {name}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        f = options[name]
        if f.type is bool and equals:
            raise BadInput(f"{name} takes no value: leave out ={value}")
        if f.type is not bool and not equals and not words:
            raise BadInput(f"{name} needs a value: {name} {f.type.__name__.upper()}")
        value = f.type is bool or (value if equals else words.pop(0))
        try:
            values[f.name] = f.type(value)
        except ValueError:
            raise BadInput(f"{name} must be {'a whole number' if f.type is int else 'a number'}, not {value!r}") from None
    return cls(**values)


def one_of(name, value, allowed):
    """Raises BadInput that names the nearest allowed value."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        raise BadInput(f"{name} {value!r} is unknown: " + (f"did you mean {near[0]}? " if near else "")
                       + f"choose from {', '.join(allowed)}")
    return value


def pick_device(name):
    """'' -> the best device there is; else the named one, which must be there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not name:
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if there[d]))
    if not there[one_of("--device", name, there)]:
        raise BadInput(f"--device {name} is not available here: choose from {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def has_bf16(device):
    """
    Does the device multiply bfloat16 matrices in hardware? A CPU without AMX or AVX-512 BF16 emulates them: measured on one
    with AVX2 only, an update of the tiny autoencoder took 16 s in bf16 and 1.9 s in float32.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def fast_autocast(device):
    """Autocast to bfloat16 where that is faster than float32, and to nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def run(main):
    """main() with the project's exit codes: 2 bad input (one line, no traceback), 130 Ctrl-C, 143 SIGTERM."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
