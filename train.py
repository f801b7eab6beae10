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

Every stage is one function that returns networks, what an update draws, and a loss; train() below is the loop they share.
Run the same command again to go on after a stop: everything random in update n is drawn from (seed, n, which batch), so a
resumed run is the uninterrupted run, and two processes are one that accumulates two batches. Each part of a stage writes
out/<part>/: log.jsonl (one JSON object an update), strip_*.png (look at them), two checkpoints, and at the end
<part>.safetensors, which goes to weights/ when it is better than what is there.

The log has loss, grad (norm of the gradient before clipping), lr, skipped (bad updates in a row), seconds, and now and then
what the judge says of held-out worlds (evaluate.probe_student): recall, ceiling, chance, returns, validity. Stages 1 and 2 have no
loss that means anything, but critic_loss and critic_grad, norm (DMD's normaliser), std (of the student's latents), fake_0..3 and
real_0..3 (squared error of the critic's x0, and of the teacher's to the student's, by quarter of the noise levels), r (exit
step), L (chunks of the rollout), kept_<motion> (share of tested chunks kept) and oldest (age of the oldest keyframe, s).

References: Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009; TAEHV.
Leaves out: LoRA, mixed-precision optimizer states.
"""
import copy
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
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import causal
import dmd
import erft
import world
from config import BadInput, has_bf16, one_of, parse, pick_device, run
from data import ClipFolder, latent_cache, training_clips
from evaluate import check_teacher_uses_context, conditions, held_out, probe_student, probe_teacher
from flow import (Rollout, Sampler, add_noise, augment_context_noise, draw_noise, flow_matching_loss, generate, schedule,
                  shifted)
from memory import CHUNK, PRESETS
from model import DiT, DiTConfig, tiny_dit
from text import TextConfig, TextEncoder, bytes_to_ids, read_prompts, tiny_text
from vae import TAE, TAEConfig, tiny_tae
from weights import WEIGHTS, Networks, load, load_wan, save_weights, wan_text
from world import WorldSpec


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
    dtype: str = ""       # bf16 | fp32: autocast of the forward pass (default: bf16 where the device has it in hardware)


PARTS = {  # stage: its parts in order; a part is one run with a folder and weights of its own
    "vae": ["vae"], "init": ["init_ar", "init_ode"], "base": ["base"], "teacher": ["teacher"], "1": ["stage1"],
    "2": ["stage2"]}
DEFAULTS = {  # part: updates, batch, lr, warm-up, EMA decay
    "vae": (3500, 8, 2e-3, 100, .99),
    "init_ar": (10000, 16, 1.5e-3, 100, .995),
    "init_ode": (600, 16, 2e-4, 50, .99),
    "base": (3200, 16, 1.5e-3, 100, .995),
    "teacher": (2200, 16, 7e-4, 100, .995),
    "stage1": (50, 16, 5e-5, 1, .95),
    "stage2": (80, 12, 6e-5, 1, .95),
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
SAVE_EVERY, STRIP_EVERY, PROBE_EVERY, BAD_IN_A_ROW = 250, 500, 250, 10
OFTEN = 5              # stages 1 and 2 have few and long updates: strips and probes come so many times as often
PROBED = 16            # held-out worlds whose recall is logged every PROBE_EVERY updates
COMPASS = 0.7          # stage vae: from this share of the updates on the sky counts four times and channels are decorrelated:
                       # else 3 % of the latents' variance tells the heading, and no network looks it up
SHIFT = 3.0            # training noise levels: uniform, shifted by this
CONTEXT_NOISE = 0.15   # most noise on a clean past, drawn per sample and latent: a past of one's own making is not clean
HEADING = {"init_ar": 40., "init_ode": 40., "teacher": 4., "stage2": 1.}  # weight of the heading (flow.flow_matching_loss), small world
# only. The sky's hue is next to nothing in the mean error: without this it lagged behind the landmarks, and a network that
# looks landmarks up by the sky found the wrong ones. Base makes its heading up, and Stage 1 follows base: there it weighs nothing.
SAMPLER = Sampler(steps=4, shift=SHIFT)
DROP = 0.1             # base and teacher: share of the batches without text, and without context
CRITIC_LR, CRITIC_PASSES = 2.0, 5      # stages 1 and 2: times the student's rate; updates before each of the student's
FIRST, LAST, RAMP = 14, 40, .5         # stage 2: chunks a rollout has at least, at most, and when (share of updates)
TARGET = erft.TARGET // CHUNK          # chunks of a target


@dataclass
class Shared:
    """What the functions of a part share: setup() makes it, nobody changes it."""
    cfg: Config
    part: str
    device: torch.device
    rank: int                # of this process, and how many there are
    processes: int
    updates: int
    batch: int               # clips a process and pass
    lr: float
    warmup: int              # updates
    decay: float             # of the averaged weights, an update
    shift: float             # of the training noise levels
    context_noise: float     # most noise on a clean past
    ramp: float              # stage 2: share of the updates in which rollouts grow
    critic_lr: float         # stages 1 and 2: times lr
    beta: float              # stages 1 and 2: AdamW's second
    clip: float              # stages 1 and 2: most gradient norm
    autocast: object = None  # of the forward passes
    start: object = None     # the network that the part starts from
    facts: dict = None       # of its file
    tae: object = None       # autoencoder
    encoder: object = None   # text encoder; None at full size
    features: object = None  # list of captions -> (b, m, text_dim)
    film: ClipFolder = None       # --data, a folder of clips
    prompts: list = ()       # --data: its captions or prompts; none: the small world's
    latent: tuple = None     # (c, h, w)
    grid: tuple = None       # rows and columns of its tokens


@dataclass
class Stage:
    """What a part gives the loop."""
    nets: dict           # name -> network that is trained; all but "critic" are averaged, and saved under their names
    choose: object       # (rng, share of the updates that is done) -> what one update draws, the same in all processes
    losses: list         # passes of one update: (the part or "critic": who is moved, (rng, chosen) -> loss, numbers to log);
                         # a loss of None has gone backward itself
    sampler: Sampler     # for strips and probes, and the metadata of the weights
    teacher: DiT = None  # stages 1 and 2: the real score
    bank: erft.ErrorBank = None


@dataclass
class Mover:
    """What one optimizer step moves."""
    params: list
    uncut: list       # those that stay whole in every process
    optimizers: list
    rate: float       # peak learning rate


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


def put_back(now, saved):
    """Nested dicts and lists of tensors: what localised() made of them goes back into them."""
    for k in now if isinstance(now, dict) else range(len(now)):
        if torch.is_tensor(now[k]):
            local(now[k]).copy_(saved[k])
        else:
            put_back(now[k], saved[k])


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


# ---- what the parts have in common ----------------------------------------------------------------------------------------

def ready(cfg, part, device, name, given="", build=DiT, make_config=DiTConfig, folder=""):
    """The file given, else what this --out has trained under that name, else what ships -> network, facts"""
    own = Path(cfg.out) / (folder or name) / f"{name}.safetensors"
    if not cfg.wan:
        net, facts = load(given or (own if own.exists() else WEIGHTS / f"{name}.safetensors"), build, make_config)
        return net.to(device), facts
    if not (given or own.exists() or name == "base" or cfg.wan.startswith("random")):
        raise BadInput(f"{part} with --wan needs {name}: give a file by --init or --teacher, or train it in this --out")
    ckpt = given or (own if own.exists() else "")
    m = load_wan(cfg.wan, ckpt, cfg.size, ["wan"], device, torch.float32, Path(cfg.out) / "text")
    m.dit.config.recompute = True
    return m.dit, {"sampler": asdict(m.sampler), "vae": m.vaes["wan"], "latent": (16, m.height // 8, m.width // 8)}


def setup(cfg, part, device):
    """Reads all that a part starts from -> Shared"""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    updates, batch, lr, *slow = (FULL if cfg.wan else DEFAULTS)[part]
    rates = (dict(shift=5., context_noise=0., ramp=1., critic_lr=.2, beta=.999, clip=2.) if cfg.wan else
             dict(shift=SHIFT, context_noise=CONTEXT_NOISE, ramp=RAMP, critic_lr=CRITIC_LR, beta=.99, clip=1.))
    s = Shared(cfg, part, device, rank, processes, cfg.updates or updates, cfg.batch or batch, cfg.lr or lr, *slow, **rates)
    s.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bf16" or not cfg.dtype and has_bf16(device))
    Path(cfg.out, part).mkdir(parents=True, exist_ok=True)
    if cfg.data and part not in ("init_ar", "base", "teacher") and not Path(cfg.data).is_dir():
        s.prompts = read_prompts(cfg.data)
    if part in BEFORE or cfg.wan:
        before = "base" if cfg.wan and part == "teacher" else BEFORE.get(part, "base")
        s.start, s.facts = ready(cfg, part, device, before, cfg.init)
    else:  # from nothing
        torch.manual_seed(cfg.seed)
        s.start = TAE(tiny_tae) if part == "vae" else DiT(tiny_dit).initialise()
        s.start, s.encoder = s.start.to(device), TextEncoder(tiny_text).to(device)
    s.latent, patch = (tiny_dit.channels, world.HEIGHT // 8, world.WIDTH // 8), tiny_dit.patch
    if cfg.wan:
        s.tae, s.latent, patch = s.facts["vae"], s.facts["latent"], s.start.config.patch
    else:
        s.tae = s.start if part == "vae" else ready(cfg, part, device, "vae", "", TAE, TAEConfig)[0]
        s.tae.to(memory_format=torch.channels_last)
    s.grid = s.latent[1] // patch[0], s.latent[2] // patch[1]
    if cfg.data and not s.prompts:
        s.film = ClipFolder(cfg.data, s.latent, device, evict_first=part == "init_ar")
        s.prompts = s.film.captions
    if cfg.wan:
        few = s.prompts[:1] if part in ("init_ar", "teacher") else s.prompts  # the others' features lie beside their latents
        mine = sorted({"", NEGATIVE, *few})[rank::processes]
        s.features = wan_text(cfg.wan, Path(cfg.out) / "text", mine, device)
        if processes > 1:
            dist.barrier()
    else:
        s.encoder = s.encoder or ready(cfg, part, device, "text", "", TextEncoder, TextConfig, "init_ar")[0]
        s.features = lambda captions: s.encoder(*(z.to(device) for z in bytes_to_ids(captions, tiny_dit.text_len)))
    return s


# ---- the stages, in order: what each trains, draws and minimises ----------------------------------------------------------

def stage_vae(s):
    """The tiny autoencoder: films of 17 frames, 5 latents."""
    def loss_of(rng, done):
        films = [world.clip(WorldSpec(int(rng.integers(world.HELD_OUT))), int(rng.integers(480)), 17) for _ in range(s.batch)]
        video = torch.from_numpy(np.stack(films)).to(s.device) * 2 - 1
        late = done >= COMPASS
        with s.autocast:
            z = s.tae.encode(video)
            # noise on the latents: neighbouring latents must decode alike, which makes them easy to generate
            again = s.tae.run(s.tae.decoder, z + (.2 if late else .1) * torch.randn_like(z), None)[0][:, 3:]
        off = (again.float() - (video * .5 + .5)).pow(2)
        mse, sky = off.mean(), off[..., :world.TOP, :].mean()
        z = z.float().transpose(2, -1).flatten(0, -2)  # (n, 16)
        z, mean = z - z.mean(0), z.mean(0)
        unit = mean.square().mean() + (z.T @ z / len(z) - torch.eye(z.shape[1], device=s.device)).square().sum(1).mean()
        if not late:  # unit variance a channel
            unit = mean.square().mean() + (z.std(0) - 1).square().mean()
        return mse + 3 * late * sky + .02 * unit, {
            "psnr": -10 * math.log10(mse.item()), "sky": -10 * math.log10(sky.item()), "unit": unit.item()}

    return Stage({"vae": s.tae}, lambda shared, done: done, [("vae", loss_of)], SAMPLER)


def cache_of(s):
    """(worlds, latents) -> their latents, from the cache of this --out"""
    def cache(worlds, latents):
        return latent_cache(Path(s.cfg.out) / "cache", s.tae, worlds, latents, s.device, s.rank)
    return cache


def clips_of(s, evict_first=True, counterfactuals=0):
    """-> clips of all motions, and of steady turns; with --data, both are its folder."""
    if s.film:
        return s.film, s.film
    return training_clips(cache_of(s), s.features, s.cfg.seed, s.device, evict_first, counterfactuals)


def probe_of(s):
    """The heading probe, for the parts that have a weight for it, in the small world only"""
    if s.film or s.cfg.wan or s.part not in HEADING:
        return None
    return causal.heading_probe(cache_of(s)).to(s.device)


def stage_init_ar(s):
    """Teacher forcing on real pasts: the causal model that the student is distilled from, and the text encoder."""
    dit = s.start.requires_grad_()
    clips, steady_turns = clips_of(s, counterfactuals=causal.COUNTERFACTUALS)
    curriculum = causal.FOLDER_CURRICULUM if s.film else causal.HISTORY_CURRICULUM
    objective = causal.Objective(s.grid, s.shift, s.context_noise, probe_of(s), HEADING["init_ar"])

    def choose(shared, done):
        return causal.draw_pass(shared, done, curriculum)

    def loss_of(rng, drawn):
        source = steady_turns if drawn.steady_turns else clips
        with s.autocast:
            loss = causal.teacher_forcing_loss(dit, source, drawn, rng, s.batch, objective)
        return loss, {f"loss_{drawn.kind}": loss.item()}

    nets = {"init_ar": dit}
    if not s.cfg.wan:
        nets["text"] = s.encoder
    return Stage(nets, choose, [("init_ar", loss_of)], Sampler() if s.cfg.wan else SAMPLER)


def stage_init_ode(s):
    """Regression to the causal model's own trajectories at the four levels that the student will use."""
    dit = s.start
    sampler = replace(Sampler(**s.facts["sampler"]), renoise=True)
    policy = replace(PRESETS["slowfast"], tau=sampler.tau)
    chunks = TARGET if s.cfg.wan else causal.ODE_CHUNKS
    captions = causal.ode_captions(s.prompts, s.cfg.seed)
    objective = causal.Objective(s.grid, s.shift, 0., probe_of(s), HEADING["init_ode"])
    levels = torch.tensor(schedule(sampler.steps, sampler.shift))

    def rollout_of(captions):
        return Rollout(dit, dit.text(s.features(captions)), policy, s.grid, pool=sampler.pool)

    with torch.autocast(s.device.type, torch.bfloat16, enabled=bool(s.cfg.wan)):
        trajectories = causal.ode_trajectories(
            Path(s.cfg.out, "cache"), dit, rollout_of, captions, chunks, sampler, s.latent,
            1 if s.cfg.wan else 32, s.rank, s.processes)

    def loss_of(rng, chosen):
        clip = torch.from_numpy(rng.integers(len(captions), size=s.batch))
        chunk = torch.from_numpy(rng.integers(chunks, size=s.batch))
        with s.autocast:
            text = dit.text(s.features([captions[c] for c in clip]))
            return causal.trajectory_loss(dit, text, trajectories, clip, chunk, levels, objective), {}

    return Stage({"init_ode": dit.requires_grad_()}, lambda shared, done: None, [("init_ode", loss_of)], sampler)


def stage_bidirectional(s):
    """Base and teacher: 21 latents at once, from text, or after a context."""
    dit, sources, watched = s.start.requires_grad_(), clips_of(s, evict_first=False), probe_of(s)
    bank = erft.ErrorBank(s.latent, shift=s.shift) if s.part == "teacher" else None
    if bank and s.rank == 0:
        print(f"error bank: {bank.errors.nbytes / 2 ** 30:.2f} GiB of host memory at most")

    def choose(shared, done):
        return {"lesson": shared.random() < .5, "text": shared.random() >= DROP,
                "context": s.part == "teacher" and shared.random() >= DROP, "lost": shared.random() < .3 * (done < .5)}

    def loss_of(rng, chosen):
        clips = sources[chosen["lesson"]]
        history = clips.draw_history(rng, s.batch, TARGET)
        which, chunk, src = history.clip, history.chunk, history.frame
        if not chosen["context"]:
            src, chunk = src[:, :0], torch.zeros_like(chunk)
        elif chosen["lost"] and not s.cfg.wan:
            src = src[:, CHUNK:CHUNK + PRESETS["slowfast"].slow]
        context = clips.frames(which, src)
        x0 = clips.frames(which, CHUNK * chunk[:, None] + torch.arange(erft.TARGET))
        t, noise = shifted(torch.rand(s.batch), s.shift).to(s.device), torch.randn(x0.shape, device=s.device)
        with s.autocast:
            features = clips.text(which) if chosen["text"] else s.features([""] * s.batch)
            if bank is None:
                at = t[:, None].expand(x0.shape[:2])
                v = erft.predict_velocity(dit, context, add_noise(x0, noise, at), at, dit.text(features), s.grid)
                return F.mse_loss(v, noise - x0), {}
            seed = int(rng.integers(2 ** 62))
            weight = HEADING["teacher"] * chosen["context"]
            context = augment_context_noise(context, s.context_noise)
            loss = erft.teacher_step(dit, bank, seed, context, x0, noise, t, features, s.grid, s.cfg.errors, watched, weight)
        return None, {"loss": loss, "errors": float(bank.count.sum())}

    sampler = Sampler(steps=50 if s.cfg.wan else 16, shift=s.shift, renoise=False)
    return Stage({s.part: dit}, choose, [(s.part, loss_of)], sampler, bank=bank)


def stage_dmd(s):
    """Stage 1: DMD in the first 5 s. Stage 2: contextual DMD behind long rollouts of the student's own."""
    student, first, sampler = s.start.requires_grad_(), s.part == "stage1", Sampler(**s.facts["sampler"])
    teacher = ready(s.cfg, s.part, s.device, "base" if first else "teacher", s.cfg.teacher)[0]
    critic = copy.deepcopy(teacher).requires_grad_()
    levels, policy = schedule(sampler.steps, sampler.shift), replace(PRESETS["slowfast"], tau=sampler.tau)
    watched = probe_of(s)

    def choose(shared, done):
        most = TARGET if first else dmd.longest_rollout(done, FIRST, LAST, s.ramp)
        return {"r": int(shared.integers(len(levels))), "L": most if first else int(shared.integers(FIRST, most + 1))}

    def rollout(rng, chosen):
        """One rollout an update and batch: it serves five critic updates and the student's, each with fresh t and noise."""
        if "trace" not in chosen:
            which = rng.integers(len(s.prompts) or world.HELD_OUT, size=s.batch)
            worlds, seeds = [] if s.prompts else [world.make_world(WorldSpec(int(i))) for i in which], rng.integers(2 ** 62, size=s.batch)
            chosen["kinds"] = [w.motion.kind for w in worlds] or ["prompt"] * s.batch
            chosen["features"] = s.features([w.caption for w in worlds] or [s.prompts[i] for i in which])
            with torch.no_grad(), s.autocast:
                roll = Rollout(student, student.text(chosen["features"]), policy, s.grid, pool=sampler.pool)
                chosen["trace"] = dmd.rollout(roll, levels, chosen["r"], lambda chunk, step: draw_noise(
                    seeds, chunk, step, (CHUNK, *s.latent), s.device), chosen["L"], TARGET)
            if s.cfg.teacher_context == "none":
                chosen["trace"].context = chosen["trace"].context[:, :0]
        video = chosen["trace"]
        t = dmd.score_level(torch.rand(s.batch), sampler.shift).to(s.device)
        return video, chosen["features"], t, torch.randn(video.x.shape, device=s.device)

    def critic_step(rng, chosen):
        video, features, t, noise = rollout(rng, chosen)
        with s.autocast:
            loss, error = dmd.critic_step(critic, features, video, t, noise, s.grid, watched, HEADING["teacher"])
        return None, {"critic_loss": loss} | by_level("fake", error, t)

    def student_step(rng, chosen):
        video, features, t, noise = rollout(rng, chosen)
        guidance, negative = (GUIDANCE[s.part], s.features([NEGATIVE] * s.batch)) if s.cfg.wan else (1., None)
        with s.autocast:
            norm, error = dmd.student_step(student, teacher, critic, features, video, t, noise, s.grid, guidance, negative,
                                           watched, HEADING.get(s.part, 0.))
        return None, {"r": chosen["r"], "L": chosen["L"], "norm": norm.mean().item(), "std": video.x.std().item(),
                      **kept_and_oldest(video.rollout, chosen["kinds"]), **by_level("real", error, t)}

    losses = [("critic", critic_step)] * CRITIC_PASSES + [(s.part, student_step)]
    return Stage({s.part: student, "critic": critic}, choose, losses, sampler, teacher)


def by_level(name, error, t):
    """error, t (b,) -> dict: mean error in each quarter of the noise levels that was drawn, name_0 (little noise) .. name_3"""
    return {f"{name}_{i}": error[some].mean().item() for i in range(4) if (some := (4 * t).long() == i).any()}


def kept_and_oldest(roll, kinds):
    """
    What a finished rollout's memory did: kinds, a name a video, of its motion
    returns  dict: kept_KIND, share of the tested chunks that surprised; oldest, mean age of the oldest keyframe in s, if any
    """
    keeps = torch.stack(roll.kept, 1).float()[:, ::roll.memory.policy.interval].mean(1).tolist()
    found = {kind: [keep for keep, k in zip(keeps, kinds) if k == kind] for kind in kinds}
    ages = [(roll.chunk * CHUNK - roll.memory.slow.frame[:, 0]).float().mean().item() / 4] if roll.memory.slow else []
    return {f"kept_{kind}": sum(some) / len(some) for kind, some in found.items()} | {"oldest": age for age in ages}


# ---- the loop: one for all parts ------------------------------------------------------------------------------------------

def room(device):
    """GiB of memory of this process's device"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2 ** 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30


def check_room(s, stage):
    """
    Tells how many GiB the part needs on each device, before optimizers, averages and passes take theirs; refuses what cannot
    fit. A rough model: 34 activations of the width a token and layer, or the block inputs alone.
    """
    trained, frozen = (sum(p.numel() for n in nets for p in n.parameters())
                       for nets in (stage.nets.values(), [stage.teacher] if stage.teacher else []))
    dit, student_passes = stage.nets[s.part].config, "critic" in stage.nets
    need = {"parameters": 4 * (trained + frozen), "gradients": 4 * trained / s.processes,  # parameters are gathered for a pass
            "optimizer and average": (12 / s.processes + 4) * trained}
    if s.part != "vae":
        width, frames = dit.dim * s.grid[0] * s.grid[1] * s.batch, 42 if student_passes or s.part == "teacher" else 60
        need["memory (keys, values)"] = (4 + 2) * dit.layers * width * (39 if student_passes else 0)
        need["activations"] = 2 * frames * width * (34 * (1 if dit.recompute else dit.layers) + 2 * dit.layers)
    need = {k: v / 2 ** 30 for k, v in need.items()}
    if s.rank == 0:
        print(f"{s.part}: {s.updates} updates of {s.batch} x {s.cfg.accumulate} x {s.processes} clips; needs about "
              + ", ".join(f"{k} {v:.2f}" for k, v in need.items())
              + f" = {sum(need.values()):.2f} GiB of {room(s.device):.0f} a device")
    if sum(need.values()) > room(s.device):
        raise BadInput(f"{s.part} needs about {sum(need.values()):.0f} GiB a device and {room(s.device):.0f} are there: "
                       "use more processes or a smaller --batch")


def movers_of(s, stage):
    """Shards the networks over the processes, and gives each group of them its optimizers -> name -> Mover"""
    movers, student_passes = {}, "critic" in stage.nets
    for name in dict(stage.losses):
        some = [net for n, net in stage.nets.items() if (n == "critic") == (name == "critic")]
        matrices = [] if student_passes or s.cfg.wan else [p for net in some for n, p in net.named_parameters()
                                                           if "blocks" in n and p.ndim == 2 and "embedding" not in n]
        uncut = list(some[0].parameters()) if s.part == "vae" else matrices  # Muon looks at whole matrices: they stay whole
        for net in some if dist.is_initialized() and s.part != "vae" else ():
            fully_shard(net, ignored_params=set(uncut))
            if isinstance(net, DiT):
                register_fsdp_forward_method(net, "text")
        params = [p for net in some for p in net.parameters() if p.requires_grad]
        whole = {id(p) for p in matrices}
        rate, betas = (s.lr * (s.critic_lr if name == "critic" else 1), (0., s.beta)) if student_passes else (s.lr, (.9, .95))
        optimizers = [torch.optim.AdamW([p for p in params if id(p) not in whole], lr=rate, betas=betas, weight_decay=.01)]
        if matrices:  # Muon for the transformers' matrices: the same lr means the same size of step
            optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=.01, adjust_lr_fn="match_rms_adamw"))
        movers[name] = Mover(params, uncut, optimizers, rate)
    return movers


def make_update(s, stage, movers, step):
    """All passes of one update -> numbers to log, and whether all was finite. Where it was not, no weight has changed."""
    chosen = [stage.choose(np.random.default_rng([s.cfg.seed, step]), step / s.updates) for _ in range(s.cfg.accumulate)]
    numbers, fine, student_passes = {}, True, "critic" in stage.nets
    for k, (name, loss_of) in enumerate(stage.losses):
        mover, total, critic = movers[name], 0., "critic_" * (name == "critic")
        for net in stage.nets.values():
            net.zero_grad()
        for micro in range(s.cfg.accumulate):
            rng = np.random.default_rng([s.cfg.seed, step, s.rank * s.cfg.accumulate + micro, k])
            torch.manual_seed(int(rng.integers(2 ** 62)))
            loss, found = loss_of(rng, chosen[micro])
            if loss is not None:
                loss.backward()
                found[critic + "loss"] = loss.item()
            total += found.get(critic + "loss", 0.)
            numbers |= found
        for p in mover.params:
            local(p.grad).div_(s.cfg.accumulate)
        for p in mover.uncut if s.processes > 1 else ():  # the others' gradients are averaged as they are cut
            p.grad = all_sum(p.grad) / s.processes
        norm = clip_gradients(mover.params, s.clip if student_passes else 1.0)
        fall = 1 if student_passes else .55 + .45 * math.cos(math.pi * step / s.updates)
        for group in [g for o in mover.optimizers for g in o.param_groups]:
            group["lr"] = mover.rate * min(1, (step + 1) / s.warmup) * fall
        if math.isfinite(all_sum(torch.tensor([norm.item() + total])).item()):  # of all processes: the same everywhere
            for optimizer in mover.optimizers:
                optimizer.step()
        else:
            fine = False
        numbers[critic + "grad"] = norm.item()
    return numbers, fine


@torch.no_grad()
def refresh(shown, average):
    """Copies the averaged weights into whole networks: every process must come here."""
    for name, some in average.items():
        for p, a in zip(shown[name].parameters(), some):
            p.copy_(a.full_tensor() if isinstance(a, DTensor) else a)


def tiny_networks(s, shown, net, sampler):
    """What evaluate.py takes: a network of the small world, with the text encoder that is trained beside it if one is"""
    encoder = shown.get("text", s.encoder)

    def features(captions):
        return encoder(*(z.to(s.device) for z in bytes_to_ids(captions, tiny_dit.text_len)))
    return Networks(net, {"tae": s.tae}, features, sampler, s.part)


@torch.no_grad()
def strip(s, shown, sampler, path):
    """
    Writes one PNG, a video a row, every 12th frame. vae: a held-out clip and its copy; else videos from text alone, of four
    held-out captions or of one prompt: 20 chunks, or a teacher's 21 latents at once.
    """
    if s.part == "vae":
        video = torch.from_numpy(world.clip(WorldSpec(world.HELD_OUT), 0, 129)[None]).to(s.device) * 2 - 1
        videos = video[0], shown["vae"].decode(shown["vae"].encode(video))[0][0]
    else:
        net, which = shown[s.part], [WorldSpec(world.HELD_OUT + i) for i in range(1 if s.cfg.wan else 4)]
        text = (net.text(s.features(s.prompts[:1])) if s.cfg.wan else
                conditions(tiny_networks(s, shown, net, sampler), which, 0)[0])
        if s.part in ("base", "teacher"):
            none = torch.zeros(len(which), 0, *s.latent, device=s.device)
            z = erft.extend(net, none, text, s.grid, sampler, range(len(which)))
        else:
            roll = Rollout(net, text, replace(PRESETS["slowfast"], tau=sampler.tau), s.grid, pool=sampler.pool)
            z = torch.cat(list(generate(roll, range(len(which)), 20, sampler, s.latent)), 1)
        videos = s.tae.decode(z)[0]
    rows = [torch.cat(list(v[::12].float()), dim=2) for v in videos]  # (3, h, n w)
    picture = (torch.cat(rows, dim=1) * .5 + .5).clamp(0, 1).mul(255).round().byte().movedim(0, -1)
    iio.imwrite(path, picture.cpu().numpy())


def finish(s, shown, sampler):
    """Writes the averaged weights, and what made them."""
    kept = {}
    if s.part == "init_ar" and not s.cfg.wan:
        found = causal.calibrate(shown["init_ar"], shown["text"], s.tae, s.device)
        kept = found.pop("kept")
        sampler = replace(sampler, **found)
        print(f"tau {found['tau']:.4f} ({found['pool']}), tested chunks kept:",
              ", ".join(f"{k} {v:.0%}" for k, v in kept.items()))
    facts = {"stage": s.part, "seed": s.cfg.seed, "updates": s.updates, "batch": s.batch * s.cfg.accumulate * s.processes,
             "lr": s.lr, "sampler": asdict(sampler), "kept": kept}
    for name, net in shown.items() if s.rank == 0 else ():
        path = Path(s.cfg.out, s.part, f"{name}.safetensors")
        save_weights(path, net.state_dict(), net.config, facts)
        print(f"wrote {path}")
    all_sum(torch.zeros(1))  # the next part reads what the first process wrote


def train(cfg, part, device):
    """One part, from its start or its newest checkpoint to its weights."""
    s = setup(cfg, part, device)
    stage = {"vae": stage_vae, "init_ar": stage_init_ar, "init_ode": stage_init_ode, "base": stage_bidirectional,
             "teacher": stage_bidirectional, "stage1": stage_dmd, "stage2": stage_dmd}[part](s)
    out, nets, bank, worlds = Path(cfg.out, part), stage.nets, stage.bank, held_out(PROBED)
    check_room(s, stage)
    shown = {n: copy.deepcopy(net).eval().requires_grad_(False) for n, net in nets.items() if n != "critic"}  # averages, whole
    movers = movers_of(s, stage)
    average = {name: [p.detach().clone() for p in nets[name].parameters()] for name in shown}

    def weights():
        return {"nets": {name: dict(enumerate(p.detach() for p in net.parameters())) for name, net in nets.items()},
                "average": average}

    step, saved = 0, load_checkpoint(out, device, s.rank, s.processes)
    if saved:
        step = saved["step"]
        put_back(weights(), saved)
        for name, mover in movers.items():
            for optimizer, held in zip(mover.optimizers, saved["optimizers"][name]):
                restore(optimizer, held)
        if bank:
            bank.load_state_dict(saved["bank"])
    stop = []  # the signal that asks for an end; the update under way is finished first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    log, latest, bad, ending = open(out / "log.jsonl", "a") if s.rank == 0 else None, {}, 0, False
    if part == "stage2" and step == 0 and s.rank == 0 and not cfg.wan:
        whole = Sampler(steps=16, shift=SHIFT, renoise=False)
        found = {k: round(v, 4) for k, v in check_teacher_uses_context(
            tiny_networks(s, {}, stage.teacher, whole), worlds).items()}
        log.write(json.dumps({"step": 0, **found}) + "\n")
        print("gates:", ", ".join(f"{k} {v}" for k, v in found.items()))
    often = OFTEN if part.startswith("stage") else 1
    save_every = max(1, min(SAVE_EVERY, s.updates // 6)) if cfg.wan else SAVE_EVERY
    bar = tqdm(total=s.updates, initial=step, desc=part, disable=s.rank > 0)
    while step < s.updates and not ending:
        started = time.time()
        found, fine = make_update(s, stage, movers, step)
        bad = 0 if fine else bad + 1
        if fine:  # a short average at first, or the start would linger
            toward = 1 - min(s.decay, (step + 1) / (step + 10))
            for name, some in average.items():
                torch._foreach_lerp_([local(a) for a in some], [local(p.detach()) for p in nets[name].parameters()], toward)
        if bank:
            bank.recycle()
        step += 1
        ending = all_sum(torch.tensor([float(len(stop))])).item() > 0
        if part != "vae" and not cfg.wan and step % (PROBE_EVERY // often) == 0:
            refresh(shown, average)
            if s.rank == 0 and part != "base":
                probe = probe_teacher if part == "teacher" else probe_student
                found |= probe(tiny_networks(s, shown, shown[part], stage.sampler), worlds)
        numbers = {"step": step, **found, "lr": movers[part].optimizers[0].param_groups[0]["lr"], "skipped": bad,
                   "seconds": time.time() - started}
        if s.rank == 0:
            log.write(json.dumps({k: round(v, 6) for k, v in numbers.items()}) + "\n")
        latest |= found  # what is not measured in every update stays in sight
        bar.set_postfix({k: f"{v:.3g}" for k, v in latest.items()})
        bar.update()
        if bad >= BAD_IN_A_ROW:
            raise SystemExit(f"stopped: {bad} updates in a row had a loss or gradient that is not finite; "
                             f"the last good checkpoint is in {out}")
        if step % save_every == 0 or step == s.updates or ending:
            if log:
                log.flush()
            states = {n: [o.state_dict() for o in m.optimizers] for n, m in movers.items()}
            save_checkpoint(out, step, weights() | {"optimizers": states, "bank": bank.state_dict() if bank else None}, s.rank)
        if step % (STRIP_EVERY // often) == 0 or step == s.updates:
            refresh(shown, average)
            if s.rank == 0:
                strip(s, shown, stage.sampler, out / f"strip_{step:06d}.png")
    bar.close()
    if ending:
        print(f"stopped at update {step}; run the same command to go on")
        sys.exit(130 if signal.SIGINT in stop else 143)
    refresh(shown, average)
    finish(s, shown, stage.sampler)


def main():
    cfg = parse(Config)
    one_of("--stage", cfg.stage, PARTS)
    one_of("--dtype", cfg.dtype, ("", "bf16", "fp32"))
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


if __name__ == "__main__":
    run(main)
