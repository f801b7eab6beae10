"""
Checkpoints of a training run, and the few questions that its processes ask each other.

A checkpoint is a folder that torch.distributed.checkpoint writes: every tensor under its name, whatever
process held which part of it, so a run goes on with as many processes or with another number. It is written
under another name and renamed when it is there: whole or absent. The last two are kept. Its index is a
pickle: go on only in folders of your own.
"""
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

from config import BadInput


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
    # whole now
    if get_rank() == 0:
        os.replace(part, whole)
        for old in sorted(folder.glob("step_*"))[:-2]:
            shutil.rmtree(old)


def load_checkpoint(folder, nets, optimizers, others):
    """
    The newest checkpoint that can be read goes into nets, optimizers and others. One that cannot is named and
    passed over.
    returns  its step; 0 if there is none
    """
    # the newest first
    checkpoints = sorted(folder.glob("step_*"), reverse=True)
    for whole in checkpoints:
        state = training_state(nets, optimizers, others)
        try:
            with quiet_alone():
                dcp.load(state, checkpoint_id=whole, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # in all processes, if in one
            reason, _ = next(iter(error.failures.values()))
            told = (str(reason).splitlines() or [type(reason).__name__])[0]
            print(f"cannot read {whole} ({told}): using the one before it", file=sys.stderr)
        else:
            # others have loaded themselves
            set_state_dict(nets, optimizers, model_state_dict=state["nets"],
                           optim_state_dict=state["optimizers"])
            return int(whole.name.removeprefix("step_"))
    if checkpoints:
        raise BadInput(f"no checkpoint in {folder} can be read: delete that folder to train from the start")
    return 0
