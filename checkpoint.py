"""
Checkpoints of a training run, and the few questions that its processes ask each other.

A checkpoint is a folder that torch.distributed.checkpoint writes: every tensor under its name, whatever
process held which part of it, so a run goes on with as many processes or with another number. It is written
under another name and renamed when it is there: whole or absent; beside its files lies their sha256
(sha256sum -c sha256). The last two are kept. Its index is a pickle: go on only in folders of your own.
"""
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import BadInput, whole_or_absent
from tensors import hash_file, read_json


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


@contextmanager
def quiet_alone():
    """One process may use torch.distributed.checkpoint: no warning is called for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def training_state(nets, optimizers, others):
    """
    nets        ModuleDict of all that is trained
    optimizers  list; each has some of its parameters
    others      name -> what has a state_dict() and a load_state_dict() of its own
    returns     what a checkpoint holds: the run's own tensors, by their names
    """
    weights, moments = get_state_dict(nets, optimizers)
    return {"nets": weights, "optimizers": moments, **others}


def save_checkpoint(folder, step, nets, optimizers, others):
    part = folder / f"part_{step:06d}"
    whole = folder / f"step_{step:06d}"
    # what an earlier run has left of it goes
    if get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(whole, ignore_errors=True)
    barrier()
    # all processes write, each what it holds
    state = training_state(nets, optimizers, others)
    with quiet_alone():
        dcp.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
    # and the checksums of that
    rank = get_rank()
    mine = [*part.glob(f"__{rank}_*"), *([part / ".metadata"] if rank == 0 else [])]
    lines = [f"{hash_file(file)}  {file.name}\n" for file in mine]
    (part / f"sha256_{rank}").write_text("".join(lines))
    barrier()
    # whole now
    if rank == 0:
        lists = list(part.glob("sha256_*"))
        (part / "sha256").write_text("".join(file.read_text() for file in lists))
        for file in lists:
            file.unlink()
        os.replace(part, whole)
        for old in sorted(folder.glob("step_*"))[:-2]:
            shutil.rmtree(old)


def find_damage(folder):
    """What is wrong with the files of a checkpoint, "" if nothing"""
    # several processes read a share each
    try:
        lines = (folder / "sha256").read_text("utf-8", "replace").splitlines()
        for line in lines[get_rank()::get_processes()]:
            digest, _, name = line.partition("  ")
            if hash_file(folder / name) != digest:
                return f"{name} is not what its sha256 says"
    except (OSError, ValueError) as error:
        return str(error)
    return "" if lines else "it has no checksums"


def load_checkpoint(folder, nets, optimizers, others, verify=True):
    """
    The newest checkpoint that can be read goes into nets, optimizers and others. One that cannot is named and
    passed over.
    verify   the checksums
    returns  its step; 0 if there is none
    """
    # the newest first
    checkpoints = sorted(folder.glob("step_*"), reverse=True)
    for whole in checkpoints:
        told = find_damage(whole) if verify else ""
        if not any_process(bool(told)):
            state = training_state(nets, optimizers, others)
            try:
                with quiet_alone():
                    dcp.load(state, checkpoint_id=whole, no_dist=not dist.is_initialized())
            except CheckpointException as error:  # in all processes, if in one
                reason, _ = next(iter(error.failures.values()))
                told = (str(reason).splitlines() or [type(reason).__name__])[0]
            else:
                # others have loaded themselves
                set_state_dict(nets, optimizers, model_state_dict=state["nets"],
                               optim_state_dict=state["optimizers"])
                return int(whole.name.removeprefix("step_"))
        if told:
            print(f"cannot read {whole} ({told}): using the one before it", file=sys.stderr)
    if checkpoints:
        raise BadInput(f"no checkpoint in {folder} can be read: delete that folder to train from the start")
    return 0


def keep_settings(folder, settings, passes):
    """
    The settings of a run lie beside its checkpoints from its first update on; BadInput names those that are
    others now, as a run does not become another one.
    settings  name -> value, for JSON; "accumulate" among them
    passes    of an update now, in all processes together; as many may be shared otherwise among them
    returns   what is saved: settings, and all numbers of passes that there were
    """
    # through JSON, as they come back
    file = folder / "settings.json"
    saved = json.loads(json.dumps({**settings, "passes": []}))
    # what has not begun may still change
    has_trained = any(folder.glob("step_*")) or any(folder.glob("*.safetensors"))
    if file.exists() and has_trained:
        saved, given = read_json(file), saved
        if not isinstance(saved.get("passes"), list):
            raise BadInput(f"{file} is damaged: passes must be a list")
        if passes in saved["passes"]:
            given["accumulate"] = saved.get("accumulate")
        differ = [f"{name} {saved.get(name)}, not {value}" for name, value in given.items()
                  if name != "passes" and saved.get(name) != value]
        if differ:
            raise BadInput(f"{folder} was trained with {', '.join(differ)}: give another --out")
    if passes not in saved["passes"]:
        saved["passes"].append(passes)
        if get_rank() == 0:
            with whole_or_absent(file) as part:
                part.write_text(json.dumps(saved, indent=1))
    return saved
