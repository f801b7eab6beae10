"""
All networks from files: this project's own weights, the raw folder of Wan2.1-T2V-1.3B, public students of it,
and random weights of its form.

    python weights.py          # what each shipped file holds, and what made it
    python weights.py out/stage2/stage2.safetensors    # ships a file: a copy in weights/, in bfloat16

A raw folder holds the DiT, its config.json, the text encoder with its tokenizer, and an autoencoder, under
Wan's own file names. Sizes are read off the tensors, names and shapes are checked strictly.

References: Wan 2.1, arXiv 2503.20314; Self-Forcing, arXiv 2506.08009 (its checkpoints).
Leaves out: image-to-video and 14B models (refused by name).
"""
import hashlib
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType

import torch
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from config import (BadInput, Parser, check_schema, check_writable, fast_layout, in_one_line, one_of, run,
                    warn, within)
from flow import Rollout, Sampler
from memory import PRESETS, Policy
from model import DiT, DiTConfig
from records import read_json
from tensors import (ANOTHER_KIND, FETCH, QUANTISED, empty_net, hash_file, load_on_device,
                     load_state_dict_strict, read_file, read_head, read_lora, write_safetensors)
from text import TextConfig, TextEncoder, clean, encode_captions, read_tokenizer, tokenise
from vae import TAE, TAEConfig, tiny_tae
from wan_vae import WanVAE, WanVAEConfig

WEIGHTS = Path(__file__).parent / "weights"

# files of a raw Wan2.1-T2V-1.3B folder
DIT = "diffusion_pytorch_model.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
VAES = {"wan": "Wan2.1_VAE.pth", "tae": "taew2_1.pth"}

# of config.json; ours have no num_
WAN_SIZES = "dim ffn_dim num_heads num_layers freq_dim text_len".split()

# type of a field -> what a file may say it is
SIZE = range(1, 2 ** 14)
SCHEMAS = {int: SIZE, tuple: [SIZE], bool: bool, float: float, str: {"mean", "token"}}

MADE_AGAIN = "it is made again"


# ---- files -------------------------------------------------------------------------------------------------

def save_weights(path, state, config, facts):
    """config: the dataclass that rebuilds the network; facts: what made it (stage, updates, sampler, ...)"""
    write_safetensors(path, state, {"config": asdict(config), "facts": facts})


def ship(file, folder=WEIGHTS):
    """A copy in bfloat16, to sample from: updates smaller than its rounding would be lost in training."""
    state, about = read_file(file)
    whose = "is no file that train.py wrote"
    check_schema(file, [*state.values()], [torch.float32], "weights", whose)
    check_schema(file, about, {"facts": dict}, "metadata", whose)
    # by this the parts that started from it name it
    about["facts"]["sha256"] = hash_file(file)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    write_safetensors(Path(folder, Path(file).name), state, about)


def make_checked(cls, path, field, told, layers=0):
    """cls(**told), a dataclass, of what a file says, which may be anything, but of `layers` layers at most"""
    check_schema(path, told, dict, field)
    schema = {each.name: SCHEMAS[each.type] for each in fields(cls) if each.name in told}
    check_schema(path, told, schema, field)
    within(f"{path}: layers", told.get("layers"), 1, layers)
    with in_one_line(f"cannot read {path}", ANOTHER_KIND):
        return cls(**told)


def make_sampler(path, facts):
    """The Sampler that a file's facts tell of"""
    check_schema(path, facts, {"stage": (str, NoneType)}, "facts")
    sampler = make_checked(Sampler, path, "sampler", facts.get("sampler", {}))
    within(f"{path}: shift of its sampler", sampler.shift, .01, 100)
    within(f"{path}: steps of its sampler", sampler.steps, 1, 1000)
    return sampler


def load(path, build, make_config):
    """A network with its weights (float32), and its facts: build(make_config(**config)), filled by a file."""
    state, about = read_file(path)
    # on the meta device, so that wrong sizes cost nothing
    with in_one_line(f"cannot read {path}", ANOTHER_KIND), torch.device("meta"):
        make_sampler(path, about["facts"])
        net = build(make_checked(make_config, path, "config", about["config"], len(state)))
    if any(tensor.itemsize == 1 or not tensor.is_floating_point() for tensor in state.values()):
        raise BadInput(f"{path} {QUANTISED}")
    state = {name: tensor.float() for name, tensor in state.items()}
    return load_state_dict_strict(net, state, path), about["facts"]


# ---- public files: the raw Wan folder and students trained from it -----------------------------------------

def build_dit(state, config_file):
    """The DiT, whose sizes Wan's config.json states"""
    told = read_json(config_file, FETCH)
    sizes = {name.removeprefix("num_"): told.get(name) for name in WAN_SIZES}
    sizes["text_dim"] = state["text_embedding.0.weight"].shape[1]
    return DiT(make_checked(DiTConfig, config_file, "content", sizes, len(state)))


def build_text(state):
    vocab, dim = state["token_embedding.weight"].shape
    buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    return TextEncoder(TextConfig(
        vocab=vocab,
        dim=dim,
        dim_attn=len(state["blocks.0.attn.q.weight"]),
        dim_ffn=len(state["blocks.0.ffn.fc1.weight"]),
        heads=heads,
        layers=sum(key.endswith("attn.q.weight") for key in state),
        buckets=buckets,
    ))


def build_vae(state):
    """Wan's autoencoder, or the tiny one"""
    if "encoder.conv1.weight" in state:
        return WanVAE(WanVAEConfig(len(state["encoder.conv1.weight"])))
    widths = tuple(len(state[f"decoder.{i}.weight"]) for i in (1, 8, 14, 20))
    return TAE(TAEConfig(len(state["encoder.0.weight"]), widths))


# ---- text features of prompts, kept in files ---------------------------------------------------------------

@torch.no_grad()
def encode_prompts(prompts, folder, cache, device, verify):
    """
    The files of prompts' features, (m, dim) bfloat16 of a prompt's m <= 512 tokens, made where they are
    missing. The encoder (11.4 GB) is loaded on the CPU where the device has no room for it, and then gone.
    """
    # named by a hash of the cleaned text and of what encodes it: the file's start, alike on every node
    with in_one_line(f"cannot read {folder / T5}", FETCH), open(folder / T5, "rb") as encoder:
        start = encoder.read(2 ** 20)
    files = []
    for prompt in prompts:
        key = hashlib.sha256(start + clean(prompt).encode()).hexdigest()[:32]
        files.append(cache / f"{key}.safetensors")
    missing = {file: prompt for file, prompt in zip(files, prompts) if not file.exists()}
    if not missing:
        return files
    # the encoder
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 16e9:
        device = torch.device("cpu")
    tokenizer = read_tokenizer(folder / TOKENIZER)
    net, _ = empty_net(folder / T5, build_text, verify)
    net = load_on_device(net, folder / T5, device, torch.bfloat16)
    for file, prompt in tqdm(missing.items(), desc="text features", delay=5):
        ids = tokenise(tokenizer, prompt).to(device)
        within(f"{folder / TOKENIZER}: an id", ids.max(), 0, net.config.vocab - 1)
        write_safetensors(file, {"features": net(ids, torch.ones_like(ids))[0]})
    return files


def read_features(file, dim):
    with in_one_line(f"cannot read {file}", MADE_AGAIN):
        content, _ = read_file(file, remedy=MADE_AGAIN)
        check_schema(file, content, {"features": torch.bfloat16}, fault=f"is damaged, so {MADE_AGAIN}")
        return rearrange(content["features"], "m dim -> m dim", dim=dim)


def wan_text(wan, cache, prompts, device, verify=True, dim=DiTConfig.text_dim):
    """
    Wan's text features, kept in the folder `cache`: those of `prompts` are made now where it lacks them, the
    others when they are asked for.
    wan      the raw folder | random...: all features are zero
    dim      text_dim
    returns  function: list of texts -> (b, m, text_dim), zero where padded
    """
    if is_random(wan):
        return lambda texts: torch.zeros(len(texts), 1, dim, device=device)
    find_files = partial(encode_prompts, folder=Path(wan), cache=cache, device=device, verify=verify)

    def features(texts):
        for file in find_files(texts):
            try:
                read_features(file, dim)
            except BadInput as error:
                warn(error)
                file.unlink(missing_ok=True)
        rows = [read_features(file, dim) for file in find_files(texts)]
        return pad_sequence(rows, batch_first=True).to(device)
    find_files(prompts)
    return features


# ---- all that makes a video --------------------------------------------------------------------------------

@dataclass
class Networks:
    dit: DiT
    vae: object        # the autoencoder, a TAE or a WanVAE
    features: object   # function: list of texts -> (b, m, text_dim)
    sampler: Sampler
    name: str          # of the weights
    width: int = world.WIDTH  # of the video, in pixels
    height: int = world.HEIGHT
    scale: int = 8     # each pixel becomes a square of so many in the file
    policy: Policy = PRESETS["slowfast"]
    positions: str = "bounded"
    compiled: object = None  # dit, compiled
    stage: str = ""    # of training that the weights come from, where their file tells

    @property
    def latent(self):
        """Shape of a latent, (c, h, w)"""
        return self.dit.config.channels, self.height // 8, self.width // 8

    @property
    def grid(self):
        """Rows and columns of a latent's tokens"""
        _, h, w = self.latent
        p, q = self.dit.config.patch
        return h // p, w // q

    def text(self, *texts):
        """What the DiT attends to for each text, one a video"""
        return self.dit.text(self.features(texts))

    def rollout(self, text):
        """A batch of videos from nothing, one a text; text: what self.text() gives."""
        pool = self.sampler.pool
        return Rollout(self.dit, text, self.policy, self.grid, self.positions, pool, self.compiled)


def trained_file(out, name):
    """Where train.py puts a network in its --out"""
    part = "init_ar" if name == "text" else name
    return Path(out, part, f"{name}.safetensors")


def find_partner(ckpt, name):
    """The file of the "vae" or "text" of a network: where train.py puts it, beside its file, or what ships"""
    folder = Path(ckpt).parent
    own = trained_file(folder.parent, name)
    return next(filter(Path.exists, (own, folder / own.name)), WEIGHTS / own.name)


def check_partner(ckpt, facts, name, file):
    """BadInput if a network was trained with another "vae" or "text" than that of a file"""
    known = facts.get(f"sha256 of {name}")
    # a shipped file says of which one it was made
    its_facts = read_head(file, FETCH)[1].get("facts", {})
    if known not in (None, its_facts.get("sha256")) and known != hash_file(file):
        raise BadInput(f"{ckpt} was trained with another {name} than {file}: put its own there, or beside it")


def load_tiny(ckpt, device):
    """The networks of the small world; ckpt: its student or teacher"""
    dit, facts = load(ckpt, DiT, DiTConfig)
    text, vae = (find_partner(ckpt, name) for name in ("text", "vae"))
    encoder, _ = load(text, TextEncoder, TextConfig)
    tae, _ = load(vae, TAE, TAEConfig)
    if dit.config.text_dim != encoder.config.dim:
        raise BadInput(f"{ckpt} is no network of the small world: give --wan with it")
    check_partner(ckpt, facts, "text", text)
    check_partner(ckpt, facts, "vae", vae)
    dit.to(device)
    # column by column in memory: a product with few tokens takes a quarter less time
    for p in dit.parameters():
        if p.ndim == 2:
            p.data = p.mT.contiguous().mT
    encoder.to(device)
    tae.to(device, memory_format=fast_layout(device))
    features = partial(encode_captions, encoder, device)
    return Networks(dit, tae, features, make_sampler(ckpt, facts), Path(ckpt).name,
                    stage=facts.get("stage", ""))


def is_random(wan):
    """Does --wan ask for random weights? It may be a folder with such a name, too."""
    return bool(re.fullmatch("random(:.*)?", str(wan)))


def two_numbers(option, words, multiple):
    """'832x480' -> 832, 480: multiples of 16 and of `multiple`"""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", words)
    if not match or int(match[1]) % 16 or int(match[2]) % multiple:
        raise BadInput(f"{option} {words!r} must be two whole numbers with an x between, "
                       f"multiples of 16 and {multiple}")
    return int(match[1]), int(match[2])


def load_wan(wan, ckpt, size, vae_name, device, dtype, text_cache, prompts=(), lora="", verify=True):
    """
    The networks of a raw Wan2.1-T2V-1.3B folder, or random ones.
    wan         the folder | random | random:DIMxLAYERS
    ckpt        "" or another DiT than the folder's: a public student, or one trained here
    size        "WIDTHxHEIGHT" of the video in pixels, "" = 832x480
    vae_name    of the autoencoder, of VAES
    text_cache  folder of text features; those of `prompts` are made first, where it lacks them
    lora        "" or a file of a LoRA, which may be that of ckpt
    verify      the checksums of files
    """
    if is_random(wan):
        return random_wan(wan, size, vae_name, device, dtype)
    folder = Path(wan)
    width, height = two_numbers("--size", size or "832x480", 16)
    # what is there, and does it fit?
    path = Path(ckpt or folder / DIT)
    vae_path = folder / VAES[vae_name]
    dit, facts = empty_net(path, partial(build_dit, config_file=folder / "config.json"), verify)
    sampler = make_sampler(path, facts)
    adapters = read_lora(lora, dit.state_dict(), verify) if lora else {}
    if not lora and any("lora" in key for key in read_file(path, verify=False)[0]):
        warn(f"{path} holds a LoRA too, which --lora {path} merges")
    vae, _ = empty_net(vae_path, build_vae, verify)
    # the text encoder is larger than all the rest: it has come and gone before that is read
    features = wan_text(folder, text_cache, prompts, device, verify, dit.config.text_dim)
    torch.cuda.empty_cache()
    # the DiT and the autoencoder
    dit = load_on_device(dit, path, device, dtype, adapters)
    vae = load_on_device(vae, vae_path, device, dtype)
    name = f"{path.name} + {Path(lora).name}" if lora else path.name
    return Networks(dit, vae, features, sampler, name, width, height, 1, stage=facts.get("stage", ""))


def random_wan(wan, size, vae_name, device, dtype):
    """
    Random weights of Wan's form, to measure what it costs; arguments as load_wan's. Defaults: 1536x30 and
    832x480, on a CPU 512x8 and 192x128.
    """
    numbers = wan.partition(":")[2] or ("512x8" if device.type == "cpu" else "1536x30")
    dim, layers = two_numbers("--wan random:", numbers, 1)
    within("--wan random: DIM * DIM * LAYERS", dim ** 2 * layers, 256, 3 * 10 ** 8)
    small = dim < 1536
    width, height = two_numbers("--size", size or ("192x128" if small else "832x480"), 16)
    # in the proportions of the full size
    config = DiTConfig(dim, ffn_dim=dim * 35 // 6, heads=1 if dim % 128 else dim // 128, layers=layers)
    torch.manual_seed(0)
    with device:
        dit = DiT(config)
        vae = WanVAE(WanVAEConfig(4 if small else 96))
        if vae_name == "tae":
            vae = TAE(tiny_tae if small else TAEConfig())
    for net in (dit, vae):
        net.to(dtype).requires_grad_(False)
    features = wan_text(wan, None, (), device)
    return Networks(dit, vae, features, Sampler(), "random weights", width, height, scale=1)


def load_networks(cfg, shipped, texts, device, dtype):
    """
    Networks, and how a script's options ask for them to be sampled and to remember.
    cfg      options: wan, ckpt, lora, size, vae, out, no_verify, steps, tau, compile, memory, positions
    shipped  weights of the small world, where there is neither wan nor ckpt
    texts    of the prompts that are known already
    """
    # 1. those of the small world, or of Wan's form
    if cfg.wan:
        cache = Path(cfg.out, "text")
        check_writable(cache)
        networks = load_wan(cfg.wan, cfg.ckpt, cfg.size, cfg.vae or "wan", device, dtype, cache,
                            [*texts, ""], cfg.lora, not cfg.no_verify)
    else:
        networks = load_tiny(cfg.ckpt or WEIGHTS / f"{shipped}.safetensors", device)
    warn_of_stage(cfg, networks, shipped)
    # 2. options in place of the weights' own
    steps = cfg.steps or networks.sampler.steps
    networks.policy = PRESETS[cfg.memory].calibrated(networks.sampler.tau)
    if cfg.tau is not None:
        networks.policy = replace(networks.policy, tau=cfg.tau)
    networks.sampler = replace(networks.sampler, steps=steps, tau=networks.policy.tau)
    networks.positions = cfg.positions
    # 3. a compiler is needed now, rather than in the middle of a video
    if cfg.compile:
        with in_one_line("--compile does not work here", "install a C++ compiler, or leave it out"):
            torch.compile(torch.sin)(torch.ones(2, device=device))
        networks.compiled = torch.compile(networks.dit, dynamic=False)
    return networks


def warn_of_stage(cfg, networks, wanted):
    """Weights that run, but were not made for what they are used for"""
    if cfg.wan and not cfg.ckpt and not is_random(cfg.wan):
        warn("Wan's base model was not trained to work causally, nor in few steps: "
             "give a student of it by --ckpt")
    # teacher_plain, too
    if networks.stage and networks.stage.startswith("teacher") != (wanted == "teacher"):
        warn(f"{networks.name} comes from stage {networks.stage}, where a {wanted} is wanted")


def check_options(cfg):
    """Refuses, before anything is loaded, what load_networks() cannot do; cfg: its options, dtype and seed"""
    one_of("--memory", cfg.memory, PRESETS)
    one_of("--positions", cfg.positions, ("bounded", "unbounded"))
    one_of("--dtype", cfg.dtype, ("", "bf16", "fp32"))
    one_of("--vae", cfg.vae, ("", *VAES))
    within("--tau", cfg.tau, -1, 1)
    within("--steps", cfg.steps, 1, 1000)
    within("--seed", cfg.seed, 0, 2 ** 63 - 1)
    if not cfg.wan and (cfg.size or cfg.vae or cfg.lora):
        raise BadInput("--size, --vae and --lora need --wan: the tiny networks come in one form")
    if is_random(cfg.wan) and (cfg.ckpt or cfg.lora):
        raise BadInput("--wan random makes weights of its own: leave out --ckpt and --lora")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("file", nargs="*")
    for file in parser.parse_args().file:
        ship(file)
    for file in sorted(WEIGHTS.glob("*.safetensors")):
        print(f"{file.name:26} {read_file(file)[1].get('facts')}"[:110])


if __name__ == "__main__":
    run(main)
