"""
Trains every network, one stage at a time: the settings, one update, the run. How long and how fast stands in
recipe.py; what each stage starts from, in starts.py; what it minimises, in stages.py.

    python train.py --stage vae        # the tiny autoencoder of the small world
    python train.py --stage init       # ar: the causal model and the text encoder; ode: its four steps
    python train.py --stage teacher    # the context teacher, on pasts with errors in them (erft.py)
    python train.py --stage 1          # DMD: the student's first 5 s match the teacher's (dmd.py)
    python train.py --stage 2          # contextual DMD: its long videos go on as the teacher would
    python train.py --stage all        # and two ablations: teacher_plain (no errors), 2_none (no context)
    torchrun --nproc_per_node 8 train.py --stage 2    # the same on 8 devices, a batch each
    ... --wan Wan2.1-T2V-1.3B --data prompts.txt --init ode_init.pt    # full size: stages teacher, init, 1, 2

Run the same command again to go on after a stop, on any number of processes. All that is random in update n
is drawn from (seed, n, which batch), so a resumed run is the uninterrupted run, and 2, 4 or 8 processes are
one that accumulates as many batches. In stages 1 and 2 each pass of an update has a rollout, a length and, at
full size, an exit step of its own. Each part of a stage writes out/<part>/: log.jsonl (a JSON object an
update), strip_*.png (look at them), two checkpoints, at the end <part>.safetensors, the averages. Nodes share
the disk of --out.

The log has loss, grad (norm of the gradient before clipping), lr, skipped (bad updates in a row), seconds,
and now and then what the judge says of held-out worlds: recall, ceiling, chance, returns, validity. Stages 1
and 2 have critic_loss and critic_grad, norm (DMD's normaliser), std (of the student's latents), fake_0..3 and
real_0..3 (squared error of the critic's x0, and of the teacher's to the student's, by quarter of the noise
levels), r (exit step, at full size), L (chunks of the student's rollout), kept (share of its tested chunks),
oldest (s in slow memory).

References: Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009. Leaves out: LoRA.
"""
import copy
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from config import (BadInput, StopSignals, check_writable, has_bf16, one_of, parse,  # first
                    pick_device, run, tell, whole_or_absent, within)

import imageio.v3 as iio
import numpy as np
import torch
from einops import rearrange
from torch.nn import ModuleDict
from tqdm import tqdm

import causal
import erft
import world
from bench import training_memory
from checkpoint import (any_process, barrier, claim, find_checkpoints, gather, get_processes, get_rank,
                        joined_processes, keep_settings, load_checkpoint, save_checkpoint)
from dmd import keyframe_histogram
from flow import Sampler, generate
from optim import make_optimizers, optimizer_step, shard, update_ema, whole_networks
from probe import check_teacher_uses_context, held_out, probe_student, probe_teacher
from recipe import PARTS, TINY, WAN, hash_recipe
from records import append_line, read_lines
from stages import TARGET_CHUNKS, TEACHER_STEPS, make_stage
from starts import hash_starts, load_inputs
from tensors import read_file
from text import encode_captions
from video import to_uint8
from weights import save_weights
from world import WorldSpec


@dataclass
class Config:
    stage: str = ""       # vae | init | teacher | teacher_plain | 1 | 2 | 2_none | all
    out: str = "out"      # folder for logs, strips, checkpoints and weights
    updates: int = 0      # number of updates (0: the stage's own default)
    batch: int = 0        # clips a process and pass (0: the stage's own default)
    accumulate: int = 1   # passes an update
    lr: float = 0.0       # peak learning rate (0: the stage's own default)
    init: str = ""        # weights to start from (default: of the stage before, of this --out or shipped)
    teacher: str = ""     # stages 1 and 2: weights of the real score, and of the critic's start
    teacher_context: str = "memory"  # stage 2: memory | none, which is stage 2_none
    data: str = ""        # teacher, init: a folder that data.py wrote; 1, 2: prompts, such a folder or a file
    wan: str = ""         # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS: full size, with --data
    size: str = ""        # with --wan: WIDTHxHEIGHT in pixels, as --data was made (default 832x480)
    seed: int = 0         # of the training run
    device: str = ""      # cuda | mps | cpu (default: the best there is)
    dtype: str = ""       # bf16 | fp32: autocast of the forward pass (default: bf16 where the device has it)
    no_verify: bool = False  # take files as they are, without verifying their checksums


ALIKE = 8          # batches of an update that are drawn alike, one of each device
PROBE_WORLDS = 16  # held-out, that a probe looks at
BAD_IN_A_ROW = 10  # updates that are not finite, until training gives up


def get_lr(preset, step):
    """Learning rate: linear warm-up, then a cosine down to a tenth; stages 1 and 2 stay at the peak."""
    warmup = min(1, (step + 1) / preset.warmup)
    if preset.teacher:
        return preset.lr * warmup
    return preset.lr * warmup * (.55 + .45 * math.cos(math.pi * step / preset.updates))


def get_ema_decay(preset, step):
    """Of the averages: 0 before ema_start, then ema_decay; without a start, a warm-up."""
    if preset.ema_start:
        return preset.ema_decay if step >= preset.ema_start else 0.
    return min(preset.ema_decay, (step + 1) / (step + 10))


# ---- one update --------------------------------------------------------------------------------------------

def seed_pass(cfg, step, number, micro):
    """
    Seeds all that is random in pass `number` of an update, for batch `micro` of this process: torch's own
    generator, and two of numpy's. It depends on which batch of the update this is, not on the process.
    returns  a generator that the batches of a group share (8, or the least common multiple of 8 and the
             number of processes), because sharded networks need as many forward passes in every process;
             and one for this batch alone
    """
    batch = micro * get_processes() + get_rank()
    group = batch // math.lcm(ALIKE, get_processes())
    alike = np.random.default_rng([cfg.seed, step, group, number, 1])
    own = np.random.default_rng([cfg.seed, step, batch, number])
    torch.manual_seed(int(own.integers(2 ** 62)))
    return alike, own


def make_update(cfg, preset, stage, optimizers, step):
    """-> numbers to log, was all finite?"""
    metrics, all_finite = {}, True
    for number, (mover, run_pass) in enumerate(stage.passes):
        # at first the critic is alone
        if mover == "net" and step < preset.critic_alone:
            continue
        total = 0.
        for micro in range(cfg.accumulate):
            alike, own = seed_pass(cfg, step, number, micro)
            drawn = stage.draw(alike, step / preset.updates)
            found = run_pass(own, drawn)
            total += sum(found.values())  # only asked: is all finite?
            metrics |= found              # of the last batch
        # the network of this pass moves, if all that it found is finite
        lr = get_lr(preset, step) * (preset.critic_lr if mover == "critic" else 1)
        norm, is_finite = optimizer_step(optimizers[mover], lr, total, cfg.accumulate, preset.clip)
        metrics["grad" if mover == "net" else "critic_grad"] = norm
        all_finite &= is_finite
    return metrics, all_finite


# ---- what one can look at ----------------------------------------------------------------------------------

def averaged(part, inputs, nets):
    """weights.Networks with the averaged networks in them."""
    m = replace(inputs, dit=nets[part])
    if "text" in nets:
        m.features = partial(encode_captions, nets["text"], inputs.device)
    return m


def look(part, preset, step, inputs, ema):
    """Now and then what the judge says of the averaged network's videos -> numbers to log"""
    if get_rank() > 0 or not preset.probe_every or step % preset.probe_every:
        return {}
    probe = probe_teacher if part.startswith("teacher") else probe_student
    return probe(averaged(part, inputs, ema), held_out(PROBE_WORLDS))


def strip_videos(part, m, specs, captions):
    """
    What a strip shows, (b, f, 3, h, w). vae: a copy of a held-out clip; else from text alone: 20 chunks, or a
    teacher's 21 latents at once.
    """
    if part == "vae":
        clip = torch.from_numpy(world.clip(specs[0], 0, 129)[None])
        return m.dit.decode(m.dit.encode(clip.to(m.device) * 2 - 1))[0]
    seeds = range(len(captions))
    text = m.text(*captions)
    if part.startswith("teacher"):
        nothing = torch.zeros(len(captions), 0, *m.latent, device=m.device)
        z = erft.extend(m.dit, nothing, text, m.grid, m.sampler, seeds)
    else:
        z = torch.cat(list(generate(m.rollout(text), seeds, 20, m.sampler, m.latent)), dim=1)
    return m.vae.decode(z)[0]


@torch.no_grad()
def save_strip(part, preset, step, inputs, ema, out):
    """Now and then a PNG, a video of four held-out captions or of the first prompt a row, every 12th frame"""
    if step % preset.strip_every and step != preset.updates:
        return
    m = averaged(part, inputs, whole_networks(ema))
    if get_rank() > 0:
        return
    specs = [WorldSpec(world.HELD_OUT + i) for i in range(4)]
    captions = m.prompts[:1] or [world.make_world(spec).caption for spec in specs]
    with inputs.autocast:
        videos = strip_videos(part, m, specs, captions)
    strip = rearrange(to_uint8(videos[:, ::12].float()), "b f h w c -> (b h) (f w) c")
    with whole_or_absent(out / f"strip_{step:06d}.png") as file:
        iio.imwrite(file, strip.cpu().numpy())


def save_networks(cfg, part, preset, inputs, ema, saved):
    """The averaged weights, and what made them."""
    nets = whole_networks(ema)
    sampler, kept = inputs.sampler, {}
    if part == "init_ar" and not cfg.wan:
        found = causal.calibrate(averaged(part, inputs, nets))
        kept = found.pop("kept")
        sampler = replace(sampler, **found)
    log = read_lines(Path(cfg.out, part, "log.jsonl"), {"step": int, "seconds": float})
    seconds = sum(line["seconds"] for line in log)
    facts = {"stage": part, "seed": cfg.seed, "recipe": hash_recipe(preset), "updates": preset.updates,
             "batch": preset.batch, "lr": preset.lr, "passes": saved["passes"], "sampler": asdict(sampler),
             "kept": kept, "seconds": round(seconds),
             "machine": f"{inputs.device.type} {platform.machine()} {cfg.dtype}"}
    facts |= {name: value for name, value in saved.items() if name.startswith("sha256")}
    if get_rank() == 0:
        if kept:
            print(f"tau {sampler.tau:.4f} ({sampler.pool}), share of the tested chunks that are kept: {kept}")
        for name, net in reversed(nets.items()):  # the part's own at last: with it the part is finished
            path = Path(cfg.out, part, f"{name}.safetensors")
            save_weights(path, net.state_dict(), net.config, facts)
            tell(f"wrote {path}")
    barrier()  # the next part reads what the first process wrote


# ---- the run -----------------------------------------------------------------------------------------------

def settings(cfg, part):
    """The part's preset, with what the command line says."""
    given = {name: vars(cfg)[name] for name in ("updates", "batch", "lr") if vars(cfg)[name]}
    return replace(WAN[part] if cfg.wan else TINY[part], **given)


def describe(cfg, part, preset):
    """What makes this run: other settings do not go on with it"""
    # of the command line, of the preset, and the files that it begins with
    told = {name: vars(cfg)[name] for name in ("seed", "accumulate", "data", "wan", "size", "dtype")}
    return told | asdict(preset) | hash_starts(cfg, part, preset)


def write_log(out, numbers):
    """A line of six digits a number"""
    short = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in numbers.items()}
    if get_rank() == 0:
        append_line(out / "log.jsonl", short)


def check_teacher(out, inputs, teacher):
    """Before Stage 2: does the teacher use its context?"""
    networks = replace(inputs, dit=teacher, sampler=Sampler(TEACHER_STEPS))
    found = check_teacher_uses_context(networks, held_out(PROBE_WORLDS))
    write_log(out, {"step": 0, "seconds": 0, **found})
    print(f"does the teacher use its context? {found}")


def prepare(cfg, part, preset, device):
    """-> inputs, Stage, what is trained, its averages (what is looked at and saved), and optimizers"""
    inputs = load_inputs(cfg, part, preset, device)
    stage = make_stage(cfg, part, preset, inputs)
    nets = ModuleDict(stage.nets).requires_grad_()
    ema = {name: copy.deepcopy(net) for name, net in nets.items() if name != "critic"}
    ema = ModuleDict(ema).eval().requires_grad_(False)
    if cfg.wan:
        frozen = [stage.teacher] if stage.teacher else []
        shard([*nets.values(), *ema.values(), *frozen])
    return inputs, stage, nets, ema, make_optimizers(cfg, preset, nets)


def announce(cfg, part, preset, inputs, ema):
    """Before a part starts: how long it takes, how large it becomes."""
    size = sum(p.numel() for p in ema.parameters()) * 4e-6
    told = f"about {preset.updates * preset.seconds / 60:.0f} min on two cores"
    if cfg.wan:
        like = part.removesuffix("_plain").removesuffix("_none")
        need = training_memory(like, inputs.dit, math.prod(inputs.grid), get_processes())
        told = f"about {need / 1e9:.0f} GB on each of {get_processes()} devices"
    print(f"{part}: {preset.updates} updates, {told}; writes {size:.1f} MB")
    # Stage 2: the curriculum
    if preset.longest > TARGET_CHUNKS:
        shares = keyframe_histogram(preset.shortest, preset.longest, preset.ramp, TARGET_CHUNKS)
        told = ", ".join(f"{i}: {share:.0%}" for i, share in enumerate(shares))
        print(f"rollouts by keyframes in slow memory when the target begins, if all are kept: {told}")


def is_there(weights, verify):
    """Has the part been trained? BadInput if what it wrote is damaged."""
    return weights.exists() and bool(read_file(weights, verify, "delete it, and it is made again"))


def train(cfg, part, device, stop):
    """One part, from its start or its newest checkpoint to its weights; stop: StopSignals"""
    preset = settings(cfg, part)
    out = Path(cfg.out, part)
    out.mkdir(parents=True, exist_ok=True)
    is_first = get_rank() == 0
    saved = keep_settings(out, describe(cfg, part, preset), cfg.accumulate * get_processes())
    # a chain goes on with what is not there yet
    weights = out / f"{part}.safetensors"
    is_made = is_there(weights, not cfg.no_verify)
    if cfg.stage == "all" and is_made:
        return
    inputs, stage, nets, ema, optimizers = prepare(cfg, part, preset, device)

    # ---- resume
    every_optimizer = sum(optimizers.values(), [])
    others = {"ema": ema, **stage.states}
    step = load_checkpoint(out, nets, every_optimizer, others, not cfg.no_verify)
    # finished: the next part has begun with this very file
    if step == preset.updates and is_made:
        return
    if part.startswith("stage2") and step == 0 and is_first and not cfg.wan:
        check_teacher(out, inputs, stage.teacher)

    # ---- the loop
    if is_first:
        announce(cfg, part, preset, inputs, ema)
    stop.patient = True  # until the update under way is done
    bad_in_a_row = 0
    latest = {}
    is_over = step >= preset.updates
    bar = tqdm(total=preset.updates, initial=step, desc=part, disable=not is_first)
    while not is_over:
        started = time.time()
        # 1. forward, backward, step
        metrics, is_finite = make_update(cfg, preset, stage, optimizers, step)
        lr = get_lr(preset, step)
        # 2. the averages follow
        if is_finite:
            update_ema(ema, nets, get_ema_decay(preset, step))
        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        # 3. the teacher's errors go into the bank, unless the update failed
        if bank := stage.states.get("bank"):
            bank.recycle(gather(bank.pending if is_finite else []))
        step += 1
        is_over = any_process(stop.code > 0) or step == preset.updates
        # 4. look at it, and log
        metrics |= look(part, preset, step, inputs, ema)
        seconds = time.time() - started
        write_log(out, {"step": step, **metrics, "lr": lr, "skipped": bad_in_a_row, "seconds": seconds})
        latest |= metrics  # what is not measured in every update stays in sight
        bar.set_postfix({name: f"{value:.3g}" for name, value in latest.items()})
        bar.update()
        if bad_in_a_row == BAD_IN_A_ROW:
            newest = ["the start", *find_checkpoints(out)][-1]
            raise SystemExit(f"stopped: {bad_in_a_row} updates in a row were not finite; run the same "
                             f"command to go on from {newest}")
        # 5. checkpoint
        if step % preset.save_every == 0 or is_over:
            save_checkpoint(out, step, nets, every_optimizer, others)
        save_strip(part, preset, step, inputs, ema, out)
    bar.close()

    # ---- stopped, or done
    if step < preset.updates:
        print(f"stopped at update {step}; run the same command to go on")
        sys.exit(stop.code or 143)  # another process got the signal
    stop.patient = False
    save_networks(cfg, part, preset, inputs, ema, saved)


def check(cfg):
    one_of("--stage", cfg.stage, PARTS)
    one_of("--dtype", cfg.dtype, ("", "bf16", "fp32"))
    one_of("--teacher-context", cfg.teacher_context, ("memory", "none"))
    for name, least in {"accumulate": 1, "seed": 0, "updates": 0, "batch": 0, "lr": 0}.items():
        within(f"--{name}", vars(cfg)[name], least, sys.maxsize)
    if cfg.stage == "all" and (cfg.init or cfg.teacher or cfg.data or cfg.wan):
        raise BadInput("--stage all begins with nothing: leave out --init, --teacher, --data and --wan")
    if cfg.wan and cfg.stage == "vae":
        raise BadInput("--stage vae is not for --wan: Wan2.1 is the base model, and brings its autoencoder")
    last = TINY[PARTS[cfg.stage][-1]]
    if (cfg.init and not last.start or cfg.teacher and not last.teacher
            or cfg.teacher_context == "none" and "2" not in cfg.stage):
        raise BadInput(f"--stage {cfg.stage} has no use for that --init, --teacher or --teacher-context")
    if cfg.size and not cfg.wan:
        raise BadInput("--size needs --wan")
    if cfg.data and not cfg.wan and cfg.stage in ("vae", "init"):
        raise BadInput(f"--data with --stage {cfg.stage} needs --wan: else clips are the small world's own")
    if cfg.wan and not cfg.data:
        raise BadInput("--wan needs --data: what data.py wrote for teacher and init, prompts for 1 and 2")


def main():
    cfg = parse(Config)
    check_writable(cfg.out)
    check(cfg)
    device = pick_device(cfg.device)
    # kept with the settings: a run that was begun in another precision, on another machine, is refused
    cfg.dtype = cfg.dtype or ("bf16" if has_bf16(device) else "fp32")
    with joined_processes(device), StopSignals() as stop:
        parts = PARTS["2_none" if cfg.teacher_context == "none" else cfg.stage]
        for number, part in enumerate(parts, 1):
            if part == "init_ar" and cfg.init:
                continue  # a causal model is given: only its four steps are wanted
            if get_rank() == 0:
                print(f"part {number} of {len(parts)}: {part}")
            with claim(Path(cfg.out, part)):
                train(cfg, part, device, stop)


if __name__ == "__main__":
    run(main)
