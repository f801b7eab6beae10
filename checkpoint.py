"""
Checkpoints of a training run, and the few questions that its processes ask each other.

A checkpoint is a folder that torch.distributed.checkpoint writes: every tensor under its name, whatever
process held which part of it, so a run goes on with as many processes or with another number. It is written
under another name and renamed when it is there: whole or absent; beside its files lies their sha256
(sha256sum -c sha256). The last two are kept. Its index is a pickle: go on only in folders of your own.
"""
import json
import os
import platform
import shutil
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import BadInput, in_one_line, warn, write_text
from records import read_json
from tensors import hash_file

# of processes that wait for the one that draws a strip, or encodes the last clips
PATIENCE = timedelta(hours=12)

# in its folder, but no part of a checkpoint; the last are of Finder and Explorer
BESIDE = ("sha256", ".DS_Store", "desktop.ini", "Thumbs.db")

# one process may use torch.distributed.checkpoint, too
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@contextmanager
def joined_processes(device):
    """
    with joined_processes(device): the processes that torchrun has started, if it did, are one group. None
    leaves before the last is done, as torchrun ends the others of a group whose first node is gone.
    """
    if "RANK" in os.environ:
        # a Mac counts none, and gloo does not reach its GPU
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device.type != "cpu" and processes > torch.cuda.device_count():
            raise BadInput("torchrun needs a GPU for each process: start fewer, or give --device cpu")
        # gradients travel between devices, flags and errors between hosts
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with in_one_line("cannot join the other processes", "start with torchrun, or unset RANK"):
            dist.init_process_group(backend, timeout=PATIENCE)
    # not where one of them fails: NCCL would wait there for those that wait for it, and nobody would see why
    yield
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def any_process(flag):
    """Is it true in any process? A collective: every process must ask."""
    flags = torch.tensor([float(flag)])
    if dist.is_initialized():
        dist.all_reduce(flags)
    return flags.item() > 0


def gather(mine):
    """Lists of all processes, one after another. A collective."""
    shares = [mine] * get_processes()
    if dist.is_initialized():
        dist.all_gather_object(shares, mine)
    return sum(shares, [])


def training_state(nets, optimizers, others):
    """
    nets        ModuleDict of all that is trained
    optimizers  list; each has some of its parameters
    others      name -> what has a state_dict() and a load_state_dict() of its own
    returns     what a checkpoint holds: the run's own tensors, by their names
    """
    weights, moments = get_state_dict(nets, optimizers)
    return {"nets": weights, "optimizers": moments, **others}


def find_checkpoints(folder):
    """The newest last; copies of other names are somebody's own"""
    found = [path for path in folder.glob("step_??????*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def list_hashes(folder):
    """What sha256sum prints of a checkpoint's files. A collective: each process reads a share of them."""
    def line(file):
        try:
            return f"{hash_file(file)}  {file.name}\n"
        # all are told, rather than left waiting
        except OSError as error:
            return f"{error}\n"
    # one process says which there are: over a network disk others may see fewer
    names = [file.name for file in folder.iterdir() if file.name not in BESIDE] if get_rank() == 0 else []
    files = [folder / name for name in sorted(gather(names))]
    return "".join(sorted(gather([line(file) for file in files[get_rank()::get_processes()]])))


def first_reason(error):
    """Of an error, or of those of all processes that one holds, in a line"""
    reasons = [reason for reason, _ in getattr(error, "failures", {}).values()]
    return repr([*reasons, error][0]).splitlines()[0]


def save_checkpoint(folder, step, nets, optimizers, others):
    part = folder / f"part_{step:06d}"
    whole = folder / f"step_{step:06d}"
    # what an earlier run has left of it goes
    if get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(whole, ignore_errors=True)
    barrier()
    # all processes write, each what it holds
    try:
        dcp.save(training_state(nets, optimizers, others), checkpoint_id=part)
    except CheckpointException as error:
        raise BadInput(f"cannot write {whole} ({first_reason(error)}): is the disk full?") from None
    hashes = list_hashes(part)
    # whole now
    if get_rank() == 0:
        (part / "sha256").write_text(hashes)
        os.replace(part, whole)
        for old in find_checkpoints(folder)[:-2]:
            shutil.rmtree(old)
    # none leaves before it is there, as torchrun ends the others then
    barrier()


def load_checkpoint(folder, nets, optimizers, others, verify=True):
    """
    The newest checkpoint that can be read goes into nets, optimizers and others. One that cannot is named and
    passed over.
    verify   the checksums
    returns  its step; 0 if there is none
    """
    # the newest first
    checkpoints = find_checkpoints(folder)
    for whole in reversed(checkpoints):
        state = training_state(nets, optimizers, others)
        try:
            if verify and list_hashes(whole).encode() != (whole / "sha256").read_bytes():
                raise OSError("its files are not what their sha256 say")
            dcp.load(state, checkpoint_id=whole)
        except (OSError, CheckpointException) as error:  # in all processes, if in one
            warn(f"cannot read {whole} ({first_reason(error)}): using the one before it")
        else:
            # others have loaded themselves
            set_state_dict(nets, optimizers, model_state_dict=state["nets"],
                           optim_state_dict=state["optimizers"])
            return int(whole.name.removeprefix("step_"))
    if checkpoints:
        raise BadInput(f"no checkpoint in {folder} can be read: delete that folder to train from the start")
    return 0


@contextmanager
def claim(folder):
    """
    with claim(folder): it is this run's, as running.json in it says as long as that lasts. BadInput where
    another run trains there that is alive on this machine.
    """
    if get_rank() > 0:
        yield
        return
    import psutil  # comes with imageio[ffmpeg]
    file = folder / "running.json"
    if file.exists():
        schema = {"machine": str, "process": range(2 ** 31), "started": int}
        other = read_json(file, "delete it", schema)
        # one that was killed leaves it there, and numbers of processes come again
        with suppress(psutil.Error):
            started = psutil.Process(other["process"]).create_time()
            if other["machine"] == platform.node() and abs(started - other["started"]) < 5:
                raise BadInput(f"process {other['process']} is training in {folder}: wait for it, or give "
                               "another --out")
    me = psutil.Process()
    mine = {"machine": platform.node(), "process": me.pid, "started": round(me.create_time())}
    write_text(file, json.dumps(mine))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def keep_settings(folder, settings, passes):
    """
    The settings of a run lie beside its checkpoints: written before its first update, binding from its first
    checkpoint on. BadInput names those that are others now, as a run does not become another one.
    settings  name -> value, for JSON; "accumulate" among them
    passes    of an update now, in all processes together; as many may be shared otherwise among them
    returns   what is saved: settings, and all numbers of passes that there were
    """
    file = folder / "settings.json"
    given = dict(settings)
    saved = {**given, "passes": []}
    # what has not begun may still change, and weights without settings were put there by hand
    has_trained = find_checkpoints(folder) or file.exists() and any(folder.glob("*.safetensors"))
    if has_trained:
        saved = read_json(file, "what trained here cannot be told: give another --out", {"passes": [int]})
        if passes in saved["passes"]:
            del given["accumulate"]
        differ = [f"{name} {saved.get(name)}, not {value}" for name, value in given.items()
                  if saved.get(name) != value]
        if differ:
            raise BadInput(f"{folder} was trained with {', '.join(differ)}: give another --out")
    if passes not in saved["passes"]:
        saved["passes"].append(passes)
        if get_rank() == 0:
            write_text(file, json.dumps(saved, indent=1))
    return saved
