import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import flow
from memory import CHUNK, Memory, Policy
from model import DiT, DiTConfig, fill
from rope import rotate, table
from text import TextConfig, TextEncoder, bucket
from vae import TAE, TAEConfig

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN", HERE / "golden"))


# ---- golden vectors: the official code's numbers ----------------------------------------------------------------------

def golden(name):
    """-> config (values parsed from JSON where they are), weights, inputs, outputs"""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        config = {}
        for k, v in json.loads(f.metadata()["config"]).items():
            try:
                config[k] = json.loads(v)
            except json.JSONDecodeError:
                config[k] = v
        parts = {"weights": {}, "in": {}, "out": {}}
        for k in f.keys():
            kind, _, rest = k.partition(".")
            parts[kind][rest] = f.get_tensor(k)
    return config, parts["weights"], parts["in"], parts["out"]


def golden_dit(name):
    c, weights, given, want = golden(name)
    config = DiTConfig(c["dim"], c["ffn_dim"], c["num_heads"], c["num_layers"], c["freq_dim"], c["text_dim"], c["text_len"],
                       c["in_dim"], c["patch_size"][-1])
    return c, fill(DiT(config), weights).eval().requires_grad_(False), given, want


def close(got, want, atol):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= atol


def frames_first(x):
    return x.transpose(1, 2)  # the goldens are (b, c, f, h, w)


def rope_of(net, time, x):
    p = net.config.patch
    return table(time, x.shape[-2] // p, x.shape[-1] // p, net.config.dim // net.config.heads)


def test_golden_bidirectional_dit_and_its_inner_taps():
    _, net, given, want = golden_dit("wan_dit")
    x, taps = frames_first(given["x"]), {}
    f = x.shape[1]
    hooks = {"time_emb": net.time_embedding, "time_proj": net.time_projection, "text_emb": net.text_embedding,
             "block0_self_attn": net.blocks[0].self_attn, "block0_cross_attn": net.blocks[0].cross_attn, "block0": net.blocks[0]}
    for name, module in hooks.items():
        module.register_forward_hook(lambda m, i, out, name=name: taps.update({name: out[0] if isinstance(out, tuple) else out}))
    net.time_embedding.register_forward_pre_hook(lambda m, i: taps.update(time_sinusoid=i[0]))
    t = (given["t"] / 1000)[:, None].expand(-1, f)
    v, _ = net(x, t, net.text(given["context"]), rope_of(net, torch.arange(f), x))
    close(frames_first(v), want["pred"], 2e-5)
    for name in taps:
        close(taps[name][:, 0] if name.startswith("time") else taps[name], want[name], 2e-5)
    assert len(taps) == 7


@pytest.mark.parametrize("which", ["global", "local", "sink"])
def test_golden_causal_dit_with_cache(which):
    """The official caches are our Memory with sizes from the file; a re-run of the same chunk replaces its entries."""
    c, net, given, want = golden_dit("wan_causal")
    window, sink = c["sets"][which]
    x = [frames_first(given[f"x{i}"]) for i in range(len(c["start_frames"]))]
    chunk, n = x[0].shape[1], c["frame_seqlen"]
    policy = Policy(0, 0, 10 ** 6) if window == -1 else Policy(sink, 0, window - sink)
    memory, text = Memory(policy), net.text(given["context"])
    for i, start in enumerate(c["start_frames"]):
        again = i > 0 and start == c["start_frames"][i - 1]
        if not again:
            if i > 0:
                memory.push(made, torch.zeros(1, dtype=torch.bool))
            memory.make_room(chunk)
        held = memory.read()
        old = rope_of(net, held[0][0], x[i]) if held else None
        seen = [(rotate(k.flatten(1, 2), old), v.flatten(1, 2)) for k, v in zip(held[1::2], held[2::2])] or None
        frames = torch.arange(start, start + chunk)
        v, kv = net(x[i], given[f"t{i}"] / 1000, text, rope_of(net, frames, x[i]), seen)
        close(frames_first(v), want[f"{which}.call{i}"], 2e-5)
        made = [frames[None], *(z.unflatten(1, (chunk, n)) for pair in kv for z in pair)]
        if i == c["num_clean_chunks"] - 1:
            k0 = torch.cat([seen[0][0], rotate(kv[0][0], rope_of(net, frames, x[i]))], 1) if seen else rotate(kv[0][0], rope_of(net, frames, x[i]))
            v0 = torch.cat([seen[0][1], kv[0][1]], 1) if seen else kv[0][1]
            close(k0, want[f"{which}.cache_k0"][:, :k0.shape[1]], 2e-5)
            close(v0, want[f"{which}.cache_v0"][:, :v0.shape[1]], 2e-5)


def test_golden_blockwise_and_teacher_forcing_passes():
    c, net, given, want = golden_dit("wan_causal")
    distinct = [i for i, s in enumerate(c["start_frames"]) if i == c["start_frames"].index(s)]
    x = torch.cat([frames_first(given[f"x{i}"]) for i in distinct], 1)
    t = torch.cat([given[f"t{i}"] for i in distinct], 1) / 1000
    f, text, size = x.shape[1], net.text(given["context"]), c["num_frame_per_block"]
    block = torch.arange(f) // size
    v, _ = net(x, t, text, rope_of(net, torch.arange(f), x), mask=(block[:, None] >= block[None])[None])
    close(frames_first(v), want["blockwise"], 2e-5)
    both = torch.cat([x, frames_first(given["teacher_forcing_noisy"])], 1)
    levels = torch.cat([torch.zeros(1, f), given["teacher_forcing_t"] / 1000], 1)
    clean = torch.cat([block[:, None] >= block[None], torch.zeros(f, f, dtype=torch.bool)], 1)
    noisy = torch.cat([block[:, None] > block[None], block[:, None] == block[None]], 1)
    v, _ = net(both, levels, text, rope_of(net, torch.arange(f).repeat(2), x), mask=torch.cat([clean, noisy])[None])
    close(frames_first(v[:, f:]), want["teacher_forcing"], 2e-5)


def test_golden_text_encoder_and_position_buckets():
    c, weights, given, want = golden("umt5")
    config = TextConfig(c["vocab"], c["dim"], c["dim_attn"], c["dim_ffn"], c["num_heads"], c["num_layers"], c["num_buckets"])
    net, taps = fill(TextEncoder(config), weights).eval(), {}
    net.blocks[0].register_forward_hook(lambda m, i, out: taps.update(block0=out))
    with torch.no_grad():
        context = net(given["ids"].long(), given["mask"].long())
    close(context, want["context"], 2e-5)
    valid = given["mask"].bool()
    close(taps["block0"][valid], want["block0"][valid], 2e-5)
    assert torch.equal(bucket(given["rel_offset"].long(), c["num_buckets"]), want["rel_bucket"].long())


def test_golden_tiny_autoencoder_encodes_decodes_and_streams():
    c, weights, given, want = golden("tae")
    tae = fill(TAE(TAEConfig(c["encoder_width"], tuple(c["decoder_widths"]), c["latent_channels"])), weights).eval()
    with torch.no_grad():
        close(tae.run(tae.encoder, given["video"], None)[0], want["encoded"], 1e-4)
        close(tae.run(tae.decoder, given["latent"], None)[0][:, c["frames_to_trim"]:], want["decoded_raw"], 1e-4)
        close(tae.decode(given["latent"])[0] * .5 + .5, want["decoded"], 1e-4)
        past, parts = None, []
        for z in given["latent"].split(1, dim=1):
            frames, past = tae.decode(z, past)
            parts.append(frames * .5 + .5)
    close(torch.cat(parts, 1), want["decoded"], 1e-4)


def test_golden_schedule_noise_and_velocity():
    """The official scheduler snaps t to a table of 1,000 levels; this project does not, so the test snaps first."""
    c, _, given, want = golden("flow")
    shift, n = c["shift"], int(c["num_train_timesteps"])
    sigmas = torch.tensor(flow.schedule(n, shift), dtype=torch.float64).float()
    close(sigmas, want["sigmas"], 2e-5)
    close(sigmas * 1000, want["timesteps"], 2e-2)  # timesteps reach 1000: 2e-5 relative
    steps = given["denoising_step_list_unwarped"].double()
    close((flow.shifted(steps / n, shift) * 1000).float(), want["denoising_step_list"].float(), 2e-2)
    t = sigmas[(sigmas[None] * 1000 - given["t"][:, None]).abs().argmin(1)][:, None]  # (b, 1): snapped

    def one(x):
        return x[:, None]  # the vectors have no frame axis
    xt = flow.add_noise(one(given["x0"]), one(given["noise"]), t)
    close(xt[:, 0], want["xt"], 2e-5)
    close(flow.x0_from_v(xt, one(given["flow"]), t)[:, 0], want["x0_from_flow"], 2e-5)
    close((one(given["noise"]) - one(given["x0"]))[:, 0], want["flow_target"], 2e-5)
    relative = (flow.v_from_x0(xt, one(given["x0"]), t)[:, 0] - want["flow_from_x0"]).abs() / want["flow_from_x0"].abs().clamp(min=1)
    assert relative.max() <= 2e-5 / t.min()  # dividing by t amplifies rounding
    k = len(want["euler_step"])
    ids = (sigmas[None] - t[:k]).abs().argmin(1)
    next_t = torch.cat([sigmas, torch.zeros(1)])[ids + 1][:, None]
    step = xt[:k] + flow.over_frames(next_t - t[:k]) * one(given["flow"])[:k]
    close(step[:, 0], want["euler_step"], 2e-5)


def keys(net):
    return {k: list(v.shape) for k, v in net.state_dict().items()}


def test_golden_names_and_shapes_of_the_full_size_networks():
    with torch.device("meta"):
        nets = {"keys_1_3B": DiT(DiTConfig()), "keys_umt5_xxl": TextEncoder(TextConfig()), "keys_tae": TAE(TAEConfig())}
    for name, net in nets.items():
        assert keys(net) == json.loads((HERE / "golden" / f"{name}.json").read_text()), name
