"""
All reading and writing of networks: this project's own weights files, the raw folder of Wan2.1-T2V-1.3B,
public students trained from it, and random weights of its form.

    python weights.py          # what each shipped file holds, and what made it

A raw folder holds the DiT, its config.json, the text encoder with its tokenizer, and an autoencoder, under
Wan's own file names. Public students are state dicts, flat or under "generator_ema", "generator" or "model",
with whatever their training code wrapped around the names. Sizes are read off the tensors, names and shapes
are checked strictly, no pickle runs code.

References: Wan 2.1, arXiv 2503.20314; Self-Forcing, arXiv 2506.08009 (its checkpoints).
Leaves out: LoRA, image-to-video and 14B models (refused by name).
"""
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from config import BadInput
from flow import Rollout, Sampler
from memory import PRESETS, Policy
from model import DiT, DiTConfig
from text import TextConfig, TextEncoder, bytes_to_ids, clean, read_tokenizer, tokenise
from vae import TAE, TAEConfig
from wan_vae import WanVAE, WanVAEConfig

WEIGHTS = Path(__file__).parent / "weights"

# files of a raw Wan2.1-T2V-1.3B folder
DIT = "diffusion_pytorch_model.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
VAES = {"wan": "Wan2.1_VAE.pth", "tae": "taew2_1.pth"}

TEXT_LENGTH = 512  # tokens of a prompt at most, its end mark among them

# what training code leaves in names
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")

# stay float32: they are small, and what they do shows in bf16
FLOAT32 = re.compile(r"time_|head\.|.*(modulation|norm3)")


# ---- files -------------------------------------------------------------------------------------------------

def write_safetensors(path, tensors, about=None):
    """A safetensors file, whole or not at all; about: its metadata, {name: text}"""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, about)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


def save_weights(path, state, config, facts, dtype=torch.bfloat16):
    """config: the dataclass that rebuilds the network; facts: what made it (stage, updates, sampler, ...)"""
    about = {"config": asdict(config), "facts": facts}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    # one entry, because several would stand in the file in any order
    write_safetensors(path, state, {"about": json.dumps(about)})


def read_file(path, what="weights", pickled=False, device="cpu"):
    """
    A safetensors file, or a pickle of tensors (.pt, .pth, or as told), mapped from disk rather than read.
    returns  its content, and what a weights file of this project says about itself (else {})
    """
    path = Path(path)
    try:
        if pickled or path.suffix in (".pt", ".pth"):
            return torch.load(path, map_location=device, weights_only=True, mmap=True), {}
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about", "{}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about)
    except FileNotFoundError:
        raise BadInput(f"no {what.removeprefix('the ')} at {path}: check the path") from None
    # torch.load raises whatever the damage makes it meet
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise BadInput(f"cannot read {what} {path} ({why}): damaged or half downloaded? "
                       "fetch it again") from None


def load_weights(path):
    """-> state dict (float32), config dict, facts dict of a file that save_weights wrote."""
    state, about = read_file(path)
    if "config" not in about:
        raise BadInput(f"{path} has no config in its metadata: it is not a weights file of this project")
    return {name: tensor.float() for name, tensor in state.items()}, about["config"], about["facts"]


def load_state_dict_strict(net, state, name="weights"):
    """
    Fills the net, ready to run; raises BadInput that lists the first names and shapes that differ. A net on
    the meta device takes the tensors themselves, types and all.
    """
    on_meta = any(tensor.is_meta for tensor in net.state_dict().values())
    try:
        net.load_state_dict(state, assign=on_meta)
    except RuntimeError as error:
        faults = [line.strip()[:200] for line in str(error).splitlines()[1:4]]
        raise BadInput(f"{name} do not fit the model: {' '.join(faults)}") from None
    return net.eval().requires_grad_(False)


def load(path, build, make_config):
    """A network with its weights, and its facts: build(make_config(**config)) filled strictly from a file."""
    state, config, facts = load_weights(path)
    try:
        net = build(make_config(**config))
    except TypeError:
        kind = build.__name__
        raise BadInput(f"{path} holds another kind of network than {kind}: give one made for it") from None
    return load_state_dict_strict(net, state, str(path)), facts


# ---- public files: the raw Wan folder and students trained from it -----------------------------------------

def read_public(path):
    """-> state dict with bare names, and the facts of a file of this project (else {})"""
    content, about = read_file(path)
    # the weights stand at the top level, or under the last of these that is there
    state = content
    for key in ("model", "generator", "generator_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise BadInput(f"{path} holds no weights at top level nor under generator_ema, generator or model")
    if any("lora" in key.lower() for key in state):
        raise BadInput(f"{path} is a LoRA, not a whole model: merge it into its base model first")
    state = {WRAPPERS.sub("", key).removeprefix("model."): tensor for key, tensor in state.items()}
    return state, about.get("facts", {})


def dit_config(state, path, file):
    """DiTConfig of a raw DiT from Wan's config.json; refuses other models by their shapes."""
    for name in ("patch_embedding.weight", "text_embedding.0.weight"):
        if name not in state:
            raise BadInput(f"{path} is no Wan DiT: it has no {name}")
    dim, channels = state["patch_embedding.weight"].shape[:2]
    if dim == 5120:
        raise BadInput(f"{path} is a 14B model: this project runs Wan2.1-T2V-1.3B and students of it")
    if channels != 16:
        raise BadInput(f"{path} is an image-to-video model ({channels} input channels): "
                       "only text-to-video is supported")
    try:
        stated = json.loads(file.read_text())
        return DiTConfig(
            dim=stated["dim"],
            ffn_dim=stated["ffn_dim"],
            heads=stated["num_heads"],
            layers=stated["num_layers"],
            freq_dim=stated["freq_dim"],
            text_dim=state["text_embedding.0.weight"].shape[1],
            text_len=stated["text_len"],
        )
    except (KeyError, ValueError) as error:
        raise BadInput(f"{file} is not Wan's ({error}): fetch it again") from None


def text_config(state, path):
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    try:
        vocab, dim = state["token_embedding.weight"].shape
        buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        return TextConfig(
            vocab=vocab,
            dim=dim,
            dim_attn=len(state["blocks.0.attn.q.weight"]),
            dim_ffn=len(state["blocks.0.ffn.fc1.weight"]),
            heads=heads,
            layers=24 if dim == 4096 else len(blocks),
            buckets=buckets,
        )
    except (KeyError, ValueError):
        raise BadInput(f"{path} is no UMT5 encoder: fetch it again") from None


def empty_vae(name, state, path):
    """Wan's autoencoder ("wan") or the TAE ("tae"), as wide as a public state dict, on the meta device."""
    try:
        with torch.device("meta"):
            if name == "wan":
                return WanVAE(WanVAEConfig(len(state["encoder.conv1.weight"])))
            widths = tuple(len(state[f"decoder.{i}.weight"]) for i in (1, 8, 14, 20))
            return TAE(TAEConfig(len(state["encoder.0.weight"]), widths))
    except KeyError as key:
        raise BadInput(f"{path} is not the autoencoder {name!r}: it has no {key}") from None


def cast(name, tensor, device, dtype):
    kept = torch.float32 if FLOAT32.match(name) else dtype
    # a copy also of what stays as it is, where the rest is converted: it would keep the whole file open
    return tensor.to(device, kept, copy=tensor.dtype != dtype)


def load_on_device(net, path, device, dtype):
    """Fills a net on the meta device from a public file, each tensor in the type that it stays in."""
    names = list(read_public(path)[0])
    ready = {}
    for first in range(0, len(names), 32):
        # mapped anew: pages that were read count as this process's memory until the file is closed
        state, _ = read_public(path)
        for name in names[first:first + 32]:
            ready[name] = cast(name, state[name], device, dtype)
    print(f"{path}: {sum(tensor.numel() for tensor in ready.values()):,} parameters in {len(ready)} tensors")
    return load_state_dict_strict(net, ready, str(path))


# ---- text features of prompts, kept in files ---------------------------------------------------------------

def feature_files(prompts, folder, cache):
    """{prompt: file of its features}, named by a hash of the cleaned text and of what made them"""
    made_by = []
    for file in (folder / T5, folder / TOKENIZER):
        facts = file.stat()
        made_by.append((file.name, facts.st_size, facts.st_mtime_ns, TEXT_LENGTH))
    files = {}
    for prompt in prompts:
        key = hashlib.sha256(repr((clean(prompt), made_by)).encode()).hexdigest()[:32]
        files[prompt] = cache / f"{key}.safetensors"
    return files


@torch.no_grad()
def encode_prompts(prompts, folder, cache, device):
    """
    Makes the files of those prompts that have none: features (m, dim) bfloat16 of a prompt's m <= 512 tokens.
    The encoder (11.4 GB) is loaded only then, on the CPU where the device has no room for it, and gone on
    return.
    """
    # which are new?
    files = feature_files(prompts, folder, cache)
    new = [prompt for prompt in files if not files[prompt].exists()]
    if not new:
        return
    # the encoder and its tokenizer
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 16e9:
        device = torch.device("cpu")
    tokenizer = read_tokenizer(folder / TOKENIZER)
    config = text_config(read_public(folder / T5)[0], folder / T5)
    with torch.device("meta"):
        encoder = TextEncoder(config)
    encoder = load_on_device(encoder, folder / T5, device, torch.bfloat16)
    for prompt in tqdm(new, desc="text features", delay=5):
        ids = tokenise(tokenizer, prompt, TEXT_LENGTH).to(device)
        write_safetensors(files[prompt], {"features": encoder(ids, torch.ones_like(ids))[0]})


def wan_text(wan, cache, prompts, device):
    """
    Wan's text features, kept in the folder `cache`. Those of `prompts` are made now where it lacks them.
    wan      the raw folder | random...: all features are zero
    returns  function: list of texts -> (b, m, text_dim), zero where padded; reads only what is asked for
    """
    if str(wan).startswith("random"):
        return lambda texts: torch.zeros(len(texts), 1, DiTConfig.text_dim, device=device)
    folder = Path(wan)
    encode_prompts(prompts, folder, cache, device)
    torch.cuda.empty_cache()

    def features(texts):
        encode_prompts(texts, folder, cache, device)
        files = feature_files(texts, folder, cache)
        rows = [load_file(files[text])["features"] for text in texts]
        return pad_sequence(rows, batch_first=True).to(device)
    return features


# ---- all that makes a video --------------------------------------------------------------------------------

@dataclass
class Networks:
    dit: DiT
    vaes: dict         # name -> autoencoder; the first is the one to use
    features: object   # function: list of texts -> (b, m, text_dim)
    sampler: Sampler
    name: str          # of the weights
    width: int = world.WIDTH  # of the video, in pixels
    height: int = world.HEIGHT
    scale: int = 8     # each pixel becomes a square of so many in the file
    policy: Policy = PRESETS["slowfast"]
    positions: str = "bounded"
    compiled: object = None  # dit, compiled

    @property
    def vae(self):
        return next(iter(self.vaes.values()))

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

    def text(self, text):
        """What the DiT attends to for one text"""
        return self.dit.text(self.features([text]))

    def rollout(self, text):
        """One video from nothing; text: what self.text() gives."""
        pool = self.sampler.pool
        return Rollout(self.dit, text, self.policy, self.grid, self.positions, pool, self.compiled)


def load_tiny(ckpt, device):
    """The networks of the small world; ckpt: its student or teacher"""
    dit, facts = load(ckpt, DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    if dit.config.text_dim != encoder.config.dim:
        raise BadInput(f"{ckpt} is no network of the small world: give --wan with it")
    dit.to(device)
    encoder.to(device)
    tae.to(device, memory_format=torch.channels_last)

    def features(texts):
        ids, mask = bytes_to_ids(texts, dit.config.text_len)
        return encoder(ids.to(device), mask.to(device))
    return Networks(dit, {"tae": tae}, features, Sampler(**facts["sampler"]), Path(ckpt).name)


def two_numbers(option, words, multiples=(16, 16)):
    """'832x480' -> [832, 480]"""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", words)
    numbers = [int(number) for number in match.groups()] if match else []
    if not numbers or any(number % multiple for number, multiple in zip(numbers, multiples)):
        raise BadInput(f"{option} {words!r} must be two whole numbers with an x between, "
                       f"multiples of {multiples[0]} and {multiples[1]}")
    return numbers


def check_files(folder, names):
    """Raises BadInput that says how to get the files which the raw folder lacks."""
    lacks = [name for name in names if not (folder / name).is_file()]
    if lacks:
        get = f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {folder}"
        if lacks[0] == VAES["tae"]:
            get = f"curl -L -o {folder / lacks[0]} https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"
        raise BadInput(f"{folder} lacks {', '.join(lacks)}: {get}")


def load_wan(wan, ckpt, size, vaes, device, dtype, text_cache, prompts=()):
    """
    The networks of a raw Wan2.1-T2V-1.3B folder, or random ones.
    wan         the folder | random | random:DIMxLAYERS
    ckpt        "" or another DiT than the folder's: a public student, or one trained here
    size        "WIDTHxHEIGHT" of the video in pixels, "" = 832x480
    vaes        names of the autoencoders to load, of VAES; the first is the one to use
    text_cache  folder of text features; those of `prompts` are made first, where it lacks them
    """
    if str(wan).startswith("random"):
        return random_wan(wan, size, vaes, device, dtype)
    folder = Path(wan)
    width, height = two_numbers("--size", size or "832x480")
    own = [] if ckpt else [DIT]
    # what is there, and does it fit?
    check_files(folder, [*own, "config.json", T5, TOKENIZER, *(VAES[name] for name in vaes)])
    path = Path(ckpt or folder / DIT)
    state, facts = read_public(path)
    config = dit_config(state, path, folder / "config.json")
    # the text encoder is larger than all the rest: it has come and gone before that is read
    features = wan_text(folder, text_cache, prompts, device)
    # the DiT and the autoencoders
    with torch.device("meta"):
        dit = DiT(config)
    dit = load_on_device(dit, path, device, dtype)
    autoencoders = {}
    for name in vaes:
        file = folder / VAES[name]
        vae = empty_vae(name, read_public(file)[0], file)
        autoencoders[name] = load_on_device(vae, file, device, dtype)
    sampler = Sampler(**facts.get("sampler", {}))
    return Networks(dit, autoencoders, features, sampler, path.name, width, height, scale=1)


def random_wan(form, size, vaes, device, dtype):
    """
    Random weights of Wan's form, to measure what it costs; arguments as load_wan's. Defaults: 1536x30 and
    832x480, on a CPU 512x8 and 192x128.
    """
    small = device.type == "cpu"
    width, height = two_numbers("--size", size or ("192x128" if small else "832x480"))
    _, _, numbers = form.partition(":")
    dim, layers = two_numbers("--wan random:", numbers or ("512x8" if small else "1536x30"), (16, 1))
    heads = 1 if dim % 128 else dim // 128
    # the DiT in the proportions of the full size, the autoencoders of one of two sizes
    with torch.device("meta"):
        nets = {
            "dit": DiT(DiTConfig(dim, ffn_dim=dim * 35 // 6, heads=heads, layers=layers)),
            "wan": WanVAE(WanVAEConfig(4) if dim < 1536 else WanVAEConfig()),
            "tae": TAE(TAEConfig(8, (16, 12, 8, 8)) if dim < 1536 else TAEConfig()),
        }
    torch.manual_seed(0)
    for name in ("dit", *vaes):
        state = {}
        for key, tensor in nets[name].state_dict().items():
            state[key] = cast(key, torch.randn(tensor.shape, device=device) * .02, device, dtype)
        load_state_dict_strict(nets[name], state)
    autoencoders = {name: nets[name] for name in vaes}
    features = wan_text(form, None, (), device)
    return Networks(nets["dit"], autoencoders, features, Sampler(), "random weights", width, height, scale=1)


if __name__ == "__main__":
    for file in sorted(WEIGHTS.glob("*.safetensors")):
        state, _, facts = load_weights(file)
        count = sum(tensor.numel() for tensor in state.values())
        print(f"{file.name:26} {count:9,} parameters, {facts}"[:110])
