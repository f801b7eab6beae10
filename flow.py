"""
Flow matching in one convention, and the one rollout that sampling and every training stage share.

t is the noise level: x_t = (1 - t) x0 + t noise, and the network predicts v = noise - x0. A video is made chunk by chunk:
look at the memory, denoise the chunk in a few steps, run it once more clean (t = 0) and commit the keys and values of that
pass to the memory. Keys come out of the memory un-rotated and are rotated once per chunk, at bounded positions.

    python flow.py             # prints the schedule, and the noise left after each step

References: Flow matching / rectified flow, arXiv 2210.02747, 2209.03003; Self-Forcing, arXiv 2506.08009 (chunk loop, clean
pass); Context Forcing, arXiv 2602.06028. Their scheduler looks sigma up in a table of 1,000 rows, so that t = 0 means
0.005; here it is closed form and t = 0 is clean.
Leaves out: higher-order solvers.
"""
from dataclasses import dataclass

import numpy as np
import torch

from memory import CHUNK, Memory, similarity, size, summary
from rope import bounded, rotate, table, unbounded


def shifted(u, shift):
    """Wan's timestep shift: uniform u in [0, 1] -> noise level t in [0, 1]; shift > 1 spends more steps at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(steps, shift):
    """Noise levels of `steps` denoising steps, from 1 down; Self-Forcing's four, shift 5: 1, 0.9375, 0.8333, 0.625."""
    return [shifted(1 - i / steps, shift) for i in range(steps)]


def over_frames(t):
    return t[..., None, None, None]  # (b, f) -> (b, f, 1, 1, 1)


def add_noise(x0, noise, t):
    """x0, noise (b, f, c, h, w), t (b, f) -> x_t = (1 - t) x0 + t noise"""
    return (1 - over_frames(t)) * x0 + over_frames(t) * noise


def x0_from_v(xt, v, t):
    """x0 = x_t - t v, in float32: in bf16 the difference of two large numbers would be noise."""
    return xt.float() - over_frames(t) * v.float()


def v_from_x0(xt, x0, t):
    """v = (x_t - x0) / t, for t > 0"""
    return (xt.float() - x0.float()) / over_frames(t)


def matching(v, v_star, t, watched=None, weight=0.):
    """
    Flow-matching loss of each sample, in which some directions of a latent may count more: the best v stays the same, but
    what is small in pixels and means much (here the sky's hue, which is the compass) is learned in hours instead of days.
    v, v_star  (b, f, c, h, w); t (b, f); watched None or (k, c h w): the error of x0 = t (v - v_star) along these counts too
    returns    (b,)
    """
    off = v.float() - v_star
    loss = off.square().mean((1, 2, 3, 4))
    if watched is not None:
        loss = loss + weight * (t[..., None] * off.flatten(2) @ watched.T).square().sum(-1).mean(1)
    return loss


def guide(cond, uncond, w):
    """Classifier-free guidance uncond + w (cond - uncond): w = 1 is no guidance; Self-Forcing's 3.0 is our 4.0."""
    return uncond + w * (cond - uncond)


def draw_noise(seeds, chunk, step, shape, device="cpu"):
    """
    Noise of one denoising step, one video a seed: keyed by (seed, chunk, step), so a video does not depend on what else
    is in its batch, on its length, or on the device. (torch's CPU generator keeps 32 bits of a seed; Philox keeps all.)
    returns  (b, *shape) float32
    """
    place = (step >> 8) << 40 | chunk << 8 | step & 255  # one number for (chunk, step), however many steps
    draws = [np.random.Generator(np.random.Philox(key=[int(seed), place])).standard_normal(shape, np.float32)
             for seed in seeds]
    noise = torch.from_numpy(np.stack(draws))
    return (noise.pin_memory() if torch.device(device).type == "cuda" else noise).to(device, non_blocking=True)  # no waiting


@dataclass(frozen=True)
class Sampler:
    """How a network wants to be sampled; travels in its weights' metadata."""
    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    renoise: bool = True   # fresh noise between steps (few-step students); False: Euler steps
    tau: float = 0.95      # surprisal threshold of the memory
    pool: str = "mean"     # how keys are compared (memory.summary)


class Rollout:
    """
    One batch of videos under way: look() at the memory, make a chunk however you like, commit() it.
    net        a DiT; text: net.text(features), (b, ...)
    grid       latent rows and columns after patching
    positions  "bounded" (0..20 for ever) or "unbounded" (absolute, up to 1,024 latents)
    compiled   None, or a compiled net: used when memory is full, because from then on no shape changes any more
    """
    def __init__(self, net, text, policy, grid, positions="bounded", pool="mean", compiled=None):
        self.net, self.text, self.grid, self.pool, self.positions, self.compiled = net, text, grid, pool, positions, compiled
        self.memory, self.chunk, self.before, self.tables = Memory(policy), 0, None, {}
        self.sims, self.keeps = [], []  # one (b,) a chunk, on the device: what the memory decided and why

    def rope(self, src, new=None):
        """
        Tables for the held latents and for the three after them: src (b, f), new (b, 3) frame numbers, None = the next chunk.
        Bounded ones depend only on how many are held: made once.
        """
        d, n, device = self.net.config.dim // self.net.config.heads, src.shape[1], self.text[0][0].device
        if self.positions == "unbounded":
            at = unbounded(src.to(device), CHUNK * self.chunk, CHUNK) if new is None else (src.to(device), new)
            return [table(p, *self.grid, d) for p in at]
        if n not in self.tables:
            self.tables[n] = [table(p.to(device), *self.grid, d) for p in bounded(n, CHUNK)]
        return self.tables[n]

    def look(self):
        """
        Make room, read, rotate: what the next chunk sees.
        returns  memory (None or one (keys, values) a layer), rope of the chunk's tokens
        """
        self.view = None  # the last chunk's rotated keys make place for this chunk's
        self.memory.make_room(CHUNK)
        self.view = self.view_of(*self.memory.parts())
        return self.view

    def view_of(self, *parts, new=None):
        """
        Lists of memory cells (frame numbers, latents, then keys and values of each layer) -> what look() returns; values
        stay in their parts, uncopied. new: frame numbers of the chunk that looks, None = the next one.
        """
        parts = [p for p in parts if p]
        old, new = self.rope(torch.cat([p[0] for p in parts], dim=1) if parts else torch.zeros(1, 0, dtype=torch.long), new)
        cells = [[z.flatten(1, 2) for z in layer] for layer in list(zip(*parts))[2:]]
        return [(rotate(torch.cat(k, dim=1), old), v) for k, v in zip(cells[::2], cells[1::2])] or None, new

    def run(self, x, t, text=None, tables=None):
        """One pass over the new chunk, after look(): x (b, 3, c, h, w), t (b, 3); tables: net.time(t) if made already."""
        p, seen = self.memory.policy, CHUNK + sum(size(part) for part in self.memory.parts())
        net = self.compiled if self.compiled is not None and seen == p.sink + p.slow + p.fast else self.net
        return net(x, t, text or self.text, self.view[1], self.view[0], *(() if tables is None else (None, 0, tables)))

    @torch.no_grad()
    def recache(self, text):
        """
        The prompt changes, between two chunks: what is held is encoded anew under text (net.text of the new prompt), at
        t = 0, three latents after another, each seeing those before it. Which frames are held does not change.
        """
        self.text, parts, (frames, latents) = text, [], self.memory.read()[:2]
        for part in self.memory.parts():
            del part[2:]  # the old keys and values make place for the new
        for x0, src in zip(latents.split(CHUNK, dim=1), frames.split(CHUNK, dim=1)):
            self.view = self.view_of(*parts, new=src)
            _, kv = self.run(x0, torch.zeros(x0.shape[:2], device=x0.device))
            parts.append([src, x0, *(z.unflatten(1, (CHUNK, -1)) for pair in kv for z in pair)])
        self.before = summary([k for k, _ in kv], self.pool)  # of the last chunk, under the new text
        for i in range(2, len(parts[0])):
            self.memory.rewrite(i, torch.cat([part[i] for part in parts], dim=1))
            for part in parts:
                part[i] = None

    @torch.no_grad()
    def commit(self, x0, keep=None, tables=None):
        """
        Clean pass over the finished chunk and entry into the memory, after look(). x0 (b, 3, c, h, w); keep (b,) bool
        replaces the policy's own decision; tables: net.time(0) if it is made already.
        """
        b = len(x0)
        _, kv = self.run(x0, torch.zeros(b, CHUNK, device=x0.device), tables=tables)
        now = summary([k for k, _ in kv], self.pool)
        sim = torch.ones(b, device=x0.device) if self.before is None else similarity(now, self.before)
        keep = self.memory.policy.decide(self.chunk, sim) if keep is None else keep
        frames = torch.arange(CHUNK * self.chunk, CHUNK * (self.chunk + 1), device=x0.device).expand(b, -1)
        self.memory.push([frames, x0, *(z.unflatten(1, (CHUNK, -1)) for pair in kv for z in pair)], keep)
        self.before, self.chunk = now, self.chunk + 1
        self.sims.append(sim)
        self.keeps.append(keep)


def denoise(predict, x, levels, fresh, renoise=True):
    """
    predict  x_t (b, 3, c, h, w), t (b, 3) -> v
    levels   noise levels from schedule(); x is pure noise at levels[0]
    fresh    step number -> noise of x's shape, for re-noising
    returns  x0 (b, 3, c, h, w) float32
    """
    for j, t in enumerate(levels):
        at = torch.full(x.shape[:2], t, device=x.device)
        v = predict(x, at)
        x0 = x0_from_v(x, v, at)
        if j + 1 < len(levels):
            x = add_noise(x0, fresh(j + 1), torch.full_like(at, levels[j + 1])) if renoise else x + (levels[j + 1] - t) * v
    return x0


@torch.no_grad()
def generate(roll, seeds, chunks, sampler, latent, uncond=None, history=None, texts=None):
    """
    Generator: one finished chunk of latents at a time.
    roll     a Rollout, fresh or under way
    seeds    one a video
    chunks   how many to make, after the history
    latent   (c, h, w) of one latent
    uncond   net.text of the empty prompt, for guidance != 1
    history  None, or real latents (b, 3m, c, h, w) that are committed first
    texts    None, or number of a chunk -> net.text of the prompt that holds from there on
    yields   x0 (b, 3, c, h, w)
    """
    levels, device = schedule(sampler.steps, sampler.shift), roll.text[0][0].device
    tables = {t: roll.net.time(torch.full((len(seeds), CHUNK), t, device=device)) for t in (*levels, 0.)}  # once a video
    for x0 in (history.split(CHUNK, dim=1) if history is not None else ()):
        roll.look()
        roll.commit(x0, tables=tables[0.])
    for _ in range(chunks):
        if texts and roll.chunk in texts:
            roll.recache(texts[roll.chunk])
        roll.look()
        step = iter(levels)

        def fresh(step):
            return draw_noise(seeds, roll.chunk, step, (CHUNK, *latent), device)

        def predict(x, t):
            known = tables[next(step)]
            v = roll.run(x, t, tables=known)[0]
            return v if sampler.guidance == 1 else guide(v, roll.run(x, t, uncond, known)[0], sampler.guidance)

        x0 = denoise(predict, fresh(0), levels, fresh, sampler.renoise)
        roll.commit(x0, tables=tables[0.])
        yield x0


# ---- the same in one pass, for training ----------------------------------------------------------------------------------

def noised(x0, copies, shift):
    """
    x0 (b, f, ...), f a multiple of copies, noised at `copies` levels a sample, spread evenly over 0..1 and shifted
    returns  x_t, t (b, f), v
    """
    u = (torch.rand(len(x0), copies) + torch.rand(len(x0), copies).argsort(1)) / copies
    t = shifted(u, shift).repeat_interleave(x0.shape[1] // copies, 1).to(x0.device)
    noise = torch.randn(x0.shape, device=x0.device)
    return add_noise(x0, noise, t), t, noise - x0


def roughened(x0, most):
    """A clean past as the model will meet it: with up to `most` noise on each latent, still called t = 0."""
    level = torch.rand(len(x0), 1) * most * torch.rand(x0.shape[:2])
    return add_noise(x0, torch.randn_like(x0), level.to(x0.device))


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


def forget(src, gone):
    """Takes latents out of a padded past src (b, p) where gone (b, p) bool says so; what is left closes up, -1 behind it."""
    src = src.masked_fill(gone, -1)
    return src.gather(1, (src < 0).long().argsort(stable=True, dim=1))


def compact(src, copies, gap=0):
    """Bounded positions of a padded past (b, p) and of `copies` of the chunk `gap` chunks on: (b, p + 3 copies)"""
    new = (src >= 0).sum(1, keepdim=True) + CHUNK * gap + torch.arange(CHUNK).repeat(copies)
    return torch.cat([torch.arange(src.shape[1]).expand(len(src), -1), new], 1)


def packed(net, text, past, src, target, positions, own, xt, t, grid):
    """
    Several noised copies of target latents share one clean past: what a Rollout would see, chunk by chunk, in one pass.
    past       (b, p, c, h, w) clean latents of the frame numbers src (b, p), -1 = nothing there
    target     (b, f) frame numbers of all copies; own (f,) which copy a latent belongs to; positions (b, p + f)
    xt, t      (b, f, c, h, w) noised, (b, f)
    returns    v (b, f, c, h, w) of the target
    """
    x, at = torch.cat([past, xt], 1), torch.cat([torch.zeros(src.shape, device=t.device), t], 1)
    rope = table(positions.to(t.device), *grid, net.config.dim // net.config.heads)
    mask = pack_mask(src, target.div(CHUNK, rounding_mode="floor"), own).to(t.device)
    return net(x, at, text, rope, mask=mask)[0][:, src.shape[1]:]


if __name__ == "__main__":
    for shift in (1, 3, 5):
        print(f"shift {shift}: " + ", ".join(f"t = {t:.4f} keeps {1 - t:5.1%} of x0" for t in schedule(4, shift)))
