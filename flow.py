"""
Flow matching in one convention, and the one rollout that sampling and every training stage share.

    x_t = (1 - t) x0 + t noise,    v = noise - x0,    x0 = x_t - t v        t = noise level: 0 clean, 1 noise

A video is made chunk by chunk: read the context from the KV cache, denoise the chunk in a few steps, run it
once more clean (t = 0) and append the keys and values of that pass to the cache. Keys come out of the cache
un-rotated and are rotated once per chunk, at bounded positions.

    python flow.py             # prints the schedule, and what each level leaves of x0

References: Flow matching / rectified flow, arXiv 2210.02747, 2209.03003; Self-Forcing, arXiv 2506.08009
(chunk loop, clean pass); Context Forcing, arXiv 2602.06028. Their scheduler looks the noise level up in a
table of 1,000 rows, so that t = 0 means 0.005; here it is closed form and t = 0 is clean.
Leaves out: higher-order solvers.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from memory import CHUNK, Entries, LayerCache, Memory, chunk_descriptor, similarity
from rope import absolute_positions, apply_rope, bounded_positions, rope_cos_sin


def shifted(u, shift):
    """Wan's timestep shift: uniform u -> noise level t, both in [0, 1]; shift > 1: more high noise."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(steps, shift):
    """Noise levels of `steps` denoising steps, from 1 down; Self-Forcing's four: 1, 0.9375, 0.8333, 0.625."""
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


def flow_matching_loss(v, v_star):
    """v and v* = noise - x0 (b, f, c, h, w) -> loss of each sample (b,), |v - v*|^2"""
    return (v.float() - v_star).square().mean((1, 2, 3, 4))


def guide(cond, uncond, w):
    """Classifier-free guidance: w = 1 is none; Self-Forcing's 3.0, cond + w (cond - uncond), is our 4.0."""
    return uncond + w * (cond - uncond)


def draw_noise(seeds, chunk, step, shape, device="cpu"):
    """
    Noise of one denoising step, keyed by (seed, chunk, step): a video does not depend on what else is in its
    batch, on its length, or on the device. (torch's CPU generator keeps 32 bits of a seed; Philox keeps all.)
    seeds    one a video
    returns  (b, *shape) float32
    """
    # one number for (chunk, step): the low 8 bits of the step, then the chunk, then the step's high bits
    key = (step >> 8) << 40 | chunk << 8 | step & 255
    noise = []
    for seed in seeds:
        generator = np.random.Generator(np.random.Philox(key=[int(seed), key]))
        noise.append(generator.standard_normal(shape, np.float32))
    noise = torch.from_numpy(np.stack(noise))
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        noise = noise.pin_memory()  # asynchronous host-to-device copy
    # elsewhere a copy that is not waited for may read memory that is free again
    return noise.to(device, non_blocking=is_cuda)


def augment_context_noise(x0, most):
    """A clean past as the model will meet it: with up to `most` noise on each latent, still called t = 0."""
    level = torch.rand(len(x0), 1) * most * torch.rand(x0.shape[:2])
    return add_noise(x0, torch.randn_like(x0), level.to(x0.device))


@dataclass(frozen=True)
class Sampler:
    """How a network wants to be sampled; travels in its weights' metadata."""
    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    renoise: bool = True   # fresh noise between steps (few-step students); False: Euler steps
    tau: float = 0.95      # surprisal threshold of the memory
    pool: str = "mean"     # how keys are compared (memory.chunk_descriptor)


class Rollout:
    """
    A batch of videos under way: read_context(), make a chunk however you like, append() it.
    net        a DiT
    text       net.text(features) of the prompts
    policy     memory.Policy
    grid       latent rows and columns after patching
    positions  "bounded" (0..20 for ever) or "unbounded" (absolute, up to 1,024 latents)
    pool       how keys are compared
    compiled   None, or a compiled net: used when memory is full, because from then on no shape changes any
               more
    """
    def __init__(self, net, text, policy, grid, positions="bounded", pool="mean", compiled=None):
        self.net = net
        self.compiled = compiled
        self.text = text
        self.grid = grid
        self.positions = positions
        self.pool = pool
        self.memory = Memory(policy)
        self.chunk = 0          # number of the next chunk
        self.view = None        # what read_context() returned
        self.descriptor = None  # of the last chunk's keys
        self.similarities = []  # one (b,) a chunk, on the device: to the chunk before ...
        self.kept = []          # ... and whether its first latent is to become a keyframe
        self.tables = {}        # cos and sin of bounded positions, by how many latents are held and new

    @property
    def device(self):
        return self.text[0][0].device

    def next_frames(self):
        """Numbers of the next chunk's latents: (1, 3)"""
        first = CHUNK * self.chunk
        return torch.arange(first, first + CHUNK, device=self.device)[None]

    def rope(self, held, new):
        """Frame numbers held (b, m) and, after them, new (b, f) -> cos and sin of both at their positions"""
        size = *self.grid, self.net.config.head_dim
        if self.positions == "unbounded":
            return [rope_cos_sin(time, *size) for time in absolute_positions(held, new)]
        # bounded positions depend only on how many latents there are: made once
        counts = held.shape[1], new.shape[1]
        if counts not in self.tables:
            positions = bounded_positions(*counts)
            self.tables[counts] = [rope_cos_sin(time.to(self.device), *size) for time in positions]
        return self.tables[counts]

    def read_context(self):
        """
        Make room, read, apply_rope: what the next chunk sees.
        returns  memory (None or one LayerCache a layer), and rope of the chunk's tokens
        """
        self.memory.evict(CHUNK)
        self.view = self.rotated(self.memory.segments())
        return self.view

    def rotated(self, segments, new=None):
        """
        Entries of the KV cache in the order of time -> what read_context() returns.
        new  frame numbers (b, f) of the latents that read, None = those of the next chunk
        """
        new = self.next_frames() if new is None else new
        frames = [segment.frame for segment in segments] or [new[:, :0]]
        held_rope, rope = self.rope(torch.cat(frames, dim=1), new)
        if not segments:
            return None, rope
        # room for the chunk's own; what stands there is overwritten
        room = segments[-1].keys[0][:, :1].expand(-1, CHUNK, -1, -1, -1)
        sizes = [len(segment) for segment in segments]
        memory = []
        for layer in range(len(segments[0].keys)):
            keys = torch.cat([segment.keys[layer] for segment in segments], dim=1)
            keys = apply_rope(keys.flatten(1, 2), held_rope)
            keys = torch.cat([keys, room.flatten(1, 2)], dim=1)
            values = torch.cat([*(segment.values[layer] for segment in segments), room], dim=1)
            memory.append(LayerCache(keys, values.flatten(1, 2), held_rope[0].shape[1]))
            # values need no rotation: from here on the segments share these, 2.6 GB at full size
            for segment, own in zip(segments, values.split([*sizes, CHUNK], dim=1)):
                segment.values[layer] = own
        return memory, rope

    def predict(self, x, t, text=None, modulation=None):
        """
        One pass over the new chunk, after read_context().
        x           (b, 3, c, h, w), t (b, 3)
        text        None: the rollout's own
        modulation  None, or net.time(t) if it is made already
        returns     v, and one (keys, values) a layer of the chunk's tokens
        """
        memory, rope = self.view
        # the compiled net only for generate(), which gives a modulation, and when memory is full: passes of
        # other lengths (recache) would be compiled anew
        places = self.memory.policy.size - CHUNK
        is_full = memory is not None and memory[0].held == places * math.prod(self.grid)
        is_usual = is_full and modulation is not None and self.compiled is not None
        net = self.compiled if is_usual else self.net
        return net(x, t, text or self.text, rope, memory, modulation=modulation)

    def entries(self, frame, x0, kv):
        """Frame numbers (b, 3), latents (b, 3, c, h, w), (keys, values) of the clean pass -> Entries"""
        m = frame.shape[1]
        # (b, m n, heads, d) -> (b, m, n, heads, d)
        keys, values = ([x.unflatten(1, (m, -1)) for x in layers] for layers in zip(*kv))
        return Entries(frame, x0, keys, values)

    @torch.no_grad()
    def append(self, x0, keep=None, modulation=None):
        """
        Clean pass over the finished chunk, whose keys and values enter the KV cache; after read_context().
        x0          (b, 3, c, h, w)
        keep        (b,) bool replaces the policy's own decision
        modulation  net.time(0) if it is made already
        returns     the chunk's Entries
        """
        # the clean pass: t = 0
        t = x0.new_zeros(x0.shape[:2])
        _, kv = self.predict(x0, t, modulation=modulation)
        # surprisal (eq. 7): how like the chunk before it is it?
        descriptor = chunk_descriptor([k for k, _ in kv], self.pool)
        similar = torch.ones(len(x0), device=x0.device)
        if self.descriptor is not None:
            similar = similarity(descriptor, self.descriptor)
        if keep is None:
            keep = self.memory.policy.should_keep(self.chunk, similar)
        # into fast memory; what the chunk has seen makes room for what the next one will see
        self.view = None
        entries = self.entries(self.next_frames().expand(len(x0), -1), x0, kv)
        self.memory.push(entries, keep)
        self.descriptor = descriptor
        self.chunk += 1
        self.similarities.append(similar)
        self.kept.append(keep)
        return entries

    @torch.no_grad()
    def recache(self, text):
        """
        The prompt changes, between two chunks (LongLive's KV-recache): what is held is encoded anew under
        `text`, at t = 0, three latents after another, each seeing those before it (where a policy's sizes are
        no multiple of three, the first are fewer). Which frames are held does not change.
        """
        self.text = text
        self.view = None
        # frames and latents stay; the old keys and values make room for the new
        self.memory.drop_keys()
        held = self.memory.read()
        # a clean pass over every three latents
        first = len(held) % CHUNK or CHUNK
        sizes = [first] + [CHUNK] * ((len(held) - first) // CHUNK)
        encoded = []
        for frame, x0 in zip(held.frame.split(sizes, dim=1), held.latent.split(sizes, dim=1)):
            self.view = self.rotated(encoded, new=frame)
            _, kv = self.predict(x0, torch.zeros(x0.shape[:2], device=x0.device))
            encoded.append(self.entries(frame, x0, kv))
            self.view = None
        # the next chunk is compared with the last one as the new text sees it
        self.descriptor = chunk_descriptor([k for k, _ in kv], self.pool)
        # back into the segments, freed layer by layer
        for _ in kv:
            keys = torch.cat([chunk.keys.pop(0) for chunk in encoded], dim=1)
            values = torch.cat([chunk.values.pop(0) for chunk in encoded], dim=1)
            self.memory.set_layer(keys, values)


def denoise(predict, x, levels, fresh_noise, renoise=True):
    """
    From noise to a clean sample, in the steps of `levels`.
    predict      x_t (b, f, c, h, w), noise level as t (b, f) and as a number -> v
    x            pure noise, at levels[0]
    levels       noise levels from schedule()
    fresh_noise  step number -> noise of x's shape
    renoise      True: fresh noise on x0 at each next level (few-step students); False: Euler steps along v
    returns      x0 (b, f, c, h, w) float32, and the x_t of the last step that it was predicted from
    """
    for step, level in enumerate(levels):
        t = torch.full(x.shape[:2], level, device=x.device)
        v = predict(x, t, level)
        x0 = x0_from_v(x, v, t)
        if step + 1 == len(levels):
            return x0, x
        # on to the next level
        if renoise:
            t = torch.full_like(t, levels[step + 1])
            x = add_noise(x0, fresh_noise(step + 1), t)
        else:
            x = x + (levels[step + 1] - level) * v


@torch.no_grad()
def generate(rollout, seeds, chunks, sampler, latent, uncond=None, history=None, texts=None):
    """
    Generator: one finished chunk of latents at a time. Between two of them the rollout may be steered: by
    rollout.recache(text), rollout.memory.change_policy(policy), rollout.positions.
    rollout  a Rollout, fresh or under way
    seeds    one a video
    chunks   how many to make, after the history
    latent   (c, h, w) of one latent
    uncond   net.text of the empty prompt, for guidance != 1
    history  None, or real latents (b, 3m, c, h, w) that are appended first
    texts    None, or number of a chunk (1 or later) -> net.text of the prompt that holds from there on
    yields   x0 (b, 3, c, h, w)
    """
    levels = schedule(sampler.steps, sampler.shift)
    # AdaLN's shifts, scales and gates depend on the noise level alone: once a video
    clean = torch.zeros(len(seeds), CHUNK, device=rollout.device)
    modulations = {level: rollout.net.time(clean + level) for level in (*levels, 0.)}

    def fresh_noise(step):
        return draw_noise(seeds, rollout.chunk, step, (CHUNK, *latent), rollout.device)

    def predict(x, t, level):
        v, _ = rollout.predict(x, t, modulation=modulations[level])
        if sampler.guidance == 1:
            return v
        v_uncond, _ = rollout.predict(x, t, uncond, modulations[level])
        return guide(v, v_uncond, sampler.guidance)

    # real latents first: a clean pass each
    if history is not None:
        for x0 in history.split(CHUNK, dim=1):
            rollout.read_context()
            rollout.append(x0, modulation=modulations[0.])
    # then chunk by chunk: read the context, denoise, append
    for _ in range(chunks):
        if texts and rollout.chunk in texts:
            rollout.recache(texts[rollout.chunk])
        rollout.read_context()
        x0, _ = denoise(predict, fresh_noise(0), levels, fresh_noise, sampler.renoise)
        rollout.append(x0, modulation=modulations[0.])
        yield x0


if __name__ == "__main__":
    for shift in (1, 3, 5):
        print(f"shift {shift}:")
        for t in schedule(4, shift):
            print(f"    t = {t:.4f} keeps {1 - t:5.1%} of x0")
