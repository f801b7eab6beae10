"""
What all scripts share at their border: options, errors with exit codes, signals, devices, files that are
written whole.

A script's options are the fields of its dataclass; the comment behind a field is its help. Bad input of any
kind is a BadInput, which run() turns into one line on stderr and exit code 2. Scripts import this file before
any package: Ctrl-C during the imports ends quietly, and a missing package is named.

    python sample.py --help

Leaves out: config files, nested options, environment variables.
"""
import argparse
import difflib
import inspect
import itertools
import os
import platform
import re
import reprlib
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile


def end_quietly(kind, error, trace):
    """What Python does with an error that nothing else caught, the imports' included."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, ModuleNotFoundError):
        print(f"error: {error}: pip install -r requirements.txt, with --wan requirements-wan.txt",
              file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly

# torch's import swallows a KeyboardInterrupt here and there: until it is over Ctrl-C ends the process
is_main = threading.current_thread() is threading.main_thread()
is_usual = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_usual:
    signal.signal(signal.SIGINT, lambda *about: os._exit(130))
import torch
if is_usual:
    signal.signal(signal.SIGINT, signal.default_int_handler)
from tqdm import tqdm

STUDENT = "stage2"  # the weights that sample.py and evaluate.py take unless told otherwise


class BadInput(ValueError):
    """The user's input is wrong: the message says what, with the value, and what to do."""


@contextmanager
def in_one_line(what, remedy, kind=Exception):
    """Any error of the kind inside becomes one BadInput: what cannot be done (the cause): what to do."""
    try:
        yield
    except BadInput:
        raise
    except kind as error:
        cause = one_line(f"{type(error).__name__}: {error}")
        # torch's own advice is to run the code
        if "Weights only load failed" in cause:
            cause = "it holds more than tensors, whose code is not run, or is damaged"
        raise BadInput(f"{what} ({cause:.300}): {remedy}") from None


def one_line(text):
    """White space, ends of lines too, becomes one space; what a terminal would obey is told by its code."""
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def tell(text, file=None):
    """One line, whatever names of files are in it, above any bar; on stdout"""
    tqdm.write(one_line(text), file)


def warn(text):
    tell(f"warning: {text}", sys.stderr)


class Parser(argparse.ArgumentParser):
    def __init__(self, **about):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **about)

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
    parser = Parser(usage="%(prog)s [options]", description=inspect.getmodule(cls).__doc__)
    # each field is an option
    options = []
    for field in fields(cls):
        option = "--" + field.name.strip("_").replace("_", "-")
        options.append(option)
        default = "" if field.default in ("", None) else f" [{field.default}]"
        about = (comments[field.name] + default).replace("%", "%%")
        kind = {"action": "store_true"}
        if field.type is not bool:
            kind = {"type": field.type, "default": field.default, "metavar": field.type.__name__.upper()}
        parser.add_argument(option, dest=field.name, help=about, **kind)
    # what is left over is unknown
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        one_of("option", unknown[0].partition("=")[0], options)
    return cls(**vars(known))


def one_of(name, value, allowed):
    """Raises BadInput that names the nearest allowed value."""
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"{name} {value!r} is unknown: {hint}choose from {', '.join(allowed)}")


def within(name, value, low, high):
    """Raises BadInput for a number outside; None, a default, is inside."""
    if value is not None and not low <= value <= high:
        raise BadInput(f"{name} must lie from {low} to {high}, not {value}")


def check_schema(path, value, schema, field="content", fault="is damaged, or not such a file"):
    """
    Raises BadInput that names file and field unless a value that was read is what the schema says: a type, or
    several, of which float must be finite; a range of whole numbers, or a set of words; the dtype of a tensor
    of finite numbers; {name: schema}, a dict with at least these; [schema], a list of such.
    """
    if isinstance(schema, (range, set)):
        # a word would be compared with every number of a range
        fits = type(value) is (int if isinstance(schema, range) else str) and value in schema
    elif schema is float:
        fits = type(value) in (int, float) and abs(value) < 1e9
    elif schema is str:
        # halves of surrogate pairs, as JSON can have them, are no text
        fits = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    elif isinstance(schema, torch.dtype):
        fits = torch.is_tensor(value) and value.dtype == schema and value.isfinite().all()
        field += f" (finite, {schema})"
    else:
        fits = isinstance(value, type(schema) if isinstance(schema, (dict, list)) else schema)
    if not fits:
        raise BadInput(f"{path} {fault}: its {field} cannot be {reprlib.repr(value):.40}")
    # what is inside
    if isinstance(schema, dict):
        for name, inner in schema.items():
            check_schema(path, value.get(name), inner, f"{field}, {name}", fault)
    if isinstance(schema, list):
        for item in value:
            check_schema(path, item, schema[0], field, fault)


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


def fast_layout(device):
    """Of images in memory: channels last, but for Apple's devices, where convolutions are not sure."""
    return torch.preserve_format if torch.device(device).type == "mps" else torch.channels_last


def fast_autocast(device):
    """Autocast to bfloat16 where that is faster than float32, and to nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def use_one_thread():
    """
    For networks as small as the tiny ones: beside other work threads would wait for each other (README, Much
    slower than said here?). OMP_NUM_THREADS has the last word.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ---- files -------------------------------------------------------------------------------------------------

PART = re.compile(r"\.(.+)\.(\d{1,9})\.\d+\.part(\..*)?")  # machine, process, number: a file being written
numbers = itertools.count()


def check_writable(folder):
    """Raises BadInput now, rather than after the work, if the folder cannot be made or written to."""
    folder = Path(folder).absolute()
    with in_one_line(f"cannot write to {folder}", "give another folder"):
        # the nearest folder that is there, or link, wherever that leads
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        TemporaryFile(dir=there).close()


def check_file(path):
    """Raises BadInput for a folder, a pipe, a device; a file need not be there."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is no file: give another name")


@lru_cache
def remove_parts_of_killed_runs(folder):
    """Once a process and folder."""
    for part in folder.glob(".*.part*"):
        match = PART.fullmatch(part.name)
        if match and match[1] == platform.node() and part.is_file():
            import psutil  # comes with imageio[ffmpeg]
            if not psutil.pid_exists(int(match[2])):
                part.unlink(missing_ok=True)


@contextmanager
def whole_or_absent(path):
    """
    with whole_or_absent(path) as part: write to `part`; it becomes `path` at the end, or vanishes on error.
    An OSError (a full disk) becomes a BadInput.
    """
    path = Path(path)
    check_file(path)
    # the name is hidden, and ends as the whole one's, which tells the format
    part = path.with_name(f".{platform.node()}.{os.getpid()}.{next(numbers)}.part{path.suffix}")
    with in_one_line(f"cannot write {path}", "is the disk full, or that a folder?", OSError):
        try:
            # in the same folder, because only there it can be renamed
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts_of_killed_runs(path.parent)
            part.touch()
            mode = part.stat().st_mode
            yield part
            # safetensors' files are for their owner alone
            part.chmod(mode)
            try:
                os.replace(part, path)
            # Windows: another program has the older file open
            except PermissionError:
                kept = path.with_stem(f"{path.stem}-{os.getpid()}")
                os.replace(part, kept)
                raise BadInput(f"{path} is in use, so what was to replace it is {kept}: rename it") from None
        finally:
            part.unlink(missing_ok=True)


def write_text(path, text):
    """A file of UTF-8, whole or absent"""
    with whole_or_absent(path) as part:
        part.write_text(text, "utf-8")


# ---- the end of a run --------------------------------------------------------------------------------------

class StopSignals:
    """
    with StopSignals() as stop: Ctrl-C ends the program with 130, SIGTERM and SIGHUP (a closed terminal) with
    143. All set `code`, for loops to ask: an exit raised in a callback of Python's is swallowed. Where
    `patient` is set, the first does no more; one a second later exits (torchrun sends two at once).
    """
    patient = False
    code = 0
    since = 0.  # when `code` was set

    def __enter__(self):
        self.before = {}  # signal -> its handler outside
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup has it ignored
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, stack):
        code = 130 if number == signal.SIGINT else 143
        now = time.monotonic()
        is_late = self.code and now > self.since + 1
        if not self.code:
            self.code, self.since = code, now
        if is_late or not self.patient:
            sys.exit(code)


class Voice:
    """A stream of words: where nobody hears them (a pipe that closed, a full disk), the work goes on."""
    def __init__(self, stream):
        # where it is closed, and under pythonw, there is none
        self.stream = stream or open(os.devnull, "w")
        # a terminal that is not UTF-8 shows what it lacks as \u732b
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(main):
    """main() with the project's exit codes: 2 bad input (one line, no traceback), 130 Ctrl-C, 143 SIGTERM."""
    sys.stdout, sys.stderr = Voice(sys.stdout), Voice(sys.stderr)
    try:
        with StopSignals():
            main()
    # a full disk, a folder in a file's place and the like, wherever they are met
    except (BadInput, OSError, RuntimeError) as error:
        told = str(error)
        if isinstance(error, NotImplementedError):
            told = f"use --device cpu, as this device lacks an operation: {told:.200}"
        elif re.search("out of memory|allocate memory", told):
            told = f"too little memory here: ask for smaller networks or videos: {told:.200}"
        elif isinstance(error, RuntimeError):
            raise
        tell(f"error: {told}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
