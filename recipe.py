"""
The recipe: the parts of each stage, and how each of them is trained, in the small world and at full size.

    python train.py --stage all    # trains every part by it

References: Self-Forcing, arXiv 2506.08009 (learning rates, EMA and guidance of the full size).
Leaves out: schedules of their own for each network of a part.
"""
import hashlib
from dataclasses import dataclass, field, replace

from erft import INJECTED

PARTS = {  # stage: its parts in order; a part is one run with a folder and weights of its own
    "vae": ["vae"],
    "init": ["init_ar", "init_ode"],
    "teacher": ["teacher"],
    "teacher_plain": ["teacher_plain"],
    "1": ["stage1"],
    "2": ["stage2"],
    "2_none": ["stage2_none"],
}
PARTS["all"] = sum(PARTS.values(), [])


@dataclass(frozen=True)
class Preset:
    updates: int
    lr: float                   # peak
    start: str = ""             # whose weights it starts from; "" = nothing
    seconds: float = field(default=0., repr=False)  # an update, about, on two cores: no part of hash_recipe
    batch: int = 16             # clips a process and pass
    warmup: int = 100           # updates
    ema_decay: float = .995     # of the averaged weights, an update ...
    ema_start: int = 0          # ... from this one on: before it they are the weights (0: a warm-up instead)
    shift: float = 5.           # training noise levels: uniform, shifted by this (stages 1, 2: the sampler's)
    context_noise: float = .15  # most noise on a latent of a clean past: one of one's own making is not clean
    save_every: int = 250       # updates: checkpoints,
    strip_every: int = 500      # strips,
    probe_every: int = 250      # and probes; 0 = never
    errors: float = INJECTED  # teacher: share of the samples that get errors
    # stages 1 and 2
    teacher: str = ""           # whose weights the real score has
    shortest: int = 7           # chunks of a rollout: at least,
    longest: int = 7            # at most,
    ramp: float = 1.            # from this share of the updates on
    critic_lr: float = 6.       # times lr
    critic_beta1: float = .9    # of the critic's AdamW; the student's is 0
    beta2: float = .99          # of critic and student
    critic_passes: int = 2      # updates of the critic before each of the student's
    critic_alone: int = 0       # updates at first in which only the critic moves: it starts as the teacher
    all_steps: bool = True      # the gradient goes through all steps of a chunk, not through one exit step
    clip: float = 1.            # most gradient norm
    guidance: float = 1.        # of the real score
    sees_context: bool = True   # stage 2: do teacher and critic see what the student's memory held?


def hash_recipe(preset):
    """16 letters that tell these settings from others; they stand in the facts of what was trained by them"""
    return hashlib.sha256(repr(preset).encode()).hexdigest()[:16]


DISTIL = Preset(updates=0, lr=0., warmup=1, ema_decay=.9, strip_every=20, probe_every=20, save_every=20)
# small batches and large rates: here many updates teach more than many samples do
MANY_STEPS = Preset(updates=0, lr=0., batch=8, save_every=500, strip_every=1000, probe_every=1000)
TINY = {
    "vae": Preset(1400, 2e-3, seconds=1., batch=8, ema_decay=.99, probe_every=0),
    "init_ar": replace(MANY_STEPS, updates=7000, lr=6e-3, seconds=.44),
    "init_ode": Preset(500, 2e-4, "init_ar", seconds=1., ema_decay=.99),
    "teacher": replace(MANY_STEPS, updates=4000, lr=2.5e-3, start="init_ar", seconds=.45),
    # straight from init_ar; critics of both stages learn at 1.2e-4
    "stage1": replace(DISTIL, updates=80, lr=1e-5, start="init_ar", seconds=6., teacher="teacher",
                      critic_alone=60, critic_lr=12.),
    # The ramp is over before the student moves: it is for the critic. Of 12 keyframes at most 10 were kept by
    # then, the others are latents that came first; a video of a minute has 12.
    "stage2": replace(DISTIL, updates=100, lr=2e-5, start="stage1", seconds=15., teacher="teacher",
                      critic_alone=60, shortest=14, longest=34, ramp=.25),
}
# With --wan, one clip a pass: processes times --accumulate should be 64 (teacher and init_ar: 8).
# Guidance is written 3 and 5 where it is cond + w (cond - uncond).
FULL_SIZE = Preset(updates=0, lr=0., batch=1, context_noise=0., probe_every=0)
FULL_DISTIL = replace(FULL_SIZE, lr=2e-6, warmup=1, ema_decay=.99, ema_start=40, strip_every=100,
                      critic_lr=.2, critic_beta1=0., beta2=.999, critic_passes=5, all_steps=False, clip=10.)
WAN = {
    "init_ar": replace(FULL_SIZE, updates=5000, lr=1e-5, start="base"),
    "init_ode": replace(FULL_SIZE, updates=3000, lr=2e-6, start="init_ar", warmup=1, ema_decay=.99, clip=10.),
    "teacher": replace(FULL_SIZE, updates=8000, lr=1e-5, start="base"),
    "stage1": replace(FULL_DISTIL, updates=120, start="init_ode", teacher="base", guidance=4., save_every=20),
    # a short ramp: half of the rollouts begin with 6 keyframes or more in slow memory
    "stage2": replace(FULL_DISTIL, updates=100, start="stage1", teacher="teacher", guidance=6., save_every=16,
                      shortest=14, longest=40, ramp=.1),
}
for presets in (TINY, WAN):  # the ablations differ in one thing each
    presets["teacher_plain"] = replace(presets["teacher"], errors=0.)
    presets["stage2_none"] = replace(presets["stage2"], sees_context=False)
