"""
What each stage trains: what an update draws, and its loss. train.py runs them; starts.py brings networks and
clips.

    part            starts from           loss
    vae             nothing               pixels, and latents of unit variance
    init_ar         nothing (Wan: base)   teacher forcing on real pasts, causal.py
    init_ode        init_ar               its own ODE trajectories at the student's four levels, causal.py
    teacher         init_ar (Wan: base)   flow matching on 21 latents after a past with errors in it, erft.py
    teacher_plain   init_ar (Wan: base)   the same without errors
    stage1          init_ar (Wan: ode)    DMD against teacher without context (Wan: base), dmd.py
    stage2          stage1                contextual DMD against teacher, dmd.py
    stage2_none     stage1                the same; teacher and critic see no context

References: as in the files named.
Leaves out: Stage 2 on real pasts.
"""
import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import causal
import dmd
import erft
import world
from data import Shuffled
from flow import Sampler, augment_context_noise, draw_noise, schedule, shifted
from memory import CHUNK
from model import DiT
from starts import NEGATIVE, load_part, load_wan_part
from world import WorldSpec

LATENT_NOISE = .5  # most noise on the latents that the tiny autoencoder decodes in training
NO_TEXT = .1      # teacher: share of the samples without text,
NO_CONTEXT = .4   # and without context: Stage 1's real score has none
TARGET_CHUNKS = erft.TARGET // CHUNK
TEACHER_STEPS = 16  # of the small world's teacher


# ---- one pass of each stage: adds to .grad, and returns numbers to log -------------------------------------

def vae_pass(inputs, batch, rng, drawn):
    """Clips of 17 frames, 5 latents."""
    vae = inputs.vae
    # real clips, in [-1, 1]
    clips = []
    for _ in range(batch):
        spec = WorldSpec(int(rng.integers(world.HELD_OUT)))
        clips.append(world.clip(spec, int(rng.integers(480)), 17))
    video = torch.from_numpy(np.stack(clips)).to(inputs.device) * 2 - 1
    with inputs.autocast:
        z = vae.encode(video)
        # noise on the latents: what is small in them is lost, so what fills the picture becomes large
        level = LATENT_NOISE * torch.rand(batch, 1, 1, 1, 1, device=z.device)
        decoded, _ = vae.run(vae.decoder, z + level * torch.randn_like(z), None)
    # pixels, and how they change from frame to frame: without it frames come in pairs. The first latent is
    # one frame, decoded to four of which the last counts
    real = video * .5 + .5
    decoded = decoded[:, 3:].float()
    mse = (decoded - real).square().mean()
    # the mean colour of each patch counts more: without it grass and stone were one ground
    error = rearrange(decoded - real, "b f c h w -> (b f) c h w")
    colour = F.avg_pool2d(error, 8).square().mean()
    moved, real_moved = decoded.diff(dim=1), real.diff(dim=1)
    motion = (moved - real_moved).square().mean()
    speed = (rms(moved) - rms(real_moved)).square().mean()
    # latents: mean 0 and variance 1 in each channel, and no channel tells of another
    z = rearrange(z.float(), "b f c h w -> (b f w h) c")
    mean, std = z.mean(0), z.std(0)
    covariance = (z - mean).T @ (z - mean) / len(z)
    others = covariance - covariance.diag().diag()
    unit = mean.square().mean() + (std - 1).square().mean()
    unit = unit + others.square().sum(1).mean()
    loss = mse + 5 * colour + motion + 2 * speed + .02 * unit
    loss.backward()
    psnr = -10 * math.log10(mse.item())
    losses = {"colour": colour, "motion": motion, "speed": speed, "unit": unit, "loss": loss}
    return {"psnr": psnr} | {name: value.item() for name, value in losses.items()}


def rms(change):
    """(b, f, c, h, w) -> root mean square of each frame (b, f)"""
    return (change.square().mean((2, 3, 4)) + 1e-6).sqrt()


def teacher_forcing_pass(inputs, preset, rng, kind):
    clip, pack = causal.draw_pack(inputs.clips, kind, rng, preset.batch)
    with inputs.autocast:
        text = inputs.dit.text(inputs.clips.text(clip))
        loss = causal.teacher_forcing_loss(
            inputs.dit, text, pack, inputs.grid, preset.shift, preset.context_noise)
    loss.backward()
    return {"loss": loss.item(), f"loss_{kind}": loss.item()}


def trajectory_pass(inputs, batch, captions, trajectories, rng, drawn):
    n, chunks = trajectories.past_frame.shape[:2]
    clip = torch.from_numpy(rng.integers(n, size=batch))
    chunk = torch.from_numpy(rng.integers(chunks, size=batch))
    levels = torch.tensor(schedule(inputs.sampler.steps, inputs.sampler.shift))
    features = inputs.features([captions[c] for c in clip])
    with inputs.autocast:
        text = inputs.dit.text(features)
        loss = causal.trajectory_loss(inputs.dit, text, trajectories, clip, chunk, levels, inputs.grid)
    loss.backward()
    return {"loss": loss.item()}


def teacher_pass(cfg, preset, inputs, bank, rng, drawn):
    """The teacher: 21 latents at once behind a context."""
    clips, batch = inputs.clips, preset.batch
    # a real past as memory would hold it, and the 21 latents that follow
    history = clips.draw_history(rng, batch, TARGET_CHUNKS)
    # some samples have no text, some no context, and start where a video starts
    has_context = torch.from_numpy(rng.random(batch) >= NO_CONTEXT)
    has_text = torch.from_numpy(rng.random(batch) >= NO_TEXT).to(inputs.device)
    first = CHUNK * history.chunk * has_context
    features = clips.text(history.clip)
    nothing = inputs.features([""] * batch)
    nothing = F.pad(nothing, (0, 0, 0, features.shape[1] - nothing.shape[1]))
    features = torch.where(has_text[:, None, None], features, nothing)
    context = clips.frames(history.clip, history.frame)
    x0 = clips.frames(history.clip, first[:, None] + torch.arange(erft.TARGET))
    # one noise level a sample
    t = shifted(torch.rand(batch), preset.shift).to(x0.device)
    noise = torch.randn(x0.shape, device=x0.device)
    # a generated past is never clean
    context = augment_context_noise(context, preset.context_noise)
    # with and without context: two lengths, so two passes; sharded networks want as many in all processes
    every = torch.arange(batch)
    groups = every.split(1) if cfg.wan else [every[has_context], every[~has_context]]
    loss = 0.
    for rows in groups:
        if not len(rows):
            continue
        places = context.shape[1] if has_context[rows[0]] else 0
        rows = rows.to(x0.device)
        with inputs.autocast:
            loss += erft.teacher_step(
                inputs.dit, bank, int(rng.integers(2 ** 62)), context[rows, :places], x0[rows],
                noise[rows], t[rows], features[rows], inputs.grid, preset.errors, len(rows) / batch)
    return {"loss": loss, "errors": float(bank.count.sum())}


# ---- the stages --------------------------------------------------------------------------------------------

@dataclass
class Stage:
    nets: dict  # name -> network that is trained, averaged and saved; a critic is only trained
    # of an update, in order: whose it is ("critic" or "net"), and (rng, drawn) -> numbers to log
    passes: list
    # (rng, share of the updates that is done) -> `drawn`, what a pass is like in all processes
    draw: object = lambda rng, done: None
    teacher: DiT = None  # frozen
    # what a checkpoint holds besides: an erft.ErrorBank, data.Shuffled prompts
    states: dict = field(default_factory=dict)


def make_stage(cfg, part, preset, inputs):
    if preset.teacher:
        return Distillation(cfg, part, preset, inputs)
    if part == "vae":
        run_pass = partial(vae_pass, inputs, preset.batch)
        return Stage({part: inputs.vae}, [("net", run_pass)])
    nets = {part: inputs.dit}
    # teacher forcing on real pasts; trains the text encoder too
    if part == "init_ar":
        if inputs.encoder:
            nets["text"] = inputs.encoder
        histories = causal.FOLDER_HISTORIES if cfg.data else causal.HISTORIES
        run_pass = partial(teacher_forcing_pass, inputs, preset)
        return Stage(nets, [("net", run_pass)], partial(causal.draw_kind, histories))
    if part == "init_ode":
        run_pass = few_steps_pass(cfg, preset, inputs)
        return Stage(nets, [("net", run_pass)])
    # a teacher: the small one recalls more with fresh noise between its steps than along the ODE
    inputs.sampler = Sampler(50, renoise=False) if cfg.wan else Sampler(TEACHER_STEPS)
    bank = erft.ErrorBank(inputs.latent, shift=preset.shift)
    run_pass = partial(teacher_pass, cfg, preset, inputs, bank)
    return Stage(nets, [("net", run_pass)], states={"bank": bank})


def few_steps_pass(cfg, preset, inputs):
    """init_ode: regression to the causal model's own trajectories at the levels that the student will use."""
    inputs.sampler = replace(inputs.sampler, renoise=True)
    captions = causal.ode_captions(inputs.prompts, cfg.seed)
    chunks, together = (TARGET_CHUNKS, 1) if cfg.wan else (causal.ODE_CHUNKS, 32)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bool(cfg.wan)):
        trajectories = causal.ode_trajectories(Path(cfg.out, "cache"), inputs, captions, chunks, together)
    return partial(trajectory_pass, inputs, preset.batch, captions, trajectories)


class Distillation(Stage):
    """
    stage1: DMD in the first 5 s. stage2: contextual DMD behind long rollouts of the student's own. Every pass
    has a rollout of its own.
    """
    def __init__(self, cfg, part, preset, inputs):
        self.preset, self.inputs = preset, inputs
        # real score, and the critic, which starts from it
        if cfg.wan:
            self.teacher = load_wan_part(cfg, preset.teacher, cfg.teacher, inputs.device).dit
        else:
            self.teacher, _ = load_part(cfg, preset.teacher, cfg.teacher, inputs.device)
        self.critic = copy.deepcopy(self.teacher)
        self.nets = {part: inputs.dit, "critic": self.critic}
        self.passes = [("critic", self.critic_pass)] * preset.critic_passes
        self.passes.append(("net", self.student_pass))
        self.levels = schedule(inputs.sampler.steps, inputs.sampler.shift)
        self.negative = inputs.features([NEGATIVE] * preset.batch) if preset.guidance != 1 else None
        self.prompts = Shuffled(inputs.prompts, cfg.seed)
        self.states = {"prompts": self.prompts}

    def draw(self, rng, done):
        """L: chunks of the rollout; r: exit step, if there is one"""
        longest = dmd.longest_rollout(done, self.preset.shortest, self.preset.longest, self.preset.ramp)
        drawn = {"L": int(rng.integers(self.preset.shortest, longest + 1))}
        if not self.preset.all_steps:
            drawn["r"] = int(rng.integers(len(self.levels)))
        return drawn

    def rollout(self, rng, drawn, for_backward):
        """
        A batch of the student's own -> text features (b of trace.x), dmd.RolloutTrace, and for the scores a
        noise level (b,) and noise
        """
        inputs, batch = self.inputs, self.preset.batch
        # prompts, and a seed for each video
        if inputs.prompts:
            captions = self.prompts.take(batch)
        else:
            numbers = rng.integers(world.HELD_OUT, size=batch)
            captions = [world.make_world(WorldSpec(int(i))).caption for i in numbers]
        seeds = rng.integers(2 ** 62, size=batch)
        features = inputs.features(captions)

        def fresh_noise(chunk, step):
            return draw_noise(seeds, chunk, step, (CHUNK, *inputs.latent), inputs.device)

        # Algorithm 1; the target is the last 21 latents
        with torch.no_grad(), inputs.autocast:
            roll = inputs.rollout(inputs.dit.text(features))
            trace = dmd.rollout(roll, self.levels, drawn.get("r"), fresh_noise, drawn["L"], TARGET_CHUNKS,
                                for_backward)
        # all of it was denoised in full: the critic learns from more than its end
        if self.preset.all_steps and not for_backward:
            keep = torch.stack(roll.kept, dim=1)
            trace.context, trace.x = dmd.targets_of(trace.video, keep, roll.memory.policy, TARGET_CHUNKS)
            features = features.repeat(len(trace.x) // batch, 1, 1)
        if not self.preset.sees_context:
            trace.context = trace.context[:, :0]
        t = dmd.score_level(torch.rand(len(trace.x)), inputs.sampler.shift).to(inputs.device)
        return features, trace, t, torch.randn(trace.x.shape, device=inputs.device)

    def critic_pass(self, rng, drawn):
        features, trace, t, noise = self.rollout(rng, drawn, for_backward=False)
        with self.inputs.autocast:
            loss, error = dmd.critic_step(self.critic, features, trace, t, noise, self.inputs.grid)
        return {"critic_loss": loss} | error_by_level("fake", error, t)

    def student_pass(self, rng, drawn):
        features, trace, t, noise = self.rollout(rng, drawn, for_backward=True)
        with self.inputs.autocast:
            norm, error = dmd.student_step(
                self.inputs.dit, self.teacher, self.critic, features, trace, t, noise,
                self.inputs.grid, self.preset.guidance, self.negative)
        numbers = {"norm": norm.mean().item(), "std": trace.x.std().item()}
        return drawn | numbers | error_by_level("real", error, t) | kept_and_oldest(trace.rollout)


def error_by_level(name, error, t):
    """error, t (b,) -> mean in each quarter of the noise levels: name_0 (little noise) .. name_3"""
    quarter = (4 * t).long()
    return {f"{name}_{i}": error[quarter == i].mean().item() for i in quarter.unique().tolist()}


def kept_and_oldest(roll):
    """Of a finished rollout: share of tested chunks that were kept; oldest keyframe's age, s"""
    tested = torch.stack(roll.kept, dim=1)[:, ::roll.memory.policy.interval]
    found = {"kept": tested.float().mean().item()}
    if roll.memory.slow:
        age = CHUNK * roll.chunk - roll.memory.slow.frame[:, 0]
        found["oldest"] = age.float().mean().item() / 4
    return found
