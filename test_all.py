"""
One test per claim, on the CPU, with the shipped weights and the golden vectors of the official code.

    python -m pytest test_all.py                    # side by side on two cores: see pytest.ini
    python -m pytest test_all.py -m "not slow"      # without the long ones
    python -m pytest test_all.py -m speed -n 0      # time and resident memory, on an idle machine
    python -m pytest test_all.py -m cuda -n 0 -s    # on a GPU, which none of the others needs
    GOLDEN=DIR python -m pytest test_all.py -k golden    # other vectors of the same format

Tests that share something expensive are of one xdist_group: one process makes it, and only once.
"""
import ast
import base64
import copy
import csv
import functools
import hashlib
import http.client
import http.server
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tokenize
import weakref
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

# before torch: nets are so small here that threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import bench
import causal
import checkpoint
import config
import data
import dmd
import erft
import evaluate
import figures
import flow
import histories
import judge
import live
import metrics
import model
import optim
import paper
import probe
import records
import report
import sample
import score
import stages
import starts
import tensors
import train
import video
import weights
import world
from config import BadInput
from data import encode_world, training_worlds
from flow import Rollout, Sampler, draw_noise, generate
from histories import Histories
from judge import chance, is_in_memory, landmark_map, read_video, reappearances, turning_rate
from memory import (CHUNK, PRESETS, Entries, LayerCache, Memory, Policy, chunk_descriptor, frames_in_memory,
                    similarity)
from model import DiT, DiTConfig, tiny_dit
from recipe import PARTS, TINY, hash_recipe
from rope import absolute_positions, apply_rope, bounded_positions, rope_cos_sin
from tensors import read_public
from text import TextConfig, TextEncoder, bucket, clean, read_prompts, tiny_text, words_to_ids
from vae import TAE, TAEConfig, tiny_tae
from weights import (DIT, T5, TOKENIZER, VAES, WEIGHTS, Networks, load, load_on_device,
                     load_state_dict_strict, load_tiny, load_wan, read_file, save_weights, wan_text,
                     write_safetensors)
from wan_vae import MEAN, STD, WanVAE, WanVAEConfig
from world import Motion, World, WorldSpec, clip, make_world, offsets, panorama, render

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN", HERE / "golden"))
CPU = torch.device("cpu")


# ---- golden vectors: the official code's numbers -----------------------------------------------------------

def golden(name):
    """-> config (values parsed from JSON where they are), weights, inputs, outputs"""
    parts = {"weights": {}, "in": {}, "out": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        for key in f.keys():
            kind, _, rest = key.partition(".")
            parts[kind][rest] = f.get_tensor(key)
    for key, value in config.items():
        with suppress(json.JSONDecodeError):
            config[key] = json.loads(value)
    return config, *parts.values()


def golden_dit(name):
    c, weights, given, want = golden(name)
    names = "dim ffn_dim num_heads num_layers freq_dim text_dim text_len in_dim"
    sizes = [c[key] for key in names.split()]
    net = DiT(DiTConfig(*sizes, tuple(c["patch_size"][1:])))
    return c, load_state_dict_strict(net, weights).requires_grad_(False), given, want


def close(got, want, atol):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= atol


def frames_first(x):
    return x.transpose(1, 2)  # the goldens are (b, c, f, h, w)


def rope_of(net, time, x):
    p, q = net.config.patch
    return rope_of_grid(net, time, (x.shape[-2] // p, x.shape[-1] // q))


def rope_of_grid(net, time, grid):
    return rope_cos_sin(time, *grid, net.config.dim // net.config.heads)


@torch.no_grad()
def whole_clip(net, given):
    x = frames_first(given["x"])
    t = (given["t"] / 1000)[:, None].expand(-1, x.shape[1])
    rope = rope_of(net, torch.arange(x.shape[1]), x)
    return frames_first(net(x, t, net.text(given["context"]), rope)[0])


def test_golden_bidirectional_dit_and_its_inner_taps():
    _, net, given, want = golden_dit("wan_dit")
    block, taps = net.blocks[0], {}
    hooked = {
        "time_emb": net.time_embedding,
        "time_proj": net.time_projection,
        "text_emb": net.text_embedding,
        "block0": block,
        "block0_self_attn": block.self_attn,
        "block0_cross_attn": block.cross_attn,
    }

    def tap(name, module, args, out):
        taps[name] = out[0] if isinstance(out, tuple) else out
    for name, module in hooked.items():
        module.register_forward_hook(functools.partial(tap, name))
    net.time_embedding.register_forward_pre_hook(lambda _, args: taps.update(time_sinusoid=args[0]))
    close(whole_clip(net, given), want["pred"], 2e-5)
    assert len(taps) == 7
    for name, got in taps.items():
        got = got[:, 0] if name.startswith("time") else got.flatten(1, -2)
        close(got, want[name], 2e-5)


@pytest.mark.parametrize("which", ["global", "local", "sink"])
def test_golden_causal_dit_with_cache(which):
    """The official caches are our Memory with sizes from the file; a chunk run again replaces itself."""
    c, net, given, want = golden_dit("wan_causal")
    window, sink = c["sets"][which]
    sizes = (0, 0, 10 ** 6) if window == -1 else (sink, 0, window - sink)
    memory = Memory(Policy(*sizes))
    text = net.text(given["context"])
    starts = c["start_frames"]
    for i, start in enumerate(starts):
        x = frames_first(given[f"x{i}"])
        b, f = x.shape[:2]
        if i > 0 and start != starts[i - 1]:
            memory.push(entries, torch.zeros(b, dtype=torch.bool))
        memory.evict(f)
        held, context = memory.read(), None
        if held is not None:
            old = rope_of(net, held.frame[0], x)
            keys = [apply_rope(k.flatten(1, 2), old) for k in held.keys]
            values = [v.flatten(1, 2) for v in held.values]
            context = [LayerCache(k, v, k.shape[1]) for k, v in zip(keys, values)]
        frame = torch.arange(start, start + f)
        rope = rope_of(net, frame, x)
        v, kv = net(x, given[f"t{i}"] / 1000, text, rope, context)
        close(frames_first(v), want[f"{which}.call{i}"], 2e-5)
        keys, values = ([z.unflatten(1, (f, -1)) for z in layers] for layers in zip(*kv))
        entries = Entries(frame.expand(b, -1), None, keys, values)
        if i == c["num_clean_chunks"] - 1:
            made = apply_rope(kv[0][0], rope), kv[0][1]
            held = (context[0].keys, context[0].values) if context else (None, None)
            for cache, old, new in zip("kv", held, made):
                new = new if old is None else torch.cat([old, new], 1)
                close(new, want[f"{which}.cache_{cache}0"][:, :new.shape[1]], 2e-5)


def test_golden_blockwise_and_teacher_forcing_passes():
    c, net, given, want = golden_dit("wan_causal")
    starts = c["start_frames"]
    distinct = [i for i, start in enumerate(starts) if i == starts.index(start)]
    x = torch.cat([frames_first(given[f"x{i}"]) for i in distinct], 1)
    t = torch.cat([given[f"t{i}"] for i in distinct], 1) / 1000
    text = net.text(given["context"])
    frame = torch.arange(x.shape[1])
    block = frame // c["num_frame_per_block"]
    older = block[:, None] > block
    own = block[:, None] == block
    v, _ = net(x, t, text, rope_of(net, frame, x), mask=(older | own)[None])
    close(frames_first(v), want["blockwise"], 2e-5)
    # teacher forcing: the clean frames and the noisy ones in one pass
    both = torch.cat([x, frames_first(given["teacher_forcing_noisy"])], 1)
    levels = torch.cat([0 * t, given["teacher_forcing_t"] / 1000], 1)
    clean = torch.cat([older | own, torch.zeros_like(own)], 1)
    noisy = torch.cat([older, own], 1)
    rope = rope_of(net, frame.repeat(2), x)
    v, _ = net(both, levels, text, rope, mask=torch.cat([clean, noisy])[None])
    close(frames_first(v[:, len(frame):]), want["teacher_forcing"], 2e-5)


def test_golden_text_encoder_and_position_buckets():
    c, weights, given, want = golden("umt5")
    names = "vocab dim dim_attn dim_ffn num_heads num_layers num_buckets"
    config = TextConfig(*[c[key] for key in names.split()])
    taps = {}
    net = load_state_dict_strict(TextEncoder(config), weights)
    net.blocks[0].register_forward_hook(lambda module, args, out: taps.update(block0=out))
    close(net(given["ids"].long(), given["mask"].long()), want["context"], 2e-5)
    real = given["mask"].bool()
    close(taps["block0"][real], want["block0"][real], 2e-5)
    buckets = bucket(given["rel_offset"].long(), c["num_buckets"])
    assert torch.equal(buckets, want["rel_bucket"].long())


def in_pieces(decode, latents, size):
    """A video decoded `size` latents at a time."""
    past, parts = None, []
    for piece in latents.split(size, dim=1):
        frames, past = decode(piece, past)
        parts.append(frames)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_golden_tiny_autoencoder_encodes_decodes_and_streams():
    c, weights, given, want = golden("tae")
    config = TAEConfig(c["encoder_width"], tuple(c["decoder_widths"]), c["latent_channels"])
    tae = load_state_dict_strict(TAE(config), weights)
    close(tae.encode_frames(given["video"]), want["encoded"], 1e-4)
    raw, _ = tae.run(tae.decoder, given["latent"], None)
    close(raw[:, c["frames_to_trim"]:], want["decoded_raw"], 1e-4)
    for size in (1, 2, 3, 99):
        close(in_pieces(tae.decode, given["latent"], size) * .5 + .5, want["decoded"], 1e-4)


@torch.no_grad()
def test_golden_wan_autoencoder_encodes_decodes_and_streams():
    """decode() clamps to [-1, 1], the golden does not."""
    c, weights, given, want = golden("wan_vae")
    vae = WanVAE(WanVAEConfig(c["dim"], tuple(c["dim_mult"]), c["z_dim"], c["num_res_blocks"]))
    load_state_dict_strict(vae, weights)
    assert MEAN.flatten().tolist() == torch.tensor(c["mean"]).tolist()
    assert STD.flatten().tolist() == torch.tensor(c["std"]).tolist()
    close(frames_first(vae.encode(frames_first(given["video"]))), want["latent"], 1e-4)
    videos = (want["latent"], want["decoded"]), (given["latent2"], want["decoded2"])
    for (latent, video), size in itertools.product(videos, (1, 2, 3, 99)):
        frames = in_pieces(vae.decode, frames_first(latent), size)
        close(frames_first(frames), video.clamp(-1, 1), 1e-4)


def test_golden_schedule_noise_and_velocity():
    """The official scheduler snaps t to a table of 1,000 levels; ours does not, so the test snaps first."""
    c, _, given, want = golden("flow")
    shift = c["shift"]
    n = int(c["num_train_timesteps"])
    sigmas = torch.tensor(flow.schedule(n, shift))
    close(sigmas, want["sigmas"], 2e-5)
    close(sigmas * 1000, want["timesteps"], 2e-2)  # timesteps reach 1000: 2e-5 relative
    steps = given["denoising_step_list_unwarped"].double()
    steps = flow.shifted(steps / n, shift) * 1000
    close(steps.float(), want["denoising_step_list"].float(), 2e-2)
    # the vectors have no frame axis
    x0, noise, v = (given[name][:, None] for name in ("x0", "noise", "flow"))
    row = (sigmas * 1000 - given["t"][:, None]).abs().argmin(1)
    t = sigmas[row][:, None]  # (b, 1): snapped
    next_t = F.pad(sigmas, (0, 1))[row + 1][:, None]
    xt = flow.add_noise(x0, noise, t)
    close(xt[:, 0], want["xt"], 2e-5)
    close(flow.x0_from_v(xt, v, t)[:, 0], want["x0_from_flow"], 2e-5)
    close((noise - x0)[:, 0], want["flow_target"], 2e-5)
    wrong = (flow.v_from_x0(xt, x0, t)[:, 0] - want["flow_from_x0"]).abs()
    scale = want["flow_from_x0"].abs().clamp(min=1) / t.min()  # dividing by t amplifies
    assert (wrong / scale).max() <= 2e-5
    step = xt + flow.over_frames(next_t - t) * v
    close(step[:len(want["euler_step"]), 0], want["euler_step"], 2e-5)


@pytest.mark.parametrize("name, build, config", [
    ("keys_1_3B", DiT, DiTConfig()),
    ("keys_umt5_xxl", TextEncoder, TextConfig()),
    ("keys_tae", TAE, TAEConfig()),
    ("keys_vae", WanVAE, WanVAEConfig())])
def test_golden_names_and_shapes_of_the_full_size_networks(name, build, config):
    with torch.device("meta"):
        state = build(config).state_dict()
    shapes = {key: list(z.shape) for key, z in state.items()}
    assert shapes == json.loads((HERE / "golden" / f"{name}.json").read_text())


def small_tae():
    return TAE(TAEConfig(8, (16, 12, 8, 8))).requires_grad_(False)


# ---- autoencoders: a video may come in pieces --------------------------------------------------------------

def test_the_tiny_autoencoder_repeats_the_last_frame_until_4_divides_their_number():
    tae = small_tae()
    video = torch.rand(2, 9, 3, 16, 24)
    latents = tae.encode_frames(video)
    assert latents.shape == (2, 3, 16, 2, 3)
    longer = video[:, [*range(9), 8, 8, 8]]
    assert torch.equal(latents, tae.encode_frames(longer))


def test_the_tiny_autoencoder_encodes_a_long_video_in_pieces_as_at_once(monkeypatch):
    video = torch.rand(1, 45, 3, 16, 24) * 2 - 1
    tae = small_tae()
    whole = tae.encode(video)
    assert whole.shape[1] == 12
    # the first latent is of four copies of the first frame
    copies = video[:, [0] * 4] * .5 + .5
    close(tae.encode_frames(copies), whole[:, :1], 1e-6)
    # later frames change no earlier latent
    close(tae.encode(video[:, :13]), whole[:, :4], 1e-6)
    monkeypatch.setattr("vae.PIECE", 0)
    close(tae.encode(video), whole, 1e-6)


@torch.no_grad()
def test_a_fresh_tiny_autoencoder_passes_signals_on_in_their_size():
    torch.manual_seed(0)
    tae = TAE(tiny_tae).initialise()
    frames = torch.from_numpy(clip(WorldSpec(1), 0, 17))[None]
    latents = tae.encode(frames * 2 - 1)
    decoded = tae.decode(torch.randn_like(latents))[0]
    assert .3 < latents.std() < 3  # from torch's own start: .03
    assert .3 < decoded.std() < 3  # and .06


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_wans_autoencoder_goes_on_from_what_it_remembers_or_from_a_copy_of_it(blocks):
    vae = WanVAE(WanVAEConfig(4, blocks=blocks))
    latents = torch.randn(1, 5, 16, 2, 2)
    assert len(vae.encoder.downsamples) == 4 * blocks + 3
    assert len(vae.decoder.upsamples) == 4 * (blocks + 1) + 3
    whole, _ = vae.decode(latents)
    _, past = vae.decode(latents[:, :2])
    for state in (dict(past), past):
        close(vae.decode(latents[:, 2:], state)[0], whole[:, 5:], 1e-5)


def test_wans_autoencoder_refuses_frames_that_fill_no_latent():
    with pytest.raises(ValueError, match="10 frames: give 1 . 4n"):
        WanVAE(WanVAEConfig(4)).encode(torch.zeros(1, 10, 3, 16, 16))


# ---- rope, memory, flow: a bounded KV cache, and the one rollout that reads it -----------------------------

def random_dit(seed=0, **small):
    torch.manual_seed(seed)
    small = small or dict(dim=64, ffn_dim=96, heads=2, layers=2)
    net = DiT(replace(tiny_dit, **small))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=.15)  # no parameter is zero, so nothing can be dropped unseen
    return net.eval().requires_grad_(False)


def random_text(net, b=1, seed=5):
    return net.text(noise(b, 20, net.config.text_dim, seed=seed))


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_causal(net, text, x, t, chunk=None, time=None):
    """One forward without a cache: every chunk sees the older ones and itself -> v, keys and values."""
    time = torch.arange(x.shape[1]) if time is None else time
    chunk = time // CHUNK if chunk is None else chunk
    rope = rope_of_grid(net, time, (2, 4))
    return net(x, t, text, rope, mask=(chunk[:, None] >= chunk)[None])


def append_all(roll, x0, keep=None):
    for i, chunk in enumerate(x0.split(CHUNK, dim=1)):
        roll.read_context()
        roll.append(chunk, None if keep is None else keep[:, i])
    return roll


def random_keep(b, chunks):
    return torch.rand(b, chunks, generator=torch.Generator().manual_seed(0)) < .5


def test_rope_turns_pairs_by_time_row_and_column_like_complex_numbers_in_float64():
    time = torch.tensor([[5, 20], [0, 3]])
    x = noise(2, 12, 2, 44)
    got = apply_rope(x, rope_cos_sin(time, 2, 3, 44)).double()
    exponents = [torch.arange(0, n, 2).double() / n for n in (16, 14)]
    by_time, by_place = (10000. ** -exponent for exponent in exponents)
    places = [*enumerate(np.ndindex(2, 2, 3))]
    for b, (n, (f, h, w)) in itertools.product(range(2), places):
        angles = torch.cat([time[b, f] * by_time, h * by_place, w * by_place])
        pairs = torch.view_as_complex(x[b, n].double().unflatten(-1, (-1, 2)))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        close(got[b, n], torch.view_as_real(turned).flatten(-2), 1e-5)


def test_unbounded_positions_end_at_1024():
    held = torch.zeros(1, 18)
    last = torch.tensor([[1022, 1023]])
    assert torch.equal(absolute_positions(held, last)[1], last)
    with pytest.raises(ValueError, match="latent 1025 asked for: use bounded positions"):
        absolute_positions(held, torch.tensor([[1023, 1024]]))


@pytest.mark.parametrize("name", PRESETS)
def test_memory_holds_at_most_21_latents_in_time_order_at_positions_0_to_20_for_1000_chunks(name):
    policy = PRESETS[name]
    for i, context in enumerate(frames_in_memory(policy, random_keep(2, 1000))):
        b, held = context.shape
        assert held + CHUNK <= min(21, policy.sink + policy.slow + policy.fast)
        positions = torch.cat(bounded_positions(held, CHUNK))
        assert positions.tolist() == [*range(held + CHUNK)]
        assert i == 0 or (context.diff(dim=1) > 0).all() and context.max() == CHUNK * i - 1


def test_contexts_after_7_8_and_9_chunks_are_those_of_the_specification():
    uniform2 = torch.tensor([[i % 2 == 0 for i in range(9)]])

    def held(preset, chunks, evict_first):
        return frames_in_memory(PRESETS[preset], uniform2, evict_first)[chunks][0].tolist()
    assert held("uniform2", 7, False) == [*range(21)]
    assert held("uniform2", 8, False) == [*range(15), *range(18, 24)]
    assert held("uniform2", 9, False) == [0, 1, 2, *range(4, 15), 18, *range(21, 27)]
    # what the student sees beside its new chunk
    assert held("uniform2", 9, True) == [0, 1, 2, *range(4, 15), 18, 24, 25, 26]
    assert held("infinity", 2, True) == [0, 4, 5]


def remember(memory, policy, keep):
    """Frame numbers come in, three a chunk, under a policy from here on -> those that are held."""
    memory.change_policy(policy)
    first = memory.frames().max() // CHUNK + 1 if memory.segments() else 0
    for i, kept in enumerate(keep, first):
        memory.evict()
        frame = torch.arange(CHUNK * i, CHUNK * (i + 1))
        memory.push(Entries(frame[None]), torch.tensor([kept]))
    return memory.frames()[0].tolist()


@pytest.mark.parametrize("chunks", [1, 5, 40])
@pytest.mark.parametrize("old", ["slowfast", "window", "longlive"])
@pytest.mark.parametrize("new", ["slowfast", "window", "infinity"])
def test_another_policy_keeps_what_it_has_room_for_and_goes_on_as_if_that_had_been_its_own(old, new, chunks):
    memory = Memory(PRESETS["slowfast"])
    policy = PRESETS[new]
    held = remember(memory, PRESETS[old], [i % 3 == 0 for i in range(chunks)])
    room = policy.sink + policy.slow + policy.fast
    fits = held if len(held) <= room else held[:policy.sink] + held[policy.sink - room:]
    assert remember(memory, policy, []) == fits
    # seven chunks later all of fast memory is new; the sink has been filled from what was there
    now = remember(memory, policy, [False] * 7)
    made = [*range(3 * chunks, 3 * chunks + 21)]
    assert now[:policy.sink] == [*fits, *made][:policy.sink]
    assert now[-policy.fast:] == made[-policy.fast:]
    assert len(now) == min(room, len(fits) + 21)
    assert now == sorted(set(now))


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_policy_again_changes_nothing_and_a_return_brings_back_what_was_not_dropped(name):
    keep = random_keep(1, 60)
    policy = PRESETS[name]
    memory = Memory(policy)
    plain = frames_in_memory(policy, keep, evict_first=False)[1:]
    for kept, context in zip(keep[0].tolist(), plain):
        assert remember(memory, policy, [kept]) == context[0].tolist()
    # a sliding window has room for all, in one segment
    held = memory.frames().tolist()
    memory.change_policy(PRESETS["window"])
    assert [s.frame.tolist() for s in memory.segments()] == [held]
    memory.change_policy(policy)
    assert memory.frames().tolist() == held


@pytest.mark.parametrize("keep, interval, tau, kept", [
    ("surprisal", 2, .95, [4]),  # tested are 0, 2, 4, ...; a similarity equal to tau is no surprise
    ("surprisal", 1, .95, [1, 4]),
    ("surprisal", 1, .96, [1, 2, 4]),
    ("surprisal", 1, -1., []),
    ("uniform", 2, .95, [0, 2, 4]),
    ("uniform", 1, .95, [0, 1, 2, 3, 4])])
def test_a_chunk_is_kept_where_it_is_tested_and_less_similar_than_tau(keep, interval, tau, kept):
    policy = Policy(3, 12, 6, keep, interval, tau)
    similar = torch.tensor([.99, .90, .95, .97, -.5])
    found = [i for i in range(5) if policy.should_keep(i, similar[i:i + 1])]
    assert found == kept


class Echo:
    """A stand-in network whose keys are its input: how alike chunks are can be written by hand."""
    config = replace(tiny_dit, dim=16, heads=1)

    def __call__(self, x, t, text, rope, memory=None, modulation=None):
        keys = x[..., 0, 0][:, :, None]  # one token a latent
        return x, [(keys, keys)]


def test_keyframes_are_the_surprising_chunks_of_each_video_by_itself():
    # the axis that all keys of a chunk lie along: equal axes are alike, others are not
    restless = [*range(8), 7, 7, 7, *range(8, 11), *range(10, 16)]
    axes = torch.tensor([[0] * 20, restless]).repeat_interleave(CHUNK, dim=1)
    keys = F.one_hot(axes, 16).float()
    text = [(torch.zeros(1, 1, 1, 16),) * 2]
    roll = Rollout(Echo(), text, PRESETS["slowfast"], (1, 1))
    append_all(roll, keys[..., None, None])
    kept = [i for i in range(2, 20, 2) if restless[i] != restless[i - 1]]
    decisions = [decision.tolist() for decision in roll.kept]
    assert decisions == [[False, i in kept] for i in range(20)]
    roll.read_context()  # chunk 20 is to be made: chunks up to 18 have left fast memory
    # latents 3..14 fill slow memory, then the first latents of kept chunks push the oldest out
    first = [*range(3, 15)]
    pushed = [CHUNK * i for i in kept if i > 4]
    memory = roll.memory
    assert memory.sink.frame.tolist() == [[0, 1, 2]] * 2
    assert memory.slow.frame.tolist() == [first, [*first, *pushed][-12:]]
    assert memory.fast.frame.tolist() == [[57, 58, 59]] * 2


@pytest.mark.parametrize("pool, places", [("mean", 1), ("token", 8)])
def test_similarity_is_the_mean_cosine_over_layers_and_places(pool, places):
    layers = noise(2, 2, 2, 24, 3, 8)  # the chunk and the one before it in each of two
    cosines = []
    for pair in layers:
        # a chunk's 24 tokens are 3 latents of 8 places
        means = [k.reshape(2, 3, 8, 24).mean(1) for k in pair]
        if pool == "mean":
            means = [m.mean(1, keepdim=True) for m in means]
        cosines.append(F.cosine_similarity(*means, dim=-1).mean(1))
    now, before = (chunk_descriptor([*keys], pool) for keys in layers.unbind(1))
    assert now.shape == (2, 2, places, 24)
    close(similarity(now, before), torch.stack(cosines).mean(0), 1e-6)


@pytest.mark.parametrize("preset", ["slowfast", "uniform1", "window", "longlive21"])
def test_7_chunks_through_the_cache_equal_one_causal_forward_and_later_ones_forget(preset):
    """To 1e-5 in float32. The chunk at hand is noised, those before it are clean."""
    net = random_dit()
    x0, xt = noise(2, 2, 33, 16, 4, 8)
    text = random_text(net, 2)
    t = torch.rand(2, 33)
    roll = Rollout(net, text, PRESETS[preset], (2, 4))
    for i in range(11):
        past = slice(CHUNK * i)
        at = slice(CHUNK * i, CHUNK * (i + 1))
        roll.read_context()
        v, _ = roll.predict(xt[:, at], t[:, at])
        level = torch.cat([0 * t[:, past], t[:, at]], dim=1)
        video = torch.cat([x0[:, past], xt[:, at]], dim=1)
        whole, _ = block_causal(net, text, video, level)
        apart = (v - whole[:, -CHUNK:]).abs().max()
        assert apart < 1e-5 if i < 7 else apart > 1e-4, i
        roll.append(x0[:, at])


def test_what_is_held_are_the_keys_of_the_clean_pass_and_neither_reading_nor_a_pass_changes_it():
    net = random_dit()
    x0 = noise(2, 27, 16, 4, 8)
    clean = []
    net.register_forward_hook(lambda module, args, made: clean.append(made[1]))
    policy = replace(PRESETS["slowfast"], tau=1.)
    roll = append_all(Rollout(net, random_text(net, 2), policy, (2, 4)), x0)
    memory, _ = roll.read_context()
    roll.predict(x0[:, :3], torch.full((2, 3), .5))
    held = roll.memory.read()
    assert torch.equal(held.frame, frames_in_memory(policy, torch.stack(roll.kept, 1))[9])
    assert torch.equal(held.latent, x0[:, held.frame[0]])
    for place, frame in enumerate(held.frame[0].tolist()):
        tokens = torch.arange(8) + frame % CHUNK * 8
        for layer, (keys, values) in enumerate(clean[frame // CHUNK]):
            assert torch.equal(held.keys[layer][:, place], keys[:, tokens])
            assert torch.equal(held.values[layer][:, place], values[:, tokens])
    # values lie in memory once
    first = roll.memory.segments()[0]
    assert [z.data_ptr() for z in first.values] == [layer.values.data_ptr() for layer in memory]


def plain_video(net, text, uncond, seed, chunks, sampler):
    """Sampling written out, without a cache: the whole clean past is run again in every step."""
    levels = [5 * u / (1 + 4 * u) for u in (1, .75, .5, .25, 0)]
    past = torch.zeros(1, 0, 16, 4, 8)
    for chunk in range(chunks):
        x = draw_noise([seed], chunk, 0, (3, 16, 4, 8))
        for step, (level, following) in enumerate(itertools.pairwise(levels), 1):
            video = torch.cat([past, x], dim=1)
            t = level * (torch.arange(video.shape[1]) >= past.shape[1])[None]
            v, away = (block_causal(net, c, video, t)[0][:, -3:] for c in (text, uncond))
            v = away + sampler.guidance * (v - away)
            if sampler.renoise and step < 4:
                fresh = draw_noise([seed], chunk, step, (3, 16, 4, 8))
                x = (1 - following) * (x - level * v) + following * fresh
            else:
                x = x - (level - following) * v
        past = torch.cat([past, x], dim=1)
    return past


@pytest.mark.parametrize("guidance, renoise, layers", [
    (1., True, 2),
    (3., True, 1),
    (1., False, 2)])
def test_a_generated_video_is_the_sampling_loop_written_out(guidance, renoise, layers):
    """With guidance one layer: its keys do not see the text, so that the past of both texts is the same."""
    net = random_dit(dim=64, ffn_dim=96, heads=2, layers=layers)
    sampler = Sampler(guidance=guidance, renoise=renoise)
    text = random_text(net)
    uncond = random_text(net, seed=6)
    want = plain_video(net, text, uncond, 3, 4, sampler)
    roll = Rollout(net, text, PRESETS["slowfast"], (2, 4))
    made = generate(roll, [3], 3, sampler, (16, 4, 8), uncond, history=want[:, :3])
    close(torch.cat(list(made), dim=1), want[:, 3:], 2e-4)


def test_noise_depends_on_seed_chunk_and_step_alone():
    a = draw_noise([1, 2], 3, 0, (4,))
    assert torch.equal(a[1:], draw_noise([2], 3, 0, (4,)))
    for chunk, step in ((4, 0), (2, 256), (3, 1), (3, 256)):
        assert not torch.equal(a[1:], draw_noise([2], chunk, step, (4,)))
    for seed in (1, 2 + 2 ** 32):
        assert not torch.equal(a[1:], draw_noise([seed], 3, 0, (4,)))


def test_a_video_does_not_depend_on_its_batch_and_goes_on_from_its_own_latents_bit_for_bit():
    """Batch against single runs: to 1e-4 over 4 chunks in float32, with the same decisions."""
    net = random_dit()
    text = random_text(net, 2)

    def start(rows):
        own = [(k[rows], v[rows]) for k, v in text]
        return Rollout(net, own, PRESETS["slowfast"], (2, 4))

    def made(roll, seeds, chunks, history=None):
        new = generate(roll, seeds, chunks, Sampler(), (16, 4, 8), history=history)
        return torch.cat([*new], 1)
    both = start(slice(2))
    alone = start(slice(1, 2))
    resumed = start(slice(1, 2))
    begun = made(alone, [6], 4)
    close(begun[0], made(both, [5, 6], 4)[1], 1e-4)
    assert torch.equal(torch.stack(both.kept)[:, 1:], torch.stack(alone.kept))
    begun = torch.cat([begun, made(alone, [6], 9)], 1)  # slow memory is in use
    assert torch.equal(made(alone, [6], 5), made(resumed, [6], 5, begun))
    assert torch.equal(torch.stack(alone.similarities), torch.stack(resumed.similarities))


@torch.no_grad()
@pytest.mark.parametrize("policy, positions, chunks, first", [
    (PRESETS["uniform2"], "bounded", 13, 3),
    (PRESETS["uniform2"], "unbounded", 13, 3),
    (Policy(1, 0, 6), "bounded", 4, 1)])
def test_recaching_is_a_clean_pass_over_what_is_held_under_the_new_text(policy, positions, chunks, first):
    """To 1e-5: in one block-causal forward, of groups of three with what is left over in front."""
    net = random_dit()
    old = random_text(net, 2)
    new = random_text(net, 2, seed=6)
    roll = Rollout(net, old, policy, (2, 4), positions)
    append_all(roll, noise(2, 3 * chunks, 16, 4, 8))
    before = roll.memory.read()
    roll.recache(new)
    after = roll.memory.read()
    assert torch.equal(before.frame, after.frame)
    assert torch.equal(before.latent, after.latent)
    place = torch.arange(len(after))
    time = after.frame[0] if positions == "unbounded" else place
    t = torch.zeros(2, len(after))
    _, kv = block_causal(net, new, after.latent, t, (place + 3 - first) // CHUNK, time)
    for keys, values, want in zip(after.keys, after.values, kv, strict=True):
        close(keys.flatten(1, 2), want[0], 1e-5)
        close(values.flatten(1, 2), want[1], 1e-5)
    close(roll.descriptor, chunk_descriptor([k[:, -24:] for k, _ in kv]), 1e-5)


# ---- distillation: DMD and its contextual form -------------------------------------------------------------

def test_golden_dmd_gradient_loss_and_critic():
    c, _, given, want = golden("flow")
    given = {k[4:]: v for k, v in given.items() if k.startswith("dmd.")}
    want = {k.removeprefix("dmd."): v for k, v in want.items()}
    n, x = c["num_train_timesteps"], given["generated"]
    # noise levels, and the official table of 1,000 of them
    u = given["t_raw"].double() / n
    t = flow.shifted(u, c["timestep_shift"]).clamp(c["min_step"] / n, c["max_step"] / n)
    close((t * n).float(), want["t"].float(), 2e-2)
    assert torch.equal(dmd.score_level(u, c["timestep_shift"]), t)
    ends = dmd.score_level(torch.tensor([0., 1.]), c["timestep_shift"])
    assert ends.tolist() == pytest.approx([c["min_step"] / n, c["max_step"] / n])
    sigmas = torch.tensor(flow.schedule(int(n), c["shift"]), dtype=torch.float64).float()
    t = sigmas[(sigmas - t[..., None].float()).abs().argmin(-1)]
    close(flow.add_noise(x, given["noise"], t), want["noisy"], 2e-5)
    # the gradient, with and without guidance of the fake score (theirs is the conditional where it is 0)
    real = flow.guide(given["x0_real_cond"], given["x0_real_uncond"], 1 + c["real_guidance_scale"])
    for weight, suffix in ((c["fake_guidance_scale"], ""), (c["fakecfg_scale"], "_fakecfg")):
        fake = flow.guide(given["x0_fake_cond"], given["x0_fake_uncond"], 1 + weight)
        gradient, _ = dmd.dmd_gradient(x, fake if weight else given["x0_fake_cond"], real)
        close(gradient, want[f"grad{suffix}"], 2e-5)
        close(gradient / gradient.numel(), want[f"dloss_dgenerated{suffix}"], 2e-5)
        loss = .5 * gradient.double().square().mean()
        assert loss == pytest.approx(want[f"loss{suffix}"].item(), rel=1e-5)
    close(dmd.dmd_gradient(x, x, x)[0], want["grad_all_equal"], 0)
    # the critic's loss
    v = flow.v_from_x0(want["noisy"], given["x0_fake_cond"], t)
    loss = flow.flow_matching_loss(v, given["noise"] - x).mean()
    assert loss.item() == pytest.approx(want["critic.loss"].item(), rel=1e-5)


EVERY_CHUNK = replace(PRESETS["slowfast"], tau=1.)
LEVELS = flow.schedule(4, 5.)


def fresh_noise(chunk, step):
    return draw_noise([1, 2], chunk, step, (3, 16, 4, 4))


def student_video(net, text, chunks=9, policy=PRESETS["slowfast"], for_backward=True, exit_step=1):
    """A rollout of two videos, its last four chunks the target, stopped at the second of four steps."""
    roll = Rollout(net, text, policy, (2, 2))
    return dmd.rollout(roll, LEVELS, exit_step, fresh_noise, chunks, 4, for_backward)


def student_video_in_one_graph(net, features, chunks, exit_step=1):
    """
    The same written plainly, with a graph through each target chunk's exit step, or (None) all its steps ->
    (b, f, c, h, w)
    """
    stop = 4 if exit_step is None else exit_step + 1
    text, xs = net.text(features), []
    detached = [(k.detach(), v.detach()) for k, v in text]
    roll = Rollout(net, detached, EVERY_CHUNK, (2, 2))
    for i in range(chunks):
        memory, rope = roll.read_context()
        x = fresh_noise(i, 0)
        levels = LEVELS if i < chunks - 4 else LEVELS[:stop]
        for step, level in enumerate(levels):
            t = torch.full(x.shape[:2], level)
            with torch.set_grad_enabled(i >= chunks - 4 and exit_step in (None, step)):
                x0 = x - level * net(x, t, text, rope, memory)[0]
            if step + 1 < len(levels):
                below = torch.full_like(t, levels[step + 1])
                x = flow.add_noise(x0, fresh_noise(i, step + 1), below)
        roll.append(x0.detach())
        xs.append(x0)
    return torch.cat(xs[-4:], dim=1)


def plain_velocity(net, features, context, xt, t):
    """v of the target with an attention mask in full: context sees context, the target sees all."""
    n = context.shape[1]
    f = xt.shape[1]
    mask = torch.ones(len(xt), n + f, n + f, dtype=torch.bool)
    mask[:, :n, n:] = False
    rope = rope_of_grid(net, torch.arange(n + f), (2, 2))
    level = F.pad(t[:, None].expand(-1, f), (n, 0))
    x = torch.cat([context, xt], 1)
    return net(x, level, net.text(features), rope, mask=mask)[0][:, n:]


def gradients(net):
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def same_gradients(got, want, rtol=1e-4):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= rtol * want[name].norm() + 1e-9, name
        assert want[name].abs().sum() > 0, name


def test_rollout_follows_algorithm_1():
    net, calls = random_dit(), []

    def hook(module, args):
        calls.append(args[1][0, 0].item())
        assert not torch.is_grad_enabled()
    net.register_forward_pre_hook(hook)
    trace = student_video(net, random_text(net, 2), 13)
    # every chunk before the target in full, then up to the exit step; a clean pass after each
    before = [*LEVELS, 0.]
    target = [*LEVELS[:2], 0.]
    assert calls == pytest.approx(before * 9 + target * 4)
    assert [exit.levels for exit in trace.exits] == [[LEVELS[1]]] * 4
    # the context is what a full memory holds before room is made for the target
    keep = torch.stack(trace.rollout.kept, 1)
    held = frames_in_memory(PRESETS["slowfast"], keep, evict_first=False)[9]
    frames = torch.cat([some.frame for some in trace.entries], 1)
    latents = torch.cat([some.latent for some in trace.entries], 1)
    assert torch.equal(frames[:, :21], held)
    assert torch.equal(trace.context, latents[:, :21])
    assert torch.equal(trace.x, latents[:, 21:])
    # what the backward pass needs does not grow with the length, and the memory drops its keys
    assert sum(map(len, student_video(net, random_text(net, 2), 20).entries)) == 21 + 12
    assert not any(segment.keys or segment.values for segment in trace.rollout.memory.segments())


def test_a_critics_rollout_is_the_students_and_keeps_no_keys():
    net = random_dit()
    text = random_text(net, 2)
    trace = student_video(net, text, 9)
    for_critic = student_video(net, text, 9, for_backward=False)
    assert torch.equal(trace.x, for_critic.x)
    assert torch.equal(trace.context, for_critic.context)
    assert not for_critic.exits and not for_critic.entries
    assert for_critic.rollout.view is None


def test_the_critic_learns_all_21_latents_of_a_whole_video_that_have_a_context():
    net = random_dit()
    text = random_text(net, 2)
    video = student_video(net, text, 15, for_backward=False, exit_step=None)
    keep = torch.stack(video.rollout.kept, 1)
    contexts, xs = dmd.targets_of(video.video, keep, PRESETS["slowfast"], 4)
    # what ends at chunks 15 and 11; before that memory is not full
    assert len(xs) == 4
    assert torch.equal(xs[:2], video.x)
    assert torch.equal(contexts[:2], video.context)
    shorter = student_video(net, text, 11, for_backward=False, exit_step=None)
    close(xs[2:], shorter.x, 1e-6)
    close(contexts[2:], shorter.context, 1e-6)
    # of the first chunks all, behind nothing
    first = shorter.video[:, :12]
    contexts, xs = dmd.targets_of(first, keep[:, :4], PRESETS["slowfast"], 4)
    assert contexts.shape[1] == 0
    assert torch.equal(xs, first)


@pytest.mark.parametrize("chunks", [4, 9, 13])
def test_two_pass_gradient_through_all_steps_equals_the_gradient_of_one_graph(chunks):
    net, features = random_dit().requires_grad_(), noise(2, 20, 64)
    trace = student_video(net, net.text(features), chunks, EVERY_CHUNK, exit_step=None)
    gradient = noise(*trace.x.shape, seed=3)
    dmd.backward(trace, features, gradient)
    two_passes = gradients(net)
    x = student_video_in_one_graph(net, features, chunks, None)
    close(x.detach(), trace.x, 1e-5)
    x.backward(gradient)
    same_gradients(two_passes, gradients(net), 1e-5)


def test_rollouts_grow_linearly():
    longest = [dmd.longest_rollout(step, 14, 40, 500) for step in (0, 10, 250, 500, 900)]
    assert longest == [14, 14, 27, 40, 40]


def test_at_full_size_half_of_the_rollouts_begin_with_six_keyframes_or_more():
    preset = train.WAN["stage2"]
    shares = dmd.keyframe_histogram(preset.shortest, preset.longest, preset.ramp, 7)
    assert sum(shares) == pytest.approx(1)
    assert sum(shares[6:]) >= .5
    assert shares[12] >= .08 and shares[0] <= .12
    # a keyframe is what slow memory holds beyond the first 15 latents
    even = torch.arange(40)[None] % 2 == 0
    contexts = frames_in_memory(PRESETS["uniform2"], even, evict_first=False)
    for chunks in range(14, 41):
        assert dmd.keyframes(chunks, 7) == (contexts[chunks - 7][0, 3:15] >= 15).sum()


def score_inputs(net, chunks=9):
    """What critic_step and student_step take: a video of `net`, with a context, noise levels and noise."""
    features = noise(2, 20, 64)
    trace = student_video(net, net.text(features), chunks, EVERY_CHUNK)
    return features, trace, torch.tensor([.3, .8]), noise(*trace.x.shape, seed=5)


def over_pixels(x):
    return x.mean((1, 2, 3, 4))


def test_critic_step_is_flow_matching_on_the_students_video_behind_its_context():
    student = random_dit().requires_grad_()
    critic = random_dit(1).requires_grad_()
    features, trace, t, eps = score_inputs(student)
    loss, error = dmd.critic_step(critic, features, trace, t, eps, (2, 2))
    got = gradients(critic)
    at = t[:, None, None, None, None]
    assert not gradients(student)
    v = plain_velocity(critic, features, trace.context, (1 - at) * trace.x + at * eps, t)
    off = v - (eps - trace.x)
    want = off.square().mean()
    want.backward()
    same_gradients(got, gradients(critic))
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(error, over_pixels((at * off).square()), rtol=1e-4)


@pytest.mark.parametrize("guidance, chunks", [(1., 4), (1., 9), (3., 13)])
def test_student_step_pushes_the_difference_of_the_scores_through_the_exit_steps(guidance, chunks):
    """Eq. 6 in one graph: d/dtheta of sum(x * stopped gradient) is what the two passes add up to."""
    student, teacher, critic = (random_dit(i).requires_grad_() for i in range(3))
    features, trace, t, eps = score_inputs(student, chunks)
    other = noise(2, 20, 64, seed=9)
    norm, error = dmd.student_step(
        student, teacher, critic, features, trace, t, eps, (2, 2), guidance, other)
    got = gradients(student)
    at = t[:, None, None, None, None]
    assert not gradients(teacher) and not gradients(critic)
    with torch.no_grad():
        xt = (1 - at) * trace.x + at * eps

        def x0_of(net, words):
            return xt - at * plain_velocity(net, words, trace.context, xt, t)
        away = x0_of(teacher, other)
        real = away + guidance * (x0_of(teacher, features) - away)
        scale = over_pixels((trace.x - real).abs())
        gradient = (x0_of(critic, features) - real) / scale[:, None, None, None, None]
    x = student_video_in_one_graph(student, features, chunks)
    close(x.detach(), trace.x, 1e-5)
    (x * gradient).mean().backward()
    same_gradients(got, gradients(student))
    assert torch.allclose(norm, scale, rtol=1e-4)
    assert torch.allclose(error, over_pixels((trace.x - real).square()), rtol=1e-4)


# ---- the teacher and its errors ----------------------------------------------------------------------------

def batch_of_errors(samples=1, t=.5, injected=True, value=1., seed=0):
    """Residuals of one chunk a sample, all of one value: that of noise is the negative."""
    error = torch.full((samples, 3, 16, 4, 4), value)
    level = torch.full((samples,), t)
    chosen = torch.full((samples,), injected)
    return erft.Residuals(seed, level, error, -error, chosen)


def small_bank(size=4):
    return erft.ErrorBank((16, 4, 4), size=size)


def test_the_bank_sorts_errors_by_the_nearest_noise_level():
    bank = small_bank()
    assert bank.bucket(torch.tensor([1., .02, .625])).tolist() == [0, 49, 37]
    bank.push(batch_of_errors(t=.625, value=2.))
    assert bank.count.nonzero().tolist() == [[erft.OF_LATENTS, 37], [erft.OF_NOISE, 37]]
    assert bank.errors[erft.OF_LATENTS, 37, 0].unique().item() == 2
    assert bank.errors[erft.OF_NOISE, 37, 0].unique().item() == -2
    again = small_bank()
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.errors, bank.errors)
    assert torch.equal(again.count, bank.count)


def test_a_full_bank_stays_as_large_as_it_is_and_replaces_at_random():
    bank, order = small_bank(), []
    level = bank.bucket(torch.tensor([.5])).item()
    for i in range(1, 25):
        bank.push(batch_of_errors(value=float(i), seed=i - 1))
        values = bank.errors[erft.OF_LATENTS, level].flatten(1)[:, 0].tolist()
        order.append(values.index(i))
    assert bank.count.max() == 4
    assert order[:4] == [0, 1, 2, 3] != order[4:8]
    assert set(order[4:]) == {0, 1, 2, 3}


def test_a_tenth_of_the_samples_without_errors_and_all_the_others_fill_the_bank():
    bank = small_bank(1000)
    bank.push(batch_of_errors(samples=500, injected=True))
    assert bank.count.max() == 500
    bank.push(batch_of_errors(samples=500, injected=False))
    assert 30 < bank.count.max() - 500 < 70


def test_errors_of_several_processes_enter_the_bank_in_one_order_however_many_they_are():
    banks = [small_bank(), small_bank()]
    found = [batch_of_errors(value=float(i), seed=i) for i in range(8)]
    # one process that accumulates four batches, and two processes in the order of their ranks
    for bank, order in zip(banks, ((0, 1, 2, 3), (0, 2, 1, 3))):
        for first in (0, 4):
            bank.recycle([found[first + i] for i in order])
    assert torch.equal(banks[0].errors, banks[1].errors)
    assert banks[0].count.max() == 4


def injected(bank, x, t, **more):
    """What bank.inject() makes of a context of two chunks, and of latents and noise of seven."""
    level = torch.full((len(x),), t)
    return bank.inject(np.random.default_rng(0), x[:, :6], x, x, level, **more)


def share_changed(x):
    """Of chunks (b, 3 n, ...) that were zero -> (b, n) float: is the chunk another now?"""
    return (x.unflatten(1, (-1, CHUNK)) != 0).flatten(2).any(2).float()


def test_errors_go_into_half_of_the_samples_and_seldom_into_the_sink_or_the_noise():
    bank = small_bank()
    x = torch.zeros(512, 21, 16, 4, 4)
    bank.push(batch_of_errors())
    context, latents, eps, chosen = injected(bank, x, .5)
    assert abs(chosen.float().mean() - .5) < .07
    assert not any(some[~chosen].any() for some in (context, latents, eps))
    sink, later = share_changed(context[chosen]).mean(0)
    assert abs(later - .9) < .05
    assert abs(sink - .45) < .07
    assert abs(share_changed(latents[chosen]).mean() - .9) < .05
    assert 0 < share_changed(eps).mean() < .03
    # each error scaled a little; what came in stays as it was
    scales = context[context != 0]
    assert .7 <= scales.min() < .75
    assert 1.25 < scales.max() <= 1.31
    assert not x.any()


@pytest.mark.parametrize("level, any_in_latents", [(.5, False), (.9, True)])
def test_latents_and_noise_get_errors_of_their_own_level_and_the_context_of_any(
        level, any_in_latents, monkeypatch):
    monkeypatch.setattr(erft, "NOISE_CHANCE", 1.)
    bank = small_bank()
    x = torch.zeros(64, 6, 16, 4, 4)
    bank.push(batch_of_errors(t=.9))
    context, latents, eps, _ = injected(bank, x, level, p=1)
    assert context.max() > 0
    assert (latents.max() > 0) == (eps.min() < 0) == any_in_latents
    assert latents.min() >= 0 >= eps.max()  # an error of the noise is the negative


@pytest.fixture
def teacher_inputs():
    """-> net, bank, and what teacher_step takes: context, x0, noise, t, features"""
    net = random_dit().requires_grad_()
    context, x0, eps = (noise(2, 6, 16, 4, 4, seed=i) for i in (0, 2, 3))
    given = context, x0, eps, torch.tensor([.5, .9]), noise(2, 20, 64)
    return net, small_bank(), given


def test_teacher_step_learns_the_clean_target_from_inputs_with_errors(monkeypatch, teacher_inputs):
    monkeypatch.setattr(erft, "NOISE_CHANCE", 1.)
    net, bank, given = teacher_inputs
    context, x0, eps, t, features = given
    for level in (.5, .9):
        bank.push(batch_of_errors(t=level))
    loss = erft.teacher_step(net, bank, 7, *given, (2, 2), 1.)
    got = gradients(net)
    at = t[:, None, None, None, None]
    rng = np.random.default_rng([7, 0])
    seen, x0_seen, eps_seen, injected = bank.inject(rng, context, x0, eps, t, p=1)
    for with_errors, clean_one in ((seen, context), (x0_seen, x0), (eps_seen, eps)):
        assert torch.any(with_errors != clean_one)
    v = plain_velocity(net, features, seen, (1 - at) * x0_seen + at * eps_seen, t)
    off = v - (eps_seen - x0)
    want = off.square().mean()
    want.backward()
    same_gradients(got, gradients(net))
    assert loss == pytest.approx(want.item(), rel=1e-5)
    # what it gives to the bank: by how much its latents and its noise are off
    found, = bank.pending
    assert found.latent.dtype == found.noise.dtype == torch.bfloat16
    for got, want in ((found.latent, -at * off), (found.noise, (1 - at) * off)):
        assert torch.allclose(got.float(), want, rtol=2 ** -8, atol=1e-4)
    assert found.injected.all() and found.seed == 7


@pytest.mark.parametrize("filled, p", [(True, 0.), (False, 1.)])
def test_without_errors_teacher_step_is_plain_flow_matching_bit_for_bit(filled, p, teacher_inputs):
    net, bank, given = teacher_inputs
    context, x0, eps, t, features = given
    if filled:
        bank.push(batch_of_errors())
    erft.teacher_step(net, bank, 7, *given, (2, 2), p)
    got = gradients(net)
    level = t[:, None].expand(2, 6)
    xt = flow.add_noise(x0, eps, level)
    v = erft.predict_velocity(net, context, xt, level, net.text(features), (2, 2))
    flow.flow_matching_loss(v, eps - x0).mean().backward()
    want = gradients(net)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("renoise", [True, False])
def test_a_teacher_goes_on_as_its_sampling_loop_written_out(renoise):
    net = random_dit()
    history = noise(2, 27, 16, 4, 8)
    text = random_text(net, 2)
    seeds = [3, 4]
    # what slow-fast memory holds after 9 chunks, every second of them kept
    even = torch.arange(9)[None] % 2 == 0
    held = frames_in_memory(PRESETS["slowfast"], even, evict_first=False)[-1][0]
    x = draw_noise(seeds, 9, 0, (21, 16, 4, 8))
    levels = [*flow.schedule(3, 3.), 0.]
    for step, (t, below) in enumerate(itertools.pairwise(levels), 1):
        level = torch.full((2, 21), t)
        v = erft.predict_velocity(net, history[:, held], x, level, text, (2, 4))
        x0 = x - t * v
        fresh = draw_noise(seeds, 9, step, (21, 16, 4, 8))
        x = (1 - below) * x0 + below * fresh if renoise else x + (below - t) * v
    sampler = Sampler(3, 3., renoise=renoise)
    made = erft.extend(net, history, text, (2, 4), sampler, seeds)
    assert torch.allclose(made, x, atol=1e-5)


# ---- the causal start model: packs see what a rollout sees, kinds of history hold what they say ------------

def numbered(worlds, latents):
    """In place of a cache: latents (clips, n, 3, 1, 1) that tell clip, frame, and: are there landmarks?"""
    clip, frame = torch.meshgrid(torch.arange(len(worlds)), torch.arange(latents), indexing="ij")
    landmarks = torch.full_like(clip, not worlds[0].empty)
    return torch.stack([clip, frame, landmarks], dim=2)[..., None, None].bfloat16()


@pytest.fixture
def four_clips(monkeypatch):
    """cache -> clips of the small world, two also encoded without landmarks, and openings of six more"""
    monkeypatch.setattr(data, "CLIPS", 4)
    monkeypatch.setattr(data, "OPENINGS", 6)
    monkeypatch.setattr(data, "EMPTY_CLIPS", 2)
    monkeypatch.setattr(histories, "EMPTY_CLIPS", 2)
    return lambda cache=numbered: data.WorldClips(0, cache, lambda captions: captions, CPU)


def causal_predictions(net, text, x0, xt, t, first=0):
    """Real clips x0 through the KV cache -> velocities of xt (b, f, c, h, w), from chunk `first` on"""
    roll = Rollout(net, text, PRESETS["slowfast"], (2, 4))
    found = []
    for i, chunk in enumerate(x0.split(CHUNK, dim=1), -first):
        roll.read_context()
        if i >= 0:
            at = slice(CHUNK * i, CHUNK * (i + 1))
            found.append(roll.predict(xt[:, at], t[:, at])[0])
        roll.append(chunk)
    return torch.cat(found, dim=1)


def test_a_packed_pass_predicts_what_a_rollout_predicts_and_its_copies_are_blind_to_each_other():
    net = random_dit()
    x0 = noise(1, 18, 16, 4, 8)
    text = random_text(net)
    xt = noise(1, 6, 16, 4, 8, seed=3)
    t = torch.rand(1, 6)
    # 15 latents, three empty places and what stands there; two copies of the next chunk
    past_frame = F.pad(torch.arange(15), (0, 3), value=-1)[None]
    past = F.pad(x0[:, :15], (0, 0) * 3 + (0, 3), value=9.)
    last = [15, 16, 17] * 2
    pack = causal.Pack(past, past_frame, x0[:, last], torch.tensor([last]))
    v = causal.packed_forward(net, text, pack, xt, t, (2, 4))
    for copy in (slice(0, 3), slice(3, 6)):
        want = causal_predictions(net, text, x0, xt[:, copy], t[:, copy], 5)
        close(v[:, copy], want, 1e-5)


def test_packs_of_more_tokens_than_every_kernel_masks_right_are_refused():
    frame = torch.zeros(1, 18, dtype=torch.long)
    target_frame = torch.zeros(1, 24, dtype=torch.long)
    pack = causal.Pack(torch.zeros(1, 18, 1), frame, None, target_frame)
    xt, t = torch.zeros(1, 24, 1), torch.zeros(1, 24)
    net = lambda x, *about, **more: (x, None)
    net.config = SimpleNamespace(head_dim=6)
    # at 832x480 there are 65,520
    assert causal.packed_forward(net, None, pack, xt, t, (30, 52)).shape == xt.shape
    with pytest.raises(BadInput, match="init has 69888 tokens a clip"):
        causal.packed_forward(net, None, pack, xt, t, (32, 52))


def test_the_prefix_pass_predicts_each_of_the_first_seven_chunks_from_those_before_it(four_clips):
    net = random_dit()
    x0 = noise(1, 123, 16, 4, 8)
    clips = four_clips(lambda worlds, latents: x0[:, :latents].repeat(len(worlds), 1, 1, 1, 1))
    pack = causal.prefix_pack(clips, clips.draw_history(np.random.default_rng(0), 1))
    x0 = x0[:, :21]
    assert torch.equal(pack.target, x0)
    assert torch.equal(pack.past, x0)
    text = random_text(net)
    xt = noise(*x0.shape, seed=3)
    t = torch.rand(1, 21)
    v = causal.packed_forward(net, text, pack, xt, t, (2, 4))
    close(v, causal_predictions(net, text, x0, xt, t), 1e-5)


@pytest.mark.parametrize("kind", ["full", "lookup"])
def test_a_history_is_what_memory_holds_and_of_lookup_no_landmark_since_one_of_the_view_was_out_of_sight(
        kind, four_clips):
    clips = four_clips()
    history = clips.draw_history(np.random.default_rng(1), 96, lookup=True)
    pack = causal.history_pack(clips, history, kind)
    assert torch.equal(pack.past_frame, history.frame)
    for b, (c, chunk) in enumerate(zip(history.clip.tolist(), history.chunk.tolist())):
        is_there = history.frame[b] >= 0
        held = history.frame[b][is_there].tolist()
        clip, frame, landmarks = pack.past[b, is_there, :, 0, 0].unbind(1)
        assert set(clip.tolist()) == {c}
        assert frame.tolist() == held
        apart = apart_and_landmarks(training_worlds(4, 0)[c], chunk)[0]
        assert apart >= 0
        assert landmarks.tolist() == [kind == "full" or n <= apart for n in held]
    # four copies of the next chunk, with its landmarks
    clip, frame, landmarks = pack.target[..., 0, 0].unbind(2)
    assert (clip == history.clip[:, None]).all()
    assert landmarks.all()
    next_chunk = 3 * history.chunk[:, None] + torch.arange(3)
    assert torch.equal(pack.target_frame, next_chunk.repeat(1, 4))
    assert torch.equal(frame, pack.target_frame.float())


@pytest.mark.parametrize("kind, drawn", [("prefix", 4), ("full", 4), ("lookup", 2)])
def test_lookup_is_drawn_from_the_clips_that_are_also_encoded_without_landmarks(kind, drawn, four_clips):
    clips = four_clips()
    clip, pack = causal.draw_pack(clips, kind, np.random.default_rng(0), 64)
    assert set(clip.tolist()) == {*range(drawn)}
    assert (pack.past_frame.max() == 20) == (kind == "prefix")
    assert clips.empty.shape[0] == 2
    assert not hasattr(data.WorldClips(0, numbered, list, CPU, False), "empty")


def test_an_opening_is_the_first_chunk_of_a_world_that_is_met_in_nothing_else(four_clips):
    clips = four_clips()
    clip, pack = causal.draw_pack(clips, "opening", np.random.default_rng(0), 64)
    assert set(clip.tolist()) == {*range(4, 10)}
    captions = [make_world(spec).caption for spec in training_worlds(10, 0)]
    assert clips.text(clip) == [captions[c] for c in clip]
    assert pack.past.shape == (64, 0, 3, 1, 1) and pack.past_frame.shape == (64, 0)
    # four copies of it, with landmarks
    opening, frame, landmarks = pack.target[..., 0, 0].unbind(2)
    assert torch.equal(opening, (clip - 4.)[:, None].expand(-1, 12))
    assert frame.tolist() == pack.target_frame.tolist() == [[0, 1, 2] * 4] * 64
    assert landmarks.all()


def test_an_opening_is_predicted_as_a_rollout_predicts_it(four_clips):
    net = random_dit()
    x0 = noise(1, 123, 16, 4, 8)
    clips = four_clips(lambda worlds, latents: x0[:, :latents].repeat(len(worlds), 1, 1, 1, 1))
    _, pack = causal.draw_pack(clips, "opening", np.random.default_rng(0), 1)
    text = random_text(net)
    xt = noise(1, 12, 16, 4, 8, seed=3)
    t = torch.rand(1, 12)
    v = causal.packed_forward(net, text, pack, xt, t, (2, 4))
    for copy in range(4):
        at = slice(3 * copy, 3 * copy + 3)
        want = causal_predictions(net, text, x0[:, :3], xt[:, at], t[:, at])
        close(v[:, at], want, 1e-5)


def test_copies_are_noised_apart_one_in_each_stratum_of_the_levels():
    fives = torch.full((64, 12, 2, 2, 2), 5.)
    xt, t, v = causal.stratified_noise(fives, 3.)
    u = (t / (3 - 2 * t))[:, ::3]  # the shift undone, a number for each copy
    strata = (4 * u).long().sort(1).values
    assert torch.equal(strata, torch.arange(4).expand(64, 4))
    assert torch.equal(t, t[:, ::3].repeat_interleave(3, 1))
    assert len(t.unique()) == 256
    close(xt - 5, flow.over_frames(t) * v, 1e-5)
    assert len(v.unique()) > .99 * v.numel()
    assert abs(v.mean() + 5) < .1


@pytest.fixture
def one_too_high(monkeypatch):
    """Every packed pass is off by one; -> list of what was asked: (pack, xt, t)"""
    seen = []

    def predict(net, text, pack, xt, t, grid):
        seen.append((pack, xt, t))
        return flow.v_from_x0(xt, pack.target, t) + 1
    monkeypatch.setattr(causal, "packed_forward", predict)
    return seen


def test_the_loss_is_that_of_the_velocity_behind_a_past_that_is_not_quite_clean(one_too_high):
    frame = torch.arange(6).expand(8, -1)
    x0 = torch.full((8, 6, 1, 1, 1), 3.)
    pack = causal.Pack(0 * x0, frame, x0, frame)
    loss = causal.teacher_forcing_loss(None, None, pack, (1, 1), 3., .5)
    pack, _, t = one_too_high[0]
    assert torch.allclose(loss, torch.ones(()), rtol=1e-3)
    assert 0 < pack.past.abs().mean() < .5


def test_the_trajectory_loss_is_the_error_of_x0_at_the_students_levels(one_too_high):
    levels = torch.tensor(flow.schedule(4, 3.))
    x = noise(2, 27, 5, 16, 4, 8).bfloat16()
    made = causal.Trajectories(x, torch.arange(18).expand(2, 9, 18))
    text = [(torch.zeros(1), None)]
    clip = torch.tensor([1, 0])
    chunk = torch.tensor([8, 3])
    loss = causal.trajectory_loss(None, text, made, clip, chunk, levels, (2, 4))
    assert torch.allclose(loss, levels.square().mean(), rtol=1e-3)
    pack, xt, t = one_too_high[0]
    assert torch.equal(pack.past, x[[1, 0], :18, -1].float())
    assert pack.target_frame.tolist() == [[24, 25, 26] * 4, [9, 10, 11] * 4]
    last = x[1, 24:27].float()  # a chunk on its way
    assert torch.equal(pack.target[0], last[:, -1].repeat(4, 1, 1, 1))
    assert torch.equal(xt[0], torch.cat([last[:, i] for i in range(4)]))
    assert torch.equal(t, levels.repeat_interleave(3).expand(2, 12))


@pytest.mark.parametrize("histories", [causal.HISTORIES, causal.FOLDER_HISTORIES], ids=["world", "folder"])
def test_each_kind_of_history_is_drawn_as_often_as_the_table_says(histories):
    rng = np.random.default_rng(0)
    drawn = Counter(causal.draw_kind(histories, rng, 0.) for _ in range(4000))
    assert all(abs(drawn[kind] / 4000 - share) < .03 for kind, share in histories.items())
    assert math.fsum(histories.values()) == 1
    assert "lookup" not in causal.FOLDER_HISTORIES


def test_ode_trajectories_are_the_models_own_sampling_and_are_made_once(tmp_path, monkeypatch):
    net = random_dit()
    latent = (16, 4, 8)
    captions = ["a", "b", "c"]

    def text(*some):
        return random_text(net, len(some))

    def rollout(text):
        return Rollout(net, text, PRESETS["slowfast"], (2, 4))

    def trajectories(sampler=Sampler(4, 3.)):
        networks = SimpleNamespace(dit=net, text=text, rollout=rollout, sampler=sampler, latent=latent)
        return causal.ode_trajectories(tmp_path, networks, captions, 9, 2)
    made = trajectories()
    assert made.x.shape == (3, 27, 5, *latent)
    assert made.past_frame.shape == (3, 9, 18)
    for seeds in ([0, 1], [2]):
        roll = rollout(text(*seeds))
        ode = Sampler(16, 3., renoise=False)
        x0 = torch.cat([*generate(roll, seeds, 9, ode, latent)], dim=1)
        assert torch.equal(made.x[seeds, :, -1], x0.bfloat16())
        start = draw_noise(seeds, 0, 0, (3, *latent))
        assert torch.equal(made.x[seeds, :3, 0], start.bfloat16())
        contexts = frames_in_memory(PRESETS["slowfast"], torch.stack(roll.kept, dim=1))
        for i, held in enumerate(contexts[:9]):
            assert torch.equal(made.past_frame[seeds, i], padded(held, 18))
    with pytest.raises(BadInput, match="16 steps or a fraction of them, not 3"):
        trajectories(Sampler(3))
    monkeypatch.setattr(causal, "record_trajectories", None)  # from here on all is on disk
    assert torch.equal(trajectories().x, made.x)
    # those of other captions are others
    captions[0] = "d"
    with pytest.raises(TypeError, match="NoneType"):
        trajectories()


def padded(held, places):
    """Frame numbers, and -1 where nothing is"""
    return F.pad(held, (0, places - held.shape[1]), value=-1)


def test_tau_keeps_95_percent_of_slow_turns_and_the_pooling_is_the_one_that_keeps_less_lingering():
    is_turn = torch.arange(16) < 8
    moved = torch.where(noise(16, 41).abs() > .5, 5., 1.)
    # keys that do not tell what moves, and keys that do
    blind = 1 - .1 * noise(16, 41, seed=2).abs()
    tells = is_turn[:, None] | (moved > 3.5)
    sharp = torch.where(tells, blind - .5, blind)
    blind[:, :2] = sharp[:, :2] = -1  # what comes before is not tested
    sharp[:, 1::2] = 5                # nor is every other chunk
    found = causal.choose_tau({"mean": blind, "token": sharp}, moved, is_turn)
    assert found["pool"] == "token"
    assert found["tau"] == sharp[:8, 2::2].quantile(.95).item()
    assert abs(found["kept"]["slow turns"] - .95) < .01
    assert found["kept"]["lingering"] == 0
    assert found["kept"]["between"] > .8


# ---- training clips: never held-out worlds, with the pasts that memory would hold --------------------------

def test_training_never_uses_held_out_worlds():
    seeds = [spec.seed for spec in training_worlds(3000, 0)]
    assert len(set(seeds)) == 3000
    assert .99 * world.HELD_OUT < max(seeds) < world.HELD_OUT


@pytest.mark.parametrize("evict_first, places", [(True, 18), (False, 21)])
def test_histories_hold_what_the_memory_would_hold(evict_first, places):
    histories = Histories(training_worlds(3, 0), 20, evict_first)
    every = torch.ones(3, 20, dtype=torch.bool)
    even = every & (torch.arange(20) % 2 == 0)
    keep = {"uniform2": even, "uniform1": every, "moving": even & (histories.moved > 3.5)}
    assert all(torch.equal(histories.keep[rule], keep[rule]) for rule in keep)
    for name, held in histories.held.items():
        policy = PRESETS["slowfast" if name in keep else name]
        contexts = frames_in_memory(policy, keep.get(name, every), evict_first)[:20]
        for i, want in enumerate(contexts):
            assert torch.equal(held[:, i], padded(want, places)), (name, i)


def test_of_every_second_training_clip_the_rate_is_drawn_evenly_and_else_the_period():
    motions = [make_world(spec).motion for spec in training_worlds(6000, 0)]
    for kind, (fastest, slowest) in world.PERIODS.items():
        by_period, by_rate = (
            np.array([motion.seconds for motion in half if motion.kind == kind])
            for half in (motions[::2], motions[1::2]))
        assert by_period.mean() == pytest.approx((fastest + slowest) / 2, rel=.05)
        assert (1 / by_rate).mean() == pytest.approx((1 / fastest + 1 / slowest) / 2, rel=.05)
        assert {by_period.min(), by_rate.min()} == {fastest}
        assert {by_period.max(), by_rate.max()} == {slowest}
    assert training_worlds(10, 0)[:4] == training_worlds(4, 0)


MOTIONS = [WorldSpec(3, "aside"), WorldSpec(1, "turn", 10), WorldSpec(2, "turn", 44)]


def apart_and_landmarks(spec, chunk):
    """
    For the view at a chunk's end: the latent at which the landmark of it that was out of sight longest ago
    was so for the last time (-1: none was), and the landmarks of the view at each latent: a list of sets.
    """
    w = make_world(spec)
    views, last = [], {}
    for n in range(3 * chunk + 3):
        heading = w.motion.heading(w.start, 4 * n)  # each latent's last frame
        turned = [world.apart(32 * landmark + 16 - heading) for landmark in range(8)]
        views.append({landmark for landmark in range(8) if turned[landmark] < 32})
        if n < 3 * chunk:
            last |= {landmark: n for landmark in range(8) if turned[landmark] > 46}
    apart = [last[landmark] for landmark in views[-1] if landmark in last]
    return min(apart, default=-1), views


def test_a_view_comes_back_if_memory_holds_its_landmarks_from_before_one_of_them_was_out_of_sight():
    histories = Histories(MOTIONS, 30)
    for b, spec in enumerate(MOTIONS):
        w = make_world(spec)
        path = w.motion.heading(w.start, np.arange(361))
        for i in range(30):
            apart, views = apart_and_landmarks(spec, i)
            assert histories.apart[b, i] == apart
            for name, held in histories.held.items():
                before = [views[n] for n in held[b, i].tolist() if 0 <= n <= apart]
                comes_back = views[-1] <= set().union(*before)
                assert histories.back[name][b, i] == comes_back, (spec, name, i)
            moved = path[12 * i + 8] - path[max(0, 12 * i - 3)]
            assert histories.moved[b, i] == pytest.approx(abs(moved), abs=1e-9)


def test_most_of_what_a_look_aside_shows_again_comes_back():
    """By landmarks: a look aside of 90 degrees shares a column with almost all that it has seen."""
    histories = Histories([WorldSpec(seed, "aside") for seed in range(20)], 41)
    assert histories.back["moving"][:, 20:].float().mean() > .8


@pytest.mark.parametrize("given, least, most", [
    ({"ahead": 7}, .45, .6),
    ({}, .45, .6),
    ({"lookup": True}, 1, 1)])
def test_half_of_the_targets_are_views_that_come_back_and_they_have_room_behind_them(given, least, most):
    histories = Histories(MOTIONS, 30)
    history = histories.draw_history(np.random.default_rng(0), 1000, **given)
    assert history.chunk.min() >= 7
    assert history.chunk.max() <= 30 - given.get("ahead", 1)
    back = torch.zeros(1000, dtype=torch.bool)
    for name, held in histories.held.items():
        is_drawn = (held[history.clip, history.chunk] == history.frame).all(1)
        back |= histories.back[name][history.clip, history.chunk] & is_drawn
    assert least <= back.float().mean() <= most


def test_clips_in_which_little_is_new_show_it_as_often_as_others():
    """Else the first turn of a fast one is hardly ever seen, and the network goes back to what it knows."""
    specs = [WorldSpec(0, "turn", 8), *(WorldSpec(i, "turn", 44) for i in range(1, 10))]
    history = Histories(specs, 30).draw_history(np.random.default_rng(0), 2000)
    is_first_turn = (history.clip == 0) & (history.chunk < 11)
    assert .5 / 10 < is_first_turn.float().mean() < .2


@pytest.mark.parametrize("given, share", [
    ({}, .15 / 2),
    ({"ahead": 2}, 0),
    ({"lookup": True}, 0)])
def test_one_sample_in_seven_has_the_memory_of_another_policy_of_the_comparison(given, share):
    history = Histories(MOTIONS, 30).draw_history(np.random.default_rng(0), 3000, **given)
    held = (history.frame >= 0).sum(1)
    assert abs((held < 18).float().mean() - share) < .02  # two of those four hold less than 18 latents
    assert torch.equal(history.frame.max(1).values, 3 * history.chunk - 1)  # up to the target


def test_latents_are_encoded_once_and_never_taken_for_those_of_other_worlds_or_weights(
        tmp_path, monkeypatch):
    tae = TAE(tiny_tae).initialise()
    worlds = training_worlds(3, 0)
    encoded = []

    def counted(tae, spec, latents, device):
        encoded.append(spec)
        return encode_world(tae, spec, latents, device)
    monkeypatch.setattr(data, "encode_world", counted)

    def cached(worlds):
        encoded.clear()
        return data.latent_cache(tmp_path, tae, worlds, 6, CPU)
    want = torch.cat([encode_world(tae, spec, 6, CPU) for spec in worlds]).bfloat16()
    assert torch.equal(cached(worlds), want)
    assert encoded == worlds
    next(tmp_path.rglob("00002.safetensors")).unlink()  # as if stopped after two clips
    assert torch.equal(cached(worlds), want)
    assert encoded == worlds[2:]
    for others in (worlds[:2], [replace(spec, empty=True) for spec in worlds]):
        cached(others)
        assert encoded == others
    assert tensors.hash_content(tae.state_dict(), "") != tensors.hash_content(TAE(tiny_tae).state_dict(), "")


# ---- training: updates, averages, checkpoints, processes ---------------------------------------------------

SMALL = replace(tiny_dit, dim=32, ffn_dim=48, heads=2, layers=2)
STAGES = ["vae", "init", "teacher", "1", "2"]


def small_preset(preset):
    lengths = {"shortest": 8, "longest": 10, "ramp": .6} if preset.longest > 7 else {}
    full_size = {"critic_passes": 2, "critic_alone": 0, "all_steps": False}
    return replace(preset, save_every=1, probe_every=0, **lengths, **full_size)


def few_chunks(roll, seeds, chunks, *about):
    """In place of generate() for a strip: two chunks instead of twenty."""
    return generate(roll, seeds, 2, *about)


def with_presets(**fields):
    """The small presets with other values in some fields."""
    return {part: replace(preset, **fields) for part, preset in train.TINY.items()}


AS_SMALL = {  # module: what a small training run sets there
    train: {
        "PROBE_WORLDS": 2,
        "TEACHER_STEPS": 2,
        "generate": few_chunks,
        "TINY": {part: small_preset(preset) for part, preset in train.TINY.items()},
    },
    stages: {"TEACHER_STEPS": 2},
    starts: {"tiny_dit": SMALL},
    data: {"CLIPS": 2, "EMPTY_CLIPS": 2, "OPENINGS": 2},
    causal: {
        "ODE_CLIPS": 2,
        "ODE_CHUNKS": 9,
        "calibrate": lambda *about: {"tau": .9, "pool": "token", "kept": {}},
    },
}


def set_small(set_in):
    """set_in(module, name, value) of all in AS_SMALL"""
    for module, values in AS_SMALL.items():
        for name, value in values.items():
            set_in(module, name, value)


def small_weights(out):
    """Random networks in the places where each stage looks for those of the stage before it."""
    for i, name in enumerate(("init_ar", "init_ode", "teacher", "stage1")):
        net = random_dit(i, **{k: getattr(SMALL, k) for k in ("dim", "ffn_dim", "heads", "layers")})
        facts = {"sampler": {"steps": 4, "tau": .9}}
        path = out / name / f"{name}.safetensors"
        if not path.exists():
            save_weights(path, net.state_dict(), SMALL, facts)


def train_small(out, *words):
    small_weights(out)
    sys.argv = ["train.py", "--out", str(out), "--batch", "2", "--device", "cpu", *words]
    train.main()


@pytest.fixture
def small_training(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [])
    set_small(monkeypatch.setattr)

    def go(*words, out=tmp_path):
        train_small(out, *words)
    before = signal.getsignal(signal.SIGTERM)
    yield go, tmp_path
    assert signal.getsignal(signal.SIGTERM) == before


def results(out, stage):
    """{file: its tensors, as bytes, and its facts} of what a stage wrote; no two runs take as long"""
    found = {}
    for part in train.PARTS[stage]:
        for file in (out / part).glob("*.safetensors"):
            state, about = tensors.read_file(file)
            values = {name: x.numpy().tobytes() for name, x in state.items()}
            facts = [told for told in about["facts"].items() if told[0][:6] not in ("second", "sha256")]
            found[file.name] = values, about["config"], facts
    assert found
    return found


def steps_of(folder):
    """Numbers of the updates that a part has logged; 0 is a look before the first"""
    return [line["step"] for line in logged(folder) if line["step"]]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint_of(folder):
    """{name: tensor} of the networks, and of their averages, in a checkpoint"""
    dcp_to_torch_save(folder, folder.parent / "whole.pt")
    state = torch.load(folder.parent / "whole.pt")
    return state["nets"], state["ema"]


def forget(part, step):
    """As if the run had been killed before checkpoint `step`, whatever the log says."""
    shutil.rmtree(part / f"step_{step:06d}")
    for file in part.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(stage, small_training):
    go, out = small_training
    go("--stage", stage, "--updates", "2")
    want = results(out, stage)
    # killed in each of its parts
    parts = [out / part for part in train.PARTS[stage]]
    for number, part in enumerate(parts):
        forget(part, 2)
        for later in parts[number + 1:]:
            shutil.rmtree(later)
        go("--stage", stage, "--updates", "2")
        assert results(out, stage) == want
        assert steps_of(part) == [1, 2, 2]
    if stage == "teacher":  # errors of one update are injected from the next on
        first, second, again = (line["errors"] for line in logged(part))
        assert first == 0 < second == again


def test_a_finished_part_is_not_written_again_because_the_next_began_with_that_file(small_training):
    go, out = small_training
    go("--stage", "init", "--updates", "1")
    files = [out / "init_ar" / "init_ar.safetensors", out / "init_ode" / "init_ode.safetensors"]
    before = [file.read_bytes() for file in files]
    # as if on other numbers of processes
    settings = out / "init_ar" / "settings.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps(told | {"passes": [2, 1]}))
    go("--stage", "init", "--updates", "1")
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_training_after_the_update_with_a_checkpoint(name, code, small_training, monkeypatch):
    go, out = small_training
    monkeypatch.setattr(train, "TINY", with_presets(save_every=9))
    step = erft.teacher_step

    def interrupted(*about):
        os.kill(os.getpid(), getattr(signal, name))
        return step(*about)
    monkeypatch.setattr(erft, "teacher_step", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        go("--stage", "teacher", "--updates", "3")
    assert stopped.type is SystemExit and stopped.value.code == code
    assert [f.name for f in (out / "teacher").glob("step_*")] == ["step_000001"]


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def flip_bit(path, share=.7, place=None):
    content = bytearray(path.read_bytes())
    content[place or int(len(content) * share)] ^= 1
    path.write_bytes(content)


DAMAGE = {  # to a checkpoint's folder
    "a wrong bit": lambda folder: flip_bit(folder / "__0_0.distcp"),
    "cut": lambda folder: cut(folder / "__0_0.distcp"),
    "gone": lambda folder: (folder / "__0_0.distcp").unlink(),
    "no index": lambda folder: cut(folder / ".metadata"),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no sums": lambda folder: (folder / "sha256").unlink(),
    "other sums": lambda folder: (folder / "sha256").write_bytes(b"\xff"),
}


def one_weight(value):
    """Networks and optimizers of a run that trains one number"""
    nets = torch.nn.ModuleDict({"net": torch.nn.Linear(1, 1)})
    torch.nn.init.constant_(nets["net"].weight, value)
    return nets, [torch.optim.AdamW(nets.parameters())]


def save_at(folder, step):
    checkpoint.save_checkpoint(folder, step, *one_weight(step), {})


def load_newest(folder, **options):
    """-> step, and the weight that came with it"""
    nets, optimizers = one_weight(-1)
    step = checkpoint.load_checkpoint(folder, nets, optimizers, {}, **options)
    return step, int(nets["net"].weight.item())


@pytest.fixture
def checkpoints(tmp_path):
    assert load_newest(tmp_path) == (0, -1)
    for step in (2, 4, 6):
        save_at(tmp_path, step)
    return tmp_path


def test_two_checkpoints_are_kept_with_checksums_and_the_newest_is_read(checkpoints):
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000004", "step_000006"]
    assert load_newest(checkpoints) == (6, 6)
    newest = checkpoints / "step_000006"
    sums = dict(reversed(line.split("  ")) for line in (newest / "sha256").read_text().splitlines())
    assert sums == {name: hashlib.sha256((newest / name).read_bytes()).hexdigest()
                    for name in (".metadata", "__0_0.distcp")}


def test_a_checkpoint_that_somebody_looked_into_is_read(checkpoints):
    (checkpoints / "step_000006" / ".DS_Store").touch()
    assert load_newest(checkpoints) == (6, 6)


def test_a_finished_part_whose_weights_are_damaged_says_so(small_training):
    go, out = small_training
    go("--stage", "vae", "--updates", "1")
    flip_bit(out / "vae" / "vae.safetensors")
    with pytest.raises(BadInput, match="vae.safetensors .*: delete it, and it is made again"):
        go("--stage", "vae", "--updates", "1")
    (out / "vae" / "vae.safetensors").unlink()
    go("--stage", "vae", "--updates", "1")
    read_file(out / "vae" / "vae.safetensors")


def test_a_checkpoint_that_is_cut_off_while_written_is_never_seen(tmp_path, monkeypatch):
    save_at(tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(checkpoint, "list_hashes", None)
        save_at(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000002", "part_000004"}
    assert load_newest(tmp_path) == (2, 2)
    save_at(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000002", "step_000004"}


def test_a_checkpoint_that_finds_no_room_is_told_and_the_one_before_and_copies_stay(tmp_path):
    save_at(tmp_path, 2)
    copies = [tmp_path / "step_kept", tmp_path / "step_000002.old"]
    for copied in copies:
        shutil.copytree(tmp_path / "step_000002", copied)
    with full_disk(100), pytest.raises(BadInput, match="cannot write .*step_000004 .*: is the disk full"):
        save_at(tmp_path, 4)
    for step in (4, 6):
        assert load_newest(tmp_path) == (step - 2, step - 2)
        save_at(tmp_path, step)
    assert all(copied.exists() for copied in copies)
    # a million updates have one digit more
    save_at(tmp_path, 1_000_000)
    assert load_newest(tmp_path)[0] == 1_000_000
    assert [path.name for path in checkpoint.find_checkpoints(tmp_path)] == ["step_000006", "step_1000000"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_with_any_damage_is_named_and_passed_over(damage, checkpoints, capsys):
    DAMAGE[damage](checkpoints / "step_000006")
    assert load_newest(checkpoints) == (4, 4)
    (told,) = capsys.readouterr().err.splitlines()
    assert "cannot read" in told and "step_000006" in told
    if damage in ("no sums", "other sums"):  # which are not missed where they are not asked for
        assert load_newest(checkpoints, verify=False) == (6, 6)
    DAMAGE[damage](checkpoints / "step_000004")
    with pytest.raises(BadInput, match="delete that folder"):
        load_newest(checkpoints)


def test_a_run_may_be_shared_out_among_other_numbers_of_processes_and_remembers_them(tmp_path):
    def passes(accumulate, processes):
        settings = {"accumulate": accumulate, "seed": 0}
        return checkpoint.keep_settings(tmp_path, settings, accumulate * processes)["passes"]
    assert passes(1, 2) == [2]
    (tmp_path / "step_000002").mkdir()
    assert passes(2, 1) == [2]
    assert passes(1, 3) == [2, 3] == passes(2, 1)
    with pytest.raises(BadInput, match="accumulate 1, not 2"):
        passes(2, 2)


def test_a_folder_in_which_another_run_trains_is_refused_until_that_has_ended(tmp_path):
    file = tmp_path / "running.json"
    with checkpoint.claim(tmp_path):
        told = json.loads(file.read_text())
        assert told["process"] == os.getpid()
        with pytest.raises(BadInput, match=f"process {os.getpid()} is training in .*another --out"):
            with checkpoint.claim(tmp_path):
                pass
    assert not file.exists()
    # its number is another's now, it was killed, or nobody can tell
    for change in ({"started": told["started"] - 60}, {"process": 2 ** 31 - 1}, {"machine": "elsewhere"}):
        file.write_text(json.dumps(told | change))
        with checkpoint.claim(tmp_path):
            assert json.loads(file.read_text()) == told
    file.write_text("[]")
    with pytest.raises(BadInput, match="running.json"), checkpoint.claim(tmp_path):
        pass


def test_a_chain_of_random_full_size_networks_goes_on_from_its_own_weights(tmp_path):
    cfg = train.Config(wan="random:32x1", size="32x32", out=str(tmp_path))
    first = starts.load_wan_part(cfg, "stage1", "", CPU).dit
    own = {name: x + 1 for name, x in first.state_dict().items()}
    file = tmp_path / "stage1" / "stage1.safetensors"
    save_weights(file, own, first.config, {})
    for given in ("", str(file)):
        again = starts.load_wan_part(cfg, "stage1", given, CPU).dit.state_dict()
        assert all(torch.equal(again[name], x) for name, x in own.items())


def test_other_settings_do_not_go_on_with_a_run_and_are_named(small_training):
    go, out = small_training
    words = ["--stage", "teacher", "--updates", "1", "--batch", "2"]
    go(*words)

    def again(*more):
        sys.argv = ["train.py", "--out", str(out), *words, *more]
        train.main()
    want = results(out, "teacher")
    # the weights tell what they started from
    facts = load(out / "teacher" / "teacher.safetensors", DiT, DiTConfig)[1]
    for folder, name in ((out / "init_ar", "init_ar"), (WEIGHTS, "vae"), (WEIGHTS, "text")):
        content = (folder / f"{name}.safetensors").read_bytes()
        assert facts[f"sha256 of {name}"] == hashlib.sha256(content).hexdigest()
    # and by which recipe, how long it took, on what
    preset = replace(train.TINY["teacher"], updates=1, batch=2)
    assert facts["recipe"] == hash_recipe(preset) != hash_recipe(train.TINY["teacher"])
    (log,) = map(json.loads, (out / "teacher" / "log.jsonl").read_text().splitlines())
    assert facts["seconds"] == round(log["seconds"]) and facts["machine"].startswith("cpu ")
    other = {
        "--seed 7": "seed 0, not 7",
        "--lr 1": "lr [0-9.]*, not 1.0",
        "--updates 2": "updates 1, not 2",
        "--accumulate 2": "accumulate 1, not 2",
        f"--init {out / 'init_ode' / 'init_ode.safetensors'}": "sha256 of init_ar [0-9a-f]*, not",
    }
    for more, told in other.items():
        with pytest.raises(BadInput, match=f"{out / 'teacher'} was trained with {told}") as refused:
            again(*more.split())
        assert "\n" not in str(refused.value)
        assert results(out, "teacher") == want
    (out / "teacher" / "settings.json").write_text('{"passes": 3}')
    with pytest.raises(BadInput, match="settings.json is damaged"):
        again()
    (out / "teacher" / "settings.json").unlink()
    with pytest.raises(BadInput, match="settings.json .*: what trained here cannot be told"):
        again("--seed", "7")
    # what has trained nothing yet may still change
    for folder in (out / "teacher").glob("step_*"):
        shutil.rmtree(folder)
    (out / "teacher" / "teacher.safetensors").unlink()
    again("--seed", "7")
    assert results(out, "teacher") != want


def test_a_log_that_was_cut_costs_a_warning_and_no_weights(small_training, capsys):
    go, out = small_training
    (out / "vae").mkdir()
    lines = ['{"step": 1, "seco', '{"step": 1, "seconds": 50}', '{"step": 2, "seconds": "x"}']
    (out / "vae" / "log.jsonl").write_text("\n".join(lines))
    go("--stage", "vae", "--updates", "1")
    assert load(out / "vae" / "vae.safetensors", TAE, TAEConfig)[1]["seconds"] >= 50
    assert "log.jsonl, line 1" in capsys.readouterr().err


def test_the_recipe_takes_an_hour_a_part_at_most_and_four_in_all():
    presets = [train.TINY[part] for part in train.PARTS["all"]]
    minutes = [preset.updates * preset.seconds / 60 for preset in presets]
    assert max(minutes) <= 60
    assert sum(minutes) <= 240


def test_an_optimizer_step_moves_weights_along_the_clipped_mean_gradient():
    weight, other = (torch.nn.Parameter(noise(4, 3)) for _ in range(2))
    mine, plain = (torch.optim.AdamW([p], betas=(0., .99)) for p in (weight, other))
    for lr in (.1, .2):
        gradient = noise(4, 3, seed=int(10 * lr))
        weight.grad = 3 * gradient
        norm, is_finite = optim.optimizer_step([mine], lr, 0., 3, 1.)
        other.grad = gradient / gradient.norm()
        plain.param_groups[0]["lr"] = lr
        plain.step()
        assert norm == pytest.approx(gradient.norm().item())
        assert is_finite and weight.grad is None
        assert torch.allclose(weight, other, atol=1e-5)


@pytest.mark.parametrize("shape", [
    (24, 24),
    (60, 24),
    (24, 60),
    (24, 5, 3, 3)])
def test_muon_is_pytorchs_but_for_its_rounding_to_bfloat16_and_takes_kernels_as_matrices(shape):
    mine = torch.nn.Parameter(noise(*shape))
    plain = torch.nn.Parameter(noise(*shape).flatten(1))
    ours = optim.Muon([mine], .01, .1)
    theirs = torch.optim.Muon([plain], .01, .1, adjust_lr_fn="match_rms_adamw")
    for seed in range(1, 4):
        for weight, optimizer in ((mine, ours), (plain, theirs)):
            weight.grad = noise(*shape, seed=seed).view_as(weight)
            optimizer.step()
    moved = (plain - noise(*shape).flatten(1)).norm()
    assert moved > .1
    assert (mine.flatten(1) - plain).norm() < .02 * moved


@pytest.mark.parametrize("gradient, loss", [
    (math.nan, 1.),
    (1., math.inf),
    (math.inf, 0.)])
def test_an_update_that_is_not_finite_changes_no_weight(gradient, loss):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1., gradient, 1.])
    _, is_finite = optim.optimizer_step([optimizer], .1, loss, 1, 1.)
    assert not is_finite
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("which", ["critic", "student", "teacher"])
def test_bad_updates_in_a_row_stop_the_run_and_leave_the_averages_alone(which, small_training, monkeypatch):
    go, out = small_training
    assert train.BAD_IN_A_ROW == 10
    monkeypatch.setattr(train, "BAD_IN_A_ROW", 2)
    # a teacher's update is one step
    monkeypatch.setattr(stages, "NO_CONTEXT", 0.)
    module, good = (erft, 1) if which == "teacher" else (dmd, 2)
    step, calls = getattr(module, f"{which}_step"), []

    def broken(net, *rest):
        numbers = step(net, *rest)
        calls.append(net)
        if len(calls) > good:  # from the second update on, or in the middle of it
            next(net.parameters()).grad.fill_(math.nan)
        return numbers
    monkeypatch.setattr(module, f"{which}_step", broken)
    push, pushed = erft.ErrorBank.push, []
    monkeypatch.setattr(erft.ErrorBank, "push", lambda bank, found: (pushed.append(found), push(bank, found)))
    stage, part = ("teacher", "teacher") if which == "teacher" else ("1", "stage1")
    with pytest.raises(SystemExit, match=r"2 updates in a row.* go on from .*step_00000\d"):
        go("--stage", stage, "--updates", "9")
    averages = [checkpoint_of(folder)[1] for folder in sorted((out / part).glob("step_*"))]
    before, after = averages
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(out / part)[-1]["skipped"] == 2
    assert len(pushed) == (which == "teacher")  # of the first update alone


def test_averages_follow_the_weights_slowly_and_are_what_is_saved(small_training, monkeypatch):
    go, out = small_training
    update, seen = train.update_ema, []

    def values(nets):
        return [p.detach().clone() for p in nets["teacher"].parameters()]

    def recorded(ema, nets, decay):
        if not seen:
            seen.append(values(ema))
        seen.append(values(nets))
        update(ema, nets, decay)
    monkeypatch.setattr(train, "update_ema", recorded)
    monkeypatch.setattr(train, "TINY", with_presets(ema_decay=.15, warmup=1))
    go("--stage", "teacher", "--updates", "3")
    average, *weights = seen
    for step, now in enumerate(weights):
        decay = min(.15, (step + 1) / (step + 10))  # .1 while it warms up, then .15
        average = [decay * a + (1 - decay) * p for a, p in zip(average, now)]
    saved = load(out / "teacher" / "teacher.safetensors", DiT, DiTConfig)[0].parameters()
    for p, a in zip(saved, average, strict=True):
        assert torch.allclose(p, a, rtol=1e-5, atol=1e-7)  # float32: a bf16 file would be off by 1e-3
    off = [(a - p).norm() / p.norm() for a, p in zip(average, weights[-1])]
    assert max(off) > 1e-4  # not the weights themselves


def test_the_learning_rate_warms_up_and_falls_but_in_distillation_stays():
    preset = replace(train.TINY["teacher"], lr=2., warmup=4, updates=100)
    rates = [train.get_lr(preset, step) for step in (0, 1, 50, 100)]
    assert rates == pytest.approx([.5, 1., 2 * .55, 2 * .1], rel=1e-3)
    preset = replace(train.TINY["stage1"], lr=2., warmup=4, updates=100)
    assert [train.get_lr(preset, step) for step in (0, 3, 99)] == [.5, 2., 2.]


def test_averages_at_full_size_begin_with_the_40th_update_and_then_keep_99_percent():
    decays = [train.get_ema_decay(train.WAN["stage1"], step) for step in range(120)]
    assert decays == [0.] * 40 + [.99] * 80


def as_process(monkeypatch, rank, processes):
    for module in (train, data):
        monkeypatch.setattr(module, "get_rank", lambda: rank)
        monkeypatch.setattr(module, "get_processes", lambda: processes)


def test_all_processes_draw_alike_each_pass_anew_and_one_that_accumulates_draws_what_they_draw(monkeypatch):
    """Of 16 batches and 6 passes: what is drawn for all, and what for each batch, by 1, 2 and 8 processes."""
    found = {}
    for processes in (1, 2, 8):
        for rank in range(processes):
            as_process(monkeypatch, rank, processes)
            for micro, number in itertools.product(range(16 // processes), range(6)):
                generators = train.seed_pass(train.Config(seed=3), 7, number, micro)
                drawn = *(rng.random() for rng in generators), torch.rand(1).item()
                place = micro * processes + rank, number
                # the same by any number of processes
                assert found.setdefault(place, drawn) == drawn
    alike, own, noises = ({place: drawn[i] for place, drawn in found.items()} for i in range(3))
    assert len(set(own.values())) == len(set(noises.values())) == 16 * 6
    # of 8 devices: the same on all, another one in each pass and micro-batch
    assert len(set(alike.values())) == 2 * 6
    assert all(alike[batch, number] == alike[8 * (batch // 8), number] for batch, number in alike)
    assert not set(alike.values()) & set(own.values())


def test_prompts_are_shuffled_all_are_seen_before_any_returns_and_a_stopped_run_goes_on(monkeypatch):
    items, taken = list("abcdefghij"), []
    for rank in range(2):  # two processes, five times two prompts each
        as_process(monkeypatch, rank, 2)
        prompts = data.Shuffled(items, 0)
        mine = [prompts.take(2) for _ in range(2)]
        resumed = data.Shuffled(items, 0)
        resumed.load_state_dict(prompts.state_dict())
        taken.append(mine + [resumed.take(2) for _ in range(3)])
    order = [item for both in zip(*taken) for two in both for item in two]
    first = order[:10]
    second = order[10:]
    assert sorted(first) == sorted(second) == items
    assert len({*map(str, (first, second, items))}) == 3
    as_process(monkeypatch, 0, 1)
    assert data.Shuffled(items, 0).take(20) == order


def test_the_autoencoder_learns_pixels_their_changes_and_latents_of_unit_covariance():
    torch.manual_seed(0)
    tae = TAE(TAEConfig(encoder=8, decoder=(16, 16, 8, 8))).initialise()
    inputs = SimpleNamespace(vae=tae, device=CPU, autocast=nullcontext())
    torch.manual_seed(1)
    found = stages.vae_pass(inputs, 2, np.random.default_rng(0), 0.)
    got = gradients(tae)
    # the same written plainly
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(2):
        spec = WorldSpec(int(rng.integers(world.HELD_OUT)))
        clips.append(torch.from_numpy(clip(spec, int(rng.integers(480)), 17)))
    torch.manual_seed(1)
    real = torch.stack(clips)
    z = tae.encode(real * 2 - 1)
    levels, noise_of_latents = .5 * torch.rand(2), torch.randn_like(z)
    noisy = torch.stack([video + level * n for video, level, n in zip(z, levels, noise_of_latents)])
    made = tae.run(tae.decoder, noisy, None)[0][:, 3:]
    changes = [video[:, 1:] - video[:, :-1] for video in (made, real)]
    speeds = [x.square().flatten(2).mean(2).sqrt() for x in changes]
    latents = z.movedim(2, 0).flatten(1)
    mean = latents.mean(1)
    deviation = latents.std(1)
    off = torch.cov(latents) - torch.diag(deviation ** 2)
    mse = F.mse_loss(made, real)
    rows = (made - real).unflatten(-2, (4, 8)).mean(-2)
    patches = rows.unflatten(-1, (8, 8)).mean(-1)
    want = {
        "colour": patches.square().mean(),
        "motion": F.mse_loss(*changes),
        "speed": F.mse_loss(*speeds),
        "unit": (mean ** 2 + (deviation - 1) ** 2 + (off ** 2).sum(1)).mean(),
    }
    loss = mse + 5 * want["colour"] + want["motion"] + 2 * want["speed"] + .02 * want["unit"]
    loss.backward()
    want |= {"loss": loss, "psnr": -10 * mse.log10()}
    assert found == pytest.approx({name: value.item() for name, value in want.items()}, rel=.02)
    same_gradients(got, gradients(tae), .02)


def test_text_and_context_are_dropped_sample_by_sample(small_training, monkeypatch):
    go, out = small_training
    step = erft.teacher_step
    seen = []
    texts = []

    def recorded(*about):
        context, features, errors, share = about[3], about[7], *about[-2:]
        seen.append((context.shape[1] > 0, 8 * share))
        texts.extend(features)
        assert len(features) == 8 * share and errors == .3
        return step(*about)
    monkeypatch.setattr(erft, "teacher_step", recorded)
    monkeypatch.setattr(train, "TINY", with_presets(errors=.3))
    monkeypatch.setattr(stages, "NO_CONTEXT", .5)
    monkeypatch.setattr(stages, "NO_TEXT", .5)
    go("--stage", "teacher", "--updates", "2", "--batch", "8")
    assert [has_context for has_context, _ in seen] == [True, False] * 2
    shares = [share for _, share in seen]
    assert sum(shares[:2]) == sum(shares[2:]) == 8
    nothing = min(texts, key=lambda text: text.abs().sum())
    assert 4 <= sum(torch.equal(text, nothing) for text in texts) <= 12


def test_each_step_of_a_distillation_moves_its_own_network_alone(small_training, monkeypatch):
    go, out = small_training
    step = torch.optim.AdamW.step
    seen = []
    known = set()

    def watched(self, *about):
        mine = {p for group in self.param_groups for p in group["params"]}
        known.update(mine)
        before = {p: p.detach().clone() for p in known}
        step(self, *about)
        assert {p for p in known if not torch.equal(p, before[p])} <= mine
        assert {p for p in known if p.grad is not None and p.grad.any()} == mine
        seen.append((mine, self.param_groups[0]["lr"]))
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    go("--stage", "1", "--updates", "2", "--lr", "1e-4")
    critic = seen[0][0]
    student = seen[2][0]
    assert not critic & student
    assert [mine == critic for mine, _ in seen] == [True, True, False] * 2
    fast = 1e-4 * train.TINY["stage1"].critic_lr
    assert [lr for _, lr in seen] == pytest.approx([fast, fast, 1e-4] * 2)


def record_steps(monkeypatch, *names):
    """dmd's steps as they are called -> {name: list of (arguments, what came back)}"""
    found = {name: [] for name in names}

    def recorded(name, step, *about):
        found[name].append((about, step(*about)))
        return found[name][-1][1]
    for name in names:
        step = getattr(dmd, f"{name}_step")
        monkeypatch.setattr(dmd, f"{name}_step", functools.partial(recorded, name, step))
    return found


@pytest.fixture
def stage_2(small_training, monkeypatch, capsys):
    """Two updates with their steps recorded -> out, the steps, the lines of the log, the progress lines"""
    go, out = small_training
    presets = with_presets(probe_every=2)
    monkeypatch.setattr(train, "TINY", presets)
    found = record_steps(monkeypatch, "critic", "student")
    go("--stage", "2", "--updates", "3")
    return out, found, logged(out / "stage2"), capsys.readouterr().err


def test_stage_2_logs_what_its_steps_saw_and_found(stage_2):
    """Who plays which part, what the context is, each number of the log."""
    out, found, lines, progress = stage_2
    (student, teacher, critic, _, trace, t, *_), (norm, error) = found["student"][-1]
    # the frozen network of the file, the one that is trained, and the student
    saved = load(out / "teacher" / "teacher.safetensors", DiT, DiTConfig)[0]
    assert torch.equal(saved.head.head.weight, teacher.head.head.weight)
    assert not next(teacher.parameters()).requires_grad
    assert critic is found["critic"][-1][0][0]
    assert student is trace.rollout.net
    # a rollout for every pass, of which the critic's keep no keys; the scores see what its memory held
    traces = [given[2] for given, _ in found["critic"]] + [given[4] for given, _ in found["student"]]
    assert len({each.x.sum().item() for each in traces}) == 9
    assert {each.rollout.chunk for each in traces} == {8, 9}
    assert [bool(each.entries) for each in traces] == [False] * 6 + [True] * 3
    levels = {str(given[3].tolist()) for given, _ in found["critic"]}
    assert len(levels) == 6
    assert str(t.tolist()) not in levels
    last = lines[-1]
    assert trace.context.shape[1] == min(21, 3 * (last["L"] - 7))
    # the numbers
    schedule = flow.schedule(4, 5.)
    oldest = trace.rollout.memory.slow.frame[:, 0].float().mean()
    kept = torch.stack(trace.rollout.kept, 1)[:, ::2]
    want = {
        "L": trace.rollout.chunk,
        "critic_loss": found["critic"][-1][1][0],
        "norm": norm.mean().item(),
        "std": trace.x.std().item(),
        "oldest": (3 * last["L"] - oldest.item()) / 4,
        "kept": kept.float().mean().item(),
        "skipped": 0,
    }
    quarter = (4 * t).long()
    for i in quarter.tolist():
        want[f"real_{i}"] = error[quarter == i].mean().item()
    assert {name: last[name] for name in want} == pytest.approx(want, abs=1e-5)
    assert trace.exits[0].levels == [schedule[last["r"]]]
    assert last["lr"] == train.TINY["stage2"].lr
    assert last["seconds"] > 0
    assert last["grad"] > 0
    assert last["critic_grad"] > 0
    assert any(name.startswith("fake_") for name in last)
    # what the judge says now and then stays in the progress line
    judged = {"recall", "ceiling", "chance", "returns", "validity"}
    assert [judged <= line.keys() for line in lines] == [False, False, True, False]
    assert "validity=" in progress.split("\r")[-1]


def only_the_critic_at_first(stage, go, monkeypatch):
    """Two updates as in the small world, of videos of 21 chunks -> what the critic was given, sizes"""
    presets = with_presets(critic_alone=1, critic_passes=1, all_steps=True, shortest=21, longest=21)
    monkeypatch.setattr(train, "TINY", presets)
    found = record_steps(monkeypatch, "critic")
    go("--stage", stage, "--updates", "2")
    traces = [given[2] for given, _ in found["critic"]]
    texts = [len(given[1]) for given, _ in found["critic"]]
    return [(n, len(trace.x), trace.context.shape[1]) for n, trace in zip(texts, traces)]


@pytest.mark.parametrize("stage, context", [("2", 21), ("2_none", 0)])
def test_in_the_small_world_the_critic_is_alone_at_first_and_learns_whole_videos(
        stage, context, small_training, monkeypatch):
    go, out = small_training
    # of two videos of 21 chunks: their last 7, and the 7 before
    assert only_the_critic_at_first(stage, go, monkeypatch) == [(4, 4, context)] * 2
    first, second = logged(out / f"stage{stage}")[-2:]
    assert first["critic_grad"] > 0
    assert "grad" not in first
    assert second["critic_grad"] > 0
    assert second["grad"] > 0
    assert second["L"] == 21
    assert "r" not in second


def test_the_log_keeps_six_digits_of_any_number(tmp_path):
    train.write_log(tmp_path, {"step": 2, "lr": 3.7123456e-9, "seconds": 1234.5678})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2, "lr": 3.71235e-09, "seconds": 1234.57}\n'


def test_the_scores_of_stage_2_none_see_no_context(small_training, monkeypatch):
    go, _ = small_training
    found = record_steps(monkeypatch, "critic", "student")
    go("--stage", "2", "--teacher-context", "none", "--updates", "1")
    traces = [given[2] for given, _ in found["critic"]] + [given[4] for given, _ in found["student"]]
    assert [trace.context.shape[1] for trace in traces] == [0, 0, 0]


def test_latents_that_are_not_finite_are_an_error_and_no_poor_video():
    latents = torch.zeros(1, 6, 16, 4, 8)
    latents[0, 5, 3] = math.inf
    with pytest.raises(BadInput, match="not finite"):
        probe.decode_frames(None, latents)


def test_a_teacher_that_looks_at_its_context_recalls_more_of_its_own_past_than_of_anothers():
    teacher = load_tiny(WEIGHTS / "teacher.safetensors", CPU)
    teacher.sampler = Sampler(steps=4, shift=3.)
    found = train.check_teacher_uses_context(teacher, probe.held_out(2))
    assert found["teacher_recall"] > found["teacher_shuffled_recall"] + .2


@pytest.mark.parametrize("words, told", [
    ("3", "choose from"),
    ("all --init x", "begins with nothing"),
    ("1 --accumulate 0", "must lie from 1"),
    ("1 --lr nan", "--lr must lie"),
    ("1 --seed -1", "--seed must lie"),
    ("1 --updates -1", "--updates must lie"),
    ("1 --batch -1", "must lie"),
    ("2 --init nowhere.safetensors", "nowhere.safetensors"),
    ("1 --size 8x8", "needs --wan"),
    ("vae --init x", "vae has no use for"),
    ("init --teacher x", "init has no use for"),
    ("1 --teacher-context none", "1 has no use for"),
    ("vae --data clips", "needs --wan"),
    (f"1 --out {Path(__file__).as_posix()}/o", "cannot write to"),
])
def test_bad_options_of_training_are_told_in_one_line(words, told, small_training):
    go, _ = small_training
    with pytest.raises(config.BadInput, match=told) as error:
        go("--stage", *words.split())
    assert "\n" not in str(error.value)


def test_a_network_meets_only_the_autoencoder_that_it_was_trained_with(small_training, tmp_path):
    """That of its own training, else one beside it, else the one that ships; another one is refused."""
    go, out = small_training
    ours, own = out / "stage2" / "stage2.safetensors", out / "vae" / "vae.safetensors"
    ours.parent.mkdir()
    shutil.copy(WEIGHTS / "stage2.safetensors", ours)
    assert weights.find_partner(ours, "vae") == WEIGHTS / "vae.safetensors"
    load_tiny(ours, CPU)
    # beside it: the very same in float32 would do, too, as its sha256 tells
    beside = Path(shutil.copy(WEIGHTS / "vae.safetensors", ours.parent))
    assert weights.find_partner(ours, "vae") == beside
    load_tiny(ours, CPU)
    # trained anew in the folder of this training: of no use for what was trained before
    own.parent.mkdir()
    state, about = read_file(WEIGHTS / "vae.safetensors")
    about["facts"]["sha256"] = "another"
    tensors.write_safetensors(own, state, about)
    assert weights.find_partner(ours, "vae") == own
    told = "stage2.safetensors was trained with another vae than .*vae.safetensors"
    with pytest.raises(BadInput, match=told):
        load_tiny(ours, CPU)
    with pytest.raises(BadInput, match="init_ar.safetensors was trained with another vae than"):
        go("--stage", "teacher", "--updates", "1", "--init", str(WEIGHTS / "init_ar.safetensors"))


# ---- training on two processes -----------------------------------------------------------------------------

@pytest.mark.parametrize("device, backend", [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_on_gpus_each_process_has_its_own_and_flags_still_travel_between_hosts(
        device, backend, monkeypatch):
    """As torchrun starts it where GPUs are, with a backend in the place of NCCL that knows only cuda."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers "fake"
    dist = torch.distributed
    calls = []
    init = torch.distributed.init_process_group
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *a: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def emulated(asked, timeout):
        calls.append(asked)
        init(asked.replace("nccl", "fake"), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

    def part(cfg, name, at, stop):
        assert checkpoint.any_process(True) and not checkpoint.any_process(False)
        checkpoint.barrier()
        assert checkpoint.gather([at]) == [at]
        calls.append(at)
    monkeypatch.setattr(dist, "init_process_group", emulated)
    monkeypatch.setattr(train, "train", part)
    run_script(train, monkeypatch, "--stage", "2", "--device", device)
    mine = torch.device("cuda", 3) if device == "cuda" else CPU
    assert calls == [mine] * (device == "cuda") + [backend, mine]
    # two processes of one device are refused
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(BadInput, match="a GPU for each") if device == "cuda" else nullcontext():
        with checkpoint.joined_processes(mine):
            pass


def test_a_process_that_fails_does_not_wait_for_the_others_before_it_says_so(monkeypatch):
    """NCCL waits in destroy_process_group() for the collectives of all: nobody would learn what happened."""
    calls = []
    monkeypatch.setenv("RANK", "0")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, name=name, **more: calls.append(name))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    with pytest.raises(KeyError), checkpoint.joined_processes(CPU):
        raise KeyError
    assert calls == ["init_process_group"]
    with checkpoint.joined_processes(CPU):
        pass
    assert calls[1:] == ["init_process_group", "barrier", "destroy_process_group"]


RESUMED = ["teacher", "1"]  # the stages that keep more than networks: errors, and a critic and prompts


def in_each_of_two_processes(out):
    """What both processes of the fixture below run, for all stages one after another."""
    set_small(setattr)
    rank = int(os.environ["RANK"])
    destroy = torch.distributed.destroy_process_group
    dist = torch.distributed
    dist.destroy_process_group = lambda: None

    def go(run, stage, updates="2"):
        train_small(out / run / stage, "--stage", stage, "--updates", updates)
        dist.init_process_group = lambda backend, timeout: None  # only once
    for stage in STAGES:
        go("two", stage)
    if rank == 0:
        for stage in RESUMED:
            copy_without_step_2(out, stage, "two", "two_two")
    dist.barrier()
    for stage in RESUMED:
        go("two_two", stage)
        go("one_two", stage)
    train_in_bf16(out / "two")
    torch._C._get_accelerator = lambda *a: torch.device("cuda")  # asked for the CPU on a machine with GPUs
    for dtype in ("fp32", "bf16"):
        train_full_size(out / "two", dtype)
    if rank == 0:
        copy_without_step_2(out, "fp32", "two", "two_two", "1")
    dist.barrier()
    for run in ("two_two", "one_two"):
        train_full_size(out / run, "fp32")
    # a signal that reaches one process ends both
    step = erft.teacher_step

    def interrupted(*about):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*about)
    erft.teacher_step = interrupted
    try:
        go("stopped", "teacher", "20")
    except SystemExit as stopped:
        (out / f"stopped_{rank}").write_text(str(stopped.code))
    destroy()


def train_in_bf16(out, *words):
    train_small(out / "small_bf16", "--stage", "2", "--updates", "2", "--dtype", "bf16", *words)


def train_full_size(out, dtype, *words):
    """Stage 1 in the form of the full size, where several processes share out the weights."""
    prompts = out.parent / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a calm sea\na storm rises\n")
    train.WAN = {part: replace(preset, save_every=1) for part, preset in train.WAN.items()}
    options = "--wan random:32x3 --size 32x32 --stage 1 --updates 2 --device cpu".split()
    files = ["--data", str(prompts), "--out", str(out / dtype)]
    sys.argv = ["train.py", *options, *files, "--dtype", dtype, *words]
    train.main()


TWO_PROCESSES = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import test_all
test_all.in_each_of_two_processes(Path(sys.argv[1]))
"""


def copy_without_step_2(out, folder, before, after, stage=""):
    shutil.copytree(out / before / folder, out / after / folder)
    for part in train.PARTS[stage or folder]:
        forget(out / after / folder / part, 2)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """
    Every stage, two updates: by one process that accumulates two batches ("one"), by two processes ("two");
    some with another number of processes after the first update ("one_two", "two_one"), or with as many
    ("two_two").
    """
    out = tmp_path_factory.mktemp("processes")
    script = out / "both.py"
    script.write_text(TWO_PROCESSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [])
        set_small(patch.setattr)
        patch.setattr(train, "WAN", train.WAN)

        def go(run, stage):
            words = ["--stage", stage, "--updates", "2", "--accumulate", "2"]
            train_small(out / run / stage, *words)
        train_in_bf16(out / "one", "--accumulate", "2")
        for dtype in ("fp32", "bf16"):
            train_full_size(out / "one", dtype, "--accumulate", "2")
        for stage in STAGES:
            go("one", stage)
        for stage in RESUMED:
            copy_without_step_2(out, stage, "one", "one_two")
        copy_without_step_2(out, "fp32", "one", "one_two", "1")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        # a thread each: more wait for each other on two cores
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run([*torchrun, script, out], timeout=1800, env=env, capture_output=True)
        assert run.returncode == 0, (run.stdout + run.stderr).decode(errors="replace")[-8000:]
        for stage in RESUMED:
            copy_without_step_2(out, stage, "two", "two_one")
            go("two_one", stage)
        copy_without_step_2(out, "fp32", "two", "two_one", "1")
        train_full_size(out / "two_one", "fp32", "--accumulate", "2")
    return out


# in any session that has the mark of the group, one process makes the fixture and runs these
uses_two_processes = pytest.mark.xdist_group("two processes")


def relative_distances(want, got, most):
    """
    {name: distance of two checkpoints' tensors, in units of `most` of the tensor's norm}. Adam makes a whole
    step of a gradient that is rounding alone: up to 4e-7 an element and update here.
    """
    allowed = {name: most * p.norm() + 2e-7 * p.numel() ** .5 for name, p in want.items()}
    apart = {name: (p - got[name]).norm() for name, p in want.items()}
    return {name: (apart[name] / allowed[name]).item() for name in want}


@pytest.mark.slow
@uses_two_processes
@pytest.mark.parametrize("run, stage", [
    *[("two", stage) for stage in STAGES],
    *itertools.product(["one_two", "two_one"], RESUMED)])
def test_two_processes_equal_one_that_accumulates_and_each_goes_on_for_the_other(run, stage, two_processes):
    for part in train.PARTS[stage]:
        want, got = (two_processes / name / stage / part for name in ("one", run))
        assert steps_of(got) == ([1, 2] if run == "two" else [1, 2, 2])
        want, got = (checkpoint_of(folder / "step_000002")[0] for folder in (want, got))
        for name, p in want.items():
            assert (p - got[name]).norm() <= 1e-6 * p.norm() + 1e-9, name


@pytest.mark.slow
@uses_two_processes
@pytest.mark.parametrize("stage", [*RESUMED, "fp32"])
def test_two_processes_that_go_on_equal_two_that_were_not_stopped_bit_for_bit(stage, two_processes):
    """fp32: in the form of the full size, where weights are sharded"""
    resumed, whole = (two_processes / run / stage for run in ("two_two", "two"))
    stage = "1" if stage == "fp32" else stage
    assert results(resumed, stage) == results(whole, stage)


@pytest.mark.slow
@uses_two_processes
@pytest.mark.parametrize("run, folder, part, most", [
    ("two", "fp32", "stage1", 1e-6),
    ("two_one", "fp32", "stage1", 1e-6),
    ("one_two", "fp32", "stage1", 1e-6),
    ("two_two", "fp32", "stage1", 1e-6),
    ("two", "bf16", "stage1", 1e-4),
    ("two", "small_bf16", "stage2", 1e-4)])
def test_networks_that_two_processes_share_out_are_those_of_one_and_bf16_changes_little(
        run, folder, part, most, two_processes):
    """In the form of the full size (stage1), where weights are sharded, and in the small world (stage2)."""
    one, other = (two_processes / name / folder / part for name in ("one", run))
    want, got = (checkpoint_of(path / "step_000002")[0] for path in (one, other))
    off = relative_distances(want, got, most)
    assert max(off.values()) <= 1, off
    # the weights hardly move, and Adam hides how long a gradient is
    lines, others = ([line for line in logged(path) if line["step"]] for path in (one, other))
    for at, name in itertools.product((0, -1), ("grad", "critic_grad")):
        assert others[at][name] == pytest.approx(lines[at][name], rel=10 * most, abs=2e-6)


@pytest.mark.slow
@uses_two_processes
def test_a_signal_that_reaches_one_process_ends_both(two_processes):
    assert [(two_processes / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    folder = two_processes / "stopped" / "teacher" / "teacher"
    assert [f.name for f in folder.glob("step_*")] == ["step_000001"]


def train_all(out, *words):
    options = "--stage all --updates 2 --batch 2 --device cpu".split()
    sys.argv = ["train.py", *options, "--out", str(out), *words]
    train.main()


@pytest.mark.slow
def test_one_command_makes_all_that_ships_and_goes_on_where_it_was(small_training, monkeypatch, capsys):
    """Stopped in the teacher, it has the bits of one that was not; each file names what it started from."""
    _, out = small_training
    whole, stopped = out / "whole", out / "stopped"
    train_all(whole)
    step = erft.teacher_step

    def interrupted(*about):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*about)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(erft, "teacher_step", interrupted)
        train_all(stopped)
    made = (stopped / "vae" / "log.jsonl").read_bytes()
    capsys.readouterr()
    train_all(stopped)
    told = capsys.readouterr().out
    assert re.search(r"part 4 of 8: teacher\nteacher: 2 updates, about \d+ min .*; writes [\d.]+ MB", told)
    assert "\nvae: " not in told
    assert (stopped / "vae" / "log.jsonl").read_bytes() == made
    want = results(whole, "all")
    assert results(stopped, "all") == want
    assert set(want) == {f"{name}.safetensors" for name in [*FILES_OF_WEIGHTS, "teacher_plain"]}
    # the chain of hashes; strips to look at; "all" does not go on with other settings
    files = whole.glob("*/*.safetensors")
    digest = {f"sha256 of {file.stem}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    for part in train.PARTS["all"][1:]:
        facts = load(whole / part / f"{part}.safetensors", DiT, DiTConfig)[1]
        starts = {name: value for name, value in facts.items() if name.startswith("sha256")}
        assert starts and starts.items() <= digest.items()
        # a row of four videos, of which a teacher's has 81 frames and a student's here 21
        height, width = iio.imread(whole / part / "strip_000002.png").shape[:2]
        assert (height, width) == (4 * 32, 64 * (7 if part.startswith("teacher") else 2))
    with pytest.raises(BadInput, match="seed 0, not 7"):
        train_all(whole, "--seed", "7")


def write_film(path, spec, seconds, scale=1):
    """A clip of the small world as a video of 32 frames a second, each of them twice"""
    frames = (clip(spec, 0, round(seconds * 16)) * 255).astype(np.uint8)
    frames = frames.transpose(0, 2, 3, 1).repeat(2, 0)
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    iio.imwrite(path, frames, fps=32, macro_block_size=1, plugin="FFMPEG")


# all that read a folder of videos run in one process, which makes it once
uses_videos = pytest.mark.xdist_group("videos")


def test_the_ablations_differ_in_one_thing_each():
    for presets in (train.TINY, train.WAN):
        assert presets["teacher_plain"] == replace(presets["teacher"], errors=0.)
        assert presets["teacher"].errors == .5
        assert presets["stage2"].sees_context
        assert presets["stage2_none"] == replace(presets["stage2"], sees_context=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of two good clips of 32 frames a second, and of all that must be skipped."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    captions = [make_world(WorldSpec(i)).caption for i in range(3)]
    write_film(folder / "good.mp4", WorldSpec(0), 10.7)
    write_film(folder / "more" / "good.mp4", WorldSpec(1), 13.2, 2)
    write_film(folder / "short.mp4", WorldSpec(2), 9)
    write_film(folder / "mute.mp4", WorldSpec(3), 1)
    (folder / "good.txt").write_text(captions[0])
    (folder / "short.txt").write_text(captions[2])
    (folder / "more" / "good.txt").write_text(captions[1], "utf-8-sig")
    good = (folder / "good.mp4").read_bytes()
    film(folder / "turned.mp4", folder / "good.mp4", "-c", "copy", before=["-display_rotation", "90"])
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "noise.mp4").write_bytes(good[:5000] + bytes(range(250)) * 12 + good[8000:])
    for name in ("latin", "empty", "bell"):
        (folder / f"{name}.mp4").write_bytes(good)
    for name in ("broken", "noise", "turned"):
        (folder / f"{name}.txt").write_text("a calm sea")
    (folder / "latin.txt").write_bytes(b"M\xe4rz")
    (folder / "empty.txt").write_text("\ufeff \n", "utf-8")
    (folder / "bell.txt").write_text("a calm sea\a")
    if os.name == "posix":  # a name of two lines, the second in red
        (folder / "two\n\x1b[31mlines.mp4").write_bytes(good)
    return folder


def run_script(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [script.__file__, *map(str, words)])
    config.run(script.main)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(script, *words): the one line on stderr of a run that must end with 2."""
    def run(script, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script, monkeypatch, *words)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ")
        return line
    return run


@pytest.mark.parametrize("script", [data, metrics])
@pytest.mark.parametrize("out, told", [("o", "ffmpeg is missing"), (f"{__file__}/o", "cannot write to")])
def test_without_ffmpeg_no_clip_is_called_unreadable(script, out, told, refusal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")
    assert told in refusal(script, "--videos", tmp_path, "--out", out)


def test_a_rank_without_its_processes_is_refused(refusal, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for script, *words in ((data, "--videos", videos), (train, "--stage", "vae")):
        assert "cannot join the other processes" in refusal(script, *words, "--out", tmp_path)


@pytest.fixture(scope="module")
def encoded(videos, tmp_path_factory):
    """What data.py makes of them, on two processes one after another -> folder, what they printed"""
    out, printed = tmp_path_factory.mktemp("encoded"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "get_processes", lambda: 2)
        for rank in (1, 0):
            patch.setattr(data, "get_rank", lambda rank=rank: rank)
            with redirect_stdout(io.StringIO()) as told:
                run_script(data, patch, "--videos", videos, "--out", out)
            made = {file.relative_to(out).as_posix() for file in out.rglob("*.safetensors")}
            printed.append((made, told.getvalue()))
    return out, printed


@uses_videos
def test_a_folder_of_videos_is_encoded_each_clip_by_one_process_and_what_cannot_be_is_told(encoded):
    out, ((first, told_first), (both, told_second)) = encoded
    assert len(first) == 1
    assert both == {"clips/good.mp4.safetensors", "clips/more/good.mp4.safetensors"}
    for line in ("short.mp4: 64x32, 9.0 s", "broken.mp4 (", "mute.mp4: cannot read the text",
                 "noise.mp4 is damaged (", "turned.mp4: 32x64", "latin.mp4: cannot read the text",
                 "empty.mp4: the prompt is empty", "bell.mp4: the prompt is empty, has control characters"):
        assert line in told_first + told_second
    # names of two lines, or in colours, are told in one plain line
    assert all(line.startswith("skipped: ") for line in (told_first + told_second).splitlines())
    assert "\x1b" not in told_first + told_second


@uses_videos
def test_a_clip_that_is_encoded_is_not_encoded_again(encoded, videos, monkeypatch):
    out, _ = encoded
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    run_script(data, monkeypatch, "--videos", videos, "--out", out)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == before


@uses_videos
def test_a_clip_whose_video_or_caption_is_another_one_is_encoded_anew(encoded, videos, monkeypatch, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("good.mp4", "good.txt"):
        shutil.copy(videos / name, folder)
    shutil.copytree(encoded[0] / "clips", out / "clips")
    shard = out / "clips" / "good.mp4.safetensors"
    for change in (lambda: None, lambda: (folder / "good.txt").write_text("Another caption."),
                   lambda: shutil.copy(videos / "more" / "good.mp4", folder)):
        change()
        run_script(data, monkeypatch, "--videos", folder, "--out", out)
        about = read_file(shard)[1]
        assert about["caption"] == (folder / "good.txt").read_text().strip()
        assert about["bytes"] == (folder / "good.mp4").stat().st_size


@pytest.fixture
def folder_clips(encoded):
    return data.ClipFolder(encoded[0], (16, 4, 8), 64, CPU, evict_first=False)


@uses_videos
def test_clips_of_a_folder_are_drawn_with_seven_chunks_of_past_or_more_and_enough_behind(folder_clips):
    clips = folder_clips
    assert clips.chunks == [14, 17]
    assert clips.captions == [make_world(WorldSpec(i)).caption for i in (0, 1)]
    assert [len(load_file(file)["latents"]) for file in clips.files] == [42, 51]  # whole chunks
    history = clips.draw_history(np.random.default_rng(0), 64, 7)
    drawn = {*zip(history.clip.tolist(), history.chunk.tolist())}
    assert drawn == {(0, 7), *((1, chunk) for chunk in range(7, 11))}
    assert clips.text(history.clip[:2]).shape == (2, 32, 64)


@uses_videos
def test_long_pasts_of_a_folders_clips_are_regular_in_half_of_the_samples_and_have_gaps_in_the_others(
        folder_clips, monkeypatch):
    monkeypatch.setattr(folder_clips, "chunks", [34, 34])
    long = folder_clips.draw_history(np.random.default_rng(1), 200, 7)
    even = torch.arange(28)[None] % 2 == 0
    contexts = frames_in_memory(PRESETS["uniform2"], even, evict_first=False)
    is_regular = []
    for frame, chunk in zip(long.frame.tolist(), long.chunk.tolist()):
        if chunk > 14:
            regular = contexts[chunk][0].tolist()
            is_regular.append(frame == regular)
            assert frame[:3] + frame[-6:] == regular[:3] + regular[-6:]
            assert frame == sorted(set(frame))
            assert all(number < 15 or number % 6 == 0 for number in frame[3:15])
    assert .4 < np.mean(is_regular) < .65
    runs = [data.keep_with_gaps(np.random.default_rng(i), 28, True) for i in range(300)]
    runs = torch.stack(runs)[:, ::2]
    assert .45 < runs.float().mean() < .55
    assert (runs[:, 1:] == runs[:, :-1]).float().mean() > .65


@uses_videos
def test_latents_of_a_folders_clips_are_those_of_the_file_and_close_to_those_of_the_world(folder_clips):
    clips = folder_clips
    frames = torch.tensor([[4, 2], [-1, 41]])
    latents = clips.frames(torch.tensor([1, 0]), frames)
    stored = load_file(clips.files[1])["latents"].float()
    assert torch.equal(latents[0], stored[[4, 2]])
    assert latents.dtype == torch.float32
    # h264 came between
    real = encode_world(shipped_vae(), WorldSpec(0), 42, CPU)[0]
    mine = clips.frames(torch.tensor([0]), torch.arange(42)[None])[0]
    assert (mine - real).std() < .3 * real.std()


ZEROS = torch.zeros(42, 16, 4, 8, dtype=torch.bfloat16)

CLIP = {"latents": ZEROS, "text": torch.zeros(3, 64).bfloat16()}


def read_all(folder):
    clips = data.ClipFolder(folder, (16, 4, 8), 64, CPU)
    clips.frames(torch.tensor([0]), torch.arange(42)[None])
    clips.text([0])


@pytest.mark.parametrize("content, caption, told", [
    (CLIP, None, "lacks a caption"),
    (CLIP, [3], "lacks a caption"),
    ({}, "a", "needed are"),
    (CLIP | {"latents": ZEROS[0, 0, 0, 0]}, "a", "needed are"),
    (CLIP | {"latents": ZEROS[:10]}, "a", "it has 10"),
    ({"latents": ZEROS}, "a", "its text"),
    (CLIP | {"text": CLIP["text"][:, :32]}, "a", "its text .dim 64"),
    (CLIP | {"latents": ZEROS / 0}, "a", r"latents \(finite, torch.bfloat16\)"),
    (CLIP | {"latents": ZEROS.int()}, "a", r"latents \(finite, torch.bfloat16\)")])
def test_a_clips_file_that_cannot_be_right_is_named(content, caption, told, tmp_path):
    path = tmp_path / "clips" / "a.safetensors"
    write_safetensors(path, content, {"caption": caption} if caption else {})
    with pytest.raises(BadInput, match=told) as refused:
        read_all(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("harm, told", [(flip_bit, "damaged"), (cut, "cannot read")])
def test_a_damaged_clips_file_is_named(harm, told, tmp_path):
    path = tmp_path / "clips" / "a.safetensors"
    write_safetensors(path, CLIP, {"caption": "a"})
    read_all(tmp_path)
    harm(path)
    with pytest.raises(BadInput, match=told) as refused:
        read_all(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@uses_videos
def test_teacher_and_base_train_from_a_folder_of_clips_and_students_from_a_file_of_prompts(
        encoded, small_training):
    go, out = small_training
    prompts = out / "prompts.txt"
    prompts.write_text("\n".join(make_world(WorldSpec(i)).caption for i in range(3)))
    for stage, source in (("teacher", encoded[0]), ("1", prompts)):
        go("--stage", stage, "--updates", "1", "--data", str(source))
        assert results(out, stage)


@uses_videos
def test_the_full_size_path_goes_from_videos_and_prompts_to_a_stage_2_student(
        raw, videos, small_training, monkeypatch):
    """All stages on a small directory of Wan's form; what is guided and how; text is encoded once."""
    out = raw.parent / "out"
    prompts = raw.parent / "prompts.txt"
    clips = raw.parent / "data"
    prompts.write_text("a calm sea\n\na storm rises\n")
    small = ["--size", "32x32", "--out"]
    texts = []
    for rank in (0, 1):  # torchrun's processes share clips, and captions
        with monkeypatch.context() as torchrun:
            torchrun.setattr(data, "get_rank", lambda rank=rank: rank)
            torchrun.setattr(data, "get_processes", lambda: 2)
            run_script(data, torchrun, "--wan", raw, *small, clips, "--videos", videos)
        texts.append(len([*(clips / "text").iterdir()]))
    assert texts == [3, 4]

    def go(stage, source, *more, wan=raw, out=out):
        words = ["--stage", stage, "--updates", "2", "--data", source, *more]
        run_script(train, monkeypatch, "--wan", wan, *small, out, *words)
        return results(out, stage)
    presets = {part: replace(preset, save_every=1) for part, preset in train.WAN.items()}
    monkeypatch.setattr(train, "WAN", presets)
    guide = dmd.guide
    decode = WanVAE.decode
    guidances = []
    monkeypatch.setattr(dmd, "guide", lambda cond, uncond, w: guidances.append(w) or guide(cond, uncond, w))
    # strips take half the time
    monkeypatch.setattr(WanVAE, "decode", lambda self, z: (torch.zeros(1, 40, 3, 32, 32), None))
    # ar from the clips, then ode from their captions
    random = {"wan": "random:32x1", "out": raw.parent / "random"}
    run_script(data, monkeypatch, "--wan", random["wan"], *small, random["out"], "--videos", videos)
    assert len(go("init", random["out"], **random)) == 2
    go("teacher", clips)
    # nothing, the negative prompt, the strip's caption: the rest is in shards
    assert len([*(out / "text").iterdir()]) == 3
    go("init", prompts, "--init", raw.parent / "student.pt")
    want = go("1", prompts)
    shutil.rmtree(out / "stage1" / "step_000002")
    monkeypatch.setattr("weights.TextEncoder", None)  # all text is known
    assert go("1", prompts) == want
    monkeypatch.setattr(WanVAE, "decode", decode)
    go("2", prompts)
    assert guidances == [4.] * 3 + [6.] * 2
    files = [out / part / f"{part}.safetensors" for part in ("init_ode", "stage2")]
    before, now = (load(file, DiT, DiTConfig) for file in files)
    assert now[0].config == before[0].config
    assert now[0].config.dim == 64
    assert now[1]["sampler"]["shift"] == 5
    assert now[1]["lr"] == 2e-6
    assert all(v.isfinite().all() for v in now[0].parameters())
    assert [*(out / "stage2").glob("strip_*.png")]
    assert hashlib.sha256(starts.NEGATIVE.encode()).hexdigest().startswith("ce96e0324e4b54ce")


WANS = "--wan RAW --size 32x32 --stage "


@uses_videos
@pytest.mark.parametrize("script, words, told", [
    (train, WANS + "vae", "Wan2.1 is the base"),
    (train, WANS + "1", "needs --data"),
    (train, WANS + "1 --data empty.txt", "holds no prompts"),
    (train, WANS + "1 --data prompts.txt", "needs init_ode"),
    (train, WANS + "teacher --data prompts.txt", "holds no clips"),
    (train, WANS + "teacher --data DATA", "holds latents [16, 4, 8]"),
    (train, "--wan . --stage teacher --data prompts.txt", "hf download"),
    (train, "--stage 1 --data gone", "cannot read"),
    (train, "--stage init --data prompts.txt", "small world's own"),
    (data, "--videos gone", "no video"),
    (data, "--size 64x64", "needs --wan"),
    (data, "--vidoes x", "did you mean --videos")])
def test_bad_input_of_full_size_training_is_told_in_one_line(
        script, words, told, raw, encoded, refusal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("prompts.txt").write_text("a storm\n")
    words = words.replace("RAW", str(raw)).replace("DATA", str(encoded[0]))
    assert told in refusal(script, *words.split())


# ---- devices that are no cuda and no cpu: Apple's has neither float64 nor complex numbers ------------------

class OnDevice(torch.Tensor):
    """A tensor on a device of its own, called meta: only to() and item() bring it to the CPU."""
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device="meta")

    def __init__(self, inner):
        self.inner = inner

    is_meta = property(lambda self: False)
    tolist = lambda self: self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        with DeviceWithoutFloat64():
            return operator(*args, **(kwargs or {}))


class DeviceWithoutFloat64(TorchDispatchMode):
    """What runs there is computed on the CPU; a float64 or complex number there is an error."""
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        bare_args, bare = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        if kwargs.get("device") is not None:
            is_there = torch.device(kwargs["device"]).type == "meta"
            bare["device"] = CPU
        else:
            is_there = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
        found = operator(*bare_args, **bare)
        if not is_there:
            return found
        there = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        assert not any(x.dtype == torch.float64 or x.is_complex() for x in there), operator
        found = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, found)
        return return_and_correct_aliasing(operator, args, kwargs, found)


class AtOnce(nullcontext):
    """In place of a ThreadPoolExecutor: what watches operators does so in one thread"""
    def __enter__(self):
        return self

    def submit(self, function, *given):
        found = function(*given)
        return SimpleNamespace(result=lambda: found)


@pytest.fixture
def other_device(monkeypatch):
    """sample.py and train.py run on that device, where tensors know their versions: no inference mode."""
    monkeypatch.setattr(video, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(sample, "main", torch.no_grad()(sample.main.__wrapped__))

    def on_cpu(function, kind, *about, **more):
        return function("cpu" if kind == "meta" else kind, *about, **more)
    for name in ("autocast", "get_autocast_dtype", "is_autocast_enabled"):
        monkeypatch.setattr(torch, name, functools.partial(on_cpu, getattr(torch, name)))
    for script in (sample, train):
        monkeypatch.setattr(script, "pick_device", lambda name: torch.device("meta"))
    with DeviceWithoutFloat64():
        yield


@pytest.mark.parametrize("more", [[], ["--positions", "unbounded", "--memory", "uniform1"]])
def test_sampling_needs_no_float64_and_no_complex_numbers_on_the_device(more, sampled, tmp_path, request):
    words = ["--seconds", "8.5", "--prompt", SWITCH.format(1), "--steps", "2", *more]
    here, _ = sampled(tmp_path, *words)
    request.getfixturevalue("other_device")
    there, code = sampled(tmp_path, *words)
    assert not code
    assert np.abs(here.astype(float) - there).mean() < .5


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_needs_float64_or_complex_numbers_on_the_device(
        stage, small_training, other_device, monkeypatch):
    monkeypatch.setattr(train, "save_checkpoint", lambda *about: None)
    go, out = small_training
    go("--stage", stage, "--updates", "1")
    assert results(out, stage)


# ---- sampling with the shipped weights ---------------------------------------------------------------------

@functools.cache
def shipped_vae():
    return load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)[0]


def through_autoencoder(frames):
    with torch.no_grad():
        latents = shipped_vae().encode(torch.from_numpy(frames)[None] * 2 - 1)
        return (shipped_vae().decode(latents)[0][0] * .5 + .5).numpy()


def test_copies_of_the_shipped_autoencoder_move_as_evenly_as_the_world():
    changes = []
    for i in range(8):
        copy = through_autoencoder(clip(WorldSpec(world.HELD_OUT + i, "turn"), 0, 81))
        # from frame to frame, by place among the four of a latent; the first two latents are a beginning
        change = np.abs(np.diff(copy, axis=0)).mean((1, 2, 3))[8:]
        changes.append(change.reshape(-1, 4).mean(0))
    change = np.mean(changes, axis=0)
    assert np.abs(change / change.mean() - 1).max() < .1


def test_a_quarter_of_a_latents_variance_and_more_tells_which_landmarks_stand_there():
    """With an eighth init_ar recalled .74 after 8,000 updates, with a half 1.0 after 5,000."""
    specs = [WorldSpec(world.HELD_OUT + 500 + i) for i in range(8)]
    others = [replace(spec, counterfactual=True) for spec in specs]
    ours, others = (torch.cat([encode_world(shipped_vae(), spec, 21, CPU) for spec in some])
                    for some in (specs, others))
    assert (ours - others).square().mean() > ours.var() / 4


def test_judge_reads_landmarks_and_heading_through_the_trained_autoencoder():
    """Headings: 99.5 % within a column; the autoencoder shifts the rest, where the speed changes."""
    right, wrong_by, ground, psnr = judge_errors(through_autoencoder, 161)
    assert right >= .99 and ground == 1
    assert np.quantile(wrong_by, .995) <= 1
    assert psnr > 28  # the ceiling that validity is compared with


# ---- command lines, files and frames -----------------------------------------------------------------------

@dataclass
class Options:
    count: int = 3       # how many, 5 % at most
    share: float = None  # of all
    go_on: bool = False  # or stop
    from_: str = "here"  # where it starts


def test_the_fields_of_a_dataclass_become_options():
    assert config.parse(Options, []) == Options()
    words = ["--count", "-5", "--share=.5", "--go-on", "--from", "a b=c"]
    assert config.parse(Options, words) == Options(-5, .5, True, "a b=c")


@pytest.mark.parametrize("words, message", [
    ("--cuont 3", "'--cuont' is unknown: did you mean --count?"),
    ("--coun=3", "'--coun' is unknown"),
    ("three", "choose from --count, --share"),
    ("--count", "--count: expected one argument"),
    ("--share half", "--share: invalid float value: 'half'"),
    ("--go-on=1", "--go-on: ignored")])
def test_wrong_options_are_refused_and_the_nearest_right_one_is_named(words, message):
    with pytest.raises(BadInput) as told:
        config.parse(Options, words.split())
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_help_shows_what_the_script_is_and_each_option_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Options, ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "One test per claim" in told
    assert "--count INT how many, 5 % at most [3] --share FLOAT of all --go-on or stop [False]" in told
    assert "--from STR where it starts [here]" in told


@pytest.mark.parametrize("error, told", [
    (KeyboardInterrupt(), "^$"),
    (OSError(28, "No space left"), "cannot write .*file .*No space left.*is the disk full")])
def test_a_file_is_whole_or_absent_and_the_one_before_stays(error, told, tmp_path):
    path = tmp_path / "more" / "file"
    with config.whole_or_absent(path) as part:
        part.write_text("first")
        assert not path.exists()
    # read by whom other files are
    other = tmp_path / "other"
    other.touch()
    write_safetensors(tmp_path / "more" / "tensors", {})
    assert (tmp_path / "more" / "tensors").stat().st_mode == other.stat().st_mode
    (tmp_path / "more" / "tensors").unlink()
    with pytest.raises((BadInput, KeyboardInterrupt), match=told):
        with config.whole_or_absent(path) as part:
            part.write_text("half")
            raise error
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(BadInput, match="cannot write .*older .*that a folder"):
        with config.whole_or_absent(tmp_path / "older"):
            (tmp_path / "older").mkdir()
    with pytest.raises(BadInput, match="is no file"), config.whole_or_absent(tmp_path):
        pass


def test_part_files_of_killed_runs_are_removed_and_those_of_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = config.platform.node()
    parts = [f".{node}.{dead.pid}.0.part.mp4", f".{node}.{os.getppid()}.0.part.mp4"]
    parts += [f".other.{dead.pid}.0.part", ".my.part.mp4", f".{node}.{10 ** 30}.0.part"]
    for name in parts:
        (tmp_path / name).touch()
    parts.append(f".{node}.{dead.pid}.1.part")
    (tmp_path / parts[-1]).mkdir()
    with config.whole_or_absent(tmp_path / "a") as part:
        assert config.PART.fullmatch(part.name)[2] == str(os.getpid())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*parts[1:], "a"])


def test_where_another_program_has_a_file_open_the_new_one_is_kept_beside_it(tmp_path, monkeypatch):
    path, replace_file = tmp_path / "a.mp4", os.replace
    path.write_text("old")

    def replace_none_in_use(part, whole):
        if whole == path:
            raise PermissionError(13, "Access is denied")
        replace_file(part, whole)
    monkeypatch.setattr(os, "replace", replace_none_in_use)
    with pytest.raises(BadInput, match="a.mp4 is in use.*a-[0-9]+.mp4: rename it"):
        with config.whole_or_absent(path) as part:
            part.write_text("new")
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["new", "old"]


def lists_of_lists(depth):
    """Ten times a list of ten times a list ...: small in memory, and without end where it is shown."""
    return [lists_of_lists(depth - 1)] * 10 if depth else 0


@pytest.mark.parametrize("schema, good, bad, told", [
    ({"a": int}, {"a": 1, "b": 2}, {}, "content, a cannot be None"),
    ([str], ["a"], ["a", 1], "content cannot be 1"),
    ([(str, type(None))], [None, "a"], [2], "cannot be 2"),
    ({"a": [int]}, {"a": []}, {"a": {}}, "content, a cannot be {}"),
    (range(1, 9), 8, 9, "cannot be 9"),
    (range(1, 9), 1, True, "cannot be True"),
    (range(2 ** 63), 1, "1", "cannot be '1'"),  # compared with each of so many it would take for ever
    ({"x", "y"}, "x", "z", "cannot be 'z'"),
    (float, -1, math.nan, "cannot be nan"),
    (str, "a", lists_of_lists(30), "cannot be .{40}$"),
    ({"prompt": str}, {"prompt": "猫"}, {"prompt": "a \ud800"}, r"prompt cannot be 'a \\ud800'"),
    (torch.float32, torch.ones(2), torch.ones(2) / 0, r"\(finite, torch.float32\) cannot be tensor\(\[inf"),
    (torch.bfloat16, torch.ones(2).bfloat16(), torch.ones(2), "torch.bfloat16"),
])
def test_a_schema_names_the_field_that_is_not_as_it_says(schema, good, bad, told):
    config.check_schema("file", good, schema)
    with pytest.raises(BadInput, match=f"file is damaged, .* its .*{told}"):
        config.check_schema("file", bad, schema)


@pytest.mark.parametrize("error, code, told", [
    (BadInput("too\nmany"), 2, "error: too many\n"),
    (KeyboardInterrupt(), 130, ""),
    (OSError(28, "No space left", "log"), 2, "error: [Errno 28] No space left: 'log'\n"),
    (NotImplementedError("aten::x"), 2,
     "error: use --device cpu, as this device lacks an operation: aten::x\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2,
     "error: too little memory here: ask for smaller networks or videos: CUDA out of memory.\n")])
def test_bad_input_ends_with_2_and_ctrl_c_with_130(error, code, told, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        config.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == told


def test_a_fault_of_ones_own_keeps_its_traceback_and_what_memory_cannot_hold_is_told(capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        config.run(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(SystemExit, match="2"):
        config.run(lambda: torch.empty(2 ** 50))
    assert "too little memory here" in capsys.readouterr().err


@pytest.mark.parametrize("text, shown", [
    ("a\nb\r\t c", "a b c"),
    ("\x1b[31m\x07", r"\x1b[31m\x07"),
    ("\u202e猫é", r"\u202e猫é"),
    ("\udce9", r"\udce9")])
def test_what_is_told_is_one_line_that_no_terminal_obeys(text, shown, capsys):
    """Whatever names of files are in it."""
    config.tell(text)
    config.warn(text)
    assert capsys.readouterr() == (f"{shown}\n", f"warning: {shown}\n")


def test_without_a_terminal_there_is_a_place_for_what_is_told(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    config.run(lambda: print("a", file=sys.stderr, flush=True))


@pytest.mark.skipif(os.name == "nt", reason="a pipe that closed is another error there")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_where_nobody_hears_the_work_goes_on(name):
    """A pipe that closed, a full disk, and both streams, in a process of its own"""
    code = f"""import config, os, sys, tqdm
def main():
    for i in tqdm.tqdm(range(3), file=sys.{name}, mininterval=0):
        print("x" * 9999, file=sys.{name}, flush=True)
        config.tell("a", sys.{name})
    os.write({1 if name == "stderr" else 2}, b"done")
config.run(main)"""
    read, write = os.pipe()
    os.close(read)
    ends = [write]
    if os.path.exists("/dev/full"):
        ends.append(os.open("/dev/full", os.O_WRONLY))
    for end in ends:
        ended = subprocess.Popen([sys.executable, "-c", code], cwd=HERE,
                                 **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, name: end})
        assert ended.communicate() in ((b"done", None), (None, b"done"))
        assert ended.returncode == 0
        os.close(end)


def in_a_fresh_python(code, *words, **env):
    """-> exit code, stdout, stderr of a few lines that run before sample.py does with these words"""
    code += "\nimport sys, runpy\nsys.argv = ['sample.py', *sys.argv[1:]]\n"
    code += f"runpy.run_path({str(HERE / 'sample.py')!r}, run_name='__main__')"
    words = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(words, capture_output=True, cwd=HERE, env={**os.environ, **env})
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


INTERRUPT = """
import _signal, sys


class Interrupt:
    def find_spec(name, *about):
        if name == {!r}:
            _signal.raise_signal(2)


_signal.signal(2, _signal.default_int_handler)  # background jobs of a shell ignore it
sys.meta_path.insert(0, Interrupt)
"""
HIDE = "import sys; sys.path.insert(0, ''); sys.modules[{!r}] = None"


@pytest.mark.parametrize("before, code, told", [
    (INTERRUPT.format("torch.nn"), 130, ""),
    (INTERRUPT.format("einops"), 130, ""),
    (HIDE.format("einops"), 2, "einops.*pip install -r requirements.txt"),
    (HIDE.format("imageio_ffmpeg"), 2, "ffmpeg is missing")])
def test_ctrl_c_during_the_imports_is_quiet_and_a_missing_package_is_told(before, code, told, tmp_path):
    ended, _, error = in_a_fresh_python(before, "--out", tmp_path / "o")
    assert ended == code
    assert re.fullmatch(f"error: .*{told}.*\\n" if told else "", error)


WINDOWS = """
import sys
for name in ("psutil", "resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
import os, signal
sys.path.insert(0, "")
import torch, tempfile, multiprocessing, asyncio, concurrent.futures  # their own use is not ours
del os.sysconf, signal.SIGHUP
import data, evaluate, metrics, train  # which import all others
"""


def test_sampling_runs_without_the_modules_that_windows_lacks_in_a_terminal_of_ascii(tmp_path):
    """And every other script is imported."""
    words = ["--out", tmp_path / "ü", "--seconds", ".3", "--prompt", "猫"]
    code, told, error = in_a_fresh_python(WINDOWS, *words, PYTHONIOENCODING="ascii")
    assert code == 0, error
    assert "wrote" in told and r"\u732b-0-" in told and "not measured" in told
    assert len(list((tmp_path / "ü").glob("猫-0-*.mp4"))) == 1


def test_frames_and_chunks_of_seconds_and_bytes_of_pixels():
    frames = [video.frames_in(s) for s in (.01, .05, 1, 60)]
    chunks = [video.chunks_of(n) for n in (1, 9, 10, 21, 960)]
    assert frames == [1, 1, 16, 960]
    assert chunks == [1, 1, 2, 2, 81]
    levels = torch.tensor([-2., -1, 0, .5, 2]).view(5, 1, 1, 1)
    pixels = video.to_uint8(levels.expand(5, 3, 2, 4))
    assert pixels.shape == (5, 2, 4, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 191, 255]


def ramp(frames, width=64):
    """(f, 32, w, 3) uint8: frame i is grey of level 5 i"""
    grey = 5 * np.arange(frames, dtype=np.uint8)
    return np.array(np.broadcast_to(grey[:, None, None, None], (frames, 32, width, 3)))


def write_video(path, frames, *more):
    height, width = frames[0].shape[:2] if len(frames) else (32, 64)
    with video.video_writer(path, width, height, *more) as write:
        for frame in frames:
            write(frame)
    return path


def facts_of(path):
    """What ffmpeg tells of a file."""
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path]
    return subprocess.run(words, capture_output=True, text=True).stderr


def test_a_written_video_has_its_frames_scale_comment_and_rate(tmp_path):
    made = ramp(30)
    made[:, :, 32:] += 100  # an edge that stays sharp
    path = write_video(tmp_path / "a.mp4", made, "a comment", 3)
    large = made.repeat(3, axis=1).repeat(3, axis=2).astype(float)
    frames = iio.imread(path, plugin="FFMPEG")
    assert frames.shape == (30, 96, 192, 3)
    assert np.abs(frames - large).max() < 5
    facts = facts_of(path)
    assert "comment         : a comment" in facts and "h264" in facts and "16 fps" in facts


def test_colours_are_those_that_the_tags_promise_and_the_index_stands_in_front(tmp_path):
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    colours += [[255, 255, 255], [12, 200, 120], [128, 64, 250]]
    colours = np.array(colours, np.uint8)
    frame = colours.repeat(16, 0)[None].repeat(32, 0)
    path = write_video(tmp_path / "a.mp4", [frame] * 3)
    assert "yuv420p(tv, bt709" in facts_of(path)
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    # the matrix of BT.709, by hand: Y of red is 16 + 219 * .2126
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-frames:v", "1", "-f", "rawvideo", "-"]
    planes = subprocess.run(words, capture_output=True).stdout
    luma = np.frombuffer(planes, np.uint8)[:32 * 96].reshape(32, 96)
    want = 16 + 219 / 255 * colours @ [.2126, .7152, .0722]
    assert np.abs(luma[16, 8::16] - want).max() < 2.5
    for frames in (iio.imread(path, plugin="FFMPEG"), video.read_frames(path, 96, 32, 1)[0]):
        assert np.abs(frames[0, 16, 8::16] - colours.astype(float)).max() < 6


def test_a_clip_is_read_from_its_end_in_whole_chunks_and_cut_at_the_sides(tmp_path):
    wide = ramp(40, 96)
    wide[:, :, :16] = wide[:, :, -16:] = 255
    path = write_video(tmp_path / "a.mp4", wide)
    frames = video.read_clip(path, 64, 32, 41)
    assert frames.shape == (33, 32, 64, 3)
    wrong = np.abs(frames - ramp(40)[7:].astype(float))
    assert wrong[:, :, 4:-4].max() < 4
    few, source = video.read_frames(path, 32, 16, 5)
    assert len(few) == 5
    assert (source.width, source.height) == (96, 32)
    with pytest.raises(BadInput, match="from 9 to 39 frames"):
        video.read_clip(path, 64, 32, 40)


def film(path, source, *options, before=()):
    """A video by ffmpeg's own words: of a source of its lavfi, or of a file."""
    kind = [] if Path(source).exists() else ["-f", "lavfi"]
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    words += [*before, *kind, "-i", source, *options, path]
    subprocess.run(list(map(str, words)), check=True)
    return path


@pytest.mark.parametrize("name, options, turned, size, middle", [
    ("as_it_is.MKV", "", 0, (96, 32), (16, 12)),
    ("turned.mp4", "", 90, (32, 96), (84, 16)),
    ("upside.mp4", "", 180, (96, 32), (16, 84)),
    ("wide.mov", "-vf setsar=2/1", 0, (192, 32), (16, 24)),
    ("odd.webm", "-vf format=gbrp,crop=95:31:0:0 -pix_fmt yuv444p", 0, (95, 31), (15, 12)),
    ("noname", "-f avi", 0, (96, 32), (16, 12)),
    ("tiny.mkv", "-vf crop=24:2:0:0 -c:v ffv1", 0, (24, 4), (2, 12)),
])
def test_a_video_is_read_upright_with_square_pixels(name, options, turned, size, middle, tmp_path):
    """In any container; a quarter at the left is blue."""
    bars = "color=red:s=96x32:r=16:d=1,drawbox=w=24:c=blue:t=fill"
    path = film(tmp_path / name, bars, *options.split())
    if turned:
        path = film(tmp_path / f"1{name}", path, "-c", "copy", before=["-display_rotation", turned])
    source = video.open_clip(path)
    assert (source.width, source.height) == size
    *_, frame = source.read(*size)
    blue = np.argwhere(frame.astype(int) @ (-1, 0, 1) > 100)
    assert np.abs(blue.mean(0) - middle).max() <= 1.5


def test_frames_are_read_at_their_times_whatever_the_rate(tmp_path):
    """Grey is 50 levels a second; 25 frames a second, then every fifth of them."""
    grey = "color=black:s=64x32:r=25:d=4,geq=lum=16+50*T:cb=128:cr=128,select='lt(t,2)+not(mod(n,5))'"
    path = film(tmp_path / "a.mkv", grey, "-fps_mode", "vfr", "-c:v", "ffv1")
    frames, _ = video.read_frames(path, 64, 32, 999)
    level = frames.mean((1, 2, 3)) / 255 * 219 / 50  # seconds
    late = np.abs(level - np.arange(len(level)) / 16)
    assert len(frames) >= 61
    assert late[:32].max() < .06
    assert late.max() < .23
    source = video.open_clip(path)
    once = [frame.mean() / 255 * 219 / 50 for frame in source.read(64, 32)]
    assert len(once) == 60
    np.testing.assert_allclose(once, source.seconds, atol=.03)


def test_a_gap_of_hours_is_not_filled(tmp_path):
    gap = "testsrc=s=64x32:r=16:d=2,setpts='PTS+if(gte(N,16),36000/TB,0)'"
    path = film(tmp_path / "a.mkv", gap, "-fps_mode", "vfr")
    begun = time.monotonic()
    frames, _ = video.read_frames(path, 64, 32, 48)
    assert time.monotonic() - begun < 30  # a hundred if copies are made for ten hours
    assert len(frames) == 48
    moves = np.diff(frames.astype(int), axis=0).any((1, 2, 3))
    assert moves[:16].sum() == 15
    assert not moves[16:].any()


def test_fields_of_different_times_show_no_comb(tmp_path):
    bar = "color=black:s=64x32:r=32:d=1,geq=lum='16+200*lt(abs(X-60*T),4)':cb=128:cr=128"
    coded = ["-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "2"]
    path = film(tmp_path / "a.mpg", f"{bar},tinterlace=4,setfield=tff", *coded)
    shown, _ = video.read_frames(path, 64, 32, 99)
    raw = iio.imread(path, plugin="FFMPEG")

    def comb(frames):
        return np.abs(np.diff(frames * 1., axis=1)).mean()
    assert comb(shown) < .3 * comb(raw)


PLAIN = torch.zeros(1, 3, 16, 4, 8)


def test_white_paper_of_an_hdr_video_is_not_the_dull_grey_of_its_code(tmp_path):
    """PQ's grey of 203 nits"""
    grey = "color=gray:s=64x64:d=0.2,format=yuv420p10le,geq=lum=64+0.58*876:cb=512:cr=512"
    tags = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:log-level=error"
    coded = ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", tags]
    white, _ = video.read_frames(film(tmp_path / "a.mp4", grey, *coded), 64, 64, 9)
    assert white.mean() > 170
    assert np.ptp(white[0, 16, 32].astype(int)) < 4


def test_a_damaged_video_says_so(tmp_path, capsys):
    def damage(path):
        return video.read_frames(path, 64, 32, 99)[1].damage
    whole = film(tmp_path / "whole.mp4", "testsrc2=s=64x32:r=16:d=4", "-movflags", "+faststart")
    title = ["-metadata", "title=[error] x\n[fatal] y"]
    assert not damage(whole)
    assert not damage(film(tmp_path / "b.mp4", whole, "-c", "copy", *title))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:whole.stat().st_size * 2 // 3])
    assert damage(cut)
    assert len(video.read_clip(cut, 64, 32, 99)) >= 9
    assert "cut.mp4 is damaged" in capsys.readouterr().err
    # two videos in one file
    sizes = [film(tmp_path / f"{size}.ts", f"testsrc2=s={size}:r=25:d=1", "-c:v", "mpeg2video")
             for size in ("64x32", "96x64")]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in sizes))
    several = video.open_clip(tmp_path / "a.ts")
    assert len(list(several.read(64, 32)))
    assert "change their size" in several.damage


@pytest.mark.parametrize("name, cause", [
    ("sound.mp4", "matches no streams"),
    ("text.mp4", "moov atom"),
    ("list.mp4", "not on whitelist.* no playlist"),
    ("list.ffconcat", "not on whitelist.* no playlist"),
    ("live.m3u8", "not on whitelist.* no playlist"),
    ("shot_%d.png", "no playlist"),
    ("folder.mp4", "no such file"),
    ("gone.mp4", "no such file"),
    ("pipe.mp4", "no such file")])
def test_what_is_no_video_says_why_in_one_line(name, cause, tmp_path):
    film(tmp_path / "sound.mp4", "sine=d=1")
    whole = film(tmp_path / "whole.mp4", "testsrc2=s=64x32:r=16:d=1")
    (tmp_path / "text.mp4").write_text("<!doctype html>")
    # other files, one after another; the last list, which does not end, would be waited for
    film(tmp_path / "s.ts", whole, "-c", "copy")
    for list_ in ("list.mp4", "list.ffconcat"):
        (tmp_path / list_).write_text("ffconcat version 1.0\nfile whole.mp4\n")
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\ns.ts\n")
    (tmp_path / "shot_%d.png").touch()
    film(tmp_path / "shot_1.png", whole, "-frames:v", "1", "-update", "1")
    (tmp_path / "folder.mp4").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadInput, match=f"{name}.*{cause}") as told:
        video.open_clip(tmp_path / name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", "mp4 mkv ts avi mov flv nut gif y4m".split())
def test_every_container_of_video_is_read(name, tmp_path):
    more = {"flv": ["-c:v", "flv"], "nut": ["-c:v", "ffv1"]}.get(name, [])
    clip = video.open_clip(film(tmp_path / f"a.{name}", "testsrc2=s=64x32:r=16:d=1", *more))
    assert len(clip.seconds) == 16
    assert not clip.damage


@pytest.mark.parametrize("exe, told", [
    ("/nonexistent", "ffmpeg is missing .*nonexistent"), ("/bin/false", "exit status 1"),
    ("/bin/true", "it is no ffmpeg"),
    (None, "ffmpeg is missing .*imageio_ffmpeg")])
def test_a_missing_ffmpeg_is_told_and_leaves_nothing(exe, told, monkeypatch, tmp_path):
    if exe:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", exe)
    else:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(BadInput, match=told):
        write_video(tmp_path / "a.mp4", ramp(3))
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk(size):
    """Files of more bytes cannot be written."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0, .5, .99])
def test_an_older_video_stays_where_ffmpeg_did_not_end_well(share, tmp_path, capfd):
    """The disk is full half-way, or at the very end; or there are no frames."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.mp4").write_text("good")
    frames = np.random.default_rng(0).integers(0, 256, (200, 32, 64, 3), np.uint8)
    size = write_video(tmp_path / "whole.mp4", frames).stat().st_size
    told = pytest.raises(BadInput, match="could not write .*a.mp4 .*is the disk full")
    with full_disk(int(share * size) or size), told:
        write_video(out / "a.mp4", frames if share else [])
    assert (out / "a.mp4").read_text() == "good"
    assert len(list(out.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


def test_a_long_video_of_any_bytes_has_all_of_its_frames(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(1500, 32, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", frames)
    assert len(video.open_clip(path).seconds) == 1500


@pytest.mark.skipif(os.name == "nt", reason="there is no sh")
@pytest.mark.parametrize("end", ["exit 1", "cat > /dev/null", "kill -9 $$"])
def test_what_ffmpeg_died_of_is_told_in_its_own_words(end, monkeypatch, tmp_path, capfd):
    """A broken pipe; with exit code 0, as of old ones; or killed, without a word."""
    said = "" if "kill" in end else "echo '[mp4 @ 0x1] [error] No space left on device' >&2\n"
    script = f"#!/bin/sh\n[ $1 = -version ] && echo ffmpeg version 4 && exit\n{said}{end}\n"
    (tmp_path / "ffmpeg").write_text(script)
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    cause = r"\(No space left on device\)" if said else "ended with -9|Broken pipe"
    with pytest.raises(BadInput, match=cause):
        write_video(tmp_path / "o" / "a.mp4", ramp(99))
    assert not list((tmp_path / "o").iterdir()) and capfd.readouterr().err == ""


@pytest.mark.parametrize("folder", ["12:30", "-x", "100%", "file:x", "it's \"so\"", "%03d", "猫", "~", "a b"])
def test_folders_may_have_any_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_video(Path(folder, "-a.mp4"), ramp(3))
    assert path.stat().st_size
    assert list(Path(folder).iterdir()) == [path]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_manifest_gives_back_what_was_written_and_passes_over_what_is_no_record(tmp_path, capsys):
    record = {"file": "猫-0.mp4", "prompt": "猫", "seed": 0, "options": {}, "model": "a", "sha256": "c"}
    records.append_line(tmp_path / "manifest.jsonl", record)
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('{"file": 3}\n[[[\n' + "[" * 100_000 + '\n{"file": "half')
    later = {**record, "seed": 1}
    records.append_line(tmp_path / "manifest.jsonl", later)
    assert video.read_manifest(tmp_path) == {"猫-0.mp4": later}
    assert not video.read_manifest(tmp_path / "x")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    assert all(f"line {n}:" in line for n, line in enumerate(told, 2))


def test_programs_that_add_to_a_file_at_once_lose_no_line_and_a_full_disk_adds_none(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    code = """
import records, sys
from pathlib import Path
for n in range(200):
    records.append_line(Path(sys.argv[1]), {"n": n})
"""
    words = [sys.executable, "-c", code, path]
    programs = [subprocess.Popen(words, cwd=HERE) for _ in range(3)]
    assert [program.wait() for program in programs] == [0, 0, 0]
    assert Counter(line["n"] for line in records.read_lines(path, {"n": int})) == dict.fromkeys(range(200), 3)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, line):
            return super().write(line[:5])
    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Full(path, "a+"))
    with pytest.raises(BadInput, match="the disk is full"):
        records.append_line(path, {"n": 1})
    monkeypatch.undo()
    assert path.read_bytes() == before


PALE = video.PALE
CRIMSON = video.CRIMSON
BLUE = video.BLUE


def test_the_memory_picture_shows_frames_surprisal_and_what_is_held(tmp_path):
    """20 chunks, of which every sixth is kept, so crimson; all bars are twice as high as the threshold."""
    memory = Memory(PRESETS["slowfast"])
    kept = torch.arange(20)[:, None] % 6 == 0
    for chunk in range(20):
        memory.evict()
        frame = torch.arange(3)[None] + 3 * chunk
        memory.push(Entries(frame, frame[..., None, None, None].float()), kept[chunk])
    rollout = SimpleNamespace(memory=memory, similarities=[torch.tensor([.9])] * 20, kept=list(kept))
    decoder = SimpleNamespace(decode=lambda z: (torch.ones(1, 1, 3, 32, 64) - z / 30, None))
    frames = {1.5 * i: torch.full((32, 64, 3), 10 * i).byte() for i in range(3)}
    video.memory_picture(tmp_path / "a.png", frames, rollout, decoder, "a prompt")
    page = iio.imread(tmp_path / "a.png")
    assert page[90, 60::132, 0][:4].tolist() == [0, 10, 20, 255]
    bars = page[:, 40::79][:, :20]
    assert [tuple(colour) for colour in bars[240]] == [CRIMSON if k else PALE for k in kept]
    pale, blue = (np.flatnonzero((bars[:, 13] == colour).all(-1)) for colour in (PALE, BLUE))
    assert pale.min() == video.BARS
    assert abs(blue - (video.BARS + video.BASE) // 2) <= 1
    held = memory.frames()[0]
    shown = page[400::90, 60::132, 0][:2].flatten()[:21]
    levels = video.to_uint8((1 - held / 30).view(-1, 1, 1, 1))
    assert len(held) == 21
    assert shown.tolist() == levels[:, 0, 0, 0].tolist()


def test_bars_of_a_long_video_stand_for_several_chunks_and_show_the_share_that_was_kept():
    """An hour: the most of about 10 chunks each; of every ten, three are kept."""
    chunk = torch.arange(4800)[:, None]
    memory = SimpleNamespace(policy=replace(PRESETS["slowfast"], tau=.97))
    similar = torch.where(chunk % 10 == 0, .92, .96)
    rollout = SimpleNamespace(memory=memory, similarities=list(similar), kept=list(chunk % 10 < 3))
    page = video.Image.new("RGB", (1584, 400), "white")
    video.draw_surprisal(page, rollout)
    column = np.array(page)[:, 1000]
    height = video.BASE - video.BARS
    assert (column == PALE).all(-1).argmax() == video.BARS
    assert (column == CRIMSON).all(-1).argmax() == pytest.approx(video.BASE - .3 * height, abs=12)


def test_the_thumbnail_of_a_sliver_is_its_middle():
    page = video.Image.new("RGB", (200, 200), "white")
    video.paste_thumbnails(page, 0, [("", 0, torch.zeros(4096, 16, 3, dtype=torch.uint8))])
    dark = (np.array(page) == 0).all(-1)
    assert dark[:64, :128].all()
    assert not dark[:64, 128:].any()


def test_letters_that_no_font_here_has_are_told_by_their_codes():
    _, shown = video.font_for("café \U0010fffd")
    assert shown == r"café \U0010fffd"


# ---- sampling: from a command line to a video --------------------------------------------------------------

SWITCH = ("Sand. The camera turns left from north, one turn in 9 seconds. | {}: "
          "Snow. The camera turns left from north, one turn in 9 seconds.")
SMALL_WAN = ["--size", "32x32", "--steps", "2", "--prompt", "a calm sea | 1: a storm rises"]


def spy_on(frames):
    """video.video_writer, which also appends each frame to the list"""
    @contextmanager
    def spy(*about):
        with video.video_writer(*about) as write:
            yield lambda frame: (frames.append(frame.copy()), write(frame))
    return spy


@pytest.fixture
def sampled(monkeypatch):
    """sampled(out, *words): sample.py runs -> the frames (f, h, w, 3) that the codec gets, exit code."""
    def run(out, *words):
        frames, code = [], 0
        monkeypatch.setattr(sample, "video_writer", spy_on(frames))
        monkeypatch.setattr("sys.argv", ["sample.py", "--out", *map(str, (out, *words))])
        try:
            config.run(sample.main)
        except SystemExit as stop:
            code = stop.code
        return np.array(frames), code
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def refused(sampled, tmp_path, capsys):
    """refused(*words): the one line on stderr of a run that must end with 2 and leave no video."""
    def run(*words):
        _, code = sampled(tmp_path / "o", *words)
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and line.startswith("error: ")
        assert not list((tmp_path / "o").glob("*.mp4"))
        return line
    return run


def test_a_video_has_the_frames_asked_for_its_provenance_and_a_memory_picture(sampled, tmp_path, capsys):
    sampled(tmp_path, "--seconds", "2.5", "--seed", "4")
    (path,) = tmp_path.glob("grass-the-camera-turns-right-from-north-one-turn-in-12-seconds-4-????????.mp4")
    assert sorted(tmp_path.iterdir()) == [path, path.with_suffix(".png"), tmp_path / "manifest.jsonl"]
    assert iio.imread(path, plugin="FFMPEG").shape == (40, 256, 512, 3)
    picture = iio.imread(path.with_suffix(".png"))  # four chunks, so four frames in the upper row
    is_white = (picture[90, 80::132] == 255).all(-1)
    assert is_white.tolist() == [False] * 4 + [True] * 8
    told = capsys.readouterr().out
    assert "seed 4" in told and "40 frames in" in told
    assert .1 < float(re.search(r"peak memory ([\d.]+) GiB", told)[1]) < 40
    facts = facts_of(path)
    assert '"AI-generated": true' in facts and "Grass. The camera" in facts and config.STUDENT in facts


def save_plain_state(path, frames=9, latents=torch.zeros(1, 3, 16, 4, 8), out="elsewhere", **options):
    """A state of the right form, with an option that is not the video's own."""
    own = {name: getattr(sample.Config, name) for name in ("prompt", "seed", "memory", "positions")}
    about = {"options": {"out": out, **own, **options}, "model": "other", "frames": frames, "clip": 0}
    write_safetensors(path, {"latents": latents}, about)


REFUSED = [
    ("--seconds 0", "0.01"),
    ("--seconds nan", "0.01"),
    ("--save-state s --prompt a|1e308:b", "no later than"),
    ("--seeds 0", "1"),
    ("--steps 0", "1"),
    ("--tau 2", "-1"),
    ("--seed -1", "from 0"),
    ("--memory slofast", "did you mean slowfast"),
    ("--device mps", "not available"),
    ("--positions none", "unknown"),
    ("--dtype fp8", "unknown"),
    ("--positions unbounded --seconds 256", "bounded"), ("--ckpt nowhere", "check the path"),
    ("--prompts nowhere", "cannot read"),
    ("--continue empty.mp4 --ckpt nowhere", "cannot read the clip"),
    ("--teacher", "give --continue"),
    ("--continue pipe.mp4", "pipe.mp4: there is no such file"),
    ("--resume nowhere", "a file that --save-state wrote"), ("--resume empty.mp4", "cannot read"),
    ("--resume other.pt", "not such a file"), ("--resume state.pt", "20 s long already"),
    ("--resume seed3.pt --seed 4", "made with --seed 3"), ("--resume seed3.pt", "made with other weights"),
    ("--resume memory9.pt", "options, memory cannot be 9"),
    ("--resume broken.pt", "its content, frames cannot be '1'"),
    ("--vae wan", "need --wan"),
    ("--save-state empty.mp4/s", "write"),
    ("--out empty.mp4/o", "write"), ("--out loop", "cannot write to"), ("--out loop/o", "cannot write to"),
    ("--save-state folder", "folder is no file"), ("--out folder", "manifest.jsonl is no file"),
    ("--save-state /dev/null", "null is no file"),
    ("--seed 9223372036854775807 --seeds 2", "from 1 to 1, not 2"), ("--size 64x64", "need --wan"),
    ("--prompts lines.txt", "lines.txt, line 2: the prompt is empty, has control"),
    ("--resume s --bench", "one video"), ("--resume s --continue c.mp4", "--continue with --resume"),
    ("--wan nowhere", "download"), ("--wan random --size 100x100", "multiples of 16"),
    ("--wan random --vae tea", "did you mean tae"),
    ("--wan random:32x1 --ckpt empty.mp4", "weights of its own"),
    ("--wan random --lora x", "weights of its own"),
    ("--teacher --continue empty.mp4 --memory window", "leave out --memory"),
    ("--teacher --continue empty.mp4 --tau 0", "--tau"),
    ("--save-state empty.mp4", "another ending"),
    ("--save-state lines.txt", "no state: give"),
    ("--save-state other.pt", "no state: give"),
    ("--save-state folder/manifest.jsonl", "no file")]
REFUSED_PROMPTS = [
    ("", "prompt is empty"),
    ("a | 1:", "prompt is empty"),
    ("a \udcff b", "no UTF-8"),
    ("a | b", "or \\| for a bar"),
    ("x" * 4001, "more than 4000 letters"),
    ("a \x1b[31m", "control characters"), ("a | 1: b \0", "control characters"),
    ("a | 9: b | 9: c", "one after"),
    ("a | 20: b", "no later than the last"),
    ("a | 9: b | 9.01: c", "a chunk (0.75 s) of its own"),
    ("a | 19.4: b", "no later than the last"),  # which begins at 19.3 s
    ("a | nan: b", "one after")]


@pytest.mark.parametrize("words, message", [(words.split(), message) for words, message in REFUSED]
                         + [(["--prompt", prompt], message) for prompt, message in REFUSED_PROMPTS])
def test_bad_input_is_told_in_one_line_and_leaves_nothing(words, message, refused, monkeypatch, tmp_path):
    if message == "not available" and torch.backends.mps.is_available():
        pytest.skip("there is such a device here")
    monkeypatch.chdir(tmp_path)
    Path("empty.mp4").write_bytes(b"")
    Path("folder/manifest.jsonl").mkdir(parents=True)
    # it would be waited for; where there are no pipes, it is not there
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.mp4")
    Path("loop").symlink_to("loop")
    Path("lines.txt").write_text("a sea\na\x07 storm\n")
    torch.save({"other": 1}, "other.pt")
    save_plain_state("state.pt", 320)
    save_plain_state("seed3.pt", seed=3)
    save_plain_state("memory9.pt", memory=9)
    save_plain_state("broken.pt", "1")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused("--seconds", "20", *words)
    assert sorted(tmp_path.rglob("*")) == before


def expanded(*shape, dtype=torch.float32):
    return torch.zeros(1, dtype=dtype).expand(*shape)


HARMFUL = [  # of a state of 8 frames (a chunk, three latents): what it says, its latents, what is told
    ({"frames": 10}, PLAIN, "no 2 chunks"),
    ({"frames": -1}, PLAIN, "frames cannot be -1"),
    ({"frames": 10 ** 12}, PLAIN, "frames cannot be"),
    ({"clip": 2}, PLAIN, "no 2 chunks"),
    ({"clip": -1}, PLAIN, "clip cannot be -1"),
    ({"options": {"seed": 2 ** 63}}, PLAIN, "--seed must lie"),
    ({"options": {"steps": 10 ** 9}}, PLAIN, "--steps must lie"),
    ({"options": {"prompt": "a \ud800"}}, PLAIN, "prompt cannot be 'a .+ud800'"),
    ({"model": 3}, PLAIN, "model cannot be 3"),
    ({}, torch.zeros(3), "no 1 chunks"),
    ({}, PLAIN[:, :0], "no 1 chunks"),
    ({}, PLAIN / 0, r"latents \(finite, torch.float32\) cannot"),
    ({}, PLAIN.long(), r"latents \(finite, torch.float32\) cannot"),
    ({}, (PLAIN / 0).to(torch.float8_e4m3fn), r"latents \(finite, torch.float32\) cannot"),
    ({}, torch.zeros(1, 3, 16, 9, 9), "needed are"),
    ({}, PLAIN[0], "its latents are no 1 chunks"),
    ({}, PLAIN.repeat(2, 1, 1, 1, 1), "needed are"),
    ({"options": {"prompt": None}}, PLAIN, "options, prompt cannot be None"),
    ({"clip": True}, PLAIN, "clip cannot be True")]


def test_a_state_that_is_none_of_such_a_video_is_told_in_one_line(sampled, refused, tmp_path, capsys):
    path = tmp_path / "state"
    words = ["--seconds", ".5", "--steps", "1"]
    sampled(tmp_path / "a", *words, "--save-state", path)
    capsys.readouterr()
    state, about = read_file(path)
    harmful = tmp_path / "harmful"
    for said, latents, told in HARMFUL:
        options = about["options"] | said.get("options", {})
        write_safetensors(harmful, {**state, "latents": latents}, about | said | {"options": options})
        assert re.search(f"harmful .*{told}", refused("--seconds", "1", "--resume", harmful))
    # a pickle is none, whatever it holds
    torch.save({**state, **about}, harmful)
    assert "options cannot be None" in refused("--seconds", "1", "--resume", harmful)


def test_only_where_something_will_be_written_it_must_be_possible(monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(sample, "check_writable", checked.append)
    sample.check(sample.Config(out="a"))
    assert checked == ["a"]
    sample.check(sample.Config(out="b", save_state="c/d"))
    assert checked == ["a", Path("c"), "b"]
    with pytest.raises(BadInput, match="cannot write to"):  # before the text encoder is read
        weights.load_networks(live.Config(wan="x", out=f"{__file__}/o"), "stage2", [], CPU, torch.float32)


def test_options_replace_what_the_weights_say_of_sampling():
    def loaded(**options):
        return weights.load_networks(sample.Config(**options), "stage2", [], CPU, torch.float32)
    plain = loaded()
    asked = loaded(memory="uniform1", tau=.5, steps=2)
    assert plain.policy == replace(PRESETS["slowfast"], tau=plain.sampler.tau)
    assert plain.sampler.tau != .95
    assert asked.policy == replace(PRESETS["uniform1"], tau=.5)
    assert asked.sampler == replace(plain.sampler, tau=.5, steps=2)


@pytest.mark.parametrize("said, chosen", [(None, [1]), ("2", [])])
def test_tiny_networks_take_one_thread_unless_the_environment_says(
        said, chosen, sampled, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    sampled(tmp_path, "--seconds", ".3", "--steps", "1")
    assert calls == chosen


def test_bf16_changes_the_tiny_models_frames(sampled, tmp_path):
    fp32, bf16 = (sampled(tmp_path, "--seconds", ".5", "--dtype", dtype)[0] for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(fp32.astype(float) - bf16).mean() < 10


def test_a_prompt_outside_the_grammar_is_warned_about_once_and_goes_on(sampled, tmp_path, capsys):
    sampled(tmp_path, "--seconds", ".5", "--prompt", "a calm sea", "--seeds", "2")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    example, prompt = re.findall(r"'(.+?)'", warning)
    assert re.fullmatch(world.GRAMMAR, example) and prompt == "a calm sea"
    assert len(list(tmp_path.glob("*.mp4"))) == 2


def named(folder, prompt, seed=0, taken=(), **options):
    cfg = sample.Config(out=folder, overwrite=options.pop("overwrite", False))
    options = {"memory": "slowfast", "from": 0} | options
    record = {"prompt": prompt, "seed": seed, "options": options, "model": "ab"}
    return sample.name_video(cfg, record, video.read_manifest(folder), set(taken)), record


def test_names_keep_letters_of_every_script_and_differ_with_all_that_changes_the_picture(tmp_path):
    prompts = ["一只猫", "一只狗", "مرحبا", "Sand!", "Sand?", "🐱", "🐶", "कि", "con", "猫" * 300]
    prompts += ["x" * 300, "x" * 300 + "y"]
    names = {named(tmp_path, prompt)[0].name for prompt in prompts}
    for other in ({"seed": 1}, {"memory": "longlive"}, {"from": 86}):
        names.add(named(tmp_path, "Sand!", **other)[0].name)
    assert len(names) == 15
    assert all(len(name.encode()) < 200 for name in names)
    assert all(any(name.startswith(start) for name in names) for start in ("一只猫-0-", "कि-0-"))
    form = re.compile(r"[^\s!-,.-/:-@[-`{-~]+-[01](-from-86)?-[0-9a-f]{8}\.mp4")
    assert all(form.fullmatch(name) for name in names)
    assert named(tmp_path, "../a: b*?")[0].name.startswith("a-b-0-")


def test_only_the_same_video_takes_the_place_of_a_file(tmp_path):
    first, record = named(tmp_path, "a")
    second, third = (tmp_path / f"{first.stem}-{number}.mp4" for number in (2, 3))
    assert named(tmp_path, "a", taken=[first])[0] == second  # twice in a list of prompts
    first.write_text("video")
    assert named(tmp_path, "a")[0] == second
    assert named(tmp_path, "a", overwrite=True)[0] == first
    sha256 = hashlib.sha256(b"video").hexdigest()
    records.append_line(tmp_path / "manifest.jsonl", {**record, "file": first.name, "sha256": sha256})
    assert named(tmp_path, "a")[0] == first
    stoppable = sample.Config(out=tmp_path, save_state="state")
    assert sample.name_video(stoppable, record, video.read_manifest(tmp_path), set()) == second
    first.write_text("something else by now")
    assert named(tmp_path, "a")[0] == second
    second.mkdir()
    assert named(tmp_path, "a")[0] == third
    # nor does the picture of its memory take the place of somebody's
    assert named(tmp_path, "b")[0].with_suffix(".png").write_text("a picture")
    assert named(tmp_path, "b")[0].stem.endswith("-2")


def test_a_list_of_prompts_gives_a_video_each_and_a_manifest_that_tells_which(sampled, tmp_path):
    lines = ["一只猫", "a sea \\| a storm", "一只猫"]
    out = tmp_path / "o"
    (tmp_path / "lines.txt").write_text("\ufeff" + "\n".join(lines), "utf-8")
    words = ["--prompts", tmp_path / "lines.txt", "--seeds", "2", "--seed", "5"]
    for _ in range(2):  # again: the same names
        assert not sampled(out, *words, "--seconds", ".3", "--steps", "1")[1]
        records = list(video.read_manifest(out).values())
        made = [(record["prompt"], record["seed"]) for record in records]
        assert sorted(made) == sorted(itertools.product(lines, (5, 6)))
        files = sorted(out.glob("*.mp4"))
        assert sorted(r["file"] for r in records) == [file.name for file in files]
        assert len(files) == 6
    hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert {r["sha256"] for r in records} == hashes
    assert len({r["model"] for r in records}) == 1
    assert records[0]["options"]["steps"] == 1


@pytest.mark.parametrize("prompt, switches", [
    (r"a \| b", {0: "a | b"}),
    (r"a \| b | 1: c\|d", {0: "a | b", 2: "c|d"}),
    ("a\t|\n1 : b", {0: "a", 2: "b"}),
    ("a: b | .5625: c | 0.563: d: e", {0: "a: b", 1: "c", 2: "d: e"})])
def test_a_bar_is_a_switch_or_with_a_backslash_a_letter(prompt, switches):
    assert sample.read_switches(prompt, 9) == switches


def test_a_prompt_switch_leaves_every_frame_before_it_untouched_and_changes_the_ground(sampled, tmp_path):
    prompt = SWITCH.format(3)
    switched, plain = (sampled(tmp_path, "--seconds", "6", "--prompt", words)[0]
                       for words in (prompt, prompt.split(" |")[0]))
    first = 57  # chunk 5, the first that begins at 48 frames or later
    assert len(switched) == len(plain) == 96
    assert np.array_equal(switched[:first], plain[:first])
    assert not np.array_equal(switched[first], plain[first])
    grounds = read_video(switched.transpose(0, 3, 1, 2)).ground
    assert (grounds[:first] == 1).mean() > .9 and (grounds[-12:] == 2).mean() > .9  # sand, then snow


def test_a_raw_directory_goes_through_to_an_mp4(raw, sampled, tmp_path, capsys):
    words = ["--wan", raw, "--ckpt", raw.parent / "student.pt", "--seconds", "1.5", *SMALL_WAN]
    made = {}
    for options in ("", "--vae tae", "--dtype bf16"):
        made[options], code = sampled(tmp_path / "o", *words, *options.split())
        assert not code
        assert made[options].shape == (24, 32, 32, 3)
        assert made[options].std() > 1
    assert "estimate" in capsys.readouterr().out.split("wrote")[0]
    assert (made[""] != made["--vae tae"]).any()
    assert (made[""] != made["--dtype bf16"]).any()


@pytest.mark.parametrize("kind", ["tiny", "wan", "tae"])
def test_head_and_tail_of_a_resumed_video_are_the_whole_one_bit_for_bit(kind, raw, sampled, tmp_path):
    """The head ends within a chunk, the tiny one before a prompt switch; the state knows the options."""
    words = ["--memory", "uniform1", "--positions", "unbounded", "--prompt", SWITCH.format(5.6)]
    if kind != "tiny":
        words = ["--wan", raw, "--vae", kind, *SMALL_WAN]
    state, out = tmp_path / "state", tmp_path / "parts"
    whole, _ = sampled(tmp_path / "whole", "--seconds", "7.2", *words)
    head, _ = sampled(out, "--seconds", "5.4", "--save-state", state, *words)
    tail, _ = sampled(out, "--seconds", "7.2", "--resume", state, "--save-state", state)
    assert read_file(state)[0]["latents"].shape[1] == 30  # not one chunk more than the 115 frames need
    assert len(head) == 86
    assert np.array_equal(np.concatenate([head, tail]), whole)
    assert len(list(out.glob("*.mp4"))) == 2
    assert len(list(out.glob("*-from-86-*.mp4"))) == 1


@pytest.fixture
def clips(tmp_path):
    """Two clips of 33 frames of the small world, as mp4."""
    paths = []
    for k in range(2):
        frames = clip(WorldSpec(world.HELD_OUT + k), 0, 33).transpose(0, 2, 3, 1)
        frames = (frames * 255).round().astype(np.uint8)
        paths.append(write_video(tmp_path / f"clip{k}.mp4", frames, "", 8))
    return paths


def kill_at(call, name):
    """In place of to_uint8(): a signal comes while that many chunks are decoded."""
    decoded_frames = video.to_uint8
    calls = itertools.count(1)

    def decode(decoded):
        if next(calls) == call:
            os.kill(os.getpid(), getattr(signal, name))
        return decoded_frames(decoded)
    return decode


@pytest.mark.parametrize("name, code, at, count", [
    ("SIGINT", 130, 3, {33, 45}),
    ("SIGTERM", 143, 1, {45})])
def test_a_signal_saves_whole_chunks(name, code, at, count, clips, sampled, monkeypatch, tmp_path):
    """
    While chunk 3 of a video is decoded, beside the making of the next; and during the first of a clip, all of
    which and a new one come first.
    """
    words, state = ["--seconds", "4"], tmp_path / "state"
    head_words = [*words, "--save-state", state, *(["--continue", clips[0]] if name == "SIGTERM" else [])]
    whole, _ = sampled(tmp_path / "whole", *head_words)
    monkeypatch.setattr(video, "to_uint8", kill_at(at, name))
    head, stopped = sampled(tmp_path / "o", *head_words)
    assert stopped == code and len(head) in count
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 1
    tail, _ = sampled(tmp_path / "o", *words, "--resume", state)
    assert np.array_equal(np.concatenate([head, tail]), whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_where_no_state_is_saved_a_signal_leaves_nothing(name, code, sampled, monkeypatch, tmp_path):
    monkeypatch.setattr(video, "to_uint8", kill_at(1, name))
    assert sampled(tmp_path, "--seconds", "1")[1] == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first, code", [("SIGTERM", 143), ("SIGHUP", 143), ("SIGINT", 130)])
def test_a_signal_waits_for_what_is_patient_and_one_a_second_later_does_not(first, code, monkeypatch):
    number = getattr(signal, first, None) or pytest.skip("there is no such signal here")
    outside = signal.signal(number, signal.SIG_DFL)  # under nohup it would be ignored
    clock = iter([10., 10.5, 11.5])  # torchrun sends two at once
    monkeypatch.setattr(config.time, "monotonic", lambda: next(clock))
    with config.StopSignals() as stop:
        stop.patient = True
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.code == code
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
    assert stop.code == code
    assert signal.signal(number, outside) == signal.SIG_DFL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exit_that_python_swallows_is_known_to_the_loop():
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
    with config.StopSignals() as stop:
        Interrupted()
    assert stop.code == 130


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal here")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with config.StopSignals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_where_nothing_compiles_it_is_told_at_the_start(refused, monkeypatch):
    def failing(function):
        raise RuntimeError("No working C++ compiler found\nin 4 lines")
    monkeypatch.setattr(torch, "compile", failing)
    assert "No working C++ compiler found in 4 lines): install" in refused("--compile", "--seconds", "1")


@pytest.mark.parametrize("name, bias", [("dit", "blocks.2.ffn.0.bias"), ("vae", "decoder.1.bias")])
def test_a_chunk_that_is_not_finite_ends_the_run(name, bias, refused, monkeypatch):
    def load_damaged(*about):
        networks = load_tiny(*about)
        getattr(networks, name).requires_grad_(False).get_parameter(bias)[3] = torch.nan
        return networks
    monkeypatch.setattr(weights, "load_tiny", load_damaged)
    assert "the chunk at 0 s is not finite" in refused("--seconds", "1")


def test_a_state_that_finds_no_room_leaves_the_one_before_and_the_video(
        sampled, tmp_path, monkeypatch, capsys):
    state = tmp_path / "state"
    save_plain_state(state)
    before = state.read_bytes()

    def write_half(tensors, path, about):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")
    save = tensors.save_file
    monkeypatch.setattr(tensors, "save_file", write_half)
    assert sampled(tmp_path / "o", "--seconds", ".3", "--steps", "1", "--save-state", state)[1] == 2
    assert "No space left on device): is the disk full?" in capsys.readouterr().err
    assert state.read_bytes() == before
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 1
    # nor is it where the manifest finds no room, or where nobody reads what is told
    monkeypatch.setattr(tensors, "save_file", save)
    with monkeypatch.context() as full:
        full.setattr(sample, "append_line", lambda path, record: write_half({}, path, ""))
        with pytest.raises(SafetensorError):
            sampled(tmp_path / "o", "--seconds", ".3", "--steps", "1", "--save-state", state)
    assert "latents" in read_file(state)[0] and f"saved {state} at" in capsys.readouterr().out
    state.unlink()
    monkeypatch.setattr(sample, "tell", lambda told: told.startswith("wrote") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampled(tmp_path / "o", "--seconds", ".3", "--steps", "1", "--save-state", state)
    assert "latents" in read_file(state)[0]


def test_where_a_video_finds_no_room_its_state_has_all_of_it(sampled, tmp_path, monkeypatch, capsys):
    whole, _ = sampled(tmp_path / "a", "--seconds", "2.5")
    state = tmp_path / "state"
    with monkeypatch.context() as full:
        full.setattr(sample, "hash_file", lambda path: (_ for _ in ()).throw(OSError("No space left")))
        assert sampled(tmp_path / "b", "--seconds", "1.6", "--save-state", state)[1] == 2
    assert read_file(state)[1]["frames"] == 26
    # where not even the file was finished, all of it is written once more
    writer = sample.video_writer

    @contextmanager
    def failing(*about):
        with writer(*about) as write:
            yield write
        raise BadInput("ffmpeg could not write: is the disk full?")
    monkeypatch.setattr("sys.argv", f"sample.py --seconds 1.6 --save-state {state} --out {tmp_path}".split())
    with monkeypatch.context() as full, pytest.raises(BadInput, match="is the disk full"):
        full.setattr(sample, "video_writer", failing)
        sample.main()
    assert f"saved {state} at 1.625 s" in capsys.readouterr().out
    assert read_file(state)[1]["frames"] == 0
    again, code = sampled(tmp_path / "c", "--seconds", "2.5", "--resume", state)
    assert code == 0 and np.array_equal(again, whole)
    # and a shorter one than that
    again, code = sampled(tmp_path / "c", "--seconds", "1", "--resume", state)
    assert code == 0 and np.array_equal(again, whole[:16])


def test_videos_of_two_states_and_of_two_networks_have_names_of_their_own(clips, sampled, tmp_path):
    """Of one prompt and seed, with weights of the same numbers; and a state is of one network."""
    for i, file in enumerate(clips):
        words = ["--seconds", "2.5", "--save-state", tmp_path / f"state{i}"]
        sampled(tmp_path / f"parts{i}", "--continue", file, *words)
        sampled(tmp_path / "o", "--seconds", "3", "--resume", tmp_path / f"state{i}")
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 2
    state, about = read_file(WEIGHTS / f"{config.STUDENT}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("same", "heads", "shift")}
    write_safetensors(files["same"], state, about)
    write_safetensors(files["heads"], state, about | {"config": about["config"] | {"heads": 2}})
    sampler = about["facts"]["sampler"] | {"shift": 4.}
    write_safetensors(files["shift"], state, about | {"facts": about["facts"] | {"sampler": sampler}})
    for file in files.values():
        sampled(tmp_path / "p", "--seconds", ".5", "--ckpt", file)
    assert len(list((tmp_path / "p").glob("*.mp4"))) == 3
    # steps are an option, and of no other network
    sampled(tmp_path / "p", "--seconds", ".5", "--ckpt", files["same"], "--steps", "2")
    records = [json.loads(line) for line in (tmp_path / "p" / "manifest.jsonl").read_text().splitlines()]
    assert len({record["model"] for record in records}) == 3
    words = ["--seconds", "3", "--resume", tmp_path / "state0"]
    assert sampled(tmp_path / "q", *words, "--ckpt", files["same"])[1] == 0
    assert sampled(tmp_path / "q", *words, "--ckpt", files["heads"])[1] == 2


def test_replaced_weights_are_refused_for_a_state_and_moved_ones_are_taken(
        sampled, refused, tmp_path, capsys):
    state = tmp_path / "state"
    here = tmp_path / "here.safetensors"
    moved = tmp_path / "moved.safetensors"
    shutil.copy(WEIGHTS / f"{config.STUDENT}.safetensors", here)
    sampled(tmp_path / "a", "--seconds", ".5", "--ckpt", here, "--save-state", state)
    here.rename(moved)
    assert not sampled(tmp_path / "b", "--seconds", "1", "--resume", state, "--ckpt", moved)[1]
    shutil.copy(WEIGHTS / "stage1.safetensors", here)
    capsys.readouterr()
    assert "other weights than here.safetensors" in refused("--seconds", "1", "--resume", state)


@pytest.mark.parametrize("kind", ["", "--teacher", "--wan", "--wan --teacher"])
def test_a_clip_is_continued_without_a_jump_and_decides_what_comes(kind, raw, clips, sampled, tmp_path):
    """A teacher is called twice for 8 s, 21 latents each. (Random weights, those of --wan, do jump.)"""
    seconds = 8 if "--teacher" in kind else 4
    words = ["--seconds", seconds, *kind.replace("--wan", f"--wan {raw}").split()]
    words += SMALL_WAN if "--wan" in kind else []
    first, second = (sampled(tmp_path / "o", *words, "--continue", path)[0] for path in clips)
    assert len(first) == 16 * seconds
    assert not np.array_equal(first[40:], second[40:])
    if "--wan" not in kind:
        steps = np.diff(first.astype(float), axis=0).std((1, 2, 3))
        source = video.read_clip(clips[0], 64, 32, 64)
        assert (first[:33].astype(float) - source).std() < 16
        assert steps[32] < 2 * np.median(steps)
        assert steps[33:].min() > 0
    assert bool(list((tmp_path / "o").glob("*.png"))) == ("--teacher" not in kind)


def test_the_teacher_follows_prompt_switches_and_sees_all_that_is_there(monkeypatch):
    """Each call of extend() gets the text that holds at its first chunk, and all latents before it."""
    calls = []

    def extend(net, history, text, grid, sampler, seeds):
        calls.append((history.shape[1], text))
        return torch.full((1, 21, 1, 1, 1), float(len(calls)))
    monkeypatch.setattr(sample, "extend", extend)
    networks = SimpleNamespace(dit=None, sampler=None)
    history = torch.zeros(1, 9, 1, 1, 1)
    made = sample.extend_with_teacher(networks, {0: "a", 10: "b"}, history, (1, 1), 0)
    chunks = [next(made) for _ in range(15)]
    assert calls == [(9, "a"), (30, "b"), (51, "b")]
    assert all(c.shape[1] == 3 for c in chunks)
    assert [int(c.mean()) for c in chunks] == [1] * 7 + [2] * 7 + [3]


@pytest.mark.slow
@pytest.mark.speed
def test_memory_is_flat_600_seconds_need_what_60_seconds_need(tmp_path):
    peaks = []
    for seconds in ("60", "600"):
        words = [sys.executable, "sample.py", "--seconds", seconds, "--out", str(tmp_path)]
        told = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout
        peaks.append(float(re.search(r"peak memory ([\d.]+)", told)[1]))
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_chunk_is_decoded_in_a_stream_of_its_own_beside_the_making_of_the_next(monkeypatch):
    vae = TAE(TAEConfig(8, (16, 12, 8, 8))).requires_grad_(False)
    log = []
    made = []
    latents = noise(1, 9, 16, 2, 2).split(CHUNK, dim=1)

    def note(word):
        return lambda *about: log.append(word)

    @contextmanager
    def entered(side):
        yield log.append("in")
        log.append("out")
    side = SimpleNamespace(wait_stream=note("wait"))
    for name, value in {"Stream": lambda: side, "current_stream": lambda: None, "stream": entered}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(vae, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    chunks = (note("made")() or x0 for x0 in latents)
    for frames, is_finite in video.decode_beside(vae, chunks):
        log.append("frames")
        made.append(frames)
        assert is_finite
    make, inside = ["made", "wait"], ["in", "out"]
    ours = [word for word in log if word not in inside]
    assert ours == [*make, *make, "frames", *make, "frames", "frames"]
    assert [word for word in log if word in inside] == 3 * inside
    # a chunk goes in once it is there, and out before its frames are
    for earlier, later in (("wait", "in"), ("out", "frames")):
        places = ([i for i, word in enumerate(log) if word == name] for name in (earlier, later))
        assert all(before < after for before, after in zip(*places))
    whole, _ = vae.decode(torch.cat(latents, dim=1))
    close(torch.cat(made).float(), video.to_uint8(whole)[0].float(), 1)


# ---- the live page: what is made, who may ask for what, and all of it in a real browser -----------

@pytest.fixture(scope="module")
def tiny_networks():
    return weights.load_networks(live.Config(), config.STUDENT, [], CPU, torch.float32)


@pytest.fixture
def session(tiny_networks):
    return live.Session(live.Config(seed=4), tiny_networks)


def frames_of(told):
    picture = iio.imread(base64.b64decode(told["strip"]))
    return rearrange(picture, "(f h) w c -> f h w c", f=told["frames"])


def segments_of(told):
    sink, slow, fast = told["sizes"]
    return [*"s" * sink, *"K" * slow, *"f" * fast]


def test_a_live_video_is_the_sampled_one_and_orders_take_hold_at_the_next_chunk(session):
    networks = session.networks
    snow = live.Config.prompt.replace("Grass", "Snow")
    made = [session.step() for _ in range(3)]
    session.ask({"prompt": snow})
    session.ask({"paused": True})  # what was asked before still holds
    made += [session.step() for _ in range(2)]
    roll = networks.rollout(networks.text(live.Config.prompt))
    texts = {3: networks.text(snow)}
    whole = generate(roll, [4], 5, networks.sampler, networks.latent, texts=texts)
    latents = torch.cat([*whole], dim=1)
    decoded, _ = networks.vae.decode(latents)
    shown = np.concatenate([frames_of(told) for told in made])
    # decoded chunk by chunk: at most a step of rounding apart
    assert np.abs(shown.astype(int) - video.to_uint8(decoded)[0].numpy()).max() <= 1
    assert [told["made"] for told in made] == [9, 21, 33, 45, 57]
    # what is held, each latent decoded alone
    for number, picture in made[-1]["held"]:
        alone, _ = networks.vae.decode(latents[:, number:number + 1])
        picture = iio.imread(base64.b64decode(picture)).astype(int)
        assert np.abs(picture - video.to_uint8(alone)[0, -1].numpy()).max() <= 1


def test_a_saved_file_has_the_frames_that_were_shown_and_says_how_they_were_made(session, monkeypatch):
    shown = [*frames_of(session.step())]
    written = []
    comments = []
    session.ask({"tau": .5})
    shown += [*frames_of(session.step())]

    @contextmanager
    def writer(path, width, height, comment, scale):
        comments.append(comment)
        yield written.append
        path.write_bytes(b"an mp4")
    monkeypatch.setattr(live, "video_writer", writer)
    assert session.save() == b"an mp4"
    assert np.array_equal(np.concatenate(written), np.concatenate(shown))
    about = json.loads(comments[0])
    assert about["AI-generated"]
    assert about["model"] == session.networks.name
    told = {"seed": 4, "memory": "slowfast", "prompt": live.Config.prompt}
    assert all(told.items() <= changes.items() for changes in about["settings"])
    assert [changes["second"] for changes in about["settings"]] == [0, 9 / 16]
    assert about["settings"][1]["tau"] == .5


def test_memory_can_be_taken_away_and_each_latent_keeps_its_picture(session):
    before = [session.step() for _ in range(9)][-1]
    assert segments_of(before) == [*"sssKKKKKKKKKKKKffffff"]
    session.ask({"memory": "longlive", "tau": .5, "positions": "unbounded"})
    after = session.step()
    assert [number for number, _ in after["held"]] == [0, 1, 2, *range(21, 30)]
    assert segments_of(after) == [*"sssfffffffff"]
    pictures = dict(before["held"])
    assert all(pictures.get(number, picture) == picture for number, picture in after["held"])
    assert session.rollout.positions == "unbounded"
    assert session.rollout.memory.policy.tau == .5
    # absolute positions end with Wan's table; a new video, with another prompt, under the settings that hold
    session.rollout.chunk = 341
    session.step()
    assert session.rollout.positions == "bounded"
    session.ask({"video": 1, "seed": 7, "prompt": "a calm sea"})
    told = session.step()
    assert told["made"] == 9 and segments_of(told) == [*"fff"]
    assert session.rollout.memory.policy.fast == 9
    fresh = live.Session(live.Config(seed=7, memory="longlive", prompt="a calm sea"), session.networks)
    assert np.array_equal(frames_of(fresh.step()), frames_of(told))


def test_the_bars_are_the_surprisal_of_each_chunk_and_what_the_rule_says_of_it(session):
    bars = []
    for tau in (-1, -1., -1., -1., 1, 1.):
        session.ask({"tau": tau})
        bars.append(session.step()["bars"][-1])
    assert [tested for _, tested, _ in bars] == [True, False] * 3
    assert [kept for *_, kept in bars] == [False] * 4 + [True, False]
    roll = session.networks.rollout(session.text)
    list(generate(roll, [4], 4, session.networks.sampler, session.networks.latent))
    shown = torch.tensor([surprisal for surprisal, *_ in bars[:4]])
    close(shown, 1 - torch.cat(roll.similarities), 1e-5)


def test_what_a_session_keeps_does_not_grow(session, monkeypatch):
    monkeypatch.setattr(score, "WINDOW", 24)
    session.step()
    session.bars, session.changes = session.bars * 80, session.changes * 15
    for i in range(8):
        session.ask({"tau": i / 10, "unknown": "a"})
        session.step()
    roll, read = session.rollout, session.score
    kept = session.bars, session.changes, session.pictures, read.path, read.landmark, read.held
    assert [len(some) for some in kept] == [80, 15, 21, 24, 24, 24]
    assert not roll.similarities and not roll.kept
    assert len(read.views) <= 21
    assert "unknown" not in session.wanted


@pytest.mark.parametrize("cost, between", [(.1, .75), (1, 1)])
def test_chunks_are_published_at_the_rate_of_the_video_and_begun_just_in_time(
        cost, between, session, monkeypatch):
    clock = SimpleNamespace(now=50.)
    costs = iter([cost] * 6)
    begun = []
    published = []

    def step():
        begun.append(clock.now)
        clock.now += next(costs)  # at last: no more
        return {"frames": 12}
    monkeypatch.setattr(live, "time", SimpleNamespace(
        monotonic=lambda: clock.now, time=lambda: clock.now,
        sleep=lambda seconds: setattr(clock, "now", clock.now + seconds)))
    monkeypatch.setattr(session, "step", step)
    monkeypatch.setattr(session, "publish", lambda news: published.append(news["at"]))
    with pytest.raises(StopIteration):
        session.run(config.StopSignals())
    assert np.allclose(np.diff(published), between)
    assert np.allclose(np.array(published)[1:] - begun[1:-1], min(2 * cost, between))


def live_clip(spec, chunk):
    """(f, h, w, 3) uint8; from chunk 20 on other landmarks stand there"""
    spec = replace(spec, counterfactual=chunk >= 20)
    frames = clip(spec, max(0, 12 * chunk - 3), 12 if chunk else 9)
    return (rearrange(frames, "f c h w -> f h w c") * 255).astype(np.uint8)


def test_the_running_score_is_that_of_the_finished_video_and_tells_lost_from_unused():
    spec = WorldSpec(3, "turn", 8)
    made = make_world(spec)
    lost = score.Score()
    unused = score.Score()
    chunks = [live_clip(spec, chunk) for chunk in range(40)]
    for i, frames in enumerate(chunks):
        lost.read(frames, range(max(0, 3 * i - 21), 3 * i), made.caption)
        unused.read(frames, range(3 * i), made.caption)
    events = reappearances(read_video(rearrange(np.concatenate(chunks), "f h w c -> f c h w")), made.motion)
    wrong = sum(not event.right for event in events)
    same = {"returns": len(events), "right": len(events) - wrong}
    assert 5 < wrong < len(events)
    assert lost.count() == {**same, "not kept": wrong, "kept but not used": 0}
    assert unused.count() == {**same, "not kept": 0, "kept but not used": wrong}
    # the maps
    told = lost.told()
    others = make_world(replace(spec, counterfactual=True))
    for colours, landmarks in ((told["first"], made.landmarks), (told["now"], others.landmarks)):
        assert colours == [[world.COLOURS[colour] for colour in world.PAIRS[kind]] for kind in landmarks]
    heading = made.motion.heading(made.start, 476) / 256
    assert (told["ground"], told["motion"]) == (world.GROUNDS[made.ground], "turn")
    assert abs((told["heading"] - heading + .5) % 1 - .5) < 1 / 256


def test_what_left_under_another_motion_is_not_missed_and_old_returns_no_longer_count(monkeypatch):
    spec = WorldSpec(3, "turn", 8)
    told = score.Score()
    aside = World(0, (), 0, Motion("aside", 1, 8)).caption
    for chunk in range(16):
        told.read(live_clip(spec, chunk), range(3 * chunk), make_world(spec).caption)
    before = told.count()
    still = live_clip(spec, 15)[-1:].repeat(12, 0)
    for chunk in range(16, 40):  # the camera stops, and is asked to look aside only
        told.read(still, range(3 * chunk), aside)
    assert told.count() == before and before["right"] > 0
    monkeypatch.setattr(score, "WINDOW", 12)
    told.read(still, [], aside)
    assert told.count()["returns"] == 0


@pytest.mark.parametrize("kind", world.CAPTIONS)
def test_captions_of_every_motion_are_read_back(kind):
    for seed in range(20):
        made = make_world(WorldSpec(seed, kind))
        assert score.motion_of(made.caption) == made.motion
    assert score.motion_of("A calm sea.") is None


@pytest.fixture
def served(session):
    """A server without chunks: function (method, path, body, headers) -> status, text, headers"""
    server = live.Server(("127.0.0.1", 0), live.Handler)
    server.session, server.name = session, "mybox"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        headers = {name: value.format(port) for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace"), answer.headers
    ask.port = port
    yield ask
    server.shutdown()
    server.server_close()


SEED = b'{"seed": 1}'
LONG = b'{"seed": 1, "prompt": "' + b"a" * 3970 + b'"}'

ANSWERS = [  # status, request, body, header and its value, with {} for the port
    (200, "GET /"),
    (200, "GET /live.js", None, "Origin http://127.0.0.1:{}"),
    (200, "GET /", None, "Host localhost:{}"),
    (200, "GET /", None, "Host mybox:{}"),
    (200, "POST /steer", LONG),
    (200, "POST /steer", SEED, "Origin http://localhost:{}"),
    (403, "GET /", None, "Host evil.example:{}"),
    (403, "GET /", None, "Host 127.0.0.1:1"),
    (403, "GET /", None, "Host 10.0.0.1:{}"),
    (403, "POST /steer", SEED, "Origin null"),
    (403, "POST /steer", SEED, "Origin http://evil.example"),
    (403, "POST /steer", SEED, "Origin https://127.0.0.1:{}"),
    (403, "POST /steer", SEED, "Origin http://127.0.0.1:1"),
    (403, "GET /events", None, "Origin null"),
    (404, "GET /live.py"),
    (404, "GET /../README.md"),
    (404, "POST /", b"{}"),
    (413, "POST /steer", b" " * 4097),
    (413, "POST /steer", b"", "Content-Length " + "9" * 50),
    (413, "POST /steer", b"", "Content-Length -1"),
    (400, "POST /steer", None, "Content-Length x")]


def test_the_server_answers_its_own_page_alone(served, session):
    for status, request, *more in ANSWERS:
        body, header = (*more, None, None)[:2]
        session.wanted = session.wanted | {"seed": 4}
        headers = dict([header.split()]) if header else {}
        got, text, sent = served(*request.split(), body, **headers)
        assert got == status, (request, headers)
        assert status < 400 or len(text.splitlines()) == 1
        assert sent["X-Frame-Options"] == "DENY"
        is_obeyed = status == 200 and "POST" in request
        assert session.wanted["seed"] == (1 if is_obeyed else 4)


ORDERS = {
    b"": "Expecting value",
    b"[1]": "content cannot be [1]",
    b"[" * 4000: "recursion",
    b"\xff": "utf-8",
    b'{"tau": 2}': "from -1",
    b'{"tau": NaN}': "tau cannot be nan",
    b'{"tau": true}': "tau cannot be",
    b'{"tau": "1"}': "tau cannot be",
    b'{"memory": "slof\\nast"}': "memory cannot be",
    b'{"memory": "\\u732b"}': "memory cannot be",
    b'{"seed": -1}': "seed cannot be",
    b'{"seed": 1.5}': "seed cannot be",
    b'{"prompt": 1}': "prompt cannot be",
    b'{"prompt": " "}': "empty",
    b'{"prompt": "\\ud800"}': "prompt cannot be",
    b'{"paused": 1}': "paused cannot be",
    b'{"positions": []}': "positions cannot be",
    b'{"video": null}': "video cannot be",
}


def test_an_order_that_makes_no_sense_is_refused_in_one_line(served, session):
    before = session.wanted
    for body, told in ORDERS.items():
        status, text, _ = served("POST", "/steer", body)
        assert status == 400 and told in text, body
        assert len(text.splitlines()) == 1
        assert session.wanted is before


def test_viewers_get_the_newest_message_a_stalled_one_harms_nobody_and_all_go(served, session, monkeypatch):
    monkeypatch.setattr(live.Handler, "timeout", 1)
    threads = threading.active_count()
    stalled, reading = (socket.create_connection(("127.0.0.1", served.port)) for _ in range(2))
    for viewer in (stalled, reading):
        viewer.sendall(f"GET /events HTTP/1.0\r\nHost: localhost:{served.port}\r\n\r\n".encode())
    stream = reading.makefile("r")
    large = "x" * 300_000  # 40 of them are more than the sockets of one that does not read hold
    for i in range(40):
        started = time.monotonic()
        session.publish({"i": i, "strip": large})
        assert time.monotonic() - started < 1
        while f'"i": {i},' not in stream.readline():
            pass
    for some in (reading, stream, stalled):
        some.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(.1)
    assert threading.active_count() == threads


@pytest.mark.parametrize("words, told", [
    ("--port 70000", "0-65535"),
    ("--host nowhere.invalid", "cannot listen"),
    ("--tau 2", "from -1"),
    ("--port {}", "another --port")])
def test_bad_input_for_the_live_page_is_told_in_one_line(words, told, served, monkeypatch, refusal):
    monkeypatch.setattr(live, "load_networks", None)  # refused before anything is loaded
    assert told in refusal(live, *words.format(served.port).split())


@contextmanager
def running_live(*words):
    """live.py as a process of its own -> the process, its address"""
    command = [sys.executable, HERE / "live.py", "--no-browser", "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_ctrl_c_ends_the_live_page_at_once_and_quietly():
    with running_live() as (process, url):
        viewers = [http.client.HTTPConnection(url.removeprefix("http://"), timeout=60) for _ in range(2)]
        for viewer, path in zip(viewers, ("/events", "/video.mp4")):
            viewer.request("GET", path)
        assert viewers[0].getresponse().readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == ""


def test_the_page_at_full_size_is_the_same_in_jpeg_without_a_judge(raw, tmp_path):
    cfg = live.Config(wan=str(raw), out=str(tmp_path / "o"), size="32x32", prompt="a calm sea")
    networks = weights.load_networks(cfg, "", [cfg.prompt], CPU, torch.float32)
    full = live.Session(cfg, networks)
    full.step()
    full.ask({"prompt": "a storm rises"})  # encoded now
    told = full.step()
    assert full.message["kind"] == "jpeg"
    assert base64.b64decode(told["strip"])[:2] == b"\xff\xd8"
    assert frames_of(told).shape == (12, 32, 32, 3)
    assert full.settings["prompt"] == "a storm rises"
    assert len(told["held"]) == 6
    assert "score" not in told
    assert iio.imread(full.save(), plugin="FFMPEG", extension=".mp4").shape == (21, 32, 32, 3)


@pytest.mark.slow
@pytest.mark.speed
def test_an_hour_of_the_live_page_takes_no_more_memory_nor_time_than_its_first_minutes(tiny_networks):
    """Of all that the page does; the network is small, and the frames are drawn, so that it takes minutes."""
    import psutil
    made = make_world(WorldSpec(3, "turn", 44))
    pano = panorama(0, SET)

    def decode(latents, past=None):
        b, n = latents.shape[:2]
        frames = np.arange(4 * n - 3) if past is None else past[-1] + np.arange(1, 4 * n + 1)
        drawn = torch.from_numpy(render(pano, made.motion.heading(0, frames)))
        return (2 * drawn - 1).expand(b, -1, -1, -1, -1), frames
    small = replace(tiny_networks.dit.config, dim=32, ffn_dim=32, heads=1, layers=1)
    networks = replace(tiny_networks, dit=DiT(small).requires_grad_(False), sampler=Sampler(steps=1))
    networks.vae = SimpleNamespace(decode=decode)
    hour = live.Session(live.Config(prompt=made.caption), networks)
    memory = {}
    seconds = {}
    for chunk in range(3001):
        hour.publish(hour.step())
        if chunk in (300, 600, 2700, 3000):
            memory[chunk] = psutil.Process().memory_info().rss / 2 ** 20
            seconds[chunk] = time.process_time()
    told = hour.message["score"]["count"]
    assert told["returns"] == told["right"] > 20
    assert memory[3000] - memory[300] < 10, memory  # MiB
    assert seconds[3000] - seconds[2700] < 2 * (seconds[600] - seconds[300]), seconds


# What a page shows, read back from its canvas: number of the frame, a fingerprint, its ground's colour
WATCH = """() => {
  const canvas = document.getElementById("video"), pen = canvas.getContext("2d");
  window.seen = [];
  const look = () => {
    requestAnimationFrame(look);
    const frame = Math.round(16 * Number(document.getElementById("made").textContent));
    if (frame === window.seen.at(-1)?.frame) return;
    const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
    const hash = data.reduce((sum, value, i) => (sum * 31 + value) % 1000000007, 7);
    window.seen.push({frame, hash, ground: [...data.slice(-64 * 4 * 4, -64 * 4 * 3)], at: Date.now()});
  };
  look();
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    chromium = shutil.which("chromium") or pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


uses_browser = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def tabs(browser):
    """Two tabs of one live page, once memory is full"""
    with running_live() as (_, url):
        tabs = [browser.new_page(reduced_motion="reduce") for _ in range(2)]
        errors = []
        for tab in tabs:
            tab.on("pageerror", lambda error: errors.append(error))
            tab.goto(url, wait_until="domcontentloaded")
            tab.evaluate(WATCH)
        until(tabs[0], lambda: held_in(tabs[0]) == [3, 12, 6])
        yield tabs
        assert not errors


def until(tab, is_true):
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        tab.wait_for_timeout(200)


def held_in(tab):
    return [tab.locator(f"#{name} li:not(.dropped)").count() for name in ("sink", "slow", "fast")]


def watched(tab, seconds):
    tab.evaluate("window.seen.length = 0")
    tab.wait_for_timeout(1000 * seconds)
    return tab.evaluate("window.seen")


def ground_of(frame):
    row = np.reshape(frame["ground"], (-1, 4))[:, :3].mean(0) / 255
    return world.GROUNDS[np.square(world.GROUND_RGB - row).sum(1).argmin()]


@uses_browser
def test_in_a_browser_all_tabs_show_the_same_frames_and_never_faster_than_16_a_second(tabs):
    first, second = [], {}
    while len(first) < 40:
        new = watched(tabs[0], 2)
        assert len(new) <= 17 * 2 + 1
        first += new
        second |= {frame["frame"]: frame["hash"] for frame in tabs[1].evaluate("window.seen")}
    assert len({frame["hash"] for frame in first}) >= .9 * len(first)
    common = [frame for frame in first if frame["frame"] in second]
    assert common
    assert all(frame["hash"] == second[frame["frame"]] for frame in common)


@uses_browser
def test_in_a_browser_a_click_changes_the_ground_in_all_tabs(tabs):
    tabs[0].get_by_role("button", name="Snow").click()
    until(tabs[1], lambda: ground_of(tabs[1].evaluate("window.seen.at(-1)")) == "Snow")
    assert tabs[1].get_by_label("Prompt").input_value().startswith("Snow.")
    pressed = tabs[1].get_by_role("button", name="Snow", pressed=True)
    until(tabs[1], lambda: pressed.count() == 1)


@pytest.mark.parametrize("prompt, order, wanted", [
    # the camera looks nearly south, at stone
    ("Grass. The camera turns left from east, one turn in 9 seconds.", {"ground": "Snow"},
     "Snow. The camera turns left from east, one turn in 9 seconds."),
    ("Snow. The camera turns left from east, one turn in 9 seconds.", {"motion": "aside"},
     "Snow. The camera looks from south 90 degrees to the left and back, every 8 seconds."),
    ("a calm sea", {"motion": "linger"},
     "Stone. The camera turns right from south, lingering at compass points, one turn in 18 seconds."),
    ("a calm sea", {"ground": "Sand"}, "Sand. The camera turns right from south, one turn in 12 seconds.")])
@uses_browser
def test_in_a_browser_a_click_changes_the_prompt_in_what_it_says(prompt, order, wanted, tabs):
    made = tabs[0].evaluate("""([prompt, order]) => {
      const kept = shown;
      shown = {score: {heading: .47, ground: "Stone"}};
      settings.prompt = prompt;
      const made = caption(order);
      shown = kept;
      return made;
    }""", [prompt, order])
    assert made == wanted and re.fullmatch(world.GRAMMAR, made)
    buttons = tabs[0].locator("#motion button, #ground button").evaluate_all("all => all.map(b => b.value)")
    assert buttons == [*world.GROUNDS, *world.CAPTIONS]


@pytest.mark.speed
@uses_browser
def test_in_a_browser_12_frames_a_second_arrive_and_a_click_takes_hold_within_two_seconds(tabs):
    frames = watched(tabs[0], 3)
    assert len({frame["hash"] for frame in frames}) >= 12 * 3
    seen = {frame["frame"]: frame["at"] for frame in tabs[1].evaluate("window.seen")}
    apart = [abs(frame["at"] - seen[frame["frame"]]) for frame in frames if frame["frame"] in seen]
    assert np.median(apart) < 100  # ms
    clicked = tabs[0].evaluate("Date.now()")
    tabs[0].get_by_role("button", name="Sand").click()
    sand = [frame["at"] for frame in watched(tabs[0], 3) if ground_of(frame) == "Sand"]
    assert min(sand) < clicked + 2000


@uses_browser
def test_in_a_browser_longlive_holds_12_latents_and_slowfast_fills_up_again(tabs):
    for memory, held in {"longlive": [3, 0, 9], "slowfast": [3, 12, 6]}.items():
        tabs[0].get_by_label("Memory").select_option(memory)
        until(tabs[1], lambda: held_in(tabs[1]) == held)
        assert tabs[1].locator("#count").inner_text() == str(sum(held))


@uses_browser
def test_in_a_browser_a_hostile_prompt_is_inert_and_an_order_from_another_page_is_refused(
        tabs, browser, tmp_path):
    title = "document.title = 'x'"
    hostile = f'<script>{title}</script><img src=x onerror="{title}">'
    tabs[0].get_by_label("Prompt").fill(hostile)
    tabs[0].get_by_role("button", name="Use", exact=True).click()
    until(tabs[1], lambda: tabs[1].get_by_label("Prompt").input_value() == hostile)
    tabs[1].wait_for_timeout(1000)
    assert all(tab.title() == "Watch it remember" for tab in tabs)
    # another page of this machine
    folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stranger = browser.new_page()
        stranger.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        order = "{method: 'POST', mode: 'no-cors', body: '{\"seed\": 99}'}"
        with stranger.expect_response("**/steer") as answer:
            stranger.evaluate(f"url => fetch(url, {order}).then(String, String)", tabs[0].url + "steer")
        assert answer.value.status == 403
        tabs[0].wait_for_timeout(2000)
        stranger.close()
        server.shutdown()
    assert tabs[0].get_by_label("seed").input_value() == "0"


@uses_browser
def test_in_a_browser_pause_restart_and_a_narrow_page(tabs):
    tabs[0].get_by_role("button", name="Pause").press("Enter")  # by keyboard
    tabs[0].wait_for_timeout(1500)
    assert len(watched(tabs[1], 1)) <= 1
    first = tabs[1].locator("#sink img").first.get_attribute("src")
    tabs[0].get_by_label("seed").fill("5")
    tabs[0].get_by_role("button", name="Restart").click()
    until(tabs[1], lambda: float(tabs[1].locator("#made").inner_text()) < 3)
    # the other video's latents have its pictures, under the same numbers
    assert tabs[1].locator("#sink li:not(.dropped) img").first.get_attribute("src") != first
    assert tabs[1].get_by_label("seed").input_value() == "5"
    tabs[1].set_viewport_size({"width": 400, "height": 800})
    assert tabs[1].evaluate("document.documentElement.scrollWidth") == 400


# ---- what a run costs --------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, made inside; fake tensors have sizes and no content."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is None or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return made


def bf16_net(build, config):
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build(config)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@torch.no_grad()
def test_the_estimate_of_sampling_is_what_fake_tensors_of_the_full_size_hold(monkeypatch):
    """
    Within 5 %, in bf16, memory full, a chunk decoded beside the next; a prompt switch costs the new text
    alone.
    """
    attention = "scaled_dot_product_attention"
    monkeypatch.setattr(F, attention, lambda q, k, v, attn_mask=None: torch.empty_like(q))
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        dit = bf16_net(DiT, DiTConfig())
        roll = Rollout(dit, dit.text(torch.empty(1, 512, 4096)), PRESETS["slowfast"], (30, 52))
        for _ in generate(roll, [0], 8, Sampler(steps=1), (16, 60, 104)):
            made, live.peak = live.peak, live.now
        before = live.now
        text = dit.text(torch.empty(1, 512, 4096))
        live.peak, size = live.now, live.now - before
        roll.recache(text)
        assert size < 1e8 and live.peak < made + 1.1 * size
        for build, config, most in ((WanVAE, WanVAEConfig(), 2.8e9), (TAE, TAEConfig(), 1.4e9)):
            before = live.now
            vae, past = bf16_net(build, config), None
            live.peak = loaded = live.now
            for _ in range(2):
                pixels, past = vae.decode(torch.empty(1, 3, 16, 60, 104), past)
                del pixels
            assert live.peak - loaded < most
            need = bench.memory_estimate(Networks(dit, vae, None, Sampler(), "", 832, 480))
            assert need == pytest.approx(made + live.peak - before, rel=.05)
            del vae, past


class Flash(torch.autograd.Function):
    """Keeps for its backward what a fused kernel does: q, k, v, the output, a number a query and head."""
    @staticmethod
    def forward(ctx, q, k, v, mask):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q[..., 0].float(), mask)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


def fused_attention(q, k, v, mask=None):
    q, k, v = (z.transpose(1, 2).bfloat16() for z in (q, k, v))
    bias = None if mask is None else torch.empty(mask.shape, dtype=q.dtype)
    return Flash.apply(q, k, v, bias).transpose(1, 2).flatten(2)


def full_size_pass(part, nets, teacher):
    """The pass of a part that holds most, on clips of 832x480, behind a memory that is full."""
    features = torch.empty(1, 512, 4096)
    t = torch.empty(1)
    grid = (30, 52)
    net = nets[part]

    def frames(count):
        return torch.empty(1, count, 16, 60, 104)
    if part == "teacher":
        def inject(rng, context, x0, noise, t, p):
            return context, x0, noise, None
        bank = SimpleNamespace(inject=inject, pending=[])
        return erft.teacher_step(net, bank, 0, frames(21), frames(21), frames(21), t, features, grid)
    if part.startswith("init"):
        past, target = (21, 21) if part == "init_ar" else (18, 12)
        numbers = (torch.arange(n)[None] for n in (past, target))
        pack = causal.Pack(frames(past), next(numbers), frames(target), next(numbers))
        return causal.teacher_forcing_loss(net, net.text(features), pack, grid, 5., 0.).backward()
    # Algorithm 1 from a memory of seven chunks, one denoising step; the passes after it
    with torch.no_grad():
        roll = Rollout(net, net.text(features), PRESETS["slowfast"], grid)
        for _ in range(7 if part == "stage2" else 0):
            roll.memory.evict()
            kv = [torch.empty(2, 1, 4680, 12, 128, dtype=torch.bfloat16).unbind() for _ in net.blocks]
            entries = roll.entries(torch.arange(3)[None], frames(3), kv)
            roll.memory.push(entries, torch.ones(1) > 0)
            roll.chunk += 1
        trace = dmd.rollout(roll, [1.], 0, lambda *_: frames(3), 7, 7)
    trace.exits = trace.exits[-1:]  # of the last chunk, which sees as much as any
    dmd.student_step(net, teacher, nets["critic"], features, trace, t, frames(21), grid, 3., features)
    trace.entries = trace.exits = []  # a critic's rollout has none
    dmd.critic_step(nets["critic"], features, trace, t, frames(21), grid)


@pytest.mark.slow
@pytest.mark.parametrize("part", bench.TRAINING)
def test_the_estimate_of_training_is_what_fake_tensors_of_the_full_size_hold(part, monkeypatch):
    """Within 15 %, on one device and on eight; each holds an eighth of what is there before the pass."""
    monkeypatch.setattr(torch.Tensor, "item", lambda self: .5)
    monkeypatch.setattr(model, "attend", fused_attention)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        names = [part, "critic"] if part.startswith("stage") else [part]
        nets = torch.nn.ModuleDict({name: DiT(DiTConfig(recompute=True)) for name in names})
        teacher = DiT(DiTConfig()).requires_grad_(False) if len(names) == 2 else None
        average = copy.deepcopy(nets[part]).requires_grad_(False)
        every = optim.make_optimizers(train.Config(wan="random"), train.WAN[part], nets)
        for p in nets.parameters():
            p.grad = torch.empty_like(p)
        for optimizer in (*every["net"], *every["critic"]):
            optimizer.step()
        optim.update_ema({part: average}, nets, .99)
        states = live.now
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            full_size_pass(part, nets, teacher)
    for devices in (1, 8):
        measured = live.peak - states * (devices - 1) / devices
        need = bench.training_memory(part, nets[part], 1560, devices)
        assert need == pytest.approx(measured, rel=.15), (need / 1e9, measured / 1e9)
    assert need < 75e9  # 5 GB to spare


def test_the_formula_of_a_pass_is_what_a_pass_does():
    """
    Counted on the meta device; what the formula leaves out, once a latent or a patch, is less than 1 %. At
    full size 40.4 TFLOP a pass, from the hand count: 30 layers of 4680 tokens, 32760 keys.
    """
    assert bench.flops(DiTConfig(), 1560, 18) == pytest.approx(40.4e12, rel=.03)
    config = DiTConfig(512, 2986, 4, 8)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as count:
        held = torch.empty(1, 18 * 96, 4, 128)
        text = torch.empty(1, config.text_len, 4, 128)
        rope = rope_cos_sin(torch.arange(3), 8, 12, 128)
        x = torch.empty(1, 3, 16, 16, 24)
        memory = [LayerCache(held, held, 18 * 96)] * 8
        DiT(config)(x, torch.empty(1, 3), [(text, text)] * 8, rope, memory)
    assert bench.flops(config, 96, 18) == pytest.approx(count.get_total_flops(), rel=.01)


def test_bench_prints_parts_and_speed_at_any_size(sampled, tmp_path, capsys):
    words = ["--wan", "random:32x1", "--size", "32x32", "--steps", "2", "--vae", "tae", "--bench"]
    assert not len(sampled(tmp_path, *words)[0])
    told = capsys.readouterr().out
    bound, rate = (float(number) for number in re.findall(r"([\d.]+) (?:frames|TFLOP)/s", told))
    work = 3 * bench.flops(DiTConfig(32, 186, 1, 1), 4, 18)
    assert bound == pytest.approx(12 * rate * 1e12 / work, rel=.02)
    parts = re.findall(r"^([a-z ]+?) +(\d) +([\d.]+)$", told, re.M)
    assert [name for name, *_ in parts] == ["memory", "decoding", "to the host", "a pass"]
    ms = {name: int(times) * float(each) for name, times, each in parts}
    rows = re.findall(r"^(DiT only|TAE) +([\d.]+) +([\d.]+)%$", told, re.M)
    wholes = ms["memory"] + ms["a pass"], sum(ms.values())
    for (_, fps, share), whole in zip(rows, wholes, strict=True):
        assert float(fps) == pytest.approx(12_000 / whole, rel=.01)
        assert float(share) == pytest.approx(100 * float(fps) / bound, rel=.01, abs=.06)
    assert [name for name, *_ in rows] == ["DiT only", "TAE"]
    assert min(ms.values()) > 0
    assert dict((name, times) for name, times, _ in parts)["a pass"] == "2"


# ---- the code itself ---------------------------------------------------------------------------------------

# a file imports only files that stand before it
ORDER = """config records rope memory world video judge score flow model vae wan_vae tensors text weights
           bench erft dmd checkpoint optim histories data probe recipe report paper figures causal starts
           stages evaluate metrics sample live train""".split()
METHOD = {"rope", "memory", "model", "flow", "dmd", "erft"}
SCRIPTS = {"evaluate", "live", "metrics", "sample", "train"}
# PIL and imageio_ffmpeg are imageio's own
PACKAGES = {"torch", "einops", "safetensors", "imageio", "tqdm", "numpy", "PIL", "imageio_ffmpeg"}
# imported where they are used
OPTIONAL = {"psutil", "ftfy", "tokenizers", "transformers", "matplotlib"}
FILES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "test_all")


def imports_of(nodes):
    """Names of the files and packages that are imported, also by a call with the name in it."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__", "need"):
                names.add(node.args[0].value)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way_and_packages_are_the_six(name):
    tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
    everywhere = imports_of(ast.walk(tree))
    ours = everywhere & set(FILES)
    assert all(ORDER.index(other) < ORDER.index(name) for other in ours), ours
    assert not ours & SCRIPTS
    assert name not in METHOD or ours <= METHOD
    # packages
    assert imports_of(tree.body) - ours <= PACKAGES
    assert everywhere - ours <= PACKAGES | OPTIONAL


def tokens_by_line(source):
    """Line number -> its number of tokens; lines of docstrings, comments and nothing are left out."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER FSTRING_END".split()
    lines, inside = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        # from Python 3.12 on an f-string comes in parts: it is one token, as before
        if name not in silent and not inside:
            lines.append(token.start[0])
        inside += (name == "FSTRING_START") - (name == "FSTRING_END")
    return Counter(line for line in lines if line not in docstrings)


def branches(function):
    kinds = "If For While ExceptHandler IfExp comprehension BoolOp Assert".split()
    return 1 + sum(type(node).__name__ in kinds for node in ast.walk(function))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_to_be_read(name):
    """In nanoGPT, DiT or flux a line of code has 9 to 10 tokens; of 100 lines, 2 to 15 are comments."""
    source = (HERE / f"{name}.py").read_text("utf-8")
    tokens, lines = tokens_by_line(source), source.splitlines()
    assert tokens.total() / len(tokens) <= 13
    assert max(tokens.values()) <= 35, tokens.most_common(1)
    assert max(map(len, lines)) <= 110, max(lines, key=len)
    assert sum(line.strip().startswith("#") for line in lines) >= .04 * len(lines)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert all(branches(function) <= 20 for function in functions), max(functions, key=branches).name


# the whole is to come down to 38,000
@pytest.mark.parametrize("names, most", [
    (METHOD, 11_000),
    (set(FILES), 59_050),
], ids=["method", "all"])
def test_there_is_no_more_to_read(names, most):
    sources = [(HERE / f"{name}.py").read_text("utf-8") for name in names]
    assert sum(tokens_by_line(source).total() for source in sources) <= most


DEMOS = {  # something true that each demo says
    "rope": "12, 13, 14, 15, 16, 17] [18, 19, 20]",
    "memory": "infinity   at 60 s sees  6 latents, of the past [0, 238, 239]",
    "flow": "t = 0.9375 keeps  6.2% of x0",
    "model": "Wan2.1-T2V-1.3B: 1,418,996,800 parameters in 825 tensors",
    "dmd": "(teacher 2), KL 0.00",
    "erft": "its v is off v* by 0.500",
    "text": "-> features (1, 32, 64), zero from there on",
    "weights": "vae.safetensors            {'stage':",
    "vae": "497,664 numbers -> 10,752 -> 497,664 at ",
    "wan_vae": "latent 4 -> frames 13..16, 0.00000 from those decoded at once",
    "world": "Snow. The camera turns right from west, one turn in 20 seconds.",
    "judge": "5.1 s away, comes back as",
    "score": "after 20.8 s: {'returns': 14, 'right': 7, 'not kept': 7, 'kept but not used': 0}",
    "bench": "one pass of Wan over 3 latents of 832x480 beside 18 held: 40.4 TFLOP",
    "histories": "memory at chunk 30: [0, 1, 2, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72, 78, 84, 87, 88, 89]",
    "causal": "######...###",
    "paper": "| LTX-Video | bidirectional | 1.9B | 8.98 | 80.00 |",
}


@pytest.mark.parametrize("name", DEMOS)
def test_the_demo_of_a_file_shows_what_it_says(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert DEMOS[name] in said
    assert all(Path(picture).exists() for picture in re.findall(r"out/[a-z]+\.png", said))


@pytest.mark.parametrize("script", [data, evaluate, live, metrics, sample, train, weights])
def test_a_script_says_what_it_is_for_and_refuses_other_options(script, refusal, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_script(script, monkeypatch, "--help")
    assert script.__doc__.strip() in capsys.readouterr().out
    assert re.search("'-x' is unknown|unrecognized arguments: -x", refusal(script, "-x"))


def test_every_demo_is_run():
    sources = {name: (HERE / f"{name}.py").read_text("utf-8") for name in set(FILES) - SCRIPTS - {"data"}}
    assert {name for name, source in sources.items() if "\nif __name__" in source} == set(DEMOS)


# transformers takes seconds to import: one process does
uses_transformers = pytest.mark.xdist_group("transformers")


# ---- the small world: what is drawn follows the caption, and captions never tell the landmarks ------------

TURNING = Motion("turn", 1, 8)         # 2 columns a frame
LOOKING = Motion("aside", 1, 8)        # 1 column a frame
SET = np.array([0, 7, 14, 21, 4, 11, 29, 19])
LOOK = LOOKING.heading(64., np.arange(400))
UNTIL_100 = np.minimum(np.arange(400), 100)  # frame numbers of a camera that stops


def steady(frames, start=0.):
    return TURNING.heading(start, np.arange(frames))


def draw_video(headings, landmarks=SET, ground=0):
    """Frames at these headings; landmarks (8,), () for none, or, where they change over time, (f, 8)."""
    landmarks = np.broadcast_to(landmarks, (len(headings), np.shape(landmarks)[-1]))
    frames = np.empty((len(headings), 3, 32, 64), np.float32)
    for row in np.unique(landmarks, axis=0):
        same = (landmarks == row).all(1)
        frames[same] = render(panorama(ground, row), np.asarray(headings)[same])
    return frames


@pytest.mark.parametrize("motion, start, seconds, end", [
    (Motion("turn", 1, 8), 5, 2, 69),
    (Motion("turn", -1, 8), 5, 12, -379),
    (Motion("linger", 1, 32), 0, 8 * 64 / 176, 8),    # a quarter takes 8 s: 64 parts for its first 8 columns,
    (Motion("linger", 1, 32), 0, 8 * 112 / 176, 56),  # 48 for the 48 in the middle, 64 for the last 8
    (Motion("linger", -1, 32), 32, 4, 0),
    (Motion("aside", 1, 16), 5, 8, 69),
    (Motion("aside", -1, 16), 5, 20, -27),            # half way out for the second time
])
def test_the_camera_moves_as_its_motion_says(motion, start, seconds, end):
    assert motion.heading(start, 16 * seconds) == pytest.approx(end)


@pytest.mark.parametrize("start, motion, words", [
    (64., Motion("turn", 1, 8), "turns right from east, one turn in 8 seconds."),
    (0., Motion("linger", -1, 44),
     "turns left from north, lingering at compass points, one turn in 44 seconds."),
    (64., Motion("aside", -1, 9), "looks from east 90 degrees to the left and back, every 9 seconds."),
])
def test_a_caption_tells_ground_and_motion_alone_in_31_words_and_the_grammar_knows_it(start, motion, words):
    caption = World(3, tuple(SET), start, motion).caption
    assert caption == f"Stone. The camera {words}"
    assert words_to_ids([caption])[0][0, -1] == 0  # nothing is cut
    assert re.fullmatch(world.GRAMMAR, caption)
    for other in (caption + " Slowly.", caption.lower(), caption[:-1], caption.replace("Stone", "Lava"),
                  caption.replace("right", "up").replace("left", "down"), ""):
        assert not re.fullmatch(world.GRAMMAR, other)


def test_a_frame_shows_the_landmark_ahead_below_the_sky_and_hills_of_every_world():
    frames = draw_video([112, 104])
    roof, wall = (world.COLOUR_RGB[colour][:, None] for colour in world.PAIRS[SET[3]])  # sector 3
    assert np.allclose(frames[0, :, 12, 31:33], roof, atol=.01)
    assert np.allclose(frames[0, :, 20, 24:28], wall, atol=.01)
    assert frames[0, :, [8, 23], 32].max() < .3  # its outline, its door
    assert np.array_equal(frames[0, ..., :-8], frames[1, ..., 8:])
    # whatever stands there, the compass is uncovered: one hue round the sky, three round the hills
    compass = draw_video(np.arange(0, 256, 64), ())[..., :world.TOP, :]
    for ground in range(4):
        seen = draw_video(np.arange(0, 256, 64), (SET + ground) % 30, ground)
        assert np.array_equal(seen[..., :world.TOP, :], compass)
    for rows in (compass[..., :4, :], compass[..., 4:8, :]):
        assert min(np.abs(a - b).mean() for a, b in itertools.combinations(rows, 2)) > .1


def test_motions_are_mixed_evenly_and_looks_aside_go_from_one_compass_point_to_the_next():
    worlds = [make_world(WorldSpec(seed)) for seed in range(4000)]
    for kind, ends in {"turn": (8, 44), "linger": (18, 44), "aside": (4, 12)}.items():
        periods = [w.motion.seconds for w in worlds if w.motion.kind == kind]
        assert len(periods) / 4000 == pytest.approx(1 / 3, abs=.03)
        assert (min(periods), max(periods)) == ends
    for w in worlds:
        if w.motion.kind == "aside":
            path = w.motion.heading(w.start, np.arange(16 * w.motion.seconds))
            ends = [path[0], path[8 * w.motion.seconds]]  # at the start, and where it turns
            assert set(np.mod(ends, 64)) == {0}
            assert abs(ends[1] - ends[0]) == 64
            assert sorted(ends) == [path.min(), path.max()]
            assert world.POINTS[int(ends[0] / 64)] in w.caption


def test_text_features_are_the_encoders(raw, tmp_path, capsys):
    """The official code pads prompts to 512 tokens; ours encodes each as long as it is."""
    prompts = ["a calm  sea", "storm", "a " * 600]
    features = wan_text(raw, tmp_path, prompts, CPU, dim=48)
    assert "601 tokens, cut after 512" in capsys.readouterr().err
    encoder = TextEncoder(TextConfig(8, 48, 48, 64, 3, 2)).bfloat16()
    encoder = load_state_dict_strict(encoder, torch.load(raw / T5, weights_only=True))
    ids = torch.zeros(3, 512, dtype=torch.long)
    known = [3, 4, 5, 1], [6, 1], [3] * 511 + [1]
    for row, words in zip(ids, known):
        row[:len(words)] = torch.tensor(words)
    want = encoder(ids, (ids > 0).long()).float()
    assert features(["storm"]).shape == (1, 2, 48)
    close(features(prompts).float(), want, .02 * want.abs().max())


def test_text_features_are_kept_in_files_and_made_again_where_those_are_damaged(
        raw, tmp_path, monkeypatch, capsys):
    features = wan_text(raw, tmp_path, ["storm"], CPU, dim=48)
    before = features(["storm"])
    # known now: the encoder is not opened again, until its file is another
    with monkeypatch.context() as patch:
        patch.setattr(weights, "TextEncoder", None)
        wan_text(raw, tmp_path, ["storm"], CPU)
    os.utime(raw / T5, ns=(1, 1))  # a copy on another node
    features(["storm"])
    assert len([*tmp_path.glob("*.safetensors")]) == 1
    encoder = torch.load(raw / T5, weights_only=True)
    torch.save(encoder | {"norm.weight": 2 * encoder["norm.weight"]}, raw / T5)
    again = features(["storm"])
    close(again, 2 * before, .02)
    assert len([*tmp_path.glob("*.safetensors")]) == 2
    # damaged, or something else
    for harm in (flip_bit, cut_short, lambda file: save_file({"features": torch.zeros(3, 4)}, file)):
        for file in tmp_path.glob("*.safetensors"):
            harm(file)
        assert torch.equal(features(["storm"]), again)
        assert re.fullmatch("warning: .* it is made again.*\n", capsys.readouterr().err)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:99])


# ---- the judge: what is drawn is read back, and what is damaged is told ------------------------------------

def with_noise(frames, db=26):
    noise = np.random.default_rng(7).standard_normal(frames.shape, np.float32)
    return frames + np.float32(10 ** (-db / 20)) * noise


def tinted(frames):
    """Generated frames drift like this: warmer, darker, and smooth patches of wrong colour."""
    patches = np.random.default_rng(9).normal(0, .02, (len(frames), 3, 4, 8))
    patches = patches.repeat(8, 2).repeat(8, 3)
    warmer = np.array([.05, 0, -.02])[:, None, None]
    return .9 * frames + (warmer + patches).astype(np.float32)


def blurred(frames):
    """Each pixel the mean of 3 x 3."""
    return F.avg_pool2d(torch.from_numpy(frames), 3, 1, 1, count_include_pad=False).numpy()


def judge_errors(damage, frames=160):
    """
    12 held-out clips, damaged (an autoencoder is a damage too), and read.
    returns  share of landmarks wholly in view that are right; heading errors; share of right grounds; PSNR
    """
    right = []
    wrong_by = []
    grounds = []
    psnr = []
    for seed in range(world.HELD_OUT, world.HELD_OUT + 12):
        w = make_world(WorldSpec(seed))
        heading = w.motion.heading(w.start, np.arange(frames))
        reading = read_video(damage(clip(WorldSpec(seed), 0, frames)))
        # at the very edge a rounded heading may differ
        whole = np.abs(offsets(heading)) <= world.WHOLE - .5
        right += (reading.landmark == np.array(w.landmarks))[whole].tolist()
        wrong_by += world.apart(reading.path - heading).tolist()
        grounds += (reading.ground == w.ground).tolist()
        psnr += reading.psnr.tolist()
    return np.mean(right), np.array(wrong_by), np.mean(grounds), np.mean(psnr)


@pytest.mark.parametrize("damage, validity", [
    (lambda frames: frames, 50),
    (tinted, 23),
    (lambda frames: with_noise(blurred(frames)), 18),
], ids=["none", "tinted", "blurred, 26 dB"])
def test_with_the_damage_of_models_99_percent_is_read_right_and_headings_within_a_column(damage, validity):
    right, wrong_by, ground, psnr = judge_errors(damage)
    assert right >= .99
    assert wrong_by.max() <= .5
    assert ground == 1 and psnr >= validity


def test_a_landmark_is_read_while_it_is_wholly_in_view_softened_edges_included():
    offset = np.arange(-48, 48.)  # of sector 3, from one side of the view to the other
    frames = draw_video(112 - offset)
    read = read_video(frames).landmark[:, 3]
    assert np.array_equal(read, np.where(np.abs(offset) <= 17, SET[3], -1))
    # 17 columns to the right the view ends with the softened edge
    without = draw_video(112 - offset, ())
    bare = np.isclose(frames[..., -1], without[..., -1]).all((1, 2))
    assert bare[offset == 16] and not bare[offset == 17]


def test_a_video_of_two_grounds_is_read_in_the_order_of_time_and_from_bytes_too():
    grounds = np.arange(200) // 7 % 2
    frames = draw_video(steady(200))
    frames[grounds == 1] = draw_video(steady(200), ground=3)[grounds == 1]
    reading = read_video((frames * 255).round().astype(np.uint8))
    assert np.array_equal(reading.ground, 3 * grounds)
    assert np.abs(reading.path - steady(200)).max() <= 1 / 4


LEFT_HALF = np.arange(2048)[:, None, None] % 256 < 128


@pytest.mark.parametrize("mix", [  # of two landmarks' panoramas a and b, and of none
    lambda a, b, none: np.where(LEFT_HALF, a, b),
    lambda a, b, none: (a + b) / 2,
    lambda a, b, none: a.mean(-1, keepdims=True).repeat(3, -1),
    lambda a, b, none: none,
], ids=["two halves", "morph", "grey", "nothing"])
def test_what_is_no_landmark_is_not_readable(mix):
    rng = np.random.default_rng(3)
    read = []
    for ground, a in np.ndindex(3, 30):
        drawings = judge.landmark_drawings(ground)
        # of another roof, of another wall, or of both
        b = rng.choice([b for b in range(30) if b != a])
        seen = panorama(ground, ())
        rows = np.s_[:, world.TOP:world.FOOT]
        seen[rows] = mix(drawings[a], drawings[b], seen)[rows]
        reading = read_video(render(seen, np.arange(8) * 32 + rng.uniform(0, 32)))
        read.append((reading.landmark >= 0).any())
    assert np.mean(read) <= .01


def test_validity_is_the_size_of_the_damage_wherever_it_is():
    for db in (30, 22):
        frames = with_noise(clip(WorldSpec(4), 0, 40), db)
        assert np.abs(read_video(frames).psnr - db).max() < .5
    for first, rows, columns in ((0, 3, 64), (22, 4, 48), (29, 3, 64)):
        frames = draw_video([112] * 8)
        frames[:, :, first:first + rows, :columns] += .1
        error = .01 * rows * columns / (32 * 64)
        assert read_video(frames).psnr == pytest.approx(-10 * np.log10(error), abs=.5)
    nothing = read_video(np.random.default_rng(0).random((8, 3, 32, 64)))
    assert nothing.psnr.max() < 12
    assert (nothing.landmark == -1).all()


# ---- reappearances: what left and came back, against what it was -------------------------------------------

def returns_of(headings, motion=TURNING, landmarks=SET):
    return reappearances(read_video(draw_video(headings, landmarks)), motion)


@pytest.mark.parametrize("changed, right", [  # sector 4 is straight ahead at frames 72, 200, 328
    (slice(0), [1, 1, 1]),          # nothing
    (slice(120, None), [0, 1, 1]),  # while out of view
    (slice(120, 240), [0, 0, 1]),   # and back
    (slice(200, None), [1, 1, 1]),  # while in view: not the absence's fault
    (slice(200, 240), [1, 0, 1]),
])
def test_a_landmark_is_wrong_at_its_return_exactly_if_it_changed_out_of_view(changed, right):
    landmarks = np.tile(SET, (490, 1))
    landmarks[changed, 4] = 22
    found = returns_of(steady(490), landmarks=landmarks)
    assert len(found) == 3 * 8
    assert [e.right for e in found if e.sector == 4] == right
    assert all(e.right for e in found if e.sector != 4)


def test_what_comes_back_unreadable_is_wrong_and_the_next_return_is_held_against_what_was_read_before():
    frames = draw_video(steady(400))
    other = draw_video(steady(400), np.roll(SET, 1))
    frames[128:256] = (frames[128:256] + other[128:256]) / 2
    found = [e for e in reappearances(read_video(frames), TURNING) if e.sector == 4]
    assert [e.before for e in found] == [SET[4]] * 2
    assert [(e.shown, e.right) for e in found] == [(-1, False), (SET[4], True)]


@pytest.mark.parametrize("kind", ["turn", "linger", "aside"])
def test_in_drawn_worlds_all_returns_are_right(kind):
    for seed in range(world.HELD_OUT, world.HELD_OUT + 3):
        w = make_world(WorldSpec(seed, kind))
        reading = read_video(with_noise(clip(WorldSpec(seed, kind), 0, 800)))
        found = reappearances(reading, w.motion)
        assert all(e.right and e.shown == w.landmarks[e.sector] for e in found)
        assert found or w.motion.seconds > 35 or kind == "aside"
        assert turning_rate(reading.path, w.motion) == pytest.approx(1, abs=.02)


@pytest.mark.parametrize("headings, motion, missed", [
    (steady(600) * .9, TURNING, False),
    (steady(600) * .6, TURNING, True),
    (steady(400)[UNTIL_100], TURNING, True),
    (LOOK[np.minimum(np.arange(400), 64)], LOOKING, True),
], ids=["a tenth slower", "far too slow", "stops", "does not look back"])
def test_a_return_that_the_motion_makes_due_and_that_does_not_come_is_wrong(headings, motion, missed):
    found = returns_of(headings, motion)
    assert found
    assert all(e.shown == (-1 if missed else e.before) for e in found)


def test_what_does_not_come_back_has_the_absence_of_the_captions_motion():
    headings = steady(400)[UNTIL_100]  # stops after 200 of 256 columns
    found = returns_of(headings)
    assert {e.sector for e in found} == {7, 0, 1, 2, 3, 4}  # those that were read and had left
    assert all(abs(e.absence - 164 / 32) <= 2 / 16 for e in found)
    # Sector 7 leaves at frame 16, is due 98 frames later, and missed at frame 155: 16 + 1.25 * 98 + 16.
    assert [len(returns_of(headings[:frames])) for frames in (155, 156)] == [0, 1]
    looks = {e.sector: e.absence for e in reversed(returns_of(LOOK, LOOKING))}  # each sector's first absence
    stays = returns_of(LOOK[np.minimum(np.arange(400), 64)], LOOKING)
    assert all(abs(e.absence - looks[e.sector]) < .2 for e in stays)


@pytest.mark.parametrize("start, sinks", [(46, {1}), (48, {1, 2})])
def test_landmarks_wholly_in_view_in_the_first_nine_frames_are_in_the_sink(start, sinks):
    # The ninth frame looks at start + 16; sector 1 is wholly in view up to 65, sector 2 from 63 on.
    found = returns_of(steady(300, start))
    assert {e.sector for e in found if e.in_sink} == sinks
    assert {e.sector for e in found} == set(range(8))


def test_up_to_four_misread_headings_in_a_row_are_mended_and_turning_points_stay():
    heading = LOOK + np.random.default_rng(6).normal(0, .7, 400)
    for frame in range(20, 390, 40):
        heading[frame:frame + 4] += np.random.default_rng(frame).uniform(40, 216)
    assert np.abs(judge.track(heading % 256) - LOOK).max() < 6
    assert np.array_equal(judge.track(LOOK % 256), LOOK)


@pytest.mark.parametrize("path, motion, rate", [
    (steady(200) * .5 + 9, TURNING, .5),
    (9 - steady(200), TURNING, -1),
    (steady(200) * 0, TURNING, 0),
    (LOOK, LOOKING, 1),
    (80 - LOOK, LOOKING, -1),
    (steady(400) / 2, LOOKING, 400 * 32 / 16 / 2 / 64),
])
def test_turning_rate_tells_half_speed_the_wrong_way_and_a_stop(path, motion, rate):
    assert turning_rate(path, motion) == pytest.approx(rate, abs=.02)


def test_a_map_is_what_each_sector_shows_most_and_chance_is_how_often_two_maps_agree():
    shown = [[3, -1], [5, -1], [5, -1], [-1, -1]]  # in four frames, of two sectors
    assert landmark_map(np.array(shown)) == [5, -1]
    rng = np.random.default_rng(8)
    assert chance(rng.integers(30, size=(300, 8))) == pytest.approx(1 / 30, abs=.002)
    assert chance([[1, -1], [1, -1], [2, -1]]) == pytest.approx(1 / 3)
    assert np.isnan(chance([[1, 2]]))


def test_a_landmark_is_in_memory_if_a_latent_that_is_held_when_its_first_pixel_returns_shows_it_wholly():
    reading = read_video(draw_video(steady(300)))
    found = reappearances(reading, TURNING)
    # Sector 4 stands at 144, 2 columns a frame: gone beyond 190, a pixel from 354 on.
    event = next(e for e in found if e.sector == 4)
    assert (event.left, event.returned, event.absence) == (96, 177, 81 / 16)
    for event in found:  # sectors whose first and last frame fall anywhere in a latent
        whole = world.apart(32 * event.sector + 16 - steady(300)) <= 17
        of_latent = [whole[max(0, 4 * j - 3):4 * j + 1] for j in range(76)]
        shows = np.flatnonzero([frames.any() for frames in of_latent]).tolist()
        assert [j for j in range(76) if is_in_memory(event, reading, [j])] == shows
        assert is_in_memory(event, reading, [0, 1, shows[0]])
        assert not is_in_memory(event, reading, [])
    chunks = [video.chunks_of(frame + 1) - 1 for frame in range(33)]  # that draw the frames
    assert chunks == [0] * 9 + [1] * 12 + [2] * 12


# ---- the miniature's numbers: what an evaluation tells is what the judge read ------------------------------

FIRST = dict(zip(report.ROW, ("student", "slowfast", "bounded", "text", None, None)))


def video_row(returns, seed=0, motion="turn", row=FIRST, **measured):
    """A video of evaluate.jsonl; returns: (absence, right, held) of each landmark that was due back."""
    events = [{"absence": absence, "right": right, "held": held, "follows": right, "sector": 0, "shown": 0,
               "left": 100} for absence, right, held in returns]
    world = {"seed": seed, "motion": motion, "landmarks": [seed] * 8}
    plain = {"validity": 27., "last": 27., "drift": 0., "steady": 100, "starts": 100, "jumps": 0.,
             "returns": events}
    return row | world | plain | measured


def targets_of(videos):
    return {f"{row['videos']}: {row['target']}": row for row in report.targets(videos, FIRST)}


def test_recall_counts_returns_within_a_tenth_of_the_absence_or_all_that_fast_memory_does_not_bridge():
    videos = [video_row([(6., True, True), (6.7, True, True), (1.9, True, True)]),
              video_row([(5.5, False, True), (6.5, True, False), (2., False, True)])]
    videos[1] |= {"training": 2, "seed": 7}

    def counted(*what):
        found = report.counts(videos, *what)
        assert found[:, 2:].tolist() == [[0, 0], [2, 7]]  # training, world
        return found[:, :2].tolist()
    assert counted("right", 6) == [[100, 1], [100, 2]]
    assert counted("held", 6) == [[100, 1], [100, 2]]
    assert counted("right") == [[200, 2], [100, 3]]
    videos[0]["drift"] = math.nan  # of a short video
    assert counted("drift") == [[0, 0], [0, 1]]


def test_whatever_the_motions_bring_back_falls_into_an_absence():
    absences = np.array(report.ABSENCES)
    assert (absences[1:] * .9 <= absences[:-1] * 1.1).all()
    assert {6, 15} <= set(absences)
    slowest = WorldSpec(world.HELD_OUT, "linger", 44)
    ideal = read_video(clip(slowest, 0, 1005))
    longest = max(event.absence for event in reappearances(ideal, make_world(slowest).motion))
    assert absences[-1] * .9 < longest < absences[-1] * 1.1


def test_intervals_are_over_worlds_and_over_trainings():
    """Two kinds of video in equal number: some draws have only the one, some only the other."""
    four = np.array([(1, 1 + i % 2, 0, i) for i in range(4)])
    middle, low, high = report.estimate(four)
    assert middle == pytest.approx(4 / 6)
    assert low == .5 and high == 1
    assert np.isnan(report.estimate(np.zeros((1, 4)))).all()
    normal = np.random.default_rng(0).standard_normal(400)
    one = np.stack([normal, np.ones(400), np.zeros(400), np.arange(400)], 1)
    _, low, high = report.estimate(one)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=.1)
    # the same worlds again make nothing surer
    _, *ends = report.estimate(np.concatenate([one, one + [0, 0, 1, 0]]))
    assert np.allclose(ends, [low, high], atol=.02)
    # a quarter of the draws have the one training only, a quarter the other
    middle, low, high = report.estimate(np.concatenate([one, one + [3, 0, 1, 0]]))
    assert middle == pytest.approx(normal.mean() + 1.5)
    assert np.allclose([low, high], [normal.mean(), normal.mean() + 3], atol=.15)


@pytest.mark.parametrize("gain, spread", [(.05, 0), (-.05, 0), (0, .1)])
def test_rows_are_compared_in_the_worlds_and_trainings_that_both_have(gain, spread):
    """Videos differ far more than the two rows do, and stand in any order."""
    rng = np.random.default_rng(0)
    hard = rng.random(64)
    theirs = [video_row([], i, last=x) for i, x in enumerate(hard)]
    other = hard + gain + spread * rng.standard_normal(64)
    ours = [video_row([], i, last=x) for i, x in enumerate(other)]
    strangers = [video_row([], 100 + i, last=9.) for i in range(64)]
    strangers += [video | {"training": 1, "last": 9.} for video in theirs]
    found, low, high = report.difference(ours, strangers + theirs[::-1], "last")
    assert found == pytest.approx((other - hard).mean())
    assert (low > 0, high < 0) == (gain > 0, gain < 0)
    # of two trainings both differences
    ours += [video | {"training": 1} for video in ours]
    found, *_ = report.difference(ours, strangers + theirs, "last")
    assert found == pytest.approx((other - (hard + 9) / 2).mean())
    for some, others, what in (
            (ours[:64], strangers, "last"),
            (ours[:7], theirs, "last"),
            (ours, theirs, "right")):
        assert np.isnan(report.difference(some, others, what)).all()


def test_half_way_is_where_returns_stop_being_right_more_often_than_half_way_to_chance():
    """Right up to 6 s, of 8.7 s a third; 12 videos, so that chance is 0."""
    videos = []
    for i in range(12):
        late = [(8.7, i < 4, True), (12.5, False, True)]
        videos.append(video_row([(5., True, True), (6., True, True), *late], i))
    assert report.half_way(videos) == 6
    assert report.half_way(videos, "held") == math.inf
    # one that comes back by luck after that is not reach; half and more are
    videos[0]["returns"][3]["right"] = True
    assert report.half_way(videos) == 6
    for row in videos[:8]:
        row["returns"][2]["right"] = True
    assert report.half_way(videos) == 8.7
    # chance of 1 makes all returns luck; nine returns tell nothing
    assert np.isnan(report.half_way([row | {"landmarks": [1] * 8} for row in videos]))
    assert np.isnan(report.half_way(videos[:3]))
    # another training draws the same worlds alike
    again = [row | {"training": 1} for row in videos]
    assert report.luck(videos + again) == report.luck(videos) == 0


@pytest.mark.parametrize("right, met", [(8_999, "no"), (9_000, "yes")])
def test_a_target_is_met_by_the_number_and_not_by_its_rounding(right, met):
    """8,999 of 10,000 returns are 89.99 %, which the table shows as 90.0."""
    table = report.targets([video_row([(6., i < right, True) for i in range(10_000)])], FIRST)
    text = report.markdown({"Targets": table})
    assert f"| text | recall after 6 s, % | at least 90 | 90.0 | {met} |" in text
    assert "| text | recall after 15 s, % | at least 80 | - | no data |" in text
    assert "| real | recall after 6 s, % | at least 90 | - | no data |" in text


def test_turns_and_looks_aside_are_held_to_their_rate_apart_and_validity_and_jumps_to_what_they_were():
    kinds = [("turn", 100), ("linger", 100), ("aside", 0), ("aside", 100)]
    real, videos = FIRST | {"worlds": "real"}, []
    for i, (kind, rate) in enumerate(kinds):
        videos.append(video_row([], i, kind, real, steady=rate, jumps=1., last=27.39))
    table = targets_of(videos)
    wanted = {"steady turns, %": (100, "yes"), "steady looks aside, %": (50, "no"),
              "jumps a minute": (1, "yes"), "last 5 s, dB": (27.39, "no")}
    for name, (number, met) in wanted.items():
        row = table[f"real: {name}"]
        assert (row["found"], row["met"]) == (pytest.approx(number), met)


@pytest.mark.parametrize("theirs, met", [(0, "yes"), (6, "no"), (8, "no")])
def test_the_student_must_be_better_than_its_start_by_intervals_that_do_not_touch(theirs, met):
    videos = []
    for weights, right in (("student", 8), ("stage1", theirs)):
        row = FIRST | {"weights": weights}
        videos += [video_row([(6., i < right, True)] * 9, i, row=row) for i in range(9)]
    table = targets_of(videos)
    assert table["text: recall, gap to stage1's interval"]["met"] == met
    assert table["text: recall, gap to init_ar's interval"]["met"] == "no data"
    assert table["text: steady, gap to stage1's interval"]["met"] == "no"  # they touch


def test_returns_that_follow_exchanged_memories_are_those_of_the_exchange():
    swapped = FIRST | {"worlds": "swapped", "memory": "uniform2"}
    videos = [video_row([(5., i < 9, True)], i, row=swapped) for i in range(10)]
    videos.append(video_row([(5., True, True)]))
    row = targets_of(videos)["real: follow exchanged memories, %"]
    assert (row["found"], row["met"]) == (90, "yes")


def test_lines_give_back_what_was_written_and_bad_ones_are_named_and_made_again(tmp_path, capsys):
    videos = [video_row([(6., True, False)], i, drift=math.inf) for i in range(3)]
    lines = [{"key": key, "videos": videos, "sha256": report.hash_videos(videos)} for key in "abc"]
    made = dict.fromkeys("abc", videos)
    path = tmp_path / "a.jsonl"
    assert report.read_videos(path) == {}
    for line in lines:
        records.append_line(path, line)
    assert report.read_videos(path) == made
    first, second, third = path.read_text().splitlines()
    # others are no such line; in the last two a digit or a word is not what was written
    others = ["[1, 2]", "{}", '{"key": "b", "videos": [3]}', '{"key": "b", "videos": [{}]}', "[" * 100_000,
              second.replace("6.0", "7.0"), second.replace('"returns"', '"Returns"')]
    for line in (second[:-9], *others):
        path.write_text("\n".join([first, line, third, ""]))
        assert list(report.read_videos(path)) == ["a", "c"]
        told = capsys.readouterr().err
        assert re.fullmatch("warning: passed over: .*a.jsonl, (line 2|key b): .*\n", told)
    # a last line that was cut short
    path.write_text("\n".join([first, third, second])[:-9])
    records.append_line(path, lines[1])
    assert report.read_videos(path) == made


def test_a_file_of_lines_without_end_is_refused_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    os.truncate(path, 2 << 30)
    with pytest.raises(BadInput, match="a.jsonl is larger than 1 GB: move it away"):
        records.read_lines(path, {})


def test_tables_hold_numbers_a_row_what_was_asked_for_and_the_kind_of_motion():
    returns = FIRST | {"worlds": "returns"}
    videos = [video_row([(6., kind == "turn", True), (22., False, True)], i, kind, returns)
              for kind in ("turn", "aside") for i in range(12)]
    others = FIRST | {"tau": .9, "steps": 2}
    videos += [video_row([(6., False, True)], i, row=others, drift=1.25) for i in range(9)]
    tables = report.all_tables(videos, FIRST)
    whole, turn, linger, aside, other, *_ = tables["All rows"]
    assert [row["motion"] for row in (whole, turn, linger, aside)] == ["all", *report.MOTIONS]
    assert turn["detail, %"].tolist() == [100] * 3
    assert turn["half-way, s"] == 6
    assert whole["detail, %"][0] == 50
    assert aside["detail, %"][0] == 0
    assert np.isnan(aside["half-way, s"])
    assert turn["ceiling's"] == math.inf
    assert whole["recall, %"][0] == 25
    assert whole["returns"] == 48
    assert linger["videos"] == 0
    assert (other["memory"], other["drift"][0]) == ("slowfast, tau 0.9, 2 steps", 1.25)
    text = report.markdown(tables)
    assert "| student | slowfast | bounded | returns | turn | 50.0 [50.0, 50.0] | 24 | 100.0 [" in text
    assert "| student | slowfast | bounded | returns | linger | - | 0 | - |" in text
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(parts) == 3
    assert all(len({line.count("|") for line in lines}) == 1 for lines in parts)


# ---- the paper's tables beside ours ------------------------------------------------------------------------

def test_every_system_of_the_paper_stands_in_its_row_and_ours_under_them_in_its_columns():
    by_seconds = [f"{name}_{t}" for name in ("dino", "clip_f", "clip_t") for t in metrics.SECONDS]
    scores = dict.fromkeys([*by_seconds, "background", "subject"], 12.34)
    tables = paper.beside(scores)
    systems = {row["system"] for table in tables.values() for row in table}
    assert systems >= {"LTX-Video", "Wan2.1", "SkyReels-V2", "MAGI-1", "CausVid", "NOVA", "Pyramid Flow",
                       "LongLive", "Self Forcing, chunk-wise", "Self Forcing++", "Rolling Forcing",
                       "Infinity-RoPE", "FramePack-F1"}
    first, second, third = (table[-1] for table in tables.values())
    assert {first["dino_60"], first["clip_t_10"], first["subject"], third["background"]} == {12.34}
    assert second["60s_subject"] == 12.34
    assert second["5s_subject"] is third["total"] is None
    longlive = tables["table1"][1]
    assert (longlive["dino_60"], longlive["context_length"]) == (86.26, "3.0 s")
    short = paper.beside(scores | {"dino_10": math.nan, "dino_60": math.nan})["table2"][-1]
    assert short["5s_subject"] == 12.34 and short["60s_subject"] is None
    assert all(len({tuple(row) for row in table}) == 1 for table in tables.values())


@pytest.mark.parametrize("ours, theirs, word", [
    (9, 0, "agrees"),
    (0, 9, "does not"),
    (5, 5, "not significant"),
    (9, None, None)])
def test_an_ordering_agrees_with_the_papers_or_does_not_or_is_not_significant(ours, theirs, word):
    """In the paper LongLive is less consistent than its method, of higher quality over 60 s."""
    videos = []
    for memory, right in (("slowfast", ours), ("longlive", theirs)):
        for i in range(9 if right is not None else 0):
            event = 6., (5 * i + right) % 9 < right, True
            noise = 99 * math.sin(i * right) if ours == theirs else 0
            row = FIRST | {"memory": memory, "worlds": "returns"}
            videos.append(video_row([event], i, row=row, last=right + noise))
    if ours == theirs:
        videos[9]["last"] = -99
    table = paper.orderings(videos, FIRST)
    found = {(row["against"], row["score"]): row["the ordering"] for row in table}
    other = {"agrees": "does not", "does not": "agrees"}.get(word, word)
    words = {"dino_60": word, "subject": word, "60s_subject": word, "60s_quality": other}
    assert found == {("LongLive", name): verdict for name, verdict in words.items() if word}
    assert not word or (table[0]["its own there"], table[0]["theirs there"]) == (87.89, 86.26)


# ---- the figures -------------------------------------------------------------------------------------------

def test_figures_have_five_policies_at_most_in_a_plot_and_each_motion_its_frontier(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    videos = []
    for memory, kind in itertools.product([*PRESETS, "uniform3", "uniform6"], report.MOTIONS):
        row = FIRST | {"memory": memory, "worlds": "returns"}
        for i in range(12):
            returns = [(6., i > 3, 1), (22., i > 6, 1)]
            videos.append(video_row(returns, i, kind, row))
    figures.draw_forgetting(figure, videos, FIRST)
    shown = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert all(len(names) <= 5 and names[0] == "slowfast" for names in shown)
    assert set(itertools.chain(*shown)) == set(PRESETS)
    figure.clear()
    figures.draw_frontier(figure, videos, FIRST)
    shown = [sorted(line.get_label() for line in axes.lines) for axes in figure.axes[:3]]
    assert shown == [["slowfast", "uniform1", "uniform2", "uniform3", "uniform6"]] * 3
    hour = video_row([], row=FIRST | {"worlds": "hour"}, **HOUR)
    figures.draw_all([*videos, hour], FIRST, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"forgetting.png", "frontier.png", "drifting.png"}


READ = {}  # what the judge has read of a video, by its content


def read_once(frames):
    key = hashlib.sha256(frames.tobytes()).digest()
    if key not in READ:
        READ[key] = read_video(frames)
    return READ[key]


def test_the_strip_is_of_a_landmark_that_one_policy_brings_back_and_the_other_does_not():
    def real(memory, seed, right, motion="turn", left=100, shown=3):
        event = {"sector": 2, "left": left, "absence": 7., "shown": shown, "right": right}
        row = FIRST | {"memory": memory, "worlds": "real"}
        return video_row([], seed, motion, row) | {"returns": [event]}

    # only the last will do
    others = [{"shown": -1}, {"motion": "aside"}, {"left": 165}, {}]
    videos = [real(memory, 9, True) for memory in ("slowfast", "longlive")]
    videos += [real("slowfast", i, True, **other) for i, other in enumerate(others)]
    videos += [real("longlive", i, False, **other) for i, other in enumerate(others)]
    both = evaluate.forgotten(videos, FIRST)
    assert [video["seed"] for video, _ in both] == [3, 3]
    assert [video["memory"] for video, _ in both] == ["slowfast", "longlive"]
    assert evaluate.forgotten(videos[:-1], FIRST) == []


def test_the_strip_goes_from_the_middle_of_the_view_to_the_middle_of_the_view():
    spec = WorldSpec(world.HELD_OUT, "turn", 9)
    drawn = make_world(spec)
    found = reappearances(read_video(clip(spec, 0, 400)), drawn.motion)
    event = next(event for event in found if not event.in_sink)
    moments = evaluate.moments(vars(event))
    far = np.abs(offsets(drawn.motion.heading(drawn.start, moments))[:, event.sector])
    assert len(moments) == 7
    assert far[[0, 6]].max() < 3
    assert far[3] > 60


def test_a_frame_of_the_strip_has_a_border_that_tells_right_from_wrong(tmp_path, monkeypatch):
    frames = np.empty((3, 3, 32, 64), np.uint8)
    frames[:] = np.reshape([5, 7, 9], (3, 1, 1, 1))
    path = tmp_path / "strip.png"
    figures.draw_strip([(frames, True), (frames, False)], path)
    # a disk that is full half-way leaves it as it is
    monkeypatch.setattr(figures.iio, "imwrite", lambda part, strip: part.write_text("a") / None)
    with pytest.raises(TypeError):
        figures.draw_strip([(frames, True)], path)
    assert list(tmp_path.iterdir()) == [path]
    picture = iio.imread(tmp_path / "strip.png")
    height = picture.shape[0] // 2
    width = picture.shape[1] // 3
    middles = picture[height // 2::height, width // 2::width, 0]
    assert middles.tolist() == [[5, 7, 9]] * 2
    right = figures.RIGHT
    wrong = figures.WRONG
    plain = (255, 255, 255)
    wanted = np.array([[right, plain, right], [right, plain, wrong]])
    assert (picture[::height, ::width] == wanted).all()


def test_of_an_hour_four_minutes_are_decoded_each_with_its_last_frame(monkeypatch):
    """Frames that show their number."""
    monkeypatch.setattr(probe, "decode_frames", lambda vae, latents: 4 * latents.numpy().repeat(4, 1))
    frames = probe.decode_minutes(None, torch.arange(14_403)[None])
    assert frames.shape == (1, 3840)
    wanted = [960 * minute for minute in report.MINUTES]
    assert frames[0, 959::960] == pytest.approx(wanted, abs=12)


def test_of_each_minute_of_an_hour_validity_entropy_and_likeness_to_the_first_are_told(monkeypatch):
    """Two landmarks, then one, then the first minute again, then nothing; one place is never seen."""
    both = [3, 3, 3, 3, 5, 5, 5, -1]
    one, nothing = [3] * 7 + [-1], [-1] * 8
    readings = [SimpleNamespace(landmark=np.array([landmarks]), psnr=np.array([i, i + 1.]))
                for i, landmarks in enumerate([both, one, both, nothing])]
    monkeypatch.setattr(judge, "read_video", lambda frames: readings[frames[0]])
    found = probe.measure_minutes(np.arange(4))
    share = np.array([4, 3]) / 7
    entropy = -(share * np.log2(share)).sum()
    wanted = {
        1: (.5, entropy, 87.5),
        5: (1.5, 0, 50),
        15: (2.5, entropy, 87.5),
        60: (3.5, 0, 0),
    }
    for minute, numbers in wanted.items():
        told = [found[f"{minute} min: {name}"] for name in report.HOUR_NUMBERS]
        assert told == pytest.approx(numbers)


# ---- videos of the small world are made, measured, and counted once ----------------------------------------

FILES_OF_WEIGHTS = {path.stem: path for path in WEIGHTS.glob("*.safetensors")}


@functools.cache
def drawn_frames(spec, frames):
    return (clip(spec, 0, frames) * 255).round().astype(np.uint8)


HOUR = {f"{minute} min: {name}": 1. for minute in report.MINUTES for name in report.HOUR_NUMBERS}


def test_a_real_video_measures_as_perfect_and_a_spoilt_one_shows_it():
    spec = WorldSpec(world.HELD_OUT + 3, "turn", 12)

    def measured(frames):
        keep = torch.ones(84, dtype=torch.bool)
        return probe.measure(frames, spec, keep, PRESETS["slowfast"], 0)

    frames = drawn_frames(spec, 1005)
    good = measured(frames)
    assert min(good["validity"], good["last"]) > 40
    assert abs(good["drift"]) < 1
    assert good["jumps"] == 0 and good["steady"] == good["starts"] == 100
    assert measured(frames[16:])["starts"] == 0
    assert json.loads(json.dumps(good)) == good
    assert good["landmarks"] == list(make_world(spec).landmarks)
    assert good["returns"]
    assert all(event["right"] for event in good["returns"])
    assert not any(event["follows"] for event in good["returns"])
    # it snaps to the first view; grey at the end; too short to drift; the other landmarks
    snaps = measured(np.concatenate([frames[:500], frames[:461]]))
    assert snaps["jumps"] == pytest.approx(1)
    assert snaps["steady"] == 100
    frames[-80:] = frames[-80:] * .8
    spoilt = measured(frames)
    assert spoilt["last"] < 30 < spoilt["validity"]
    assert spoilt["drift"] < -5
    assert np.isnan(measured(frames[:200])["drift"])
    assert measured(frames[:400:2])["steady"] == 0
    other = drawn_frames(replace(spec, counterfactual=True), 600)
    other[:100] = frames[:100]
    left_before = [event for event in measured(other)["returns"] if event["left"] < 100]
    assert left_before and all(event["follows"] for event in left_before)


@pytest.mark.parametrize("shuffle, whose", [(False, [0, 1, 2]), (True, [1, 2, 0])])
def test_a_teacher_goes_on_from_its_own_or_from_the_next_worlds_past(shuffle, whose, monkeypatch):
    pasts = []

    def extend(net, past, text, grid, sampler, seeds):
        pasts.append(past)
        return past[:, :1].expand(-1, 21, -1, -1, -1)

    monkeypatch.setattr(probe, "extend", extend)
    networks = load_tiny(FILES_OF_WEIGHTS["teacher"], CPU)
    specs = probe.held_out(3)
    latents, keep = probe.continue_teacher(networks, specs, 1, 2, shuffle)
    real = probe.conditions(networks, specs, 1)[1]
    assert torch.equal(pasts[0], real[whose])
    assert torch.equal(latents[:, :3], real)
    assert [past.shape[1] for past in pasts] == [3, 24]
    assert latents.shape[1] == 45
    assert keep.tolist() == [[True, False] * 7 + [True]] * 3


def test_a_probe_tells_what_came_back_right_and_what_memory_held():
    """Real videos are right whatever memory holds; one that keeps nothing new ends with the first 3.5 s."""
    specs = probe.held_out(2)
    frames = [drawn_frames(spec, 285) for spec in specs]
    none = torch.zeros(2, 24, dtype=torch.bool)
    found = probe.read_probe(specs, frames, none)
    assert found["recall"] == 1
    assert found["ceiling"] < .8
    assert found["returns"] >= 5
    assert found["validity"] > 40
    every_second = torch.arange(24).expand(2, -1) % 2 == 0
    assert probe.read_probe(specs, frames, every_second)["ceiling"] == 1
    frames[0][165:] = frames[0][164]  # the camera stops: what was due does not come
    assert probe.read_probe(specs, frames, none)["recall"] < .8


def test_the_check_of_a_teacher_compares_its_own_past_with_anothers(monkeypatch):
    numbers = {False: {"recall": 2, "chance": .5}, True: {"recall": 1, "chance": .7}}
    monkeypatch.setattr(probe, "probe_teacher", lambda networks, specs, shuffle=False: numbers[shuffle])
    found = probe.check_teacher_uses_context(None, [])
    assert found == {"teacher_recall": 2, "teacher_shuffled_recall": 1, "teacher_chance": .5}


@pytest.mark.parametrize("tau", [None, .5])
def test_the_threshold_is_the_weights_own_unless_the_preset_or_the_row_names_one(tau, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "continue_student", lambda *given: asked.append(given) or (None, None))
    monkeypatch.setattr(evaluate, "decode_frames", lambda *given: None)
    if tau:
        monkeypatch.setitem(PRESETS, "uniform2", replace(PRESETS["uniform2"], tau=tau))
    row = FIRST | {"weights": "stage2", "memory": "uniform2", "worlds": "swapped"}
    for each in (row, row | {"tau": .7, "steps": 2}):
        evaluate.make_videos(each, [], FILES_OF_WEIGHTS, CPU)
    (networks, _, *lengths, policy, positions, swap), (fewer, *_, other, _, _) = asked
    assert policy == replace(PRESETS["uniform2"], tau=tau or networks.sampler.tau)
    assert (lengths, positions, swap) == ([14, 5], "bounded", True)
    assert other.tau == .7
    assert fewer.sampler == replace(networks.sampler, steps=2)


def test_neighbours_exchange_their_slow_memories_and_only_landmarks_differ():
    m = load_tiny(WEIGHTS / "stage2.safetensors", CPU)
    specs = [WorldSpec(i, "turn", 9) for i in range(4)]
    slow = []
    for swap in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            rollouts = []
            patch.setattr(probe, "Rollout", lambda *about: rollouts.append(Rollout(*about)) or rollouts[-1])
            probe.continue_student(m, specs, 9, 0, PRESETS["uniform2"], swap=swap)
        rollouts[0].memory.evict(CHUNK)
        slow.append(rollouts[0].memory.slow)
    other = [1, 0, 3, 2]
    own, exchanged = slow
    assert torch.equal(exchanged.latent, own.latent[other])
    assert torch.equal(exchanged.values[-1], own.values[-1][other])
    first, second, *_ = specs = evaluate.worlds_of("swapped", 7, 5)
    assert len(specs) == 6
    assert second == replace(first, counterfactual=True)
    assert first.seed == evaluate.worlds_of("text", 2, 5)[0].seed == world.HELD_OUT + 5


def test_the_shipped_student_is_evaluated_from_its_file():
    """The path from a preset's name to a line, with networks: 4 s after real video."""
    row = FIRST | {"weights": "stage2", "memory": "uniform2", "worlds": "swapped"}
    specs = evaluate.worlds_of("swapped", 8, 0)
    videos = evaluate.run_batch((row, specs, FILES_OF_WEIGHTS, CPU))
    assert [video["seed"] for video in videos] == [spec.seed for spec in specs]
    assert report.pick(videos, row | {"motion": "turn"}) == videos
    # returns show the other world's landmarks
    follows = report.counts(videos, "follows")
    assert follows.sum(0)[1] >= 12
    assert report.estimate(follows)[0] > 60
    assert report.estimate(report.counts(videos, "right"))[0] < 20


def test_captions_with_returns_are_of_each_motion_and_spread_from_soon_to_late():
    specs = evaluate.worlds_of("returns", 24, 0)
    motions = [make_world(spec).motion for spec in specs]
    seconds = {kind: [m.seconds for m in motions if m.kind == kind] for kind in report.MOTIONS}
    assert len({spec.seed for spec in specs}) == 24
    assert {len(found) for found in seconds.values()} == {8}
    for kind, ends in world.PERIODS.items():
        assert seconds[kind] == sorted(set(seconds[kind]))
        assert (seconds[kind][0], seconds[kind][-1]) == ends
    assert all(re.fullmatch(world.GRAMMAR, make_world(spec).caption) for spec in specs)


def test_the_frontier_is_of_uniform_intervals_1_to_6_and_three_taus_at_equal_slots():
    whole = evaluate.all_rows(FIRST, (.9, .97))
    short = evaluate.all_rows(FIRST, (.9, .97), no_hours=True)
    assert short == [row for row in whole if row["worlds"] != "hour"] != whole
    # a student of any name
    named = evaluate.all_rows(FIRST | {"weights": "my student"}, (.9, .97))
    ours = report.pick(named, {"weights": "my student"})
    student = {"weights": FIRST["weights"]}
    assert [row | student for row in ours] == report.pick(whole, student)
    rows = report.pick(whole, {"worlds": "returns"})
    policies = {evaluate.policy_of(row, .94) for row in rows}
    slots = [p for p in policies if (p.sink, p.slow, p.fast) == (3, 12, 6)]
    assert sorted(p.interval for p in slots if p.keep == "uniform") == [1, 2, 3, 4, 5, 6]
    assert sorted(p.tau for p in slots if p.keep == "surprisal") == [.9, .94, .97]


def test_what_makes_a_video_is_in_its_key(tmp_path, monkeypatch):
    """What was asked for, the world, networks, the preset's sizes, the code."""
    files = {name: tmp_path / name for name in ("one", "two", "other")}
    for name, path in files.items():
        path.write_text(name)
    one = FIRST | {"weights": "one", "memory": "window"}

    def key(row={}, seed=1, **other):
        return evaluate.key_of(one | row, [WorldSpec(seed)], files | other, CPU)
    first = key()
    others = {"weights": "two", "memory": "longlive", "steps": 2, "tau": .5, "worlds": "real"}
    found = [key({name: value}) for name, value in others.items()]
    found += [key(seed=2), key(one=files["other"])]
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "window", replace(PRESETS["window"], fast=18))
        found.append(key())
    assert key() == first
    # an autoencoder of its own beside it, and other code
    (tmp_path / "vae.safetensors").write_text("other")
    found.append(key())
    monkeypatch.setattr(evaluate, "CODE", evaluate.CODE[1:])
    found.append(key())
    assert len({first, *found}) == 11


def test_comments_and_layout_of_code_do_not_count(tmp_path):
    prints = []
    for i, text in enumerate(["a = 1", "a  =  1  # one", "a = 2"]):
        path = tmp_path / f"{i}.py"
        path.write_text(text)
        prints.append(evaluate.hash_of_file(path))
    assert prints[0] == prints[1] != prints[2]


def test_worlds_are_what_the_shipped_weights_have_seen():
    landmarks = 29, 6, 8, 17, 14, 23, 13, 2
    one = World(2, landmarks, 128, Motion("linger", -1, 36))
    other = replace(one, landmarks=(20, 13, 4, 11, 2, 27, 11, 18))
    assert make_world(WorldSpec(0)) == one
    assert make_world(WorldSpec(0, counterfactual=True)) == other
    assert make_world(WorldSpec(0, empty=True)) == replace(one, landmarks=())
    # fixing the motion changes nothing else
    turns = replace(one, motion=Motion("turn", -1, 20))
    assert make_world(WorldSpec(0, "turn", 20)) == turns
    motions = [make_world(WorldSpec(seed)).motion for seed in (7, 1, 4)]
    assert motions[0] == Motion("aside", 1, 9)
    assert motions[1] == Motion("linger", 1, 36)
    assert motions[2] == Motion("turn", -1, 15)


@pytest.mark.parametrize("changes", [{}, {"counterfactual": True}, {"empty": True}])
def test_a_clip_is_its_world_drawn_at_its_headings(changes):
    spec = WorldSpec(0, **changes)
    w = make_world(spec)
    heading = w.motion.heading(w.start, np.arange(7, 9))
    assert np.array_equal(clip(spec, 7, 2), draw_video(heading, w.landmarks, w.ground))


def test_drawing_is_what_the_shipped_weights_have_seen():
    """On each ground, how light frames are, and how sharp; between sub-columns, the mean of both."""
    drawn = [draw_video([0, 50.3, 128], SET, ground) for ground in range(4)]
    drawn = np.stack(drawn).astype(float)
    light = drawn.mean((1, 2, 3, 4))
    sharp = np.abs(np.diff(drawn)).mean((1, 2, 3, 4))
    assert np.allclose(light, [.430164, .491101, .562312, .432507], atol=1e-5)
    assert np.allclose(sharp, [.028398, .031267, .035024, .028345], atol=1e-5)
    before, between, after = draw_video([40, 40 + 1 / 16, 40 + 1 / 8])
    assert np.allclose(between, (before + after) / 2, atol=1e-6)


def test_the_code_that_makes_a_video_is_all_that_is_imported_but_for_tables_and_figures():
    reached = {"evaluate"}
    for name in ORDER[::-1]:
        if name in reached:
            tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
            reached |= imports_of(ast.walk(tree)) & set(FILES)
    assert set(evaluate.CODE) == reached - {"report", "paper", "figures"}


@pytest.fixture
def run_evaluate(tmp_path, monkeypatch):
    """Words -> the tables, of a student whose videos are real ones, and how many were made"""
    made = []

    def real_videos(row, specs, files, device):
        frames = data.frames_of(evaluate.LENGTHS[row["worlds"]][1] * CHUNK)
        made.extend(specs)
        keep = torch.arange(84) % PRESETS[row["memory"]].interval == 0
        videos = np.stack([drawn_frames(spec, frames) for spec in specs])
        return videos, keep.expand(len(videos), -1)

    monkeypatch.setattr(evaluate, "make_videos", real_videos)
    monkeypatch.setattr(judge, "read_video", read_once)
    monkeypatch.setattr(figures, "draw_all", lambda *given: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # in this process

    def run(words):
        made.clear()
        monkeypatch.setattr(sys, "argv", f"evaluate.py --device cpu --out {tmp_path} {words}".split())
        evaluate.main()
        return (tmp_path / "evaluate.md").read_text("utf-8"), len(made)
    return run


# their videos are drawn and read once, by one process
evaluates = pytest.mark.xdist_group("evaluations")


@evaluates
def test_a_video_is_made_once_and_again_for_an_edited_preset(run_evaluate, monkeypatch):
    words = "--quick --memory infinity --worlds 3"
    text, made = run_evaluate(words)
    again, made_again = run_evaluate(words)
    assert (made, made_again) == (3, 0)
    assert again == text
    monkeypatch.setitem(PRESETS, "infinity", Policy(0, 0, 15))
    edited, made = run_evaluate(words)
    row, edited_row = (re.search(r"\| stage2 \| infinity \| .*", x)[0].split("|") for x in (text, edited))
    assert made == 3 and edited_row[7] == row[7]  # so many returns: the old lines do not count


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_a_signal_ends_the_evaluation_and_the_processes_that_make_its_videos(tmp_path):
    import psutil
    words = [HERE / "evaluate.py", "--quick", "--device", "cpu", "--out", tmp_path]
    main = psutil.Popen([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "2"})
    workers = []
    # two that make videos, and one that tracks what they share
    while len(workers) < 3 or min(worker.cpu_times().user for worker in workers[-2:]) < 1:
        time.sleep(.1)
        assert main.poll() is None
        workers = main.children()
    main.terminate()
    assert main.wait(20) == 143
    gone, alive = psutil.wait_procs(workers, 20)
    assert not alive


@evaluates
def test_rows_count_the_worlds_that_are_asked_for_each_once(run_evaluate, tmp_path):
    few, _ = run_evaluate("--quick --memory infinity --worlds 2")
    run_evaluate("--quick --memory infinity --worlds 2 --seed 50")
    path = tmp_path / "evaluate.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(True)[0])
    again, made = run_evaluate("--quick --memory infinity --worlds 2")
    assert made == 0 and again == few


@evaluates
def test_a_policy_of_ones_own_gets_its_row_its_curve_and_its_reach_by_one_line(run_evaluate, monkeypatch):
    """Its videos are real ones: landmarks come back after 28 s, and are right."""
    monkeypatch.setitem(PRESETS, "mine", Policy(3, 24, 6, "uniform", interval=3))
    text, _ = run_evaluate("--quick --memory mine --worlds 12")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| stage2 | mine |")]
    summary, curve = [row for row in rows if row[4] == "all"]
    assert int(summary[6]) > 50
    assert summary[5] == "100.0 [100.0, 100.0]"
    assert summary[10] == "beyond"
    assert curve[-1] == "100.0 [100.0, 100.0] |"


@evaluates
def test_other_steps_and_taus_are_rows_beside_the_students_own(run_evaluate):
    run_evaluate("--quick --memory uniform1 --worlds 2")
    text, made = run_evaluate("--quick --memory uniform1 --worlds 2 --tau .5 --steps 2")
    assert made == 2
    assert "| stage2 | uniform1 | " in text and "| stage2 | uniform1, tau 0.5, 2 steps | " in text


def test_networks_of_other_trainings_count_in_what_they_are_compared_in(run_evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "TABLE", ["student slowfast text", "teacher uniform2 teacher",
                                            "stage2_none slowfast text", "student slowfast real"])
    keys = {}

    def run_batch(batch):
        row, specs, files, _ = batch
        keys[row["weights"], row["worlds"], row["training"]] = files[row["weights"]].parent.name
        last = float(row["training"])
        return [video_row([(6., True, True)], i, row=row, last=last) for i in range(len(specs))]
    monkeypatch.setattr(evaluate, "run_batch", run_batch)
    others = [tmp_path / "b", tmp_path / "c"]
    for name in ("stage2", "stage2_none"):
        for folder in others:
            (folder / name).mkdir(parents=True)
            shutil.copy(WEIGHTS / f"{name}.safetensors", folder / name)
    text, _ = run_evaluate(f"--worlds 9 --tau .5 --others {others[0]},{others[1]}")
    again = {place for place in keys if place[2]}
    assert again == {*itertools.product(("stage2", "stage2_none"), ["text"], (1, 2))}
    assert keys["stage2", "real", 0] == "weights"
    assert keys["stage2_none", "text", 2] == "stage2_none"
    row, _ = re.findall(r"\| stage2_none \| slowfast.* \| text \| all .*", text)
    assert "| 1.0 [0.0, 2.0] |" in row and row.endswith("| 27 |")
    assert "| stage2 - stage2_none | last 5 s, dB | 0.0 [0.0, 0.0] |" in text
    with pytest.raises(BadInput, match="--others .*no networks"):
        run_evaluate("--others nowhere")


def test_worlds_in_which_nothing_comes_back_are_told_in_one_line(run_evaluate, monkeypatch):
    monkeypatch.setitem(evaluate.LENGTHS, "returns", (0, 2))  # 1.3 s
    with pytest.raises(BadInput, match="no landmark is due back"):
        run_evaluate("--quick --memory infinity --worlds 3")


def test_the_whole_evaluation_has_all_tables_and_all_rows_of_a_new_preset(run_evaluate, monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", Policy(3, 6, 12, "uniform", interval=3))

    def run_batch(batch):
        row, specs, *_ = batch
        return [video_row([(6., True, True)], i, "turn", row, **HOUR) for i in range(len(specs))]

    monkeypatch.setattr(evaluate, "run_batch", run_batch)
    text, _ = run_evaluate("--worlds 9 --steps 2")
    titles = re.findall(r"^\*\*(.*)\*\*$", text, re.M)
    assert titles == ["Targets", "All rows", "Recall by seconds out of view, %", "Differences in training",
                      "Drifting over an hour", "The paper's orderings"]
    rows = re.findall(r"\| mine, 2 steps \| bounded \| (\w+ \| \w+)", text)
    kinds = ["all", "turn", "linger", "aside"]
    assert sorted(rows) == sorted([f"returns | {kind}" for kind in kinds] * 2 + ["hour | 1"])
    assert text.count("uniform6, 2 steps") == 8
    assert text.count("| teacher | uniform2 |") == 16


# ---- model: one network, causal by what it is shown --------------------------------------------------------

def test_prompts_are_padded_with_zeros_that_are_attended():
    net = random_dit()
    features = noise(2, 5, 64)
    padded = F.pad(features, (0, 0, 0, net.config.text_len - 5))
    for made, want in zip(net.text(features), net.text(padded), strict=True):
        assert torch.equal(made[0], want[0])
        assert torch.equal(made[1], want[1])
        assert made[0].shape == (2, net.config.text_len, 2, 32)
        assert made[0][:, 5:].abs().min() > 0


def test_a_mask_among_new_frames_leaves_the_memory_in_sight_of_all():
    net = random_dit()
    x = noise(1, 3, 16, 4, 8)
    text = random_text(net)
    rope = rope_cos_sin(torch.arange(3), 2, 4, 32)
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    whole, kv = net(x, torch.zeros(1, 3), text, rope, mask=mask)
    # the first latent, of 8 tokens, from memory
    first = [(apply_rope(k, rope)[:, :8], v[:, :8]) for k, v in kv]
    memory = [LayerCache(k, v, 8) for k, v in first]
    t, mask = torch.zeros(1, 2), mask[:, 1:, 1:]
    rope = [table[:, 8:] for table in rope]
    later, _ = net(x[:, 1:], t, text, rope, memory, mask=mask)
    close(later, whole[:, 1:], 1e-5)


def test_a_fresh_network_looks_sharply_predicts_zero_and_recomputing_changes_no_gradient():
    x = noise(1, 3, 16, 4, 8)
    t = torch.rand(1, 3)
    rope = rope_cos_sin(torch.arange(3), 2, 4, 32)
    fresh = DiT(random_dit().config).initialise()
    assert not fresh(x, t, random_text(fresh), rope)[0].any()
    norms = [norm.weight for b in fresh.blocks for norm in (b.self_attn.norm_q, b.self_attn.norm_k)]
    assert torch.cat(norms).unique().tolist() == [2.]
    net = random_dit().requires_grad_(True)
    gradients = []
    for net.config.recompute in (False, True):
        loss = net(x, t, random_text(net), rope)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_weights_in_bf16_change_the_golden_by_less_than_two_percent_and_less_than_all_in_bf16(tmp_path):
    """Relative rms difference to float32; time, modulation, norm3 and head stay float32 as they load."""
    _, net, given, _ = golden_dit("wan_dit")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    with torch.device("meta"):
        mixed = DiT(net.config)
        all_bf16 = DiT(net.config)
    mixed = load_on_device(mixed, tmp_path / "net.safetensors", "cpu", torch.bfloat16)
    load_state_dict_strict(all_bf16, {name: z.bfloat16() for name, z in net.state_dict().items()})
    for name, z in mixed.state_dict().items():
        small = name.startswith(("time_", "head.")) or "modulation" in name or "norm3" in name
        assert z.dtype == (torch.float32 if small else torch.bfloat16), name
    want, *others = (whole_clip(net, given) for net in (net, mixed, all_bf16))
    power = want.square().mean()
    ours, theirs = ((got - want).square().mean() / power for got in others)
    assert 0 < ours < theirs < .02 ** 2


# ---- text: captions as words, prompts as Wan's tokens ------------------------------------------------------

def test_captions_are_a_number_a_word_or_digit_with_its_place_an_end_mark_and_zeros_and_are_cut():
    ids, mask = words_to_ids(["a sea.", "\u00e9t\u00e9, a", "12 2", "a " * 200], length=5)
    first, second, third, last = ids.tolist()
    a, sea = first[:2]
    assert first == [a, 2 + zlib.crc32(b"sea") % 998, 1, 0, 0]
    assert second == [2 + zlib.crc32("\u00e9t\u00e9".encode()) % 998, a, 1, 0, 0]
    ten, two = third[:2]
    assert third == [ten, two, two, 1, 0]
    one = words_to_ids(["1"])[0][0, 0]
    assert len({ten, two, one.item()}) == 3
    assert last == [a, a, a, a, 1]
    assert torch.equal(mask, (ids > 0).long())


def test_no_two_words_of_captions_have_one_number():
    """As bytes east and west differ by two: networks that read those began at the wrong one."""
    words = set()
    for seed in range(4000):
        words |= set(re.findall(r"[^\W\d]+", make_world(WorldSpec(seed)).caption))
    assert len(words) == 29
    # 10 is 1_ 0: what stands before the last digit, and the last
    numbers = [f"{n}0" for n in range(1, 10)] + list("0123456789")
    ids, mask = words_to_ids([*sorted(words), *numbers], length=2)
    words |= set(numbers)
    assert mask.all()
    assert len(set(ids[:, 0].tolist())) == len(words)
    assert ids[:, 0].min() > 1 and ids.max() < tiny_text.vocab


@pytest.mark.parametrize("content, want", [
    (" a calm\u2028sea \n\nein B\xe4r\n".encode("utf-8"), ["a calm\u2028sea", "ein B\xe4r"]),
    (" a calm sea \r\rein B\xe4r".encode("utf-16"), ["a calm sea", "ein B\xe4r"]),
    (b"\xef\xbb\xbf a calm sea \r\n\r\n", ["a calm sea"]),
    (b"M\xe4rz", "cannot read"),
    (b" \n\n", "no prompts"),
    (b"a\n\0", "line 2: .*control characters"),
    (None, "is no file")])
def test_a_file_of_prompts_has_one_a_line_in_utf_8_or_16(content, want, tmp_path):
    file = tmp_path / "prompts.txt"
    if content is None:  # a pipe to which nobody writes, where there are pipes
        getattr(os, "mkfifo", Path.mkdir)(file)
    else:
        file.write_bytes(content)
    if isinstance(want, list):
        assert read_prompts(file) == want
        with open(file) as opened:  # as the shell gives it, also in place of a pipe
            assert os.name == "nt" or read_prompts(f"/dev/fd/{opened.fileno()}") == want
    else:
        with pytest.raises(BadInput, match=want):
            read_prompts(file)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "-"])
def test_prompts_come_through_a_pipe_that_the_shell_holds_open_but_not_without_end(name, monkeypatch):
    if os.name == "nt":
        pytest.skip("there are no such names")
    for content in (b"a sea\n", b"a sea\n" * 9):
        out, into = os.pipe()
        stdin = os.dup(0)
        os.dup2(out, 0)
        os.write(into, content)
        os.close(into)
        if len(content) < 9:
            assert read_prompts(name.format(out)) == ["a sea"]
        else:
            monkeypatch.setattr("text.MOST_BYTES", 9)
            with pytest.raises(BadInput, match="more than"):
                read_prompts(name.format(out))
        os.dup2(stdin, 0)
        os.close(stdin), os.close(out)
    with pytest.raises(BadInput, match="cannot read the text /dev/fd/99"):
        read_prompts("/dev/fd/99")


def test_prompts_are_cleaned_like_wans():
    pytest.importorskip("ftfy")
    for case in json.loads((GOLDEN / "text_clean.json").read_text())["cases"]:
        assert clean(case["in"]) == case["out"]
    assert clean("a < b &amp;lt;  c") == "a < b < c"  # HTML is resolved twice


# ---- weights: own files, the raw folder, public students ---------------------------------------------------

@pytest.fixture
def raw(tmp_path):
    """A folder in the raw format of Wan2.1-T2V-1.3B, scaled down: its names, files and types."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    folder = tmp_path / "Wan"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    words = "<pad> </s> <unk> a calm sea storm rises".split()
    words = {word: i for i, word in enumerate(words)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens.save(str(folder / TOKENIZER))
    torch.manual_seed(0)
    nets = [DiT(DiTConfig(64, 96, 2, 2, 32, 48))]
    nets += [TextEncoder(TextConfig(8, 48, 48, 64, 3, 2))]
    nets += [WanVAE(WanVAEConfig(4)), TAE(TAEConfig(8, (16, 12, 8, 8)))]
    for p in (p for net in nets for p in net.state_dict().values()):
        p.copy_(torch.randn_like(p) * .1)
    dit, text, vae, tae = (net.state_dict() for net in nets)
    save_file(dit, folder / DIT)
    torch.save({k: v.bfloat16() for k, v in text.items()}, folder / T5)
    torch.save(vae, folder / VAES["wan"])
    torch.save(tae, folder / VAES["tae"])
    sizes = dict(dim=64, ffn_dim=96, num_heads=2, num_layers=2)
    sizes |= dict(freq_dim=32, in_dim=16, text_len=512)
    (folder / "config.json").write_text(json.dumps(sizes))

    def wrapped(key):
        key = key.replace("self_attn", "_checkpoint_wrapped_module.self_attn")
        return "model." + key.replace("blocks.", "_fsdp_wrapped_module.blocks.")
    averages = {wrapped(k): v + .01 for k, v in dit.items()}
    torch.save({"generator": {k: v + 1 for k, v in dit.items()}, "generator_ema": averages, "step": 5},
               tmp_path / "student.pt")
    return folder


def load_raw(raw, ckpt="", size="32x32", vae="wan", dtype=torch.float32, **more):
    return load_wan(raw, ckpt, size, vae, CPU, dtype, raw.parent / "text", **more)


@pytest.fixture
def small_net():
    return random_dit(dim=32, ffn_dim=64, heads=1, layers=1, text_dim=32)


def test_saved_weights_come_back_with_what_made_them(small_net, tmp_path):
    facts = {"sampler": {"steps": 4}}
    file = tmp_path / "net.safetensors"
    save_weights(file, small_net.state_dict(), small_net.config, facts)  # float32, for the next stage
    got, told = load(file, DiT, DiTConfig)
    assert told == facts
    assert replace(got.config, patch=tuple(got.config.patch)) == small_net.config
    pairs = zip(got.parameters(), small_net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(BadInput, match="give --wan"):
        load_tiny(file, "cpu")
    weights.ship(file, tmp_path / "shipped")
    state, about = read_file(tmp_path / "shipped" / "net.safetensors")
    want = read_file(file)[1]
    want["facts"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert about == want
    assert all(torch.equal(state[name], p.bfloat16()) for name, p in small_net.state_dict().items())
    # of whatever else: one line
    torch.save({"generator": {"x": torch.ones(3)}}, tmp_path / "gen.pt")
    save_weights(file, {"x": torch.tensor([math.nan])}, small_net.config, facts)
    save_file({"x": torch.ones(3)}, tmp_path / "bare.safetensors")
    for other in (file, tmp_path / "gen.pt", tmp_path / "bare.safetensors"):
        with pytest.raises(BadInput, match="is no file that train.py wrote"):
            weights.ship(other, tmp_path / "shipped")


def test_weights_of_either_teacher_are_a_teachers_and_a_folder_may_be_called_random(capsys):
    for stage, wanted, is_told in (("teacher_plain", "teacher", False), ("teacher_plain", "stage2", True),
                                   ("teacher", "teacher", False), ("stage1", "teacher", True)):
        weights.warn_of_stage(sample.Config(), SimpleNamespace(name="x", stage=stage), wanted)
        assert ("warning" in capsys.readouterr().err) == is_told
    asked = ["random", "random:32x1", "random_folder", "a/random", Path("randomised")]
    assert [weights.is_random(wan) for wan in asked] == [True, True, False, False, False]


def test_what_ships_was_made_by_the_recipe_each_part_from_the_others():
    """One chain: train.py --stage all makes these files, and no hand has been in between."""
    made = {file.stem: read_file(file)[1]["facts"] for file in WEIGHTS.glob("*.safetensors")}
    assert made.keys() == {*PARTS["all"], "text"}
    for name, facts in made.items():
        part = "init_ar" if name == "text" else name
        preset = TINY[part]
        assert facts["recipe"] == hash_recipe(preset), name
        assert (facts["updates"], facts["seed"], facts["passes"]) == (preset.updates, 0, [1]), name
        # the files that it started with are those that stand beside it
        starts = {key.removeprefix("sha256 of "): value for key, value in facts.items() if " of " in key}
        needed = {preset.start, preset.teacher} | ({"vae"} if part != "vae" else set())
        assert starts.keys() >= needed - {""}, name
        assert starts == {start: made[start]["sha256"] for start in starts}, name


def test_networks_are_built_without_values_and_fresh_ones_start_as_ever():
    code = "import sys, weights\nweights.load_tiny(weights.WEIGHTS / 'teacher.safetensors', 'cpu')"
    code += "\nsys.exit('torch._dynamo' in sys.modules)"  # most of a second, to fill what is not there
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
    torch.manual_seed(0)
    made = model.learned_modulation(6, 4)
    torch.manual_seed(0)
    assert torch.equal(made, torch.randn(1, 6, 4) / 2)


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def as_parameters(state):
    return {key: torch.nn.Parameter(tensor) for key, tensor in state.items()}


WRAPPINGS = {  # how training code wraps a state dict
    "model": lambda s: {"model": s},
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "epoch": 3},
    "compiled": lambda s: {"generator": prefixed("_orig_mod.model.", s), "critic": {}},
    "ddp": lambda s: prefixed("module.model.diffusion_model.", s),
    "peft": lambda s: {f"base_model.model.{k.replace('.q.', '.q.base_layer.')}": v for k, v in s.items()},
    "shadow": lambda s: {"ema": {"shadow": s}},
    "empty ema": lambda s: {"generator_ema": {}, "generator": as_parameters(s)},
}


def save_shards(state, folder):
    files = {name: f"m-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    folder.mkdir()
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


CONTAINERS = {  # under names that tell something else
    "a.ckpt": torch.save,
    "b.safetensors": torch.save,
    "c.bin": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "d.pt": save_file,
    "folder": save_shards,
}


@pytest.mark.parametrize("name", [*WRAPPINGS, *CONTAINERS])
def test_students_of_every_public_form_load_the_same_weights(name, raw, tmp_path):
    want, _ = read_public(raw / DIT)
    path = tmp_path / (name if name in CONTAINERS else "form.pt")
    CONTAINERS.get(name, torch.save)(WRAPPINGS.get(name, dict)(want), path)
    got, _ = read_public(path)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    for file in path.glob("*-of-*"):  # one of several stands for all
        assert read_public(file)[0].keys() == want.keys()


def test_the_raw_folder_is_read_in_the_types_it_runs_in_and_with_its_sizes(raw):
    own = raw.parent / "own.safetensors"
    save_weights(own, read_public(raw / DIT)[0], tiny_dit, {"sampler": {"steps": 2}})
    m = load_raw(raw, own, "64x32", "tae", torch.bfloat16)
    assert m.sampler.steps == 2
    assert m.name == "own.safetensors"
    assert isinstance(m.vae, TAE)
    assert m.latent == (16, 4, 8)
    assert m.grid == (2, 4)
    assert m.dit.config.heads == 2
    assert m.dit.patch_embedding.weight.dtype == torch.bfloat16
    assert m.dit.blocks[0].modulation.dtype == torch.float32
    parameters = [*m.dit.parameters(), *m.vae.parameters()]
    assert not any(p.requires_grad or p.is_meta for p in parameters)
    m = load_raw(raw, raw.parent / "student.pt")
    assert m.sampler == Sampler()
    assert isinstance(m.vae, WanVAE)
    # averages before raw weights
    got = m.dit.state_dict()
    want = read_public(raw / DIT)[0]
    assert all(torch.equal(got[name], want[name] + .01) for name in want)


def test_random_networks_have_the_proportions_of_the_full_size():
    m = load_wan("random:32x1", "", "", "tae", CPU, torch.bfloat16, None)
    assert (m.dit.config.dim, m.dit.config.ffn_dim) == (32, 186)
    assert (m.width, m.height) == (192, 128)
    assert m.dit.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert torch.equal(m.features(["a", "b"]), torch.zeros(2, 1, 4096))


def patches(*shape):
    return lambda s: s | {"patch_embedding.weight": torch.zeros(*shape, 1, 2, 2)}


def within_itself():
    state = {}
    return state | {"model": state.setdefault("model", state)}


FOREIGN = {
    "is a LoRA": lambda s: {"generator_lora": {"blocks.0.q.lora_A.weight": torch.zeros(4, 64)}, "step": 1},
    "size mismatch for patch_embedding.*5120.*14B": patches(5120, 16),
    "size mismatch for patch_embedding.*36.*image-to-video": patches(64, 36),
    "size mismatch.*128.*another kind.*without --wan": patches(128, 16),
    "KeyError: 'text_embedding.0.weight'.*another kind": lambda s: {"conv.weight": torch.zeros(3)},
    "holds no weights": lambda s: {"step": 3},
    "no weights at top level": lambda s: within_itself(),
    "holds no weights ": lambda s: s | {"head.head.weight": expanded(10 ** 6, 10 ** 6)},
    "Unexpected key.*extra": lambda s: s | {"extra": torch.zeros(1)},
    "torch.int8, is quantised": lambda s: {k: v.to(torch.int8) for k, v in s.items()},
    "torch.complex64, .* or complex": lambda s: {k: v.to(torch.complex64) for k, v in s.items()},
    "torch.float8.*, is quantised": lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()},
    "is quantised, or complex: fetch": lambda s: s | {"scaled_fp8": torch.zeros(1)},
    "layout of diffusers": lambda s: {k.replace("self_attn", "attn1"): v for k, v in s.items()},
    "content cannot be .1, 2.": lambda s: [1, 2],
    "are no weights|no weights": lambda s: {3: torch.zeros(3), 4: 5},
    "two tensors of one name": lambda s: s | prefixed("module.", s),
    "ffn.0.bias is not finite": lambda s: s | {"blocks.1.ffn.0.bias": torch.full((96,), math.inf)},
}


@pytest.mark.parametrize("told, harm", {
    "is quantised": lambda state, about: state | {"head.head.bias": state["head.head.bias"].to(torch.int8)},
    "or complex": lambda state, about: state | {"head.head.bias": torch.zeros(64, dtype=torch.complex64)},
    "steps of its sampler must lie from 1 to 1000":
        lambda state, about: about["facts"]["sampler"].update(steps=16000) or state}.items())
def test_tiny_weights_of_other_types_and_endless_samplers_are_refused(told, harm, tmp_path):
    state, about = read_file(WEIGHTS / "stage2.safetensors")
    write_safetensors(tmp_path / "a.safetensors", harm(state, about), about)
    with pytest.raises(BadInput, match=f"a.safetensors.* {told}"):
        load_tiny(tmp_path / "a.safetensors", CPU)


@pytest.mark.parametrize("told", FOREIGN)
def test_foreign_weights_are_refused_by_name(told, raw):
    file = raw.parent / "foreign.pt"
    torch.save(FOREIGN[told](read_public(raw / DIT)[0]), file)
    with pytest.raises(BadInput, match=told) as refused:
        load_raw(raw, file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, content, told", [
    ("a.pth", b"GGUF" + bytes(99), "begins with b'GGUF.*fetch the model as safetensors"),
    ("a", b"<!doctype html><html>Entry not found", "begins with b'<!doc.*web page"),
    ("a", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", "git lfs pull"),
    ("a", b"hello", "neither safetensors nor"),
    ("a", b"", "empty.*fetch it again"),
    ("a", b"", "is no file"),
    ("a-1-of-2.pth", b"", "not hold all files NAME-1-of-2"),
    (".metadata", b"", "dcp_to_torch"),
    ("a.index.json", b"{}", "not hold all files NAME-1-of-2")])
def test_what_is_no_file_of_weights_is_named_for_what_it_is(name, content, told, tmp_path):
    file = tmp_path / name
    if told == "is no file":
        getattr(os, "mkfifo", lambda file: pytest.skip("there are no pipes here"))(file)
    else:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=told):
        read_file(file.parent if name == ".metadata" else file)


@pytest.mark.parametrize("share", [.04, .7], ids=["in what it says of itself", "in its tensors"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_one_wrong_bit_in_any_file_is_told_and_no_verify_takes_it(name, share, small_net, tmp_path):
    path, state = tmp_path / name, small_net.state_dict()
    if name == "a.pt":
        torch.save(state, path)
    else:
        save_weights(path, state, small_net.config, {"stage": "x"})
    assert len(read_file(path)[0]) == len(state)
    flip_bit(path, share)
    with pytest.raises(BadInput, match=f"cannot read {path} "):
        read_file(path)
    if share == .7:
        assert len(read_file(path, verify=False)[0]) == len(state)


@pytest.mark.parametrize("word", ["sha256", "about"])
def test_a_wrong_bit_in_the_name_of_the_checksum_is_told(word, small_net, tmp_path):
    save_weights(tmp_path / "a", small_net.state_dict(), small_net.config, {"stage": "x"})
    place = (tmp_path / "a").read_bytes().index(word.encode())
    flip_bit(tmp_path / "a", place=place)
    with pytest.raises(BadInput, match=f"cannot read {tmp_path}/a "):
        load(tmp_path / "a", DiT, DiTConfig)


def test_the_raw_folder_is_verified_unless_no_verify_says_otherwise(raw):
    flip_bit(raw / VAES["wan"])
    with pytest.raises(BadInput, match=f"{VAES['wan']} .*CRC-32"):
        load_raw(raw)
    load_raw(raw, verify=False)


IMPOSSIBLE = {  # what weights may say of themselves, by field
    "layers": [10 ** 9],
    "dim": [1e9, True, math.nan, 64],
    "heads": [5, -1],
    "text_len": [10 ** 8],
    "patch": [[0, 1], 3],
    "width": [64],
    "facts": [3],
    "sampler": [[], {"steps": math.inf}, {"pool": "x"}, {"shift": math.nan}, {"shift": 0.}],
}


EACH = [(field, value) for field, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize("field, value", EACH)
def test_what_weights_say_of_themselves_has_bounds(field, value, small_net, tmp_path):
    about = {"config": asdict(small_net.config), "facts": {}}
    places = {"sampler": about["facts"], "facts": about}
    places.get(field, about["config"])[field] = value
    write_safetensors(tmp_path / "a", small_net.state_dict(), about)
    with pytest.raises(BadInput, match=f"{field}|size mismatch") as refused:
        load(tmp_path / "a", DiT, DiTConfig)
    assert str(tmp_path / "a") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("about", ["[" * 10 ** 5, "null", '{"config": 3, "facts": {}}', "{}", "9" * 10 ** 5])
def test_metadata_that_is_no_object_is_told(about, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "a", {"about": about})
    with pytest.raises(BadInput, match="cannot (read|be)"):
        load(tmp_path / "a", DiT, DiTConfig)


@pytest.mark.parametrize("sizes, told", [
    ({"num_layers": 10 ** 9}, "layers"),
    ({"dim": "64"}, "dim"),
    ({"num_heads": 7}, "heads"),
    ({"text_len": None}, "text_len"),
    ([], "content cannot be")])
def test_wans_config_is_believed_within_bounds_alone(sizes, told, raw):
    stated = json.loads((raw / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps(stated | sizes if sizes else []))
    with pytest.raises(BadInput, match=f"config.json.*{told}"):
        load_raw(raw)


Q = "blocks.0.self_attn.q"
LORAS = {  # a pair for one weight under the names that programs give it, and what comes with it
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "longlive": ("model.model.{}.lora_A.default.weight", "model.model.{}.lora_B.default.weight"),
    "comfy": ("model.{}.lora_down.weight", "model.{}.lora_up.weight", "model.{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


@pytest.mark.parametrize("form", LORAS)
@pytest.mark.parametrize("config", [False, True])
def test_a_lora_is_merged_as_by_hand(form, config, raw, tmp_path, capsys):
    """alpha: 2 in the file, 3 in peft's adapter_config.json, else the rank, 4"""
    up = noise(64, 4)
    down = noise(4, 64, seed=1)
    path = tmp_path / "lora.pt"
    layer = Q.replace(".", "_") if form == "kohya" else Q
    names = [name.format(layer) for name in LORAS[form]]
    content = dict(zip(names, (down, up, torch.tensor(2.))))
    whole = read_public(raw / DIT)[0]
    if form == "longlive":  # the model in the same file
        content = {"generator_lora": content, "generator": prefixed("model.", whole), "critic_lora": {}}
    torch.save(content, path)
    if config:
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 3}')
    alpha = 2 if len(names) == 3 else 3 if config else 4
    ckpt = path if form == "longlive" else ""
    m = load_raw(raw, ckpt, lora=path)
    got, name = m.dit.state_dict(), f"{Q}.weight"
    close(got[name], whole[name] + alpha / 4 * up @ down, 1e-5)
    assert all(torch.equal(got[key], whole[key]) for key in whole if key != name)
    assert "lora.pt" in m.name
    if ckpt:
        assert torch.equal(load_raw(raw, ckpt).dit.state_dict()[name], whole[name])
        assert "holds a LoRA too" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", ["NaN", "1e400", '"3"'])
def test_a_loras_alpha_is_a_finite_number(alpha, tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({f"{Q}.lora_A.weight": noise(4, 64), f"{Q}.lora_B.weight": noise(64, 4)}, path)
    (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
    with pytest.raises(BadInput, match="adapter_config.json .*lora_alpha cannot be"):
        tensors.read_lora(path, [f"{Q}.weight"])


@pytest.mark.parametrize("wan", ["random:1048576x1", "random:512x10000", "random:16384x7"])
def test_random_networks_are_no_larger_than_any_of_wans(wan, refused):
    assert "DIM * DIM * LAYERS must lie from" in refused("--wan", wan, "--seconds", "1")


@pytest.mark.parametrize("change, told", [
    ({"blocks.9.self_attn.q.lora_A.weight": torch.zeros(4, 64)}, "blocks.9.* no place"),
    ({f"{Q}.lora_B.weight": None}, f"lora.pt: {Q}.weight lacks one of lora_A and lora_B"),
    ({"blocks.1.self_attn.k.alpha": torch.tensor(1.)}, "blocks.1.self_attn.k.weight lacks"),
    ({f"{Q}.lora_A.weight": torch.zeros(4, 63)}, "lora_A and lora_B must fit"),
    ({f"{Q}.lora_A.weight": torch.zeros(0, 64)}, "lora_A and lora_B must fit"),
    ({f"{Q}.lora_magnitude_vector": torch.zeros(64)}, "no place"),
    ({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, "torch.int8, is quantised"),
    ({f"{Q}.alpha": torch.tensor(math.nan)}, "not finite")])
def test_a_lora_that_does_not_fit_wholly_is_refused(change, told, raw, tmp_path):
    pair = {f"{Q}.lora_A.weight": torch.zeros(4, 64), f"{Q}.lora_B.weight": torch.zeros(64, 4)}
    pair = {key: tensor for key, tensor in (pair | change).items() if tensor is not None}
    torch.save(pair, tmp_path / "lora.pt")
    with pytest.raises(BadInput, match=told):
        load_raw(raw, lora=tmp_path / "lora.pt")


@pytest.mark.parametrize("words, told", [
    (["--ckpt", WEIGHTS / "teacher.safetensors"], "comes from stage teacher, where a"),
    (["--ckpt", WEIGHTS / "init_ar.safetensors"], "^(?!.*stage)"),
    (["--wan", "RAW", *SMALL_WAN[:4]], "give a student of it by --ckpt"),
    (["--ckpt", "RAW/student.pt"], "need --wan"),
    (["--lora", "a"], "need --wan"),
    (["--wan", "RAW", "--ckpt", WEIGHTS / "stage2.safetensors"], "without --wan")])
def test_weights_that_are_not_for_this_use_are_told(words, told, raw, sampled, tmp_path, capsys):
    """With a warning where they run, else in the one line of a refusal."""
    words = [str(word).replace("RAW/", f"{raw.parent}/").replace("RAW", str(raw)) for word in words]
    code = sampled(tmp_path / "o", "--seconds", ".1", *words)[1]
    error = capsys.readouterr().err
    assert re.search(told, error, re.S)
    assert code == (2 if error.startswith("error: ") else 0)
    assert ("need --wan" in told or "without" in told) == (code == 2)


@pytest.mark.parametrize("name", [DIT, "config.json", T5, TOKENIZER, VAES["wan"], VAES["tae"]])
def test_damaged_and_missing_files_say_how_to_get_them(name, raw):
    vae = "tae" if name == VAES["tae"] else "wan"
    content = (raw / name).read_bytes()
    for damaged in (content[:len(content) // 2], b""):
        (raw / name).write_bytes(damaged)
        with pytest.raises(BadInput, match=f"cannot read .*{name}.* fetch it again"):
            load_raw(raw, vae=vae, prompts=["a calm sea"])
    (raw / name).unlink()
    with pytest.raises(BadInput, match=f"cannot read .*{name}.* hf download .*taehv"):
        load_raw(raw, vae=vae, prompts=["storm"])


def test_a_tokenizer_of_another_encoder_is_named(raw):
    words = json.loads((raw / TOKENIZER).read_text())
    words["model"]["vocab"]["calm"] = 2 ** 32 - 1
    (raw / TOKENIZER).write_text(json.dumps(words))
    with pytest.raises(BadInput, match=f"{TOKENIZER}: an id must lie from 0 to 7, not 4294967295"):
        load_raw(raw, prompts=["a calm sea"])


def test_no_code_of_a_pickle_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)
    torch.save({"model": Code()}, tmp_path / "code.pt")
    with pytest.raises(BadInput, match="holds more than tensors"):
        read_public(tmp_path / "code.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package, size, told", [
    ("", "100x100", "multiples of 16"),
    ("", "big", "multiples of 16"),
    ("", "0x32", "multiples of 16"),
    ("ftfy", "32x32", "ftfy"),
    ("tokenizers", "32x32", "tokenizers")])
def test_sizes_that_do_not_fit_and_missing_packages_are_told(package, size, told, raw, monkeypatch):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((BadInput, ModuleNotFoundError), match=told):
        load_raw(raw, size=size, prompts=["c"])


@pytest.mark.slow
@pytest.mark.speed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["a.safetensors", "b.pth"])
def test_loading_takes_no_more_host_memory_than_a_fifth_above_the_file(name, tmp_path):
    """A float32 DiT of 0.1 GB, taken as bf16: the process grows by at most 1.2 times the file."""
    with torch.device("meta"):
        net = DiT(DiTConfig(512, 2986, 4, 4))
    state = {k: torch.zeros(v.shape, device="cpu") for k, v in net.state_dict().items()}
    write = save_file if name.endswith("safetensors") else torch.save
    write(state, tmp_path / name)
    code = """if True:
        import sys, torch, pathlib
        from model import DiT, DiTConfig
        from weights import load_on_device
        path = pathlib.Path(sys.argv[1])
        with torch.device("meta"):
            net = DiT(DiTConfig(512, 2986, 4, 4))
        def most():  # ru_maxrss would start at the parent's
            return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = most()
        load_on_device(net, path, "cpu", torch.bfloat16)
        print((most() - before) * 1024 / path.stat().st_size)"""
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    grown = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert .4 < float(grown) <= 1.2


# ---- the full-size model -----------------------------------------------------------------------------------

def test_a_full_size_chunk_has_constant_shapes_and_no_step_that_waits_for_data():
    """On the meta device tensors have no values: .item(), bool() or an index from data would raise."""
    shapes = []

    def note(module, args):
        latents, memory = args[0], args[4]
        if memory is not None:
            seen = latents, memory[0].keys, memory[0].values
            shapes.append([tuple(z.shape) for z in seen])
    with torch.device("meta"), torch.no_grad():
        net = DiT(replace(DiTConfig(), layers=1))
        net.register_forward_pre_hook(note)
        text = net.text(torch.empty(1, 7, 4096))
        roll = Rollout(net, text, PRESETS["slowfast"], (30, 52))
        made = [x0.shape for x0 in generate(roll, [0], 10, Sampler(), (16, 60, 104))]
    assert made == [(1, 3, 16, 60, 104)] * 10
    full = shapes[-20:]  # of 5 passes in each of the last 4 chunks
    assert all(found == full[0] for found in full)
    assert full[0][1] == (1, 21 * 1560, 12, 128)
    with pytest.raises(RuntimeError):
        roll.similarities[-1].item()  # what this test would have caught


def test_a_rollout_and_the_students_step_wait_for_no_data_and_mix_no_devices():
    """On the meta device, where tensors have no values, from Algorithm 1 to the gradients of every weight."""
    with torch.device("meta"):
        small = DiTConfig(256, 512, 2, 2, recompute=True)
        student, teacher, critic = (DiT(small) for _ in range(3))
        features = torch.empty(1, 7, 4096)
        t = torch.empty(1)
        eps = torch.empty(1, 21, 16, 8, 8)
        with torch.no_grad():
            roll = Rollout(student, student.text(features), PRESETS["slowfast"], (4, 4))
    with torch.no_grad():
        draw = lambda *_: torch.empty(1, 3, 16, 8, 8, device="meta")
        trace = dmd.rollout(roll, LEVELS, 1, draw, 14, 7)
    dmd.student_step(student, teacher, critic, features, trace, t, eps, (4, 4), 3., features)
    assert trace.context.shape[1] == 21
    assert all(p.grad is not None for p in student.parameters())


def test_with_compile_nothing_is_compiled_again_once_memory_is_full_not_where_the_prompt_switches():
    net = random_dit(dim=32, ffn_dim=64, heads=1, layers=1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(compiled):
        roll = Rollout(net, random_text(net), PRESETS["slowfast"], (2, 4), compiled=compiled)
        switch = {14: random_text(net, seed=7)}
        chunks = generate(roll, [3], 16, Sampler(), (16, 4, 8), texts=switch)
        return [(x0, len(graphs)) for x0 in chunks]
    plain = run(None)
    fast = run(torch.compile(net, backend=backend, dynamic=False, fullgraph=True))
    # one graph, made for chunk 6, the first that sees 18 latents
    assert [count for _, count in fast] == [0] * 6 + [1] * 10
    for (want, _), (got, _) in zip(plain, fast, strict=True):
        close(got, want, 1e-4)


# ---- on a GPU: whatever a first run there would meet -------------------------------------------------------

@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.cuda.reset_peak_memory_stats()
    return torch.device("cuda", 0)


@pytest.mark.cuda
@pytest.mark.parametrize("words", [
    "--seconds 8", "--seconds 8 --compile", "--seconds 8 --teacher", "--wan random --seconds 4",
    "--wan random --seconds 8 --vae tae --compile", "--wan random --vae tae --bench"])
def test_on_a_gpu_the_tiny_and_the_full_size_make_videos(words, gpu, clips, sampled, tmp_path, capsys):
    words = words.split()
    more = ["--continue", clips[0]] if "--teacher" in words else []
    frames, code = sampled(tmp_path, *words, *more, "--device", "cuda")
    assert code == 0
    if "--bench" in words:
        assert "frames/s" in capsys.readouterr().out
    else:
        assert len(frames) == 16 * int(words[words.index("--seconds") + 1])
        assert frames.std() > 1
    with capsys.disabled():
        print("\n", torch.cuda.get_device_name(), *words, bench.peak_memory(gpu))


@pytest.mark.cuda
def test_on_a_gpu_the_first_frames_are_those_of_the_cpu(gpu, sampled, tmp_path):
    words = ["--seconds", "2", "--dtype", "fp32", "--device"]
    there, here = (sampled(tmp_path / device, *words, device)[0] for device in ("cuda", "cpu"))
    assert abs(there.astype(float) - here).mean() < 2


@pytest.mark.cuda
@pytest.mark.parametrize("stage", STAGES)
def test_on_a_gpu_every_stage_goes_on_with_what_belongs_to_the_host_there(stage, gpu, small_training,
                                                                          monkeypatch):
    go, out = small_training
    part = out / train.PARTS[stage][-1]
    load_checkpoint, hosted = train.load_checkpoint, []

    def watched(folder, nets, optimizers, others, verify):
        step = load_checkpoint(folder, nets, optimizers, others, verify)
        if step:
            states = [state for optimizer in optimizers for state in optimizer.state.values()]
            hosted.extend(state["step"] for state in states if "step" in state)
            hosted.extend([others["bank"].errors] if "bank" in others else [])
            assert {p.device.type for p in nets.parameters()} == {"cuda"}
        return step
    monkeypatch.setattr(train, "load_checkpoint", watched)
    for _ in range(2):
        go("--stage", stage, "--updates", "4", "--device", "cuda")
        forget(part, 4)
    assert hosted
    assert all(tensor.device.type == "cpu" for tensor in hosted)
    lines = [line for line in logged(part) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 3, 4]
    assert all(line["skipped"] == 0 for line in lines)


@pytest.mark.cuda
@pytest.mark.parametrize("stage", ["1", "2"])
def test_on_a_gpu_training_at_832x480_takes_the_memory_of_its_estimate(stage, gpu, tmp_path, capsys):
    """Four layers of Wan's thirty, under torchrun on as many GPUs as there are, two at most."""
    prompts = tmp_path / "prompts.txt"
    processes = min(2, torch.cuda.device_count())
    prompts.write_text("a calm sea\na storm rises\n")
    script = tmp_path / "one.py"
    # without the strip, whose autoencoder may need more than so few layers
    script.write_text(f"import sys, torch\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
                      "sys.argv[0] = 'train.py'\ntrain.save_strip = lambda *given: None\ntrain.main()\n"
                      "print('peak', torch.cuda.max_memory_allocated())\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--wan", "random:1536x4", "--stage", stage, "--updates", "2", "--accumulate", "2"]
    words += ["--data", prompts, "--device", "cuda", "--out", tmp_path / "out"]
    told = subprocess.run([*torchrun, "--nproc_per_node", str(processes), script, *words],
                          check=True, timeout=600, capture_output=True, text=True).stdout
    peak = max(int(number) for number in re.findall(r"peak (\d+)", told))
    need = bench.training_memory(f"stage{stage}", DiT(DiTConfig(layers=4)), 1560, processes)
    with capsys.disabled():
        print(f"\nstage {stage}, 4 layers, {processes} GPUs: {peak / 1e9:.1f} GB of {need / 1e9:.1f}")
    assert need == pytest.approx(peak, rel=.15)


# ---- scores of real videos: the formulas of the paper and of VBench, on files ------------------------------

def by_hand(features, other, fps):
    """VBench's consistency, then the paper's windows with `other`, one cosine at a time"""
    f = [z / np.linalg.norm(z) for z in np.asarray(features, float)]
    other = np.asarray(other, float) / np.linalg.norm(other)
    pairs = [(max(0, now @ last) + max(0, now @ f[0])) / 2
             for last, now in itertools.pairwise(f)]
    scores = [np.mean(pairs) if pairs else np.nan]
    for t in metrics.SECONDS:
        near = [z @ other for i, z in enumerate(f) if t - .5 <= i / fps <= t + .5]
        scores.append(np.mean(near) if near else np.nan)
    return scores


@pytest.mark.parametrize("n, fps", [
    (960, 16),
    (153, 16),
    (152, 16),
    (1, 16),
    (63, 6.25)])
def test_consistency_and_windows_are_the_formulas_and_end_with_the_video(n, fps):
    x = np.random.default_rng(n).standard_normal((n, 4)) + .3  # many cosines below 0
    f = F.normalize(torch.from_numpy(x).float())
    windows = metrics.windows("a", f @ f[0], torch.arange(n) / fps)
    got = [metrics.consistency(f), *windows.values()]
    np.testing.assert_allclose(got, by_hand(x, x[0], fps), atol=1e-5)
    assert np.isnan(got[0]) == (n == 1)
    assert np.isnan(got[1]) == (n in (152, 1))  # 153 frames reach the window of 10 s by one


@pytest.fixture
def score_videos(tmp_path, monkeypatch):
    """in/: a video that moves, one that stands still, one frame -> a function: words -> rows"""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    moves = np.random.default_rng(0).integers(0, 256, (21, 16, 22, 3), np.uint8)
    moves = moves.repeat(16, 1).repeat(16, 2)
    videos = {"a-cat-0": moves, "a-cat-1": moves[:1].repeat(21, 0), "a-dog-0": moves[:1]}
    for name, frames in videos.items():
        iio.imwrite(f"in/{name}.mp4", frames, plugin="FFMPEG", fps=2)
    Path("lines").write_text("A cat!\nA dog.\nHalf")

    def score(words):
        monkeypatch.setattr("sys.argv", ["metrics.py", "--device", "cpu", *words.split()])
        config.run(metrics.main)
        return {row["video"]: row for row in csv.DictReader(Path("out/videos.csv").read_text().splitlines())}
    return score


def random_networks(kind):
    """A tiny DINO in dino/ and a tiny CLIP in clip/, which takes 256 x 256: the middle of a frame as it is"""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    dino = tf.AutoModel.from_config(tf.AutoConfig.for_model(kind, **size, image_size=224, patch_size=56))
    dino.eval().save_pretrained("dino")
    text = tf.CLIPTextConfig(**size, vocab_size=6, bos_token_id=0, eos_token_id=1)
    vision = tf.CLIPVisionConfig(**size, image_size=256, patch_size=64)
    both = tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    clip = tf.CLIPModel(both).eval()
    clip.save_pretrained("clip")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "c": 3, "a": 4, "t</w>": 5}
    Path("clip/vocab.json").write_text(json.dumps(words))
    Path("clip/merges.txt").write_text("#version: 0.2\n")
    Path("clip/tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return dino, clip, tf.AutoTokenizer.from_pretrained("clip")


def coloured(frame, colours):
    """(h, w, 3) 0..255 -> (1, 3, h, w)"""
    mean, deviation = colours
    return rearrange(torch.from_numpy((frame / 255 - mean) / deviation).float(), "h w c -> 1 c h w")


def linear(n):
    """(7 n / 8, n): weights of a resizing between the two nearest pixels, not antialiased"""
    places = np.arange(.5, n * .875) / .875 - .5
    return np.stack([np.interp(places, range(n), z) for z in np.eye(n)], 1)


@uses_transformers
@pytest.mark.parametrize("part, name, size", [
    ("", "num_hidden_layers", 100_000),
    ("", "hidden_size", 1_000_000),
    ("text_config", "num_hidden_layers", 1000)])
def test_networks_of_sizes_that_none_has_are_refused_before_they_are_made(part, name, size, tmp_path):
    told = {"model_type": "dinov2", "text_config": {}}
    (told[part] if part else told)[name] = size
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match=f": {name} must lie from 1"):
        metrics.load_network("--dino", tmp_path, ("dinov2",))


@uses_transformers
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_scores_of_files_are_a_plain_loop_over_frames(kind, score_videos):
    dino, clip, words = random_networks(kind)
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    dinos, clips = [], []
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(**words("A cat!", return_tensors="pt"))[1])[0]
        for frame in iio.imread("in/a-cat-0.mp4", plugin="FFMPEG"):
            small = np.einsum("hwc,yh,xw->yxc", frame, linear(256), linear(352), optimize=True)
            dinos.append(dino(coloured(small, metrics.DINO_COLOURS), **more)[0][0, 0].numpy())
            middle = coloured(frame[:, 48:304], metrics.CLIP_COLOURS)
            clips.append(clip.visual_projection(clip.vision_model(middle)[1])[0].numpy())
    rows = score_videos("--videos in --dino dino --clip clip --prompts lines")
    moves, stands, dog = (rows[f"{name}.mp4"] for name in ("a-cat-0", "a-cat-1", "a-dog-0"))
    for whole, windows, features, other in (
            ("subject", "dino", dinos, dinos[0]),
            ("background", "clip_t", clips, text),
            ("background", "clip_f", clips, clips[0])):
        names = [whole, *(f"{windows}_{t}" for t in metrics.SECONDS)]
        scores = [float(moves[name]) for name in names]
        np.testing.assert_allclose(scores, by_hand(features, other, 2), atol=1e-4)
        assert float(stands[whole]) == pytest.approx(1, abs=1e-3)
        assert dog[whole] == "nan"
    assert dog["prompt"] == "A dog."
    # the means of videos so long, under the paper's
    lines = Path("out/videos.md").read_text().splitlines()
    ours = [line for line in lines if line.startswith("| these videos |")]
    mean = 50 * (float(moves["dino_10"]) + float(stands["dino_10"]))
    assert f" {mean:.2f} |" in ours[0] and len(ours) == 3


@pytest.fixture
def grey_networks(monkeypatch):
    """In place of DINO and CLIP, where only files and times matter: a frame's feature is its mean grey."""
    net = SimpleNamespace(device="cpu", config=SimpleNamespace(text_config=SimpleNamespace()))
    net.config.text_config.max_position_embeddings = 9
    net.to = lambda device: net

    def words(prompt, **more):
        return SimpleNamespace(to=lambda device: {"prompt": prompt})

    def grey(net, frames):
        level = frames.float().mean((1, 2, 3))
        return F.normalize(torch.stack([level, torch.full_like(level, 100)], 1))
    monkeypatch.setattr(metrics, "load_network", lambda *about: (net, words))
    monkeypatch.setattr(metrics, "dino_features", grey)
    monkeypatch.setattr(metrics, "clip_features",
                        lambda net, frames, ids: (grey(net, frames), torch.tensor([[0., 1.]])))


def test_any_video_is_scored_at_its_times(score_videos, grey_networks):
    """12 s, of which the last 9 have a frame a second"""
    grey = "color=black:s=32x32:r=25:d=12,geq=lum=16+18*T:cb=128:cr=128,select='lt(t,3)+not(mod(n,25))'"
    film("in/TIMES.MKV", grey, "-fps_mode", "vfr", "-c:v", "ffv1")
    row = score_videos("--videos in")["TIMES.MKV"]
    level = 18 * 10 / 219 * 255  # of the one frame near 10 s
    assert float(row["clip_t_10"]) == pytest.approx(100 / math.hypot(level, 100), abs=.01)
    assert row["clip_t_20"] == "nan"


def test_a_video_of_which_ffmpeg_gives_fewer_frames_than_it_tells_of_is_no_score(
        score_videos, grey_networks, monkeypatch, capsys):
    """As ffmpeg 4.2 does: of a webm of 50 frames 49, of a GIF of 96 it gives 200."""
    read = video.Clip.read
    monkeypatch.setattr(video.Clip, "read", lambda clip, *size: itertools.islice(read(clip, *size), 1, None))
    with pytest.raises(SystemExit, match="2"):
        score_videos("--videos in")
    assert "a-cat-0.mp4: this ffmpeg cannot count its frames" in capsys.readouterr().out


def test_videos_that_cannot_be_read_are_listed_and_the_list_that_made_a_set_scores_it(
        score_videos, grey_networks, capsys):
    whole = Path("in/a-cat-0.mp4").read_bytes()
    Path("in/half-0.mp4").write_bytes(whole[:9999])
    Path("in/noise-0.mp4").write_bytes(whole[:40000] + bytes(range(250)) * 40 + whole[50000:])
    # no text, where a name can be that
    strange = os.fsdecode(b"m\xe4rz-0.mp4") if sys.platform == "linux" else "m\xe4rz-0.mp4"
    Path("in", strange).write_bytes(whole)
    Path("in/folder.mp4").mkdir()
    prompt = "一只狗 | 3: a cat"
    made = {"file": "a-dog-0.mp4", "prompt": prompt, "seed": 0, "options": {}, "model": "", "sha256": ""}
    Path("in/manifest.jsonl").write_text(json.dumps(made) + "\n{cut")
    rows = score_videos("--videos in")
    told = capsys.readouterr()
    assert "skipped: cannot read the clip in/half-0.mp4 (moov" in told.out and "line 2" in told.err
    assert "in/noise-0.mp4 is damaged" in told.out
    escaped = strange.encode("utf-8", "backslashreplace").decode()
    assert set(rows) == {"a-cat-0.mp4", "a-cat-1.mp4", "a-dog-0.mp4", escaped}
    assert rows["a-dog-0.mp4"]["prompt"] == prompt
    assert rows["a-cat-0.mp4"]["prompt"] == "a-cat"
    Path("list").write_text(f"{prompt}\nA cat!\n", "utf-8-sig")
    rows = score_videos("--videos in --prompts list")
    assert {row["prompt"] for row in rows.values()} == {prompt, "A cat!"}
    assert len(rows) == 3


@uses_transformers
def test_networks_without_all_their_weights_are_refused(score_videos, capsys):
    dino, *_ = random_networks("vit")
    biases = {name: x for name, x in dino.state_dict().items() if "bias" in name}
    save_file(biases, "dino/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        score_videos("--videos in --dino dino --clip clip")
    assert "weights are missing" in capsys.readouterr().err


@pytest.mark.parametrize("script, words, told", [
    (metrics, "--videos nowhere", "no video"),
    pytest.param(metrics, "--videos in --dino gone", "requirements-eval.txt", marks=uses_transformers),
    (metrics, "--videos in --prompts no", "cannot read"),
    (metrics, "--videos in --prompts birds", "no video to score"),
    (metrics, "--videos in --out dogs/o", "cannot write to"),
    (evaluate, "--out dogs/o", "cannot write to"),
    (evaluate, "--memory slofast", "did you mean slowfast?"),
    (evaluate, "--worlds -1", "from 0 to"),
    (evaluate, "--tau 2", "from -1 to 1"),
    (evaluate, "--steps 0", "from 1 to"),
    (evaluate, "--seed -5", "from 0 to")])
def test_bad_input_for_an_evaluation_is_told_in_one_line(script, words, told, score_videos, refusal):
    Path("dogs").write_text("A dog.")
    Path("birds").write_text("A bird.")
    assert told in refusal(script, *words.split())
