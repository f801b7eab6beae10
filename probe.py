"""
What is looked at while a network is trained: does it remember, does its teacher use the past, what do its videos look like?

A falling loss is not a video. So train.py lets the judge read held-out worlds that the network goes on with, measures before
Stage 2 what the teacher makes of its context, and draws strips of frames; and from the finished causal model it reads tau.

    python train.py --stage 2  # prints what gates() found, has the rest in out/stage2/log.jsonl and strip_*.png

Leaves out: anything with an interval around it (evaluate.py).
"""
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F

import erft
import world
from data import CHUNKS, LINGERS, Histories, frames_of
from evaluate import GIVEN, conditions, continuations, returns, teacher_continuations
from flow import Rollout, Sampler, add_noise, draw_noise, generate
from memory import CHUNK, PRESETS, plan


def held_out(n):
    """n worlds that turn once in 8 or 9 s: with 10 s of each given, returns are due after 5.4 or 6.1 s."""
    return [(world.HELD_OUT + i, "turn", 8 + i % 2) for i in range(n)]


def probe(net, encoder, tae, which, sampler, device, shuffle=None):
    """
    10 s of every held-out world of `which` are given, then net goes on; the judge reads what it made.
    shuffle  None for a causal network; False for a teacher, True if it shall go on from another world's past
    returns  dict: recall (share of the returning landmarks that are right), ceiling (share that memory still showed), chance,
             number of returns, validity (dB to the nearest frame that the world can draw)
    """
    policy = PRESETS["uniform2"]
    if shuffle is None:
        frames, keeps = continuations(net, encoder, tae, which, GIVEN, 5, policy, sampler, device)
    else:
        frames, keeps = teacher_continuations(net, encoder, tae, which, GIVEN, 1, sampler, device, shuffle)
    readings, found, psnr = [world.judge(f) for f in frames], [], []
    for w, r, keep in zip(which, readings, keeps):
        found += returns(r, world.world(*w).caption, keep, policy, GIVEN)
        psnr.append(r.psnr[frames_of(GIVEN * CHUNK):].mean())
    return {"recall": float(np.mean([e.recall for e, _ in found] or [0])),
            "ceiling": float(np.mean([h for _, h in found] or [0])), "chance": world.chance(readings),
            "returns": len(found), "validity": float(np.mean(psnr))}


@torch.no_grad()
def gates(teacher, encoder, tae, which, sampler, device):
    """Does the teacher use its context? Recall and loss at t = 0.7, and both with another world's past beside them -> dict"""
    text, z, grid = conditions(teacher, encoder, tae, which, GIVEN + erft.TARGET // CHUNK, device)
    src = plan(PRESETS["uniform2"], torch.arange(GIVEN)[None] % 2 == 0, new=0)[-1][0]
    context, x0, found = z[:, src], z[:, GIVEN * CHUNK:], {}
    at, eps = torch.full(x0.shape[:2], .7, device=device), draw_noise(range(len(which)), 0, 0, x0.shape[1:], device)
    for name, past, shuffle in (("", context, False), ("shuffled_", context.roll(1, 0), True)):
        v = erft.score(teacher, past, add_noise(x0, eps, at), at, text, grid)
        numbers = probe(teacher, encoder, tae, which, sampler, device, shuffle)
        found |= {f"teacher_{name}loss": F.mse_loss(v, eps - x0).item(), f"teacher_{name}recall": numbers["recall"]}
    return found | {"teacher_chance": numbers["chance"]}


@torch.no_grad()
def calibrate(net, encoder, tae, device):
    """
    tau: the smallest that keeps 95 % of the tested chunks of the slowest turns (one in 40 s or more), on real video;
    keys are compared as a whole ("mean", Wan's way) or place by place ("token"), whichever keeps fewer lingering chunks.
    returns  dict: tau, pool, kept (share of the tested chunks that are kept, by motion)
    """
    worlds = [(i, "turn", 40 + i % 5) for i in range(8)] + [(i, "linger", None) for i in range(8)]
    (text, x0, grid), paths = conditions(net, encoder, tae, worlds, CHUNKS, device), Histories(worlds)
    at = torch.arange(CHUNKS)[None] % 2 == 0
    at = at & (torch.arange(CHUNKS) > 1)                    # tested chunks that have one before them
    turns, lingers = torch.arange(16)[:, None] < 8, torch.from_numpy(paths.moved) < LINGERS
    choices = []
    for pool in ("mean", "token"):
        roll = Rollout(net, text, PRESETS["slowfast"], grid, pool=pool)
        for i in range(CHUNKS):
            roll.look()
            roll.commit(x0[:, i * CHUNK:(i + 1) * CHUNK], torch.from_numpy(paths.keep["moving"][:, i]).to(device))
        sims = torch.stack(roll.sims, 1).cpu()
        tau = sims[at & turns].quantile(.95).item()
        kept = {name: (sims < tau)[at & which].float().mean().item() for name, which in
                (("slow turns", turns), ("lingering", ~turns & lingers), ("between", ~turns & ~lingers))}
        choices.append((kept["lingering"], {"tau": tau, "pool": pool, "kept": kept}))
    return min(choices, key=lambda c: c[0])[1]


def write_strip(path, videos):
    """videos: list of (f, 3, h, w) tensors in [-1, 1] -> one PNG, a row each, every 12th frame side by side."""
    rows = [torch.cat(list(v[::12].float()), dim=2) for v in videos]  # (3, h, n w)
    picture = (torch.cat(rows, dim=1) * .5 + .5).clamp(0, 1).mul(255).round().byte().movedim(0, -1)
    iio.imwrite(path, picture.cpu().numpy())


@torch.no_grad()
def from_text(net, text, n, tae, sampler, grid, latent, together, device):
    """n videos from text alone, of 20 chunks, or `together`, all 21 latents at once -> list of (f, 3, h, w) in [-1, 1]"""
    if together:
        z = erft.extend(net, torch.zeros(n, 0, *latent, device=device), text, grid, sampler, range(n))
    else:
        roll = Rollout(net, text, replace(PRESETS["slowfast"], tau=sampler.tau), grid, pool=sampler.pool)
        z = torch.cat(list(generate(roll, range(n), 20, sampler, latent)), 1)
    return list(tae.decode(z)[0])
