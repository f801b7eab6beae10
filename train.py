"""
Trains every network of the project, one stage at a time, top to bottom.

    python train.py --stage vae        # the tiny autoencoder of the small world
    python train.py --stage init       # ar: the causal model with memory, and the text encoder; then ode: its four steps
    python train.py --stage base       # bidirectional, 21 latents: what Wan2.1 is for the full size
    python train.py --stage teacher    # the context teacher, fine-tuned on pasts with errors in them (erft.py)
    python train.py --stage 1          # DMD: the student's first 5 s match the base model's (dmd.py)
    python train.py --stage 2          # contextual DMD: its long videos go on as the teacher would

    torchrun --nproc_per_node 8 train.py --stage 2    # the same on 8 devices: a batch each, networks sharded over them
    ... --wan Wan2.1-T2V-1.3B --data prompts.txt --init ode_init.pt    # the same at full size (stages teacher, init, 1, 2)

Run the same command again to go on after a stop: everything random in update n is drawn from (seed, n, which batch), so a
resumed run is the uninterrupted run, and two processes are one that accumulates two batches. Each part of a stage writes
out/<part>/: log.jsonl (one JSON object an update), strip_*.png (look at them), two checkpoints, and at the end
<part>.safetensors, which goes to weights/ when it is better than what is there.

References: Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009; TAEHV.
Leaves out: LoRA, mixed-precision optimizer states.
"""
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dmd
import erft
import world
from config import BadInput, one_of, parse, pick_device, run
from data import (CHUNKS, LESSON_CHUNKS, LINGERS, Clips, Histories, compass, encode_world, frames_of, latent_cache,
                  lesson_worlds, read_prompts, training_worlds, wan_models, wan_text)
from evaluate import GIVEN, continuations, returns, teacher_continuations
from flow import Rollout, Sampler, add_noise, denoise, draw_noise, generate, guide, matching, schedule, shifted, v_from_x0
from memory import CHUNK, PRESETS, plan
from model import DiT, DiTConfig, load, save_weights, tiny_dit
from rope import table
from text import TextConfig, TextEncoder, bytes_to_ids, tiny_text
from vae import TAE, TAEConfig, tiny_tae


@dataclass
class Config:
    stage: str = ""       # vae | init | base | teacher | 1 | 2
    out: str = "out"      # folder for logs, strips, checkpoints and weights
    updates: int = 0      # number of updates (0: the stage's own default)
    batch: int = 0        # clips a process and pass (0: the stage's own default)
    accumulate: int = 1   # passes an update
    lr: float = 0.0       # peak learning rate (0: the stage's own default)
    init: str = ""        # weights to start from (default: the stage before, from the same --out, else the shipped ones)
    teacher: str = ""     # stages 1 and 2: weights of the real score, and of the critic's start
    teacher_context: str = "memory"  # stage 2: memory | none: teacher and critic score without the student's context
    errors: float = 0.5   # stage teacher: share of samples that get errors injected; 0 is plain fine-tuning
    data: str = ""        # base, teacher: a folder that data.py wrote; 1, 2: a file, one prompt a line (default: small world)
    wan: str = ""         # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS: train at full size, with --data
    size: str = ""        # with --wan: WIDTHxHEIGHT in pixels, as --data was made (default 832x480)
    seed: int = 0         # of the training run
    device: str = ""      # cuda | mps | cpu (default: the best there is)
    dtype: str = "bf16"   # bf16 | fp32: autocast of the forward pass; weights and optimizer are float32


PARTS = {  # stage: its parts in order; a part is one run with a folder and weights of its own
    "vae": ["vae"], "init": ["init_ar", "init_ode"], "base": ["base"], "teacher": ["teacher"], "1": ["stage1"],
    "2": ["stage2"]}
DEFAULTS = {  # part: updates, batch, lr, warm-up, EMA decay
    "vae": (3500, 8, 2e-3, 100, .99),
    "init_ar": (10000, 16, 1.5e-3, 100, .995),
    "init_ode": (4400, 16, 2e-4, 50, .99),
    "base": (3200, 16, 1.5e-3, 100, .995),
    "teacher": (3000, 16, 7e-4, 100, .995),
    "stage1": (200, 16, 5e-5, 1, .95),
    "stage2": (250, 12, 3e-5, 1, .95),
}
FULL = {  # the same with --wan, one clip a pass: meant are 64 an update, by processes and --accumulate (teacher and init_ar: 8)
    "init_ar": (5000, 1, 1e-5, 100, .995), "init_ode": (3000, 1, 2e-6, 1, .99), "teacher": (8000, 1, 1e-5, 100, .995),
    "stage1": (120, 1, 2e-6, 1, .99), "stage2": (100, 1, 2e-6, 1, .99)}
GUIDANCE = {"stage1": 4., "stage2": 6.}  # with --wan: of the real score (written 3 and 5 where it is cond + w (cond - uncond))
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # Wan's
            "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
            "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
BEFORE = {"init_ode": "init_ar", "base": "init_ar", "teacher": "init_ar", "stage1": "init_ode", "stage2": "stage1"}
# What a part starts from. The tiny teacher starts from the causal model, which remembers; from base it did not learn to: recall
# .13 and .33 after 250 and 500 updates against .12 and .10 (its probe, chance .04). At full size it starts from Wan, the base.
WEIGHTS = Path(__file__).parent / "weights"
SAVE_EVERY, STRIP_EVERY, PROBE_EVERY, BAD_IN_A_ROW = 250, 500, 250, 10
PROBED = 16            # held-out worlds whose recall is logged every PROBE_EVERY updates
COMPASS = 0.7          # stage vae: from this share of the updates on the sky counts four times and channels are decorrelated:
                       # else 3 % of the latents' variance tells the heading, and no network looks it up
CLIPS = 1024           # training clips in the latent cache
COPIES = 4             # noised copies of a target chunk that share one clean past: most of the compute is supervised
LESSON_CLIPS = 1600    # and of steady turns of 8 to 16 s, whose keyframes hold all that comes back
TWINS = 640            # clips of each set that have a twin: the same motion past other landmarks
MIX = {                # init_ar: until which share of the updates, how often a pack is of which kind, and from a lesson
    # first 7 chunks, whole past, a chunk left out before the target, no sink and fast memory, fast memory from a twin
    .2: (.15, .255, .2975, .2975, 0, .7), .65: (.10, .30, 0, .10, .50, .7), 1: (.10, .60, 0, .05, .25, .2)}
# With the last second at hand a network draws on from that and does not learn in an hour to choose among keyframes. Where
# that second is missing, or shows other landmarks, every column must be looked up by what tells the heading: the sky.
SEQUENTIAL = 0.975     # from this share of the updates on pasts go through the real memory, chunk by chunk
SHIFT = 3.0            # training noise levels: uniform, shifted by this
CONTEXT_NOISE = 0.15   # most noise on a clean past, drawn per sample and latent: a past of one's own making is not clean
HEADING = {"init_ar": 40., "init_ode": 40., "teacher": 4.}  # weight of the heading in the losses (flow.matching),
# small world only. The hue of the sky is next to nothing in the mean error: without this it lagged behind the landmarks
SAMPLER = Sampler(steps=4, shift=SHIFT)
ODE_CLIPS, ODE_CHUNKS = 512, 20         # init_ode: videos of the causal model's own, and their length
DROP = 0.1             # base and teacher: share of the batches without text, and without context
CRITIC_LR, CRITIC_PASSES = 2.0, 5      # stages 1 and 2: times the student's rate; updates before each of the student's
FIRST, LAST, RAMP = 14, 40, .5         # stage 2: chunks a rollout has at least, at most, and when (share of updates)
TARGET = erft.TARGET // CHUNK          # chunks of a target


def pack_mask(src, target, own):
    """
    Who sees whom in a pack of clean past latents and noised target latents.
    src     (b, p)  frame numbers of the past, -1 = nothing there
    target  (b, f)  chunk number of each target latent; own (f,) which noised copy it belongs to
    returns (b, p + f, p + f) bool: the past sees what is not newer (chunk mates included); a target latent sees every
            older chunk of the past and its own copy
    """
    past, there = src.div(CHUNK, rounding_mode="floor"), src >= 0
    among = (past[:, :, None] >= past[:, None]) & there[:, None] | torch.eye(src.shape[1], dtype=torch.bool)
    ahead = torch.zeros(len(src), src.shape[1], len(own), dtype=torch.bool)
    to_past = (past[:, None] < target[:, :, None]) & there[:, None]
    to_own = (own[:, None] == own[None]).expand(len(src), -1, -1)
    return torch.cat([torch.cat([among, ahead], 2), torch.cat([to_past, to_own], 2)], 1)


def forget(rng, src, n):
    """Takes n keyframes, any, out of every row of src (b, 18) whose slow memory is full; what is left closes up."""
    rows = []
    for row in src.numpy():
        gone = CHUNK + rng.choice(PRESETS["slowfast"].slow, n, replace=False) if row[-1] >= 0 else []
        row = np.delete(row, gone)
        rows.append(np.pad(row, (0, src.shape[1] - len(row)), constant_values=-1))
    return torch.from_numpy(np.stack(rows))


def write_strip(path, rows):
    """rows: list of (f, 3, h, w) arrays in [0, 1] -> one PNG, frames side by side."""
    picture = np.concatenate([np.concatenate(list(r.transpose(0, 2, 3, 1)), axis=1) for r in rows])
    iio.imwrite(path, (picture.clip(0, 1) * 255).round().astype(np.uint8))


# ---- processes and checkpoints ------------------------------------------------------------------------------------------

def local(x):
    """What this process holds of a tensor that may be sharded over all of them."""
    return x.to_local() if isinstance(x, DTensor) else x


def all_sum(x):
    """Sum over processes; every process must come here, whatever it found."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def clip_gradients(params, most):
    """Scales gradients so that their norm over all shards is at most `most` -> the norm before, the same everywhere."""
    squares = [local(p.grad).float().square().sum() for p in params if isinstance(p, DTensor)]
    whole = [p.grad.float().square().sum() for p in params if not isinstance(p, DTensor)]
    norm = (sum(whole) + (all_sum(sum(squares)) if squares else 0)).sqrt()
    for p in params:
        local(p.grad).mul_((most / (norm + 1e-6)).clamp(max=1))
    return norm


def localised(x):
    """Nested dicts and lists of tensors -> the same with this process's parts"""
    if isinstance(x, dict):
        return {k: localised(v) for k, v in x.items()}
    return [localised(v) for v in x] if isinstance(x, list) else local(x) if torch.is_tensor(x) else x


def restore(optimizer, state):
    """load_state_dict of what localised() took apart."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, held in state["state"].items():
        p = params[i]
        if isinstance(p, DTensor):
            state["state"][i] = {k: DTensor.from_local(v, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                                 if v.ndim else v for k, v in held.items()}
    optimizer.load_state_dict(state)


def save_checkpoint(folder, step, state, rank=0):
    """
    A folder per checkpoint, one file a process, written under another name and renamed when all are there: it is whole or
    absent. The last two are kept.
    """
    part, whole = folder / f"part_{step:06d}", folder / f"step_{step:06d}"
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(whole, ignore_errors=True)
        part.mkdir(parents=True)
    all_sum(torch.zeros(1))
    torch.save({"step": step, **localised(state)}, part / f"state_{rank}.pt")
    all_sum(torch.zeros(1))
    if rank == 0:
        os.replace(part, whole)
        for old in sorted(folder.glob("step_*"))[:-2]:
            shutil.rmtree(old)


def load_checkpoint(folder, device, rank=0, processes=1):
    """The newest checkpoint that every process can read, or None. An unreadable one is named and passed over, never used."""
    for whole in sorted(folder.glob("step_*"), reverse=True):
        if len(list(whole.glob("state_*.pt"))) != processes:
            raise BadInput(f"{whole} was written by another number of processes: go on with as many, or give another --out")
        state, failed = None, torch.zeros(1)
        try:
            state = torch.load(whole / f"state_{rank}.pt", map_location=device, weights_only=True)
        except Exception as error:
            failed += 1
            print(f"cannot read {whole} ({str(error).splitlines()[0]}): using the one before it", file=sys.stderr)
        if not all_sum(failed):
            return state
    return None


def gathered(some, processes):
    """Lists of all processes, in the order of their ranks; every process must come here."""
    if not dist.is_initialized():
        return some
    parts = [None] * processes
    dist.all_gather_object(parts, some)
    return sum(parts, [])


def estimate(part, nets, trained, frames, batch, tokens, processes):
    """
    GiB that a part of training needs on each device, told before optimizers, averages and passes take theirs.
    nets     all networks, trained: those with gradients, optimizer state and an average; frames: most in one pass
    returns  dict of GiB; a rough model: 34 activations of the width a token and layer, or the block inputs alone
    """
    def count(some):
        return sum(p.numel() for n in some for p in n.parameters())
    dit = next((n.config for n in trained if isinstance(n, DiT)), None)
    found = {"parameters": 4 * count(nets), "gradients": 4 * count(trained) / processes,  # parameters are gathered for a pass
             "optimizer and average": (12 / processes + 4) * count(trained)}
    if dit:
        width = dit.dim * tokens * batch
        found["memory (keys, values)"] = (4 + 2) * dit.layers * width * (39 if part.startswith("stage") else 0)
        found["activations"] = 2 * frames * width * (34 * (1 if dit.recompute else dit.layers) + 2 * dit.layers)
    return {k: v / 2 ** 30 for k, v in found.items()}


def room(device):
    """GiB of memory of this process's device"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2 ** 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30


# ---- what two parts need of their own -------------------------------------------------------------------------------------

@torch.no_grad()
def calibrate(shown, tae, grid, device):
    """
    tau: the smallest that keeps 95 % of the tested chunks of the slowest turns (one in 40 s or more), on real video;
    keys are compared as a whole ("mean", Wan's way) or place by place ("token"), whichever keeps fewer lingering chunks.
    """
    worlds = [(s, "turn", 40 + s % 5) for s in range(8)] + [(s, "linger", None) for s in range(8)]
    x0, paths = torch.cat([encode_world(tae, w, CHUNKS * CHUNK, device) for w in worlds]), Histories(worlds)
    ids, mask = bytes_to_ids([world.world(*w).caption for w in worlds], tiny_dit.text_len)
    text = shown["init_ar"].text(shown["text"](ids.to(device), mask.to(device)))
    at = torch.arange(CHUNKS)[None] % 2 == 0
    at = at & (torch.arange(CHUNKS) > 1)                    # tested chunks that have one before them
    turns, lingers = torch.arange(16)[:, None] < 8, torch.from_numpy(paths.moved) < LINGERS
    choices = []
    for pool in ("mean", "token"):
        roll = Rollout(shown["init_ar"], text, PRESETS["slowfast"], grid, pool=pool)
        for i in range(CHUNKS):
            roll.look()
            roll.commit(x0[:, i * CHUNK:(i + 1) * CHUNK], torch.from_numpy(paths.keep["moving"][:, i]).to(device))
        sims = torch.stack(roll.sims, 1).cpu()
        tau = sims[at & turns].quantile(.95).item()
        kept = {name: (sims < tau)[at & which].float().mean().item() for name, which in
                (("slow turns", turns), ("lingering", ~turns & lingers), ("between", ~turns & ~lingers))}
        choices.append((kept["lingering"], {"tau": tau, "pool": pool, "kept": kept}))
    return min(choices, key=lambda c: c[0])[1]


@torch.no_grad()
def ode_paths(folder, dit, captions, features, sampler, grid, latent, device, chunks, together, rank, processes):
    """
    Videos of the causal model's own in 16 Euler steps, with what each chunk was at the student's noise levels; on disk.
    Made `together` at a time, each process its share.
    returns  dict: x (n, latents, levels + 1, c, h, w) bf16, the last is x0; held (n, chunks, 18) frame numbers of each
             chunk's past, -1 = nothing; captions
    """
    mark = hashlib.sha256(b"".join(p.cpu().float().numpy().tobytes() for p in dit.parameters())).hexdigest()[:8]
    every, files = 16 // sampler.steps, []
    for at in tqdm(range(0, len(captions), together), desc="paths of the causal model", disable=rank > 0):
        files.append(Path(folder) / f"paths_{mark}_{at:05d}.safetensors")
        if files[-1].exists() or at // together % processes != rank:
            continue
        part, xs = captions[at:at + together], []
        roll = Rollout(dit, dit.text(features(part)), replace(PRESETS["slowfast"], tau=sampler.tau), grid, pool=sampler.pool)
        for i in range(chunks):
            roll.look()
            seen = []

            def predict(x, t):
                seen.append(x)
                return roll.run(x, t)[0]
            noise = draw_noise(range(at, at + len(part)), i, 0, (CHUNK, *latent), device)
            x0 = denoise(predict, noise, schedule(16, sampler.shift), None, renoise=False)
            roll.commit(x0)
            xs.append(torch.stack([*seen[::every], x0], 2).bfloat16().cpu())
        held = plan(roll.memory.policy, torch.stack(roll.keeps, 1).cpu())[:chunks]
        save = {"x": torch.cat(xs, 1), "held": torch.stack([F.pad(h, (0, 18 - h.shape[1]), value=-1) for h in held], 1)}
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(save, files[-1].with_suffix(".part"))
        os.replace(files[-1].with_suffix(".part"), files[-1])
    all_sum(torch.zeros(1))
    parts = [load_file(f) for f in files]
    return {k: torch.cat([p[k] for p in parts]) for k in ("x", "held")} | {"captions": captions}


# ---- the stages -----------------------------------------------------------------------------------------------------------

def main():
    cfg = parse(Config)
    one_of("--stage", cfg.stage, PARTS)
    one_of("--dtype", cfg.dtype, ("bf16", "fp32"))
    one_of("--teacher-context", cfg.teacher_context, ("memory", "none"))
    if cfg.updates < 0 or cfg.batch < 0 or cfg.lr < 0 or cfg.accumulate < 1 or not 0 <= cfg.errors <= 1:
        raise BadInput("--updates, --batch and --lr must be above 0, --accumulate at least 1, --errors from 0 to 1")
    if cfg.wan and cfg.stage in ("vae", "base"):
        raise BadInput(f"--stage {cfg.stage} is not for --wan: Wan2.1 is the base model, and brings its autoencoder")
    if cfg.size and not cfg.wan or cfg.data and not cfg.wan and cfg.stage in ("vae", "init"):
        raise BadInput("--size needs --wan, and so does --data with the stages vae and init: they are the small world's own")
    if cfg.wan and not cfg.data:
        raise BadInput("--wan needs --data: a folder that data.py wrote for teacher and init, for 1 and 2 a file of prompts")
    device = pick_device(cfg.device)
    if "RANK" in os.environ:  # torchrun started this process
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()
    try:
        for part in PARTS[cfg.stage]:
            if part == "init_ar" and cfg.init:
                continue  # a causal model is given: only its four steps are wanted
            train(cfg, part, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(cfg, part, device):
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    updates, batch, lr, warmup, decay = (FULL if cfg.wan else DEFAULTS)[part]
    updates, batch, lr = cfg.updates or updates, cfg.batch or batch, cfg.lr or lr
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bf16")
    out = Path(cfg.out) / part
    out.mkdir(parents=True, exist_ok=True)
    latent, patch = (tiny_dit.channels, world.HEIGHT // 8, world.WIDTH // 8), tiny_dit.patch
    sampler, bank, frozen, film, prompts = Sampler() if cfg.wan else SAMPLER, None, [], None, []
    shift, context_noise, ramp, critic_lr, beta, clip, save_every = (
        (5., 0., 1., .2, .999, 2., max(1, min(SAVE_EVERY, updates // 6))) if cfg.wan else
        (SHIFT, CONTEXT_NOISE, RAMP, CRITIC_LR, .99, 1., SAVE_EVERY))

    def ready(name, given="", build=DiT, make_config=DiTConfig, folder=""):
        """The file given, else what this --out has trained under that name, else what ships -> network, facts"""
        own = Path(cfg.out) / (folder or name) / f"{name}.safetensors"
        if cfg.wan:
            if not (given or own.exists() or name == "base" or cfg.wan.startswith("random")):
                raise BadInput(f"{part} with --wan needs {name}: give a file by --init or --teacher, or train it in this --out")
            m = wan_models(cfg, device, given or (own if own.exists() else ""))
            m.dit.config.recompute = True
            return m.dit, {"sampler": asdict(m.sampler), "vae": m.vaes["wan"], "latent": (16, m.height // 8, m.width // 8)}
        net, facts = load(given or (own if own.exists() else WEIGHTS / f"{name}.safetensors"), build, make_config)
        return net.to(device), facts

    def noised(x0, copies):
        """x0 (b, f, ...) at `copies` noise levels each, spread evenly over 0..1 -> x_t, t, v, all with f * copies frames."""
        u = (torch.rand(len(x0), copies) + torch.rand(len(x0), copies).argsort(1)) / copies
        t = shifted(u, shift).repeat_interleave(x0.shape[1] // copies, 1).to(device)
        noise = torch.randn(x0.shape, device=device)
        return add_noise(x0, noise, t), t, noise - x0

    def clean(x0):
        """A past as the model will meet it: with a little noise, still called t = 0."""
        level = torch.rand(len(x0), 1) * context_noise * torch.rand(x0.shape[:2])
        return add_noise(x0, torch.randn_like(x0), level.to(device))

    def packed(net, text, past, src, target, positions, own, xt, t):
        """past (b, p, ...) latents of frames src (b, p); target (b, f) frame numbers of all copies -> v of the targets"""
        x, at = torch.cat([past, xt], 1), torch.cat([torch.zeros(src.shape, device=device), t], 1)
        rope = table(positions.to(device), *grid, net.config.dim // net.config.heads)
        mask = pack_mask(src, target.div(CHUNK, rounding_mode="floor"), own).to(device)
        return net(x, at, text, rope, mask=mask)[0][:, src.shape[1]:]

    def compact(src, copies, gap=0):
        """Bounded positions of a padded past (b, p) and of `copies` of the chunk `gap` chunks on: (b, p + 3 copies)"""
        new = (src >= 0).sum(1, keepdim=True) + CHUNK * gap + torch.arange(CHUNK).repeat(copies)
        return torch.cat([torch.arange(src.shape[1]).expand(len(src), -1), new], 1)

    def chunk_of(n):
        return n[:, None] * CHUNK + torch.arange(CHUNK)

    # each part sets: nets, name -> what is trained and saved; choose(shared, done), drawn once an update for all processes;
    # loss_of(rng, chosen) -> loss or None (then it has gone backward itself), numbers to log
    if cfg.data and part not in ("init_ar", "base", "teacher") and not Path(cfg.data).is_dir():
        prompts = read_prompts(cfg.data)
    if part in BEFORE or cfg.wan:
        start, facts = ready("base" if cfg.wan and part == "teacher" else BEFORE.get(part, "base"), cfg.init)
    if cfg.wan:
        tae, latent, patch = facts["vae"], facts["latent"], start.config.patch
    elif part != "vae":
        tae = ready("vae", "", TAE, TAEConfig)[0].to(memory_format=torch.channels_last)
    grid = latent[1] // patch[0], latent[2] // patch[1]
    if cfg.data and not prompts:
        film = Clips(cfg.data, latent, CHUNK if part == "init_ar" else 0)
        prompts = film.captions
    if part != "vae":
        def clips(lessons):
            """-> latents, their clips' numbers -> text features, worlds: of all motions, or of the lessons; or --data's"""
            if film:
                return film, lambda which: film.text(which).to(device), None
            worlds, n = ((lesson_worlds(LESSON_CLIPS, cfg.seed), LESSON_CHUNKS * CHUNK) if lessons else
                         (training_worlds(CLIPS, cfg.seed), CHUNKS * CHUNK))
            latents = latent_cache(Path(cfg.out) / "cache", tae, worlds, n, device, rank)
            ids, mask = bytes_to_ids([world.world(*w).caption for w in worlds], tiny_dit.text_len)
            return latents, lambda which: encoder(ids[which].to(device), mask[which].to(device)), worlds
    watched = None  # the directions in which latents show the heading
    if part in HEADING and not cfg.data and not cfg.wan:
        z, _, worlds = clips(False)
        path = Histories(worlds[:128]).heading
        watched = compass(z[:128, :path.shape[1]].flatten(0, 1), path.flatten()).to(device)
    if cfg.wan:
        few = prompts[:1] if part in ("init_ar", "teacher") else prompts  # the others' features lie beside their latents
        features = wan_text(cfg, device, ["", NEGATIVE, *few], rank, processes)
    elif part not in ("vae", "init_ar"):
        encoder = ready("text", "", TextEncoder, TextConfig, "init_ar")[0]

        def features(captions):
            with torch.no_grad():
                return encoder(*(z.to(device) for z in bytes_to_ids(captions, tiny_dit.text_len)))

    if part == "vae":
        torch.manual_seed(cfg.seed)
        tae = TAE(tiny_tae).to(device, memory_format=torch.channels_last)
        nets = {"vae": tae}

        def choose(shared, done):
            return done

        def loss_of(rng, done):
            films = [world.clip(int(rng.integers(world.HELD_OUT)), int(rng.integers(480)), 17) for _ in range(batch)]
            video = torch.from_numpy(np.stack(films)).to(device) * 2 - 1
            late = done >= COMPASS
            with autocast:
                z = tae.encode(video)
                # noise on the latents: neighbouring latents must decode alike, which makes them easy to generate
                again = tae.run(tae.decoder, z + (.2 if late else .1) * torch.randn_like(z), None)[0][:, 3:]
            off = (again.float() - (video * .5 + .5)).pow(2)
            mse, sky = off.mean(), off[..., :world.TOP, :].mean()
            z = z.float().transpose(2, -1).flatten(0, -2)  # (n, 16)
            z, mean = z - z.mean(0), z.mean(0)
            unit = mean.square().mean() + (z.T @ z / len(z) - torch.eye(z.shape[1], device=device)).square().sum(1).mean()
            if not late:  # unit variance a channel
                unit = mean.square().mean() + (z.std(0) - 1).square().mean()
            return mse + 3 * late * sky + .02 * unit, {
                "psnr": -10 * math.log10(mse.item()), "sky": -10 * math.log10(sky.item()), "unit": unit.item()}

    elif part == "init_ar":  # flow matching on real pasts: the causal model that the student will be distilled from
        torch.manual_seed(cfg.seed)
        dit = start.requires_grad_() if cfg.wan else DiT(tiny_dit).initialise().to(device)
        encoder = None if cfg.wan else TextEncoder(tiny_text).to(device)
        nets, sources = {"init_ar": dit} | ({} if cfg.wan else {"text": encoder}), [clips(False), clips(True)]
        twins = [None if film else latent_cache(Path(cfg.out) / "cache", tae, [(*w, 1) for w in s[2][:TWINS]], s[0].shape[1],
                                                device, rank) for s in sources]
        histories = [film or Histories(s[2], n) for s, n in zip(sources, (CHUNKS, LESSON_CHUNKS))]

        def choose(shared, done):
            mix = (.15, .85, 0, 0, 0, 0) if film else next(mix for until, mix in MIX.items() if done < until)
            sequential = not film and done >= SEQUENTIAL and shared.random() < .8
            kind = "sequential" if sequential else str(shared.choice(["first", "packed", "gap", "lost", "twin"], p=mix[:-1]))
            length = int(shared.integers(12, CHUNKS))
            other = shared.random() < Histories.OTHER
            lesson = kind != "sequential" and shared.random() < mix[-1]
            gap = int(shared.integers(1, 3)) if kind == "gap" else 0
            return {"kind": kind, "lesson": lesson, "gap": gap, "length": length,
                    "policy": str(shared.choice(Histories.LAYOUTS)) if other else "slowfast",
                    "supervised": set(shared.choice(np.arange(7, length + 1), 3, replace=False).tolist())}

        def loss_of(rng, chosen):
            (latents, told, _), paths = sources[chosen["lesson"]], histories[chosen["lesson"]]
            same, kind = torch.arange(COPIES).repeat_interleave(CHUNK), chosen["kind"]
            gap = chosen["gap"]
            which, chunk, src = map(torch.from_numpy, paths.draw(rng, batch, 1 + gap, *[TWINS] * (kind == "twin")))
            with autocast:
                text = dit.text(told(which))
                if kind == "first":  # the first 7 chunks: plain block-causal training, clean half and noised half
                    src = target = torch.arange(7 * CHUNK).expand(batch, -1)
                    x0 = latents[which[:, None], src].to(device).float()
                    xt, t, v = noised(x0, 7)
                    begun = t * (target >= CHUNK).to(device)  # where the first chunk looks, nothing tells
                    loss = matching(packed(dit, text, clean(x0), src, target, torch.cat([src, target], 1), src[0] // CHUNK,
                                           xt, t), v, begun, watched, HEADING[part]).mean()
                elif kind != "sequential":  # a long past at once: the latents a policy holds, packed
                    src = src[:, CHUNK:CHUNK + PRESETS["slowfast"].slow].contiguous() if kind == "lost" else src
                    src = forget(rng, src, CHUNK * gap) if gap else src
                    if kind == "twin" and chosen["lesson"]:  # keyframes of the last half turn show the view, a known way off
                        here = paths.heading[which, CHUNK * chunk - 1, None]
                        far = world.COLUMNS / 2 + rng.uniform(0, world.WIDTH)
                        near = (paths.heading[which[:, None], src] - here).abs() < far
                        near[:, :CHUNK] = near[:, -CHUNK:] = False
                        src = src.masked_fill(near, -1)
                        src = src.gather(1, (src < 0).long().argsort(stable=True, dim=1))
                    target = chunk_of(chunk + gap).repeat(1, COPIES)
                    past, x0 = (latents[which[:, None], s].to(device).float() for s in (src.clamp(min=0), target))
                    if kind == "twin":
                        false = twins[chosen["lesson"]][which[:, None], src.clamp(min=0)].to(device).float()
                        last = (src >= CHUNK * (chunk - 1)[:, None])[..., None, None, None].to(device)
                        past = torch.where(last, false, past)
                    xt, t, v = noised(x0, COPIES)
                    loss = matching(packed(dit, text, clean(past), src, target, compact(src, COPIES, gap), same, xt, t), v, t,
                                    watched, HEADING[part]).mean()
                else:  # the real memory, chunk after chunk; some chunks are supervised on the way
                    rules = [str(rng.choice(paths.RULES)) for _ in range(batch)]
                    keep = torch.from_numpy(np.stack([paths.keep[r][c] for r, c in zip(rules, which)]))
                    roll = Rollout(dit, [(k.detach(), v.detach()) for k, v in text], PRESETS[chosen["policy"]], grid)
                    loss = 0
                    for i in range(chosen["length"] + 1):
                        x0 = latents[which, i * CHUNK:(i + 1) * CHUNK].to(device).float()
                        memory, rope = roll.look()
                        if i in chosen["supervised"]:
                            xt, t, v = noised(x0.repeat(1, COPIES, 1, 1, 1), COPIES)
                            many = [z.repeat(COPIES, 1, 1) for z in rope]
                            own = (same[:, None] == same[None])[None].to(device)
                            off = matching(dit(xt, t, text, many, memory, own)[0], v, t, watched, HEADING[part]).mean()
                            loss = loss + off / len(chosen["supervised"])
                        if i < chosen["length"]:
                            roll.commit(clean(x0), keep[:, i].to(device))
            return loss, {f"loss_{kind}": loss.item()}

    elif part == "init_ode":  # regression to the causal model's own paths at the four levels that the student will use
        sampler, dit, chunks = replace(Sampler(**facts["sampler"]), renoise=True), start, TARGET if cfg.wan else ODE_CHUNKS
        seeds = np.random.default_rng([cfg.seed, 0x0DE]).integers(len(prompts) or world.HELD_OUT, size=ODE_CLIPS)
        captions = [prompts[s] if prompts else world.world(int(s)).caption for s in seeds]
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(cfg.wan)):
            paths = ode_paths(Path(cfg.out) / "cache", dit, captions, features, sampler, grid, latent, device, chunks,
                              1 if cfg.wan else 32, rank, processes)
        nets = {"init_ode": dit.requires_grad_()}
        levels = torch.tensor(schedule(sampler.steps, sampler.shift))

        def choose(shared, done):
            return None

        def loss_of(rng, chosen):
            which, chunk = (torch.from_numpy(rng.integers(n, size=batch)) for n in (len(paths["x"]), chunks))
            src, target = paths["held"][which, chunk], chunk_of(chunk)
            past = paths["x"][which[:, None], src.clamp(min=0), -1].to(device).float()
            x = paths["x"][which[:, None], target].to(device).float()  # (b, 3, levels + 1, ...)
            xt, x0 = x[:, :, :-1].transpose(1, 2).flatten(1, 2), x[:, :, -1].repeat(1, len(levels), 1, 1, 1)
            t = levels.repeat_interleave(CHUNK).expand(batch, -1).to(device)
            with autocast:
                text = dit.text(features([paths["captions"][i] for i in which]))
                v = packed(dit, text, past, src, target.repeat(1, len(levels)), compact(src, len(levels)),
                           torch.arange(len(levels)).repeat_interleave(CHUNK), xt, t)
            by_x0 = t[..., None, None, None]  # the error of x0
            loss = matching(v * by_x0, v_from_x0(xt, x0, t) * by_x0, torch.ones_like(t), watched, HEADING[part]).mean()
            return loss, {}

    elif part in ("base", "teacher"):  # bidirectional, 21 latents: from text, or after a context
        nets, sources, dit = {part: start.requires_grad_()}, [clips(False), clips(True)], start
        histories = [film or Histories(s[2], n, room=0) for s, n in zip(sources, (CHUNKS, LESSON_CHUNKS))]
        sampler = Sampler(steps=50 if cfg.wan else 16, shift=shift, renoise=False)
        bank, recycled = erft.ErrorBank(latent, shift=shift) if part == "teacher" else None, []
        if bank and rank == 0:
            print(f"error bank: {bank.errors.nbytes / 2 ** 30:.2f} GiB of host memory at most")

        def choose(shared, done):
            return {"lesson": shared.random() < .5, "text": shared.random() >= DROP,
                    "context": part == "teacher" and shared.random() >= DROP, "lost": shared.random() < .3 * (done < .5)}

        def loss_of(rng, chosen):
            latents, told, _ = sources[chosen["lesson"]]
            which, chunk, src = map(torch.from_numpy, histories[chosen["lesson"]].draw(rng, batch, TARGET))
            if not chosen["context"]:
                src, chunk = src[:, :0], torch.zeros_like(chunk)
            elif chosen["lost"] and not cfg.wan:
                src = src[:, CHUNK:CHUNK + PRESETS["slowfast"].slow]
            context, x0 = (latents[which[:, None], s].to(device).float() for s in
                           (src, chunk[:, None] * CHUNK + torch.arange(erft.TARGET)))
            t, noise = shifted(torch.rand(batch), shift).to(device), torch.randn(x0.shape, device=device)
            with autocast:
                text = dit.text(told(which) if chosen["text"] else features([""] * batch))
                if bank is None:
                    at = t[:, None].expand(x0.shape[:2])
                    v = erft.score(dit, context, add_noise(x0, noise, at), at, text, grid)
                    return F.mse_loss(v, noise - x0), {}
                seed = int(rng.integers(2 ** 62))
                loss, found = erft.teacher_loss(dit, bank, np.random.default_rng([seed, 0]), clean(context), x0, noise, t,
                                                text, grid, cfg.errors, watched, HEADING[part] * chosen["context"])
            recycled.append((seed, [z.detach().cpu() for z in found]))
            return loss.mean(), {"errors": float(bank.count.sum())}

    else:  # DMD: stage 1 in the first 5 s, stage 2 behind long rollouts of the student's own
        student, first = start, part == "stage1"
        teacher = ready("base" if first else "teacher", cfg.teacher)[0]
        critic = copy.deepcopy(teacher).requires_grad_()
        nets, frozen = {part: student.requires_grad_(), "critic": critic}, [teacher]
        sampler = Sampler(**facts["sampler"])
        levels, policy = schedule(sampler.steps, sampler.shift), replace(PRESETS["slowfast"], tau=sampler.tau)

        def choose(shared, done):
            most = TARGET if first else dmd.longest(done, FIRST, LAST, ramp)
            return {"r": int(shared.integers(len(levels))),
                    "L": most if first else int(shared.integers(FIRST, most + 1))}

        def rollout(rng, chosen):
            """One rollout an update and batch: it serves five critic updates, with fresh t and noise, and the student's."""
            if "trace" not in chosen:
                which = rng.integers(len(prompts) or world.HELD_OUT, size=batch)
                worlds, seeds = [] if prompts else [world.world(int(s)) for s in which], rng.integers(2 ** 62, size=batch)
                chosen["kinds"] = [w.motion.kind for w in worlds] or ["prompt"] * batch
                chosen["features"] = features([w.caption for w in worlds] or [prompts[i] for i in which])
                with torch.no_grad(), autocast:
                    roll = Rollout(student, student.text(chosen["features"]), policy, grid, pool=sampler.pool)
                    chosen["trace"] = dmd.rollout(roll, levels, chosen["r"], lambda chunk, step: draw_noise(
                        seeds, chunk, step, (CHUNK, *latent), device), chosen["L"], TARGET)
            trace = chosen["trace"]
            return trace, trace.context if cfg.teacher_context == "memory" else trace.context[:, :0], chosen["features"]

        def noise_of(x):
            return dmd.score_level(torch.rand(len(x)), sampler.shift).to(device), torch.randn(x.shape, device=device)

        def by_level(name, error, t):
            """Mean error in each quarter of the noise levels that were drawn"""
            return {f"{name}_{i}": error[some].mean().item() for i in range(4) if (some := (4 * t).long() == i).any()}

        def critic_loss(rng, chosen):
            trace, context, text = rollout(rng, chosen)
            t, noise = noise_of(trace.x)
            at = t[:, None].expand(trace.x.shape[:2])
            with autocast:
                v = erft.score(critic, context, add_noise(trace.x, noise, at), at, critic.text(text), grid)
            error = (t[:, None, None, None, None] * (v - (noise - trace.x))).pow(2).mean((1, 2, 3, 4)).detach()
            return dmd.critic_loss(v, trace.x, noise), by_level("fake", error, t)

        def loss_of(rng, chosen):
            trace, context, text = rollout(rng, chosen)
            t, noise = noise_of(trace.x)
            with torch.no_grad(), autocast:
                fake, real = (dmd.scores(lambda xt, at: erft.score(net, context, xt, at, net.text(text), grid),
                                         trace.x, t, noise) for net in (critic, teacher))
                if cfg.wan:
                    away = teacher.text(features([NEGATIVE] * batch))
                    real = guide(real, dmd.scores(lambda xt, at: erft.score(teacher, context, xt, at, away, grid), trace.x, t,
                                                  noise), GUIDANCE[part])
            gradient, norm = dmd.dmd_gradient(trace.x, fake, real)
            with autocast:
                dmd.backward(trace, lambda: student.text(text), gradient / gradient.numel() / cfg.accumulate)
            keeps = torch.stack(trace.roll.keeps, 1).float()[:, ::2].mean(1).tolist()
            slow = trace.roll.memory.slow
            kept = {f"kept_{k}": float(np.mean([x for x, kind in zip(keeps, chosen["kinds"]) if kind == k]))
                    for k in set(chosen["kinds"])}
            return None, {"r": chosen["r"], "L": chosen["L"], "norm": norm.mean().item(), "std": trace.x.std().item(), **kept,
                          **by_level("real", (trace.x - real).pow(2).mean((1, 2, 3, 4)), t),
                          **({"oldest": (chosen["L"] * CHUNK - slow[0][:, 0]).float().mean().item() / 4} if slow else {})}

    # ---- what is looked at on the way ---------------------------------------------------------------------------------
    soon = [(world.HELD_OUT + i, "turn", 8 + i % 2) for i in range(PROBED)]

    def probe(net, text_encoder, sampler, shuffle=None):
        """
        Held-out worlds that turn once in 8 or 9 s: 10 s of each are given, returns are due after 5.4 or 6.1 s.
        shuffle: None for a causal network; False for a teacher, True if it shall go on from another world's past
        """
        policy = PRESETS["uniform2"]
        if shuffle is None:
            frames, keeps = continuations(net, text_encoder, tae, soon, GIVEN, 5, policy, sampler, device)
        else:
            frames, keeps = teacher_continuations(net, text_encoder, tae, soon, GIVEN, 1, sampler, device, shuffle)
        readings, found, psnr = [world.judge(f) for f in frames], [], []
        for w, r, keep in zip(soon, readings, keeps):
            found += returns(r, world.world(*w).caption, keep, policy, GIVEN)
            psnr.append(r.psnr[frames_of(GIVEN * CHUNK):].mean())
        return {"recall": float(np.mean([e.recall for e, _ in found] or [0])),
                "ceiling": float(np.mean([h for _, h in found] or [0])), "chance": world.chance(readings),
                "returns": len(found), "validity": float(np.mean(psnr))}

    @torch.no_grad()
    def gates():
        """Before Stage 2: does the teacher use its context? Recall and loss, and both with another world's past beside them."""
        text = teacher.text(features([world.world(*w).caption for w in soon]))
        z = torch.cat([encode_world(tae, w, (GIVEN + TARGET) * CHUNK, device) for w in soon])
        src = plan(PRESETS["uniform2"], torch.arange(GIVEN)[None] % 2 == 0, new=0)[-1][0]
        context, x0, found = z[:, src], z[:, GIVEN * CHUNK:], {}
        at, eps = torch.full(x0.shape[:2], .7, device=device), draw_noise(range(len(soon)), 0, 0, x0.shape[1:], device)
        for name, past, shuffle in (("", context, False), ("shuffled_", context.roll(1, 0), True)):
            v = erft.score(teacher, past, add_noise(x0, eps, at), at, text, grid)
            numbers = probe(teacher, encoder, Sampler(steps=16, shift=SHIFT, renoise=False), shuffle)
            found |= {f"teacher_{name}loss": F.mse_loss(v, eps - x0).item(), f"teacher_{name}recall": numbers["recall"]}
        return found | {"teacher_chance": numbers["chance"]}

    @torch.no_grad()
    def strip(shown, path):
        """vae: a held-out clip and its copy; else 20 chunks or 21 latents from text alone: four held-out captions, or a prompt"""
        if part == "vae":
            video = torch.from_numpy(world.clip(world.HELD_OUT, 0, 129)[None]).to(device) * 2 - 1
            rows = video, shown["vae"].decode(shown["vae"].encode(video))[0]
        else:
            n, net = 1 if cfg.wan else 4, shown[part]
            text = net.text(features(prompts[:1]) if cfg.wan else shown.get("text", encoder)(*(z.to(device) for z in bytes_to_ids(
                [world.world(world.HELD_OUT + i).caption for i in range(n)], tiny_dit.text_len))))
            if part in ("base", "teacher"):
                z = erft.extend(net, torch.zeros(n, 0, *latent, device=device), text, grid, sampler, range(n))
            else:
                roll = Rollout(net, text, replace(PRESETS["slowfast"], tau=sampler.tau), grid, pool=sampler.pool)
                z = torch.cat(list(generate(roll, range(n), 20, sampler, latent)), 1)
            rows = tae.decode(z)[0].split(1)
        write_strip(path, [(v[0, ::12] * .5 + .5).cpu().numpy() for v in rows])

    # ---- the loop: one for all parts ------------------------------------------------------------------------------------
    student_passes = part.startswith("stage")
    trained = list(nets.values())
    need = estimate(part, trained + frozen, trained, 42 if student_passes or part == "teacher" else 60,
                    batch, grid[0] * grid[1], processes)
    if rank == 0:
        print(f"{part}: {updates} updates of {batch} x {cfg.accumulate} x {processes} clips; needs about "
              + ", ".join(f"{k} {v:.2f}" for k, v in need.items())
              + f" = {sum(need.values()):.2f} GiB of {room(device):.0f} a device")
    if sum(need.values()) > room(device):
        raise BadInput(f"{part} needs about {sum(need.values()):.0f} GiB a device and {room(device):.0f} are there: "
                       "use more processes or a smaller --batch")
    shown = {n: copy.deepcopy(net).eval().requires_grad_(False) for n, net in nets.items() if n != "critic"}  # averages, whole
    groups = {}  # what one optimizer step moves: name -> parameters, those that stay whole, optimizers, rate
    for name, members in (("critic", ["critic"]), (part, [n for n in nets if n != "critic"])):
        some = [nets[m] for m in members if m in nets]
        if not some:
            continue
        matrices = [] if student_passes or cfg.wan else [p for net in some for n, p in net.named_parameters()
                                                         if "blocks" in n and p.ndim == 2 and "embedding" not in n]
        uncut = list(nets["vae"].parameters()) if part == "vae" else matrices  # Muon looks at whole matrices: they stay whole
        if dist.is_initialized() and part != "vae":
            for net in some:
                fully_shard(net, ignored_params=set(uncut))
                if isinstance(net, DiT):
                    register_fsdp_forward_method(net, "text")
        params = [p for net in some for p in net.parameters() if p.requires_grad]
        whole = {id(p) for p in matrices}
        rate, betas = (lr * (critic_lr if name == "critic" else 1), (0., beta)) if student_passes else (lr, (.9, .95))
        optimizers = [torch.optim.AdamW([p for p in params if id(p) not in whole], lr=rate, betas=betas, weight_decay=.01)]
        if matrices:  # Muon for the transformers' matrices: the same lr means the same size of step
            optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=.01, adjust_lr_fn="match_rms_adamw"))
        groups[name] = params, uncut, optimizers, rate
    average = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items() if name != "critic"}

    def refresh():
        """The averaged weights into `shown`: every process must come here."""
        for name, some in average.items():
            for p, a in zip(shown[name].parameters(), some):
                p.copy_(a.full_tensor() if isinstance(a, DTensor) else a)
        return shown

    def state():
        return {"nets": {n: dict(enumerate(p.detach() for p in net.parameters())) for n, net in nets.items()},
                "average": average, "optimizers": {n: [o.state_dict() for o in g[2]] for n, g in groups.items()},
                "bank": bank.state_dict() if bank else None}

    step, saved = 0, load_checkpoint(out, device, rank, processes)
    if saved:
        step = saved["step"]
        with torch.no_grad():
            for name, net in nets.items():
                for p, q in zip(net.parameters(), saved["nets"][name].values()):
                    local(p).copy_(q)
            for name, some in average.items():
                for p, q in zip(some, saved["average"][name]):
                    local(p).copy_(q)
        for name, group in groups.items():
            for optimizer, held in zip(group[2], saved["optimizers"][name]):
                restore(optimizer, held)
        if bank:
            bank.load_state_dict(saved["bank"])
    stop = []  # the signal that asks for an end; the update under way is finished first
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    log, bad, ending = open(out / "log.jsonl", "a") if rank == 0 else None, 0, False
    if part == "stage2" and step == 0 and rank == 0 and not cfg.wan:
        found = {k: round(v, 4) for k, v in gates().items()}
        log.write(json.dumps({"step": 0, **found}) + "\n")
        print("gates:", ", ".join(f"{k} {v}" for k, v in found.items()))
    bar = tqdm(total=updates, initial=step, desc=part, disable=rank > 0)
    while step < updates and not ending:
        started, numbers = time.time(), {"step": step + 1}
        passes = [("critic", critic_loss)] * CRITIC_PASSES if student_passes else []
        passes.append((part, loss_of))
        chosen = [choose(np.random.default_rng([cfg.seed, step]), step / updates) for _ in range(cfg.accumulate)]
        fine = True
        for k, (name, loss_function) in enumerate(passes):
            params, uncut, optimizers, rate = groups[name]
            for net in nets.values():
                net.zero_grad()
            total = 0.
            for micro in range(cfg.accumulate):
                rng = np.random.default_rng([cfg.seed, step, rank * cfg.accumulate + micro, k])
                torch.manual_seed(int(rng.integers(2 ** 62)))
                loss, found = loss_function(rng, chosen[micro])
                if loss is not None:
                    (loss / cfg.accumulate).backward()
                    found["critic_loss" if name == "critic" else "loss"] = loss.item()
                    total += loss.item()
                numbers |= found
            for p in uncut if processes > 1 else ():  # the others' gradients are averaged as they are cut
                p.grad = all_sum(p.grad) / processes
            norm = clip_gradients(params, clip if student_passes else 1.0)
            for group in [g for o in optimizers for g in o.param_groups]:
                fall = 1 if student_passes else .55 + .45 * math.cos(math.pi * step / updates)
                group["lr"] = rate * min(1, (step + 1) / warmup) * fall
            if math.isfinite(all_sum(torch.tensor([norm.item() + total])).item()):  # of all processes: the same everywhere
                for optimizer in optimizers:
                    optimizer.step()
            else:
                fine = False  # weights unchanged
            numbers["critic_grad" if name == "critic" else "grad"] = norm.item()
        bad = 0 if fine else bad + 1
        if fine:
            with torch.no_grad():  # a short average at first, or the start would linger
                toward = 1 - min(decay, (step + 1) / (step + 10))
                for name, some in average.items():
                    now = [local(p.detach()) for p in nets[name].parameters()]
                    torch._foreach_lerp_([local(a) for a in some], now, toward)
        if bank:
            for seed, found in gathered(recycled, processes):
                bank.push(np.random.default_rng([seed, 1]), *found)
            recycled.clear()
        step += 1
        asked = all_sum(torch.tensor([float(len(stop))]))
        ending = asked.item() > 0
        if part != "vae" and not cfg.wan and step % PROBE_EVERY == 0:
            refresh()
            if rank == 0 and part != "base":
                numbers |= probe(shown[part], shown.get("text", encoder), sampler, False if part == "teacher" else None)
        numbers |= {"lr": groups[part][2][0].param_groups[0]["lr"], "skipped": bad, "seconds": time.time() - started}
        if rank == 0:
            log.write(json.dumps({k: round(v, 6) for k, v in numbers.items()}) + "\n")
        bar.set_postfix({k: f"{v:.3g}" for k, v in numbers.items() if k not in ("step", "lr", "seconds", "skipped")})
        bar.update()
        if bad >= BAD_IN_A_ROW:
            raise SystemExit(f"stopped: {bad} updates in a row had a loss or gradient that is not finite; "
                             f"the last good checkpoint is in {out}")
        if step % save_every == 0 or step == updates or ending:
            if log:
                log.flush()
            save_checkpoint(out, step, state(), rank)
        if step % STRIP_EVERY == 0 or step == updates:
            refresh()
            if rank == 0:
                strip(shown, out / f"strip_{step:06d}.png")
    bar.close()
    if ending:
        print(f"stopped at update {step}; run the same command to go on")
        sys.exit(130 if signal.SIGINT in stop else 143)
    refresh()
    facts, kept = {}, {}
    if part == "init_ar" and not cfg.wan:
        found = calibrate(shown, tae, grid, device)
        kept = found.pop("kept")
        sampler = replace(sampler, **found)
        print(f"tau {found['tau']:.4f} ({found['pool']}), tested chunks kept:",
              ", ".join(f"{k} {v:.0%}" for k, v in kept.items()))
    facts = {"stage": part, "seed": cfg.seed, "updates": updates, "batch": batch * cfg.accumulate * processes, "lr": lr,
             "sampler": asdict(sampler), "kept": kept}
    for name in average if rank == 0 else ():
        save_weights(out / f"{name}.safetensors", shown[name].state_dict(), shown[name].config, facts)
        print(f"wrote {out / name}.safetensors")
    all_sum(torch.zeros(1))  # the next part reads what the first process wrote


if __name__ == "__main__":
    run(main)
