"""
The context teacher, and how it learns to go on from pasts that carry its own errors (Error-Recycling
Fine-Tuning).

The teacher sees 21 clean context latents and denoises the 21 latents that follow, all at once: context
attends to context, target to both. A student's past is never clean, so the teacher is fine-tuned on pasts
with errors in them: the residuals of its own one-step predictions are kept in a bank by noise level, and put
into later samples.

    Context Forcing, section 3.4:  X~ = X + 1[injected] e_drift,  e_drift from the bank of past residuals
    here:  x~_t = (1 - t) (x0 + e) + t (noise + e'),   v* = (noise + e') - x0,   e and e' mostly 0

    X = context; e_drift and e = bank.draw() of latents, e' = bank.draw() of noise; the x0 of the target v*
    stays clean, or the teacher would learn to reproduce errors.

    python erft.py             # an error goes into the past and into the input, and stays out of the target

References: Context Forcing, arXiv 2602.06028, sections 3.3 and 3.4; Stable Video Infinity, arXiv 2510.09212.
Leaves out: a similarity rule for replacement (random here), errors of whole rollouts.
"""
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from flow import add_noise, denoise, draw_noise, flow_matching_loss, over_frames, schedule
from memory import CHUNK, PRESETS, frames_in_memory
from rope import rope_cos_sin

TARGET = 21            # latents that a teacher denoises at once
INJECTED = 0.5         # share of the samples that get errors; of those ...
CONTEXT_CHANCE = 0.9   # ... how many get them in the context,
LATENT_CHANCE = 0.9    # in the latents that are noised,
NOISE_CHANCE = 0.01    # and in the noise
SINK_CHANCE = 0.5      # of a context chunk in the sink: drift is everywhere, an anchor is sometimes clean
MODULATION = 0.3       # errors are scaled by 1 +- this
KEEP_CLEAN = 0.1       # chance that a sample without injection gives its errors to the bank: they are small
OF_LATENTS, OF_NOISE = 0, 1  # the two halves of the bank


# ---- the teacher -------------------------------------------------------------------------------------------

def predict_velocity(net, context, xt, t, text, grid):
    """
    The one forward of teacher and critic: training, real score and fake score.
    context  (b, n, c, h, w) clean latents in the order of time, n = 0 allowed
    xt, t    (b, f, c, h, w) the target, noised; (b, f)
    text     net.text(features) of the prompts
    grid     latent rows and columns after patching
    returns  v (b, f, c, h, w) of the target; positions are 0..n + f - 1
    """
    n, f = context.shape[1], xt.shape[1]
    # positions follow one another, context first
    rope = rope_cos_sin(torch.arange(n + f, device=xt.device), *grid, net.config.head_dim)
    # the context is clean, t = 0, and sees only itself: prefix
    x = torch.cat([context, xt], dim=1)
    v, _ = net(x, F.pad(t, (n, 0)), text, rope, prefix=n, with_kv=False)
    return v[:, n:]


@torch.no_grad()
def extend(net, history, text, grid, sampler, seeds):
    """
    The teacher goes on: 21 latents after a history, all at once.
    history  (b, 3m, c, h, w), m = 0: from text alone
    returns  (b, 21, c, h, w)
    """
    m = history.shape[1] // CHUNK
    # the context is what slow-fast memory would hold, had it kept every second chunk
    keep = torch.arange(m)[None] % 2 == 0
    frame = frames_in_memory(PRESETS["slowfast"], keep, evict_first=False)[-1][0]
    context = history[:, frame.to(history.device)]

    def fresh_noise(step):
        return draw_noise(seeds, m, step, (TARGET, *history.shape[2:]), history.device)

    def predict(x, t, level):
        return predict_velocity(net, context, x, t, text, grid)

    levels = schedule(sampler.steps, sampler.shift)
    x0, _ = denoise(predict, fresh_noise(0), levels, fresh_noise, sampler.renoise)
    return x0


# ---- its errors --------------------------------------------------------------------------------------------

@dataclass
class Residuals:
    """What the samples of one batch give to the bank."""
    seed: int                # of the random choices of ErrorBank.push
    t: torch.Tensor          # (b,) noise levels
    latent: torch.Tensor     # (b, f, c, h, w) error of the predicted latents
    noise: torch.Tensor      # (b, f, c, h, w) error of the predicted noise
    injected: torch.Tensor   # (b,) bool: did the sample carry errors itself?


class ErrorBank:
    """
    Residuals of latents and of noise, by noise level, a chunk each. It lives on the CPU in bfloat16; every
    place is bounded, and a full one replaces at random.
    latent         (c, h, w) of one latent
    levels, shift  noise levels: those of so many inference steps
    size           errors a level
    """
    def __init__(self, latent, levels=50, size=32, shift=5.0):
        self.levels = torch.tensor(schedule(levels, shift))
        self.size = size
        self.errors = torch.zeros(2, levels, size, CHUNK, *latent, dtype=torch.bfloat16)
        self.count = torch.zeros(2, levels, dtype=torch.long)
        self.pending = []  # Residuals of this process that no bank has yet

    def state_dict(self):
        return {"errors": self.errors, "count": self.count}

    def load_state_dict(self, state):
        self.errors = state["errors"].clone()
        self.count = state["count"].clone()

    def bucket(self, t):
        """(b,) noise levels -> (b,) index of the nearest level of the bank"""
        return (t.cpu()[:, None] - self.levels).abs().argmin(1)

    def push(self, found):
        """Residuals into the bank; of samples without injection a tenth, or small errors would flood it."""
        rng = np.random.default_rng([found.seed, 1])
        taken = found.injected.numpy() | (rng.random(len(found.t)) < KEEP_CLEAN)
        buckets = self.bucket(found.t).tolist()
        for i in taken.nonzero()[0]:
            for half, error in ((OF_LATENTS, found.latent[i]), (OF_NOISE, found.noise[i])):
                for chunk in error.split(CHUNK):
                    # into the next free place, or in place of a random one
                    place = int(self.count[half, buckets[i]])
                    if place < self.size:
                        self.count[half, buckets[i]] += 1
                    else:
                        place = int(rng.integers(self.size))
                    self.errors[half, buckets[i], place] = chunk

    def recycle(self, batches):
        """What was pending in all processes goes into every bank, whatever their number in the same order."""
        for found in sorted(batches, key=lambda found: found.seed):
            self.push(found)
        self.pending = []

    def draw(self, rng, half, level=None):
        """One error (3, c, h, w), at a level of the bank or (None) at any; zeros where there is none yet."""
        filled = self.count[half].nonzero()[:, 0].tolist()
        if level is not None:
            filled = [level] if level in filled else []
        if not filled:
            return torch.zeros(self.errors.shape[3:])
        level = filled[int(rng.integers(len(filled)))]
        scale = rng.uniform(1 - MODULATION, 1 + MODULATION)
        place = int(rng.integers(int(self.count[half, level])))
        return self.errors[half, level, place].float() * scale

    def inject(self, rng, context, x0, noise, t, p=INJECTED):
        """
        context, x0, noise  (b, f, c, h, w), t (b,)
        rng                 serves nothing else, so p = 0 is plain fine-tuning bit for bit
        returns             the three with errors added, and (b,) bool: was this sample chosen?
        """
        context, x0, noise = context.clone(), x0.clone(), noise.clone()
        chosen = torch.from_numpy(rng.random(len(t)) < p)
        buckets = self.bucket(t).tolist()
        for i in chosen.nonzero()[:, 0].tolist():
            in_context, in_latents, in_noise = rng.random(3) < (CONTEXT_CHANCE, LATENT_CHANCE, NOISE_CHANCE)
            # into the past: of any level, an error of its own every three latents
            if in_context:
                for at in range(0, context.shape[1], CHUNK):
                    if at >= CHUNK or rng.random() < SINK_CHANCE:
                        context[i, at:at + CHUNK] += self.draw(rng, OF_LATENTS).to(context)
            # into what will be noised, and into the noise: of the level at which the sample is noised
            for at in range(0, x0.shape[1], CHUNK):
                if in_latents:
                    x0[i, at:at + CHUNK] += self.draw(rng, OF_LATENTS, buckets[i]).to(x0)
                if in_noise:
                    noise[i, at:at + CHUNK] += self.draw(rng, OF_NOISE, buckets[i]).to(noise)
        return context, x0, noise, chosen


# ---- the update: adds to .grad, and leaves the step to the optimizer ---------------------------------------

def teacher_step(net, bank, seed, context, x0, noise, t, features, grid, p=INJECTED, share=1.):
    """
    Flow matching on the target given the context, with errors in what the network sees. Its own errors wait
    in bank.pending.
    context              (b, n, c, h, w)
    x0, noise            (b, f, c, h, w), t (b,) noise levels
    features             text features (b, m, text_dim)
    p                    share of the samples that get errors; p = 0 or an empty bank: plain fine-tuning
    share                of a batch that comes in several calls: the loss counts so much
    returns              loss, times share
    """
    # errors go into all that the network sees
    rng = np.random.default_rng([seed, 0])
    context, x0_seen, noise, injected = bank.inject(rng, context, x0, noise, t, p)
    level = t[:, None].expand(x0.shape[:2])
    xt = add_noise(x0_seen, noise, level)
    v = predict_velocity(net, context, xt, level, net.text(features), grid)
    # ... but not into the x0 that it shall predict
    v_star = noise - x0
    loss = share * flow_matching_loss(v, v_star).mean()
    loss.backward()
    # its own errors, for later samples. They are taken from v, not from x0 - truth: after an injection that
    # difference would hold the injected error again, and errors would pile up in the bank
    off = (v.detach() - v_star).float()
    level = over_frames(level)
    of_latents, of_noise = -level * off, (1 - level) * off
    residuals = [error.bfloat16().cpu() for error in (of_latents, of_noise)]  # as the bank has them
    bank.pending.append(Residuals(seed, t.cpu(), *residuals, injected))
    return loss.item()


if __name__ == "__main__":
    # A "network" that predicts a velocity 0.5 too high, whatever it sees: from the second batch on its errors
    # come back in what it sees, and its distance to the clean target stays what it was.
    class Biased:
        bias = torch.tensor(.5, requires_grad=True)
        config = SimpleNamespace(head_dim=32)

        def text(self, features):
            return features

        def __call__(self, x, t, text, rope, prefix, with_kv):
            context, target = x.split([prefix, x.shape[1] - prefix], dim=1)
            print(f"    sees a context of {context.mean():.3f}, a target of {target.mean():.3f};", end=" ")
            return x * 0 - 1 + self.bias, None

    bank = ErrorBank((16, 4, 8))
    net = Biased()
    ones = torch.ones(1, 21, 16, 4, 8)
    t = torch.tensor([.5])
    print("context and x0 are 1, noise is 0, t = 0.5: x_t is 0.5, and v* = noise - x0 is -1")
    for batch in range(4):
        print(f"batch {batch}, {int(bank.count.sum())} errors in the bank:")
        loss = teacher_step(net, bank, batch, ones, ones, 0 * ones, t, None, (2, 4), p=1)
        print(f"its v is off v* by {loss ** .5:.3f}")
        bank.recycle(bank.pending)
