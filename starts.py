"""
What a part of the training starts from: networks, clips or prompts, text features, the type of its passes.

References: Self-Forcing, arXiv 2506.08009 (the negative prompt, which is Wan's).
Leaves out: starting a part from another one's optimizer states.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from checkpoint import barrier, get_processes, get_rank
from config import BadInput, fast_layout
from data import ClipFolder, WorldClips, latent_cache
from flow import Sampler
from model import DiT, DiTConfig, tiny_dit
from tensors import hash_file, load_state_dict_strict, read_public
from text import TextConfig, TextEncoder, encode_captions, read_prompts, tiny_text
from vae import TAE, TAEConfig, tiny_tae
from weights import (DIT, WEIGHTS, Networks, check_partner, is_random, load, load_wan, make_sampler,
                     trained_file, wan_text)

NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # Wan's
            "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
            "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


@dataclass
class Inputs(Networks):
    """What a part starts from, in weights.Networks, and what it is trained on."""
    encoder: TextEncoder = None  # None at full size, where text features lie in files
    device: torch.device = None
    prompts: list = ()           # of --data; none: the small world's captions
    clips: object = None         # a data.ClipFolder of --data, or data.WorldClips, if the part takes clips
    autocast: object = None      # of forward passes


def find_weights(cfg, name, given=""):
    """The file given, else what this --out has trained under that name, else (small world) what ships."""
    own = trained_file(cfg.out, name)
    if given or own.exists():
        return given or own
    return Path(cfg.wan, DIT) if cfg.wan else WEIGHTS / own.name


def hash_starts(cfg, part, preset):
    """-> {"sha256 of NAME": of each file that a part begins with}"""
    starts = {preset.start: cfg.init, preset.teacher: cfg.teacher}
    if part != "vae" and not cfg.wan:
        starts |= {"vae": ""} | ({"text": ""} if preset.start else {})
    files = {name: Path(find_weights(cfg, name, given)) for name, given in starts.items() if name}
    return {f"sha256 of {name}": hash_file(file) for name, file in files.items() if file.is_file()}


def tiny_inputs(cfg, part, preset, device):
    """The small world: networks of the part before it, or new ones."""
    torch.manual_seed(cfg.seed)
    sampler = Sampler(shift=3.)
    net = encoder = None
    # the network, and the text encoder that belongs to it
    if part == "init_ar":
        net = DiT(tiny_dit).initialise().to(device)
        encoder = TextEncoder(tiny_text).to(device)
    elif preset.start:
        net, sampler = load_part(cfg, preset.start, cfg.init, device)
        encoder, _ = load(find_weights(cfg, "text"), TextEncoder, TextConfig)
        encoder.to(device)
    # the autoencoder
    vae = TAE(tiny_tae).initialise() if part == "vae" else load(find_weights(cfg, "vae"), TAE, TAEConfig)[0]
    vae.to(device, memory_format=fast_layout(device))
    return Inputs(net, vae, partial(encode_captions, encoder, device), sampler, part, encoder=encoder)


def load_part(cfg, name, given, device):
    """A DiT of the small world, and how it is sampled."""
    file = find_weights(cfg, name, given)
    net, facts = load(file, DiT, DiTConfig)
    for partner in ("text", "vae"):
        check_partner(file, facts, partner, find_weights(cfg, partner))
    return net.to(device), make_sampler(file, facts)


def load_wan_part(cfg, name, given, device):
    """A network of Wan's form, in a weights.Networks."""
    file = find_weights(cfg, name, given)
    is_base = file == Path(cfg.wan, DIT)
    if is_base and name != "base" and not is_random(cfg.wan):
        raise BadInput(f"--wan needs {name}: give a file by --init or --teacher, or train it in this --out")
    networks = load_wan(cfg.wan, file, cfg.size, "wan", device, torch.float32, Path(cfg.out, "text"),
                        verify=not cfg.no_verify)
    # random ones are where a chain begins
    if is_random(cfg.wan) and not is_base:
        state, _ = read_public(file, not cfg.no_verify)
        load_state_dict_strict(networks.dit, state, str(file))
    networks.dit.config.recompute = True
    return networks


def load_inputs(cfg, part, preset, device):
    """Networks, and what --data names -> Inputs"""
    for_student = part == "init_ar"
    takes_clips = for_student or part.startswith("teacher")
    prompts = []
    if cfg.data and not takes_clips and not Path(cfg.data).is_dir():
        prompts = read_prompts(cfg.data)
    # networks
    if cfg.wan:
        inputs = Inputs(**vars(load_wan_part(cfg, preset.start, cfg.init, device)))
    else:
        inputs = tiny_inputs(cfg, part, preset, device)
    inputs.device = device
    inputs.policy = inputs.policy.calibrated(inputs.sampler.tau)
    # clips, with their captions; those of the small world from the cache of this --out
    if cfg.data and not prompts:
        inputs.clips = ClipFolder(cfg.data, inputs.latent, inputs.dit.config.text_dim, device, for_student)
        prompts = inputs.clips.captions
    elif takes_clips:
        cache = partial(latent_cache, Path(cfg.out, "cache"), inputs.vae, device=device)
        inputs.clips = WorldClips(cfg.seed, cache, inputs.features, device, for_student)
    inputs.prompts = prompts
    # text features: those of clips lie beside them, but for the caption of a strip
    if cfg.wan:
        texts = {"", NEGATIVE, *(prompts[:1] if takes_clips else prompts)}
        mine = sorted(texts)[get_rank()::get_processes()]
        inputs.features = wan_text(cfg.wan, Path(cfg.out, "text"), mine, device, not cfg.no_verify,
                                   inputs.dit.config.text_dim)
        barrier()
    # without its cache: gradients of sharded weights that several passes share in one context get lost there
    inputs.autocast = torch.autocast(device.type, torch.bfloat16, cfg.dtype == "bf16", cache_enabled=False)
    return inputs
