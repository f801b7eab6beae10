"""
What a run costs: the FLOPs of a pass, the memory of a full-size run, and a table of times.

    python bench.py                              # FLOPs of the full-size model
    python sample.py --wan random --bench        # the table, with random weights

A pass is counted on the meta device, where tensors have shapes and no values. The table measures the
transformer alone and with each autoencoder, and holds it against what the device does in one large matrix
product.

Leaves out: the text encoder, which runs once a prompt; times of training.
"""
import resource
import sys
import time
import timeit

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from flow import generate
from memory import CHUNK
from model import DiT, DiTConfig
from rope import rope_cos_sin
from video import FRAMES, chunks_of, frames_in
from wan_vae import WanVAE

H100 = 790e12  # FLOP/s of a large bf16 matrix product on an H100


def flops(config, h, w, held):
    """Floating-point operations of a pass over 3 latents (h, w) that sees `held` more: counted, not run."""
    rows, columns = h // config.patch[0], w // config.patch[1]
    d = config.dim // config.heads
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as count:
        net = DiT(config)
        old = torch.empty(1, held * rows * columns, config.heads, d)
        text = torch.empty(1, config.text_len, config.heads, d)
        memory = [(old, [old])] * config.layers if held else None
        x = torch.empty(1, CHUNK, config.channels, h, w)
        rope = rope_cos_sin(torch.arange(CHUNK), rows, columns, d)
        net(x, torch.empty(1, CHUNK), [(text, text)] * config.layers, rope, memory)
    return count.get_total_flops()


def memory_estimate(networks):
    """Bytes on the device: weights, KV cache with its rotated keys, one pass, decoding."""
    config, policy, vae = networks.dit.config, networks.policy, networks.vae
    pixels = networks.width * networks.height
    tokens = pixels // 256  # of a latent
    size = networks.dit.blocks[0].ffn[0].weight.element_size()
    seen = policy.sink + policy.slow + policy.fast
    # three of each held latent's tokens: keys, rotated keys, values; two of the chunk's and of the text's
    cache = config.layers * (tokens * (3 * seen - CHUNK) + 2 * config.text_len)
    one_pass = CHUNK * (config.ffn_dim * size + 16 * config.dim * 4) + 2 * seen * config.dim * size
    # at full resolution Wan's VAE remembers 2 frames before each of 7 convolutions, as much again at coarser
    # ones, and works on about 10 feature maps of a frame; the TAE on about 4 of 12 frames
    if isinstance(vae, WanVAE):
        maps = vae.config.dim * (2 * 14 + 10)
    else:
        maps = vae.config.decoder[-1] * 4 * FRAMES
    weights = [*networks.dit.parameters(), *vae.parameters()]
    return {"weights": sum(p.nbytes for p in weights), "memory": cache * config.dim * size,
            "pass": tokens * one_pass, "decoding": pixels * size * maps}


def peak_memory():
    """The most memory used so far, as a line: of the host, and of a cuda device."""
    unit = 1 if sys.platform == "darwin" else 1024
    line = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.2f} GiB"
    if torch.cuda.is_available():
        line += f", on the device {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"
    return line


def chunk_seconds(networks, text, seed, chunks, vae):
    """How long each chunk takes (chunks,), generated and decoded; vae None: not decoded"""
    rollout = networks.rollout(networks.text(text))
    past = None
    clock = [time.perf_counter()]
    for x0 in generate(rollout, [seed], chunks, networks.sampler, networks.latent):
        video = x0
        if vae is not None:
            video, past = vae.decode(x0, past)
        video.cpu()
        clock.append(time.perf_counter())
    return np.diff(clock)


def bench(cfg, networks, text):
    """One table: frames a second without and with each autoencoder, and as a share of what FLOPs allow."""
    # 1. what the FLOPs allow on this device
    policy, weight = networks.policy, networks.dit.blocks[0].ffn[0].weight
    held = policy.sink + policy.slow + policy.fast - CHUNK
    passes = networks.sampler.steps + 1
    work = passes * flops(networks.dit.config, *networks.latent[1:], held)
    x = torch.randn(2048, 2048, device=weight.device, dtype=weight.dtype)
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1))
    rate = 2 * 2048 ** 3 / seconds
    bound = FRAMES * rate / work
    print(f"a chunk: {work / 1e12:.4f} TFLOP in {passes} passes, so at most {bound:.1f} frames/s "
          f"at {rate / 1e12:.3f} TFLOP/s, a product of 2048 x 2048 matrices here")
    # 2. what it does, once memory is full
    print(f"{'':16} frames/s   share  first frame  chunk 10-14    last 5")
    for name, vae in {"DiT only": None, **networks.vaes}.items():
        seconds = chunk_seconds(networks, text, cfg.seed, chunks_of(frames_in(cfg.seconds)), vae)
        fps = FRAMES / np.median(seconds[10:])
        early = np.median(seconds[10:15])
        late = np.median(seconds[-5:])
        print(f"{name:16} {fps:8.2f} {fps / bound:7.1%} {seconds[0]:10.2f} s {early:10.3f} s {late:7.3f} s")
    print(peak_memory())


if __name__ == "__main__":
    one = flops(DiTConfig(), 60, 104, 18)
    print(f"one pass of Wan over 3 latents of 832x480 beside 18 held: {one / 1e12:.1f} TFLOP")
    print(f"5 passes a chunk of 12 frames: {FRAMES * H100 / (5 * one):.1f} frames/s at most on an H100")
