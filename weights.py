"""
Everything that reads or writes networks: this project's own weights files, the raw folder of Wan2.1-T2V-1.3B, public
students trained from it, and random weights of its form.

References: Wan 2.1, arXiv 2503.20314. Leaves out: LoRA, image-to-video and 14B models (refused by name).
"""
import ctypes
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

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
from text import TextConfig, TextEncoder, bytes_to_ids, clean, need
from vae import TAE, TAEConfig
from wan_vae import WanVAE, WanVAEConfig

WEIGHTS = Path(__file__).parent / "weights"
DIT, T5, TOKENIZER = "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"
VAES = {"wan": "Wan2.1_VAE.pth", "tae": "taew2_1.pth"}


# ---- files -----------------------------------------------------------------------------------------------------------

def write_safetensors(path, tensors, about=None):
    """A safetensors file, whole or not at all; about: its metadata, {name: text}"""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, about)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


def save_weights(path, state, config, facts, dtype=torch.bfloat16):
    """config: the dataclass that rebuilds the network; facts: what made it (stage, updates, seed, sampler, ...)"""
    about = {"about": json.dumps({"config": asdict(config), "facts": facts})}  # one entry: their order in the file is random
    write_safetensors(path, {k: v.to(dtype) for k, v in state.items()}, about)


def read_file(path, what="weights", pickled=None, device="cpu"):
    """
    A safetensors file, or a pickle of tensors (.pt, .pth, or as told), mapped from disk rather than read.
    returns  its content, and what a weights file of this project says about itself (else {})
    """
    path, about = Path(path), {}
    try:
        if pickled or path.suffix in (".pt", ".pth"):
            return torch.load(path, map_location=device, weights_only=True, mmap=True), about
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise BadInput(f"no {what.removeprefix('the ')} at {path}: check the path") from None
    except Exception as error:  # torch.load raises whatever the damage makes it meet
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise BadInput(f"cannot read {what} {path} ({why}): damaged or half downloaded? fetch it again") from None


def load_weights(path):
    """-> state dict (float32), config dict, facts dict of a file that save_weights wrote."""
    state, about = read_file(path)
    if "config" not in about:
        raise BadInput(f"{path} has no config in its metadata: it is not a weights file of this project")
    return {k: v.float() for k, v in state.items()}, about["config"], about["facts"]


def load_state_dict_strict(net, state, name="weights"):
    """
    Strict load: raises BadInput that lists the first few missing, unexpected and misshapen tensors. A net on the meta device
    takes the tensors themselves, types and all.
    """
    own, wrong = net.state_dict(), []
    for kind, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys()),
                       ("misshapen", {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape})):
        if keys:
            wrong.append(f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})")
    if wrong:
        raise BadInput(f"{name} do not fit the model: {'; '.join(wrong)}")
    net.load_state_dict(state, assign=next(iter(own.values())).is_meta)
    return net


def load(path, build, make_config):
    """A network with its weights, and its facts: build(make_config(**config)) filled strictly from a file."""
    state, config, facts = load_weights(path)
    try:
        net = build(make_config(**config))
    except TypeError:
        raise BadInput(f"{path} holds another kind of network than {build.__name__}: give one made for it") from None
    return load_state_dict_strict(net, state, str(path)).eval().requires_grad_(False), facts


# ---- public files: the raw Wan directory and students trained from it --------------------------------------------------

WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")  # left in names by training code
FLOAT32 = re.compile(r"time_|head\.|.*(modulation|norm3)")  # small, and what they do shows in bf16


def read_public(path):
    """-> state dict with bare names (of generator_ema, generator, model, or the top level), facts (of our own files)"""
    whole, about = read_file(path)
    whole = whole if isinstance(whole, dict) else {}
    inner = [whole[k] for k in ("generator_ema", "generator", "model") if isinstance(whole.get(k), dict) and whole[k]]
    inner = inner[0] if inner else whole
    if any("lora" in k.lower() for k in (*whole, *inner)):
        raise BadInput(f"{path} is a LoRA, not a whole model: merge it into its base model first")
    state = {WRAPPERS.sub("", k).removeprefix("model."): v for k, v in inner.items()}
    if not state or not all(torch.is_tensor(v) for v in state.values()):
        raise BadInput(f"{path} holds no weights at top level nor under generator_ema, generator or model")
    return state, about.get("facts", {})


def dit_config(state, folder, path):
    """DiTConfig of a raw DiT, from its shapes and config.json; refuses 14B and image-to-video models."""
    shape = {k: v.shape for k, v in state.items()}
    first, file = shape.get("patch_embedding.weight", ()), Path(folder) / "config.json"
    if len(first) != 5:
        raise BadInput(f"{path} is no Wan DiT: it has no patch_embedding.weight")
    if first[0] == 5120:
        raise BadInput(f"{path} is a 14B model: this project runs Wan2.1-T2V-1.3B and students of it")
    if first[1] != 16 or any(k.startswith("img_emb") for k in state):
        raise BadInput(f"{path} is an image-to-video model ({first[1]} input channels): only text-to-video is supported")
    try:
        c = json.loads(file.read_text()) if file.exists() else {}
        layers = 30 if first[0] == 1536 else count_blocks(state)
        return DiTConfig(first[0], shape["blocks.0.ffn.0.weight"][0], c.get("num_heads", max(1, first[0] // 128)),
                         c.get("num_layers", layers), shape["time_embedding.0.weight"][1], shape["text_embedding.0.weight"][1],
                         c.get("text_len", 512), patch=tuple(first[-2:]))
    except ValueError:
        raise BadInput(f"{file} is not JSON: fetch it again") from None
    except KeyError as key:
        raise BadInput(f"{path} is no Wan DiT: it has no {key}") from None


def count_blocks(state):
    return len({k.split(".")[1] for k in state if k.startswith("blocks.")})


def load_on_device(net, state, path, device, dtype):
    """A net built on the meta device gets its weights, tensor by tensor in the type they stay in; prints a fingerprint."""
    names = "\n".join(f"{k} {list(v.shape)}" for k, v in sorted(state.items()))
    print(f"{path}: {sum(v.numel() for v in state.values()):,} parameters in {len(state)} tensors, "
          f"sha256 of names and shapes {hashlib.sha256(names.encode()).hexdigest()[:12]}")
    own, ready = net.state_dict(), {}
    for k, v in state.items():
        fits = k in own and v.shape == own[k].shape
        ready[k] = v.to(device, torch.float32 if FLOAT32.match(k) else dtype) if fits else v
        if fits and v.is_cpu and sys.platform == "linux":  # hand back the pages of the file that were read: they count as ours
            start = -(-v.data_ptr() // 4096) * 4096
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, v.data_ptr() + v.nbytes - start)), 21)
    return load_state_dict_strict(net, ready, str(path)).eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(prompts, weights, tokenizer, cache, device, length=512):
    """
    prompts    distinct texts; weights, tokenizer: paths of the UMT5 encoder and its tokenizer.json
    cache      folder that keeps each prompt's features, named by a hash of the cleaned text and of the two files' facts
    returns    {prompt: features (m, dim) bfloat16 of its m <= length tokens, on the CPU}; the encoder is loaded only if a
               prompt is new, and gone on return
    """
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, length) for f in (weights, tokenizer)]
    files = {p: cache / (hashlib.sha256(repr((clean(p), facts)).encode()).hexdigest()[:32] + ".safetensors") for p in prompts}
    new = [p for p in prompts if not files[p].exists()]
    if new:
        package = need("tokenizers")
        try:
            words = package.Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the package raises bare Exceptions
            raise BadInput(f"cannot read {tokenizer} ({str(error)[:100]}): fetch it again") from None
        words.no_truncation()
        words.no_padding()
        s, _ = read_public(weights)
        try:
            vocab, dim = s["token_embedding.weight"].shape
            buckets, heads = s["blocks.0.pos_embedding.embedding.weight"].shape
            config = TextConfig(vocab, dim, len(s["blocks.0.attn.q.weight"]), len(s["blocks.0.ffn.fc1.weight"]), heads,
                                24 if dim == 4096 else count_blocks(s), buckets)
        except (KeyError, ValueError):
            raise BadInput(f"{weights} is no UMT5 encoder: fetch it again") from None
        with torch.device("meta"):
            empty = TextEncoder(config)
        encoder = load_on_device(empty, s, weights, device, torch.bfloat16)
        for p in new:
            ids = words.encode(clean(p), add_special_tokens=False).ids
            if len(ids) >= length:
                print(f"warning: {len(ids) + 1} tokens, cut after {length}: {p[:60]!r}", file=sys.stderr)
            ids = torch.tensor([ids[:length - 1] + [1]], device=device)  # 1 ends a text; no row is padded, the DiT pads
            write_safetensors(files[p], {"features": encoder(ids, torch.ones_like(ids))[0]})
    return {p: load_file(files[p])["features"] for p in prompts}


def public_vae(kind, state, path):
    """Wan's autoencoder ("wan") or the TAE ("tae") of a public state dict's widths, on the meta device."""
    try:
        with torch.device("meta"):
            if kind == "wan":
                return WanVAE(WanVAEConfig(state["encoder.conv1.weight"].shape[0]))
            wide = tuple(len(state[f"decoder.{i}.weight"]) for i in (1, 8, 14, 20))
            return TAE(TAEConfig(len(state["encoder.0.weight"]), wide))
    except KeyError as key:
        raise BadInput(f"{path} is not the autoencoder {kind!r}: it has no {key}") from None


# ---- models ------------------------------------------------------------------------------------------------------------

@dataclass
class Networks:
    dit: DiT
    vaes: dict         # name -> autoencoder; the first is the one to use
    features: object   # list of texts -> (b, m, text_dim)
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
        return self.dit.config.channels, self.height // 8, self.width // 8

    def text(self, text):
        return self.dit.text(self.features([text]))

    def rollout(self, text):
        """One video from nothing; text: what self.text() gives."""
        grid = tuple(n // p for n, p in zip(self.latent[1:], self.dit.config.patch))
        return Rollout(self.dit, text, self.policy, grid, self.positions, self.sampler.pool, self.compiled)


def load_tiny(ckpt, device):
    """The networks of the small world; ckpt: its student or teacher"""
    dit, facts = load(ckpt, DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    dit, encoder, tae = dit.to(device), encoder.to(device), tae.to(device, memory_format=torch.channels_last)

    def features(texts):
        return encoder(*(z.to(device) for z in bytes_to_ids(texts, dit.config.text_len)))
    return Networks(dit, {"tae": tae}, features, Sampler(**facts["sampler"]), Path(ckpt).name)


def pair(name, text, *of):
    """'832x480' -> [832, 480], multiples of the two numbers in `of`"""
    found = [int(n) for n in text.split("x")] if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) else []
    if not found or any(n % m for n, m in zip(found, of)):
        raise BadInput(f"{name} {text!r} must be two whole numbers with an x between, multiples of {of[0]} and {of[1]}")
    return found


def wan_models(cfg, texts, device, dtype):
    """The raw Wan directory, or random weights of its form; the text encoder has come and gone before the rest is read."""
    folder, (name, _, form) = Path(cfg.wan), cfg.wan.partition(":")
    random, small, facts = name == "random", name == "random" and device.type == "cpu", {}
    width, height = pair("--size", cfg.size or ("192x128" if small else "832x480"), 16, 16)
    kinds = [cfg.vae or "wan"]
    kinds += [k for k in VAES if cfg.bench and k not in kinds and (random or (folder / VAES[k]).exists())]
    if random:
        dim, layers = pair("--wan random:", form or ("512x8" if small else "1536x30"), 16, 1)
        ckpt, heads, w = Path("random weights"), 1 if dim % 128 else dim // 128, 96 if dim >= 1536 else max(4, dim // 64)
        with torch.device("meta"):
            nets = {DIT: DiT(DiTConfig(dim, dim * 35 // 6, heads, layers)), "wan": WanVAE(WanVAEConfig(w)),
                    "tae": TAE(TAEConfig(w * 2 // 3, tuple(w * i // 3 for i in (8, 4, 2, 2))))}
        torch.manual_seed(0)
        states = {k: {name: torch.randn(z.shape, device=device) * .02 for name, z in nets[k].state_dict().items()}
                  for k in (DIT, *kinds)}
        known = {t: torch.zeros(1, nets[DIT].config.text_dim) for t in texts}
    else:
        ckpt = Path(cfg.ckpt or folder / DIT)
        lacks = [f for f in [DIT] * (not cfg.ckpt) + [T5, TOKENIZER] + [VAES[k] for k in kinds] if not (folder / f).is_file()]
        if lacks:
            curl = f"curl -L -o {folder / VAES['tae']} https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"
            get = curl if lacks[0] == VAES["tae"] else f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {folder}"
            raise BadInput(f"{folder} lacks {', '.join(lacks)}: {get}")
        if not cfg.ckpt:
            print("warning: without --ckpt this is the base model, not trained to run causally in 4 steps", file=sys.stderr)
        state, facts = read_public(ckpt)
        config = dit_config(state, folder, ckpt)
        texts = texts + [""] * (Sampler(**facts.get("sampler", {})).guidance != 1)
        roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 20e9
        known = encode_prompts(texts, folder / T5, folder / TOKENIZER, Path(cfg.out) / "text",
                               device if roomy else torch.device("cpu"), config.text_len)
        torch.cuda.empty_cache()
        states = {DIT: state, **{k: read_public(folder / VAES[k])[0] for k in kinds}}
        with torch.device("meta"):
            nets = {DIT: DiT(config), **{k: public_vae(k, states[k], folder / VAES[k]) for k in kinds}}
    dit, *vaes = (load_on_device(nets[k], states.pop(k), ckpt if k == DIT else folder / VAES[k], device, dtype) for k in (DIT, *kinds))

    def features(texts):
        return pad_sequence([known[t] for t in texts], batch_first=True).to(device)
    return Networks(dit, dict(zip(kinds, vaes)), features, Sampler(**facts.get("sampler", {})), ckpt.name, width, height, 1)


def wan_networks(cfg, device, ckpt=""):
    """What sample.py --wan makes of the raw folder, with float32 weights; ckpt: another DiT. cfg: wan, size, out"""
    options = {"wan": cfg.wan, "size": cfg.size, "out": cfg.out, "vae": "", "bench": False}
    return wan_models(SimpleNamespace(ckpt=str(ckpt or Path(cfg.wan) / DIT), **options), [], device, torch.float32)


def wan_text(cfg, device, texts, rank=0, processes=1):
    """
    Wan's text features, in files under out/text: those of `texts` are made now where they are new, a share on each process.
    returns  list of texts -> (b, m, text_dim), zero where padded; reads only what is asked for
    """
    if cfg.wan.startswith("random"):
        return lambda some: torch.zeros(len(some), 1, 4096, device=device)
    files = [Path(cfg.wan) / name for name in (T5, TOKENIZER)] + [Path(cfg.out) / "text"]
    mine = sorted(set(texts))[rank::processes]
    for i in tqdm(range(0, len(mine), 4096), desc="text features", disable=rank > 0):
        encode_prompts(mine[i:i + 4096], *files, device)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()

    def features(some):
        known = encode_prompts(sorted(set(some)), *files, torch.device("cpu"))
        return pad_sequence([known[t] for t in some], batch_first=True).to(device)
    return features
