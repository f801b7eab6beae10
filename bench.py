"""
What a run costs: the FLOPs of a pass, the memory of a full-size run, and its speed.

    python bench.py                              # FLOPs of the full-size model
    python sample.py --bench                     # two tables, of the tiny networks
    python sample.py --wan random --bench        # of random weights of Wan's form; --size, --device, --dtype

The first table tells where a chunk's time goes, part by part ("memory": what is held is read, and the chunk
appended by a clean pass). The second makes of it frames a second, of the transformer alone and with an
autoencoder, and holds them against what the device does in one large matrix product.

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
from vae import TAE
from video import FRAMES, to_uint8
from wan_vae import WanVAE

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
REPEATS = 9  # of each measurement
MAPS = {WanVAE: 35, TAE: 27}  # maps of full resolution and width that decoding holds, measured at full size


def flops(config, n, held):
    """Floating-point operations of a pass over 3 latents of n tokens that sees `held` more."""
    # matrices: queries, keys, values, output; queries and output for the text; up and down
    matrices = config.dim * (6 * config.dim + 2 * config.ffn_dim)
    # attention: scores and their sums over what is held, the chunk, the text
    seen = (held + CHUNK) * n + config.text_len
    attention = 2 * config.dim * seen
    return 2 * config.layers * CHUNK * n * (matrices + attention)


def memory_estimate(networks):
    """Bytes at the peak of sampling, prompt switches included, once memory is full."""
    config, policy, vae = networks.dit.config, networks.policy, networks.vae
    weight, tokens = networks.dit.blocks[0].ffn[0].weight, math.prod(networks.grid)
    held = policy.size - CHUNK
    # keys as they are kept, keys rotated, values: each with room for a chunk; both of the pass
    latents = 3 * (held + CHUNK) + 2 * CHUNK
    places = latents * tokens + 2 * config.text_len
    cache = config.layers * places * config.dim * weight.element_size()
    # a pass: the MLP before and after its activation; the residual stream, its copies in float32
    block = CHUNK * tokens * (2 * config.ffn_dim * weight.element_size() + 16 * config.dim)
    # decoding: maps as large as the video
    channels = vae.config.dim if isinstance(vae, WanVAE) else vae.config.decoder[-1]
    pixels = networks.width * networks.height
    decoding = MAPS[type(vae)] * channels * pixels * next(vae.parameters()).element_size()
    weights = sum(p.nbytes for p in (*networks.dit.parameters(), *vae.parameters()))
    # a chunk is decoded while the next is made; where it is decoded after it, this is up to a tenth too much
    return weights + cache + block + decoding


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


def chunk_seconds(networks, text):
    """
    How long a chunk takes once memory is full, part by part, the device waited for after each.
    returns  name -> seconds, the median of several; seconds until there is a first chunk
    """
    started = time.perf_counter()
    first = None
    rollout, vae = networks.rollout(networks.text(text)), networks.vae
    # as many chunks as fill the memory
    for x0 in generate(rollout, [0], 7, networks.sampler, networks.latent):
        video, past = vae.decode(x0)
        video.cpu()  # waits for the device
        first = first or time.perf_counter() - started
    t = torch.full((1, CHUNK), .5, device=x0.device)
    modulation = rollout.net.time(t)
    # what a chunk shows changes no time
    parts = {
        "memory": lambda: (rollout.read_context(), rollout.append(x0, modulation=modulation)),
        "decoding": lambda: vae.decode(x0, past),
        "to the host": lambda: to_uint8(video).cpu(),
        "a pass": lambda: rollout.predict(x0, t, modulation=modulation),
    }

    def seconds_of(part):
        rollout.read_context()

        def run():
            part()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        return np.median(timeit.repeat(run, number=1, repeat=REPEATS))
    return {name: seconds_of(part) for name, part in parts.items()}, first


def bench(networks, text):
    """Where a chunk's time goes; frames a second, and their share of what the FLOPs allow."""
    steps, held = networks.sampler.steps, networks.policy.size - CHUNK
    weight = networks.dit.blocks[0].ffn[0].weight
    # 1. what the FLOPs allow on this device
    work = (steps + 1) * flops(networks.dit.config, math.prod(networks.grid), held)
    n = 8192 if weight.is_cuda else 2048  # a GPU is done with a smaller one before it is asked again
    x = torch.randn(n, n, device=weight.device, dtype=weight.dtype)
    fastest = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1))
    rate = 2 * n ** 3 / fastest
    bound = FRAMES * rate / work
    print(f"a chunk: {work / 1e12:.4f} TFLOP, so at most {bound:.1f} frames/s at {rate / 1e12:.4f} TFLOP/s, "
          f"a product of {n} x {n} matrices here")
    # 2. what it does
    seconds, first = chunk_seconds(networks, text)
    print("part of a chunk  times         ms, median")
    for name, each in seconds.items():
        print(f"{name:16} {steps if name == 'a pass' else 1:5} {1000 * each:18.3f}")
    dit = seconds["memory"] + steps * seconds["a pass"]
    whole = dit + seconds["decoding"] + seconds["to the host"]
    print("           frames/s   share")
    for name, each in {"DiT only": dit, type(networks.vae).__name__: whole}.items():
        print(f"{name:8} {FRAMES / each:10.2f} {FRAMES / each / bound:7.1%}")
    print(f"first chunk after {first:.2f} s, {peak_memory(weight.device)}")


if __name__ == "__main__":
    one = flops(DiTConfig(), 30 * 52, 18)
    print(f"one pass of Wan over 3 latents of 832x480 beside 18 held: {one / 1e12:.1f} TFLOP")
    with torch.device("meta"):
        wan = DiT(DiTConfig())
    print("training, GB a device    1    2    4    8 devices")
    for part in TRAINING:
        row = [training_memory(part, wan, 30 * 52, devices) / 1e9 for devices in (1, 2, 4, 8)]
        print(f"{part:22}", *(f"{need:4.0f}" for need in row))
