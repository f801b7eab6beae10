"""
What a run costs: the FLOPs of a pass, the memory of a full-size run, and its speed.

    python bench.py                              # FLOPs of the full-size model
    python sample.py --wan random --bench        # the table, with random weights

The table measures the transformer alone and with an autoencoder, and holds it against what the device does
in one large matrix product.

Leaves out: the text encoder, which runs once a prompt; times of training.
"""
import math
import sys
import time
import timeit

import numpy as np
import torch

from flow import generate
from memory import CHUNK
from model import DiT, DiTConfig
from video import FRAMES

# Training at full size, what each part holds: copies of the float32 weights (weights, gradients, two moments
# and averages; the critic's first four; the teacher's first), latents of its longest pass with a graph, and
# latents of keys and values at the end of the student's rollout: what its target saw, memory, that rotated,
# and two chunks that move.
TRAINING = {
    "init_ar": (5, 42, 0),
    "init_ode": (5, 30, 0),
    "teacher": (5, 42, 0),
    "stage1": (10, 21, 21 + 21 + 21 + 6),
    "stage2": (10, 42, 42 + 21 + 21 + 6),
}
BLOCK = 118  # bytes of one block's graph for each number of the residual stream, measured at full size
CHUNKS = 16  # made for each row of the table; memory is full after the first 7


def flops(config, n, held):
    """Floating-point operations of a pass over 3 latents of n tokens that sees `held` more."""
    # matrices: queries, keys, values, output; queries and output for the text; up and down
    matrices = config.dim * (6 * config.dim + 2 * config.ffn_dim)
    # attention: scores and their sums over what is held, the chunk, the text
    seen = (held + CHUNK) * n + config.text_len
    attention = 2 * config.dim * seen
    return 2 * config.layers * CHUNK * n * (matrices + attention)


def memory_estimate(networks):
    """Bytes of the weights and of a full KV cache with its rotated keys; a pass and decoding come on top."""
    config, policy = networks.dit.config, networks.policy
    weight = networks.dit.blocks[0].ffn[0].weight
    held = policy.sink + policy.slow + policy.fast - CHUNK
    # keys and values of all, rotated keys of what is held; keys and values of the text
    tokens = math.prod(networks.grid) * (3 * held + 2 * CHUNK) + 2 * config.text_len
    cache = config.layers * tokens * config.dim * weight.element_size()
    weights = [*networks.dit.parameters(), *networks.vae.parameters()]
    return sum(p.nbytes for p in weights) + cache


def training_memory(part, net, tokens, devices):
    """
    Bytes on each of so many devices, one clip a pass: the weights are spread over them, a pass is not.
    part    of TRAINING
    net     its DiT
    tokens  of a latent
    """
    copies, latents, held = TRAINING[part]
    config = net.config
    weights = sum(p.numel() for p in net.parameters())
    # every block's input, and the graph of the one that is run again
    graph = latents * tokens * config.dim * (4 * config.layers + BLOCK)
    if part.startswith("init"):
        graph += 3 * (latents * tokens) ** 2  # who sees whom, as bool and as bfloat16
    rollout = held * tokens * config.dim * 4 * config.layers
    return 4 * copies * weights / devices + max(graph, rollout)


def peak_memory(device):
    """The most memory used so far, as text: of a cuda device, else of the process."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB on the device"
    try:
        import resource
    except ImportError:  # Windows
        return "peak memory not measured"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.2f} GiB"


def chunk_seconds(networks, text, seed, vae):
    """How long each chunk takes (CHUNKS,), generated and decoded; vae None: not decoded"""
    rollout = networks.rollout(networks.text(text))
    past = None
    clock = [time.perf_counter()]
    for x0 in generate(rollout, [seed], CHUNKS, networks.sampler, networks.latent):
        video = x0
        if vae is not None:
            video, past = vae.decode(x0, past)
        video.cpu()  # waits for the device
        clock.append(time.perf_counter())
    return np.diff(clock)


def bench(networks, text, seed):
    """One table: frames a second without and with the autoencoder, and as a share of what FLOPs allow."""
    # 1. what the FLOPs allow on this device
    policy, weight = networks.policy, networks.dit.blocks[0].ffn[0].weight
    held = policy.sink + policy.slow + policy.fast - CHUNK
    work = (networks.sampler.steps + 1) * flops(networks.dit.config, math.prod(networks.grid), held)
    x = torch.randn(2048, 2048, device=weight.device, dtype=weight.dtype)
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1))
    rate = 2 * 2048 ** 3 / seconds
    bound = FRAMES * rate / work
    print(f"a chunk: {work / 1e12:.4f} TFLOP, so at most {bound:.1f} frames/s at {rate / 1e12:.3f} TFLOP/s, "
          "a product of 2048 x 2048 matrices here")
    # 2. what it does, once memory is full
    print("           frames/s   share  first frame")
    for name, vae in {"DiT only": None, type(networks.vae).__name__: networks.vae}.items():
        seconds = chunk_seconds(networks, text, seed, vae)
        fps = FRAMES / np.median(seconds[10:])
        print(f"{name:8} {fps:10.2f} {fps / bound:7.1%} {seconds[0]:10.2f} s")
    print(peak_memory(weight.device))


if __name__ == "__main__":
    one = flops(DiTConfig(), 30 * 52, 18)
    print(f"one pass of Wan over 3 latents of 832x480 beside 18 held: {one / 1e12:.1f} TFLOP")
    with torch.device("meta"):
        wan = DiT(DiTConfig())
    print("training, GB a device    1    2    4    8 devices")
    for part in TRAINING:
        row = [training_memory(part, wan, 30 * 52, devices) / 1e9 for devices in (1, 2, 4, 8)]
        print(f"{part:22}", *(f"{need:4.0f}" for need in row))
