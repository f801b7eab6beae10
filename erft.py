"""
The context teacher, and how it learns to go on from pasts that carry its own errors (Error-Recycling Fine-Tuning).

The teacher sees 21 clean context latents and denoises the 21 latents that follow, all at once: context attends to context,
target to both. A student's past is never clean, so the teacher is fine-tuned on pasts with errors in them: the residuals of
its own one-step predictions are kept in a bank by noise level, and put into later samples. The target stays clean.

    python erft.py             # one injection into a small context, printed

References: Context Forcing, arXiv 2602.06028, section 3.3; Stable Video Infinity, arXiv 2510.09212 (error recycling).
Leaves out: a similarity rule for replacement (random here), errors of whole rollouts.
"""
import numpy as np
import torch

from flow import add_noise, denoise, draw_noise, flow_matching_loss, schedule
from memory import CHUNK, PRESETS, frames_in_memory
from rope import rope_cos_sin

TARGET = 21                    # latents a teacher denoises at once
CLEAN, CONTEXT, LATENT, NOISE = .5, .9, .9, .01  # chance of no injection at all; else of one into context, latents, noise
MODULATION = .3                # errors are scaled by 1 +- this
KEEP_CLEAN = .1                # chance that a sample without injection gives its errors to the bank: they are small


def predict_velocity(net, context, xt, t, text, grid):
    """
    The one forward of teacher and critic: training, real score and fake score.
    context  (b, n, c, h, w) clean latents in the order of time, n = 0 allowed; xt (b, f, c, h, w) noised; t (b, f)
    returns  v (b, f, c, h, w) of the target; positions are 0..n + f - 1
    """
    n, config = context.shape[1], net.config
    rope = rope_cos_sin(torch.arange(n + xt.shape[1], device=xt.device), *grid, config.dim // config.heads)
    level = torch.cat([torch.zeros(context.shape[:2], device=t.device), t], dim=1)
    return net(torch.cat([context, xt], dim=1), level, text, rope, prefix=n)[0][:, n:]


@torch.no_grad()
def extend(net, history, text, grid, sampler, seeds, keep=None):
    """
    The teacher goes on: 21 latents after a history, all at once.
    history  (b, 3m, c, h, w), m = 0: from text alone; keep (b, m) bool: which chunks memory kept (default: every second)
    returns  (b, 21, c, h, w)
    """
    b, m = len(history), history.shape[1] // CHUNK
    keep = torch.arange(m).expand(b, -1) % 2 == 0 if keep is None else keep
    src = frames_in_memory(PRESETS["slowfast"], keep, evict_first=False)[-1].to(history.device)
    context = history[torch.arange(b)[:, None], src]
    noise = draw_noise(seeds, m, 0, (TARGET, *history.shape[2:]), history.device)

    def predict(x, level):
        t = torch.full(x.shape[:2], level, device=x.device)
        return predict_velocity(net, context, x, t, text, grid)
    return denoise(predict, noise, schedule(sampler.steps, sampler.shift), None, renoise=False)[0]


class ErrorBank:
    """
    Residuals by noise level, a chunk each: bank x of predicted latents, bank noise of predicted noise. It lives on the CPU
    in bfloat16; every place is bounded, and a full one replaces at random.
    latent   (c, h, w) of one latent
    levels   noise levels, those of `levels` inference steps at the given shift; size: errors a level
    """
    def __init__(self, latent, levels=50, size=32, shift=5.0):
        self.levels = torch.tensor(schedule(levels, shift))
        self.errors = torch.zeros(2, levels, size, CHUNK, *latent, dtype=torch.bfloat16)
        self.count = torch.zeros(2, levels, dtype=torch.long)
        self.pending = []  # (seed, what push takes after rng): errors of this process that no bank has yet

    def state_dict(self):
        return {"errors": self.errors, "count": self.count}

    def load_state_dict(self, state):
        self.errors, self.count = state["errors"].clone(), state["count"].clone()

    def bucket(self, t):
        """(b,) noise levels -> (b,) index of the nearest level of the bank"""
        return (t.cpu()[:, None] - self.levels).abs().argmin(1)

    def push(self, rng, t, error_x, error_noise, perturbed):
        """
        t (b,) of each sample; error_x, error_noise (b, f, c, h, w) from errors_of(); perturbed (b,) bool: was anything
        injected? Only a tenth of the others is taken, or errors of clean samples would flood the bank.
        """
        taken = perturbed.numpy() | (rng.random(len(t)) < KEEP_CLEAN)
        for i, level in enumerate(self.bucket(t).tolist()):
            for kind, error in enumerate((error_x, error_noise)) if taken[i] else ():
                for chunk in error[i].detach().cpu().split(CHUNK):
                    place = int(self.count[kind, level])
                    place = place if place < self.errors.shape[2] else int(rng.integers(self.errors.shape[2]))
                    self.errors[kind, level, place] = chunk
                    self.count[kind, level] += self.count[kind, level] < self.errors.shape[2]

    def recycle(self):
        """What is pending in all processes goes into every process's bank, in the order of ranks: all must come here."""
        parts = [self.pending]
        if torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.pending)
        for seed, errors in sum(parts, []):
            self.push(np.random.default_rng([seed, 1]), *errors)
        self.pending = []

    def draw(self, rng, kind, level=None):
        """One error (3, c, h, w) of bank `kind` (0 latents, 1 noise), at a level or any; zeros where there is none yet."""
        filled = self.count[kind].nonzero()[:, 0].tolist() if level is None else [level] * bool(self.count[kind, level])
        if not filled:
            return torch.zeros(self.errors.shape[3:])
        level = filled[int(rng.integers(len(filled)))]
        scale = rng.uniform(1 - MODULATION, 1 + MODULATION)
        return self.errors[kind, level, int(rng.integers(int(self.count[kind, level])))].float() * scale

    def inject(self, rng, context, x0, noise, t, sink=CHUNK, p=1 - CLEAN):
        """
        context, x0, noise (b, f, c, h, w), t (b,) -> the three with errors added, and (b,) bool: was this sample chosen?
        Every three latents of the context get an error of their own, the first `sink` with half the chance: drift is
        everywhere, an anchor is sometimes clean. rng serves nothing else, so p = 0 is plain fine-tuning bit for bit.
        """
        context, x0, noise = context.clone(), x0.clone(), noise.clone()
        chosen = torch.from_numpy(rng.random(len(t)) < p)
        levels = self.bucket(t).tolist()
        for i in chosen.nonzero()[:, 0].tolist():
            in_context, in_latent, in_noise = rng.random(3) < (CONTEXT, LATENT, NOISE)
            for at in range(0, context.shape[1], CHUNK) if in_context else ():
                if at >= sink or rng.random() < .5:
                    part = context[i, at:at + CHUNK]
                    part += self.draw(rng, 0)[:len(part)].to(part)
            for at in range(0, x0.shape[1], CHUNK):
                if in_latent:
                    x0[i, at:at + CHUNK] += self.draw(rng, 0, levels[i]).to(x0)
                if in_noise:
                    noise[i, at:at + CHUNK] += self.draw(rng, 1, levels[i]).to(noise)
        return context, x0, noise, chosen


def errors_of(v, v_star, t):
    """
    One-step residuals of latents and noise: -t (v - v*), (1 - t)(v - v*). Taken from v, not from x0 - truth: after an
    injection that difference would hold the injected error again, and errors would pile up in the bank.
    """
    off, t = (v - v_star).float(), t[:, None, None, None, None]
    return -t * off, (1 - t) * off


def teacher_loss(net, bank, rng, context, x0, noise, t, text, grid, p=1 - CLEAN, watched=None, weight=0.):
    """
    Flow matching on the target given the context. context (b, n, c, h, w), x0 and noise (b, f, c, h, w), t (b,) levels;
    watched, weight as in flow.flow_matching_loss
    returns  (b,) losses, and what bank.push takes. The network sees perturbed latents; v* = noise~ - x0 has the clean x0,
             or it would learn to reproduce errors. p = 0 or an empty bank: plain fine-tuning.
    """
    seen, x0_seen, noise_seen, chosen = bank.inject(rng, context, x0, noise, t, p=p)
    at = t[:, None].expand(-1, x0.shape[1])
    v = predict_velocity(net, seen, add_noise(x0_seen, noise_seen, at), at, text, grid)
    v_star = noise_seen - x0
    return flow_matching_loss(v, v_star, at, watched, weight), (t, *errors_of(v.detach(), v_star, t), chosen)


if __name__ == "__main__":
    torch.manual_seed(0)
    bank, rng, t = ErrorBank((16, 4, 8)), np.random.default_rng(0), torch.full((2,), .7)
    print(f"error bank: {bank.errors.nbytes / 2 ** 20:.0f} MiB at most, {tuple(bank.errors.shape)}")
    x0 = torch.randn(2, 21, 16, 4, 8)
    bank.push(rng, t, *errors_of(x0 + .1, x0, t), torch.tensor([True, True]))
    context, _, _, chosen = bank.inject(rng, x0, x0, x0, t, p=1)
    print("moved context latents by", (context - x0)[0].mean((1, 2, 3)).numpy().round(3))
