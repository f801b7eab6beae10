"""
What a run costs: FLOPs, a table of times, an estimate of its memory.
"""
import resource
import sys
import time
import timeit

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from config import BadInput
from flow import generate
from memory import CHUNK
from model import DiT, DiTConfig
from rope import rope_cos_sin
from video import Decoder, chunks_of, frames_in
from wan_vae import WanVAE

PEAK = 790e12  # FLOP/s that a large bf16 matrix product reaches on an H100: what --bench measures a GPU against


def flops(config, h, w, held):
    """Floating-point operations of one pass over 3 latents (h, w) that sees `held` latents before them; counted, not run."""
    (p, q), d = config.patch, config.dim // config.heads
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as count:
        net, old = DiT(config), torch.empty(1, held * (h // p) * (w // q), config.heads, d)
        text = [(torch.empty(1, config.text_len, config.heads, d),) * 2] * config.layers
        net(torch.empty(1, 3, config.channels, h, w), torch.empty(1, 3), text, rope_cos_sin(torch.arange(3), h // p, w // q, d),
            [(old, [old])] * config.layers if held else None)
    return count.get_total_flops()


def estimate(m, b=1):
    """Bytes on the device: weights, what the memory holds and its rotated keys, one pass, decoding."""
    c, size, vae = m.dit.config, m.dit.blocks[0].ffn[0].weight.element_size(), m.vae
    tokens, held = m.width * m.height // 256 * b, m.policy.sink + m.policy.slow + m.policy.fast
    # decoding: at full resolution Wan's VAE remembers 2 frames before each of 7 convolutions, as much again at the coarser
    # ones, and works on about 10 feature maps of a frame; the TAE on about 4 of 12 frames
    maps = vae.config.dim * (2 * 14 + 10) if isinstance(vae, WanVAE) else vae.config.decoder[-1] * 4 * 12
    return {"weights": sum(p.numel() * p.element_size() for net in (m.dit, vae) for p in net.parameters()),
            "memory": c.layers * c.dim * size * (tokens * (3 * held - 3) + 2 * c.text_len * b),
            "pass": tokens * (3 * (c.ffn_dim * size + 16 * c.dim * 4) + 2 * held * c.dim * size),
            "decoding": m.width * m.height * b * size * maps}


def peak():
    """Most host memory used so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def peak_line():
    on_device = torch.cuda.max_memory_allocated() / 2 ** 30
    return f"peak memory {peak():.2f} GiB" + (f", on the device {on_device:.2f} GiB" if on_device else "")


def bench(cfg, m, text):
    """One table: frames a second with nothing, with each autoencoder; first frame; memory; share of what the FLOPs allow."""
    chunks, steps, weight = chunks_of(frames_in(cfg.seconds)), m.sampler.steps, next(m.dit.parameters())
    if chunks < 16:
        raise BadInput("--bench needs --seconds 12 or more: the first 10 chunks fill the memory")
    work = (steps + 1) * flops(m.dit.config, *m.latent[1:], m.policy.sink + m.policy.slow + m.policy.fast - CHUNK)
    rate, how = PEAK, "790 TFLOP/s, an H100's large bf16 product"
    if not weight.is_cuda:
        x = torch.randn(2048, 2048, device=weight.device, dtype=weight.dtype)
        rate = 2 * 2048 ** 3 / min(timeit.repeat(lambda: x @ x, number=1))
        how = f"{rate / 1e12:.3f} TFLOP/s, a product of 2048 x 2048 matrices here"
    print(f"a chunk: {work / 1e12:.4f} TFLOP in {steps + 1} passes, so at most {12 * rate / work:.1f} frames/s at {how}\n"
          f"{'':16}{'frames/s':>9} {'share':>6} {'first frame':>12} {'chunk 10-14':>12} {'last 5':>8} {'GiB at chunk 10':>16} "
          f"{'at the end':>11}")
    for name, vae in {"DiT only": None, **{f"with {k}": v for k, v in m.vaes.items()}}.items():
        for n in (2 if m.compiled is None else 9, chunks):  # the first time to warm up
            made = generate(m.rollout(m.text(text)), [cfg.seed], n, m.sampler, m.latent)
            at, used = [time.perf_counter()], []
            for _ in Decoder(vae).frames(made) if vae else (z.cpu() for z in made):
                at.append(time.perf_counter())
                used.append(torch.cuda.memory_allocated() / 2 ** 30 if weight.is_cuda else peak())
        each = np.diff(at)
        fps = 12 / np.median(each[10:])
        print(f"{name:16}{fps:9.2f} {fps * work / 12 / rate:6.1%} {each[0]:10.2f} s {np.median(each[10:15]):10.3f} s "
              f"{np.median(each[-5:]):6.3f} s {used[10]:16.2f} {used[-1]:11.2f}", flush=True)
    print(peak_line())


if __name__ == "__main__":
    print(f"one pass of Wan over 3 latents of 832x480 beside 18 held: {flops(DiTConfig(), 60, 104, 18) / 1e12:.1f} TFLOP")
