"""
Files of tensors, in whatever container and under whatever names: read, checked, written; LoRAs.

A file is known by how it begins, not by its name: safetensors, a pickle of torch.save, new or old, or several
files with an index.json. No pickle runs code. What is written here carries a sha256 of its content, pickles
the CRC-32 of their zip; both are verified when a file is read, so that one wrong bit is told.

    python weights.py weights/vae.safetensors    # writes a file of weights/ anew, with its checksum

References: safetensors, torch.save; LoRA, arXiv 2106.09685 (names of peft and of kohya's scripts).
Leaves out: GGUF, 8-bit weights, diffusers' names, torch.distributed.checkpoint (named, with what to do).
"""
import hashlib
import json
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import BadInput, check_schema, whole_or_absent

# how a file begins that is none of tensors: what it is, and what to do
NOT_TENSORS = {
    b"GGUF": "is GGUF, quantised for other programs: fetch the model as safetensors or .pth",
    b"version https://git-lfs": "is only the pointer of git-lfs: git lfs pull",
    b"<": "is a web page, not the file that was to be fetched: fetch it again",
}

# where public checkpoints keep their weights: at the top level, or under the first of these, or under both
LEVELS = ("generator_ema", "generator", "ema", "shadow", "model", "module", "state_dict", "generator_lora")
LORA_LEVELS = ("generator_lora", "lora", "model", "state_dict")

# what training code leaves in names
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.|base_layer\.")
PREFIXES = re.compile(r"^(((module|base_model|model|diffusion_model)\.)+|lora_unet_)")

# what names of tensors tell that cannot be run
NOT_RUN = {
    r"lora_|lokr_|loha_|hada_w|\.diff(_b)?$": "is a LoRA, not a whole model: give it by --lora",
    r"scale_weight|scaled_fp8|absmax|qweight": "is quantised: fetch the model in bf16, fp16 or fp32",
    r"\.attn1\.": "is in the layout of diffusers: fetch the original files",
}

LORA_KEY = re.compile(r"(.+)\.(lora_A|lora_down|lora_B|lora_up|alpha)(\.\w+)?")
SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}


# ---- checksums ---------------------------------------------------------------------------------------------

def hash_file(path):
    """sha256 of a file, as sha256sum prints it"""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def hash_content(tensors, about):
    """sha256 of names, types, shapes and values, and of what the file says of itself"""
    found = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


# ---- one file ----------------------------------------------------------------------------------------------

@contextmanager
def in_one_line(path, remedy):
    """Whatever a file makes its reading raise becomes one BadInput: what it is, and what to do."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        if "Weights only load failed" in why:
            why = "it holds more than tensors, whose code is not run, or is damaged"
        raise BadInput(f"cannot read {path} ({why}): {remedy}") from None


def read_json(path):
    """The object in a file of JSON, of 1 MB at most"""
    with in_one_line(path, "fetch it again"), open(path, encoding="utf-8") as file:
        content = json.loads(file.read(1 << 20))
    check_schema(path, content, dict)
    return content


def write_safetensors(path, tensors, about=None):
    """A safetensors file, whole or not at all; about: what it says of itself, a dict for JSON"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about or {}
    # one entry, because several would stand in the file in any order
    entry = json.dumps({**about, "sha256": hash_content(tensors, about)})
    try:
        with whole_or_absent(path) as part:
            save_file(tensors, part, {"about": entry})
    except SafetensorError as error:
        raise BadInput(f"cannot write {path}: {error}") from None


def read_about(path, file):
    """What an open safetensors file of this project says of itself (else {})"""
    about = json.loads((file.metadata() or {}).get("about", "{}"))
    check_schema(path, about, dict, "metadata")
    return about


def read_head(path, remedy):
    """Of a safetensors file of this project, without its values: name -> shape, and what it says of itself"""
    with in_one_line(path, remedy), safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, read_about(path, file)


def read_safetensors(path, verify):
    with safe_open(path, "pt") as file:
        about = read_about(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    claimed = about.pop("sha256", None)
    if verify and claimed and claimed != hash_content(tensors, about):
        raise ValueError("damaged: its content is not what its sha256 says")
    return tensors, about


def verify_zip(path):
    with zipfile.ZipFile(path) as archive:
        # torch.save compresses nothing, and a bomb would
        is_compressed = any(entry.compress_type for entry in archive.infolist())
        if is_compressed or archive.testzip():
            raise ValueError("damaged: not what its CRC-32 says; --no-verify takes it as it is")


def read_one(path, device, verify):
    with open(path, "rb") as file:
        head = file.read(32)
    for begin, what in NOT_TENSORS.items():
        if head.startswith(begin):
            raise BadInput(f"{path} {what}")
    if head[8:9] == b"{":  # behind the length of a header of JSON
        return read_safetensors(path, verify)
    is_zip = head.startswith(b"PK\3\4")
    if not is_zip and not head.startswith(b"\x80"):  # as torch.save writes, and wrote before 1.6
        raise ValueError("empty, or no file of tensors, neither safetensors nor torch.save's")
    if is_zip and verify:
        verify_zip(path)
    # mapped from disk rather than read, unless torch would believe a name that is wrong
    is_mapped = is_zip and path.suffix != ".safetensors"
    with open(path, "rb") as file:
        source = path if is_mapped else file
        content = torch.load(source, map_location=device, weights_only=True, mmap=is_mapped)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    return content, {}


# ---- a file, or several that belong together ---------------------------------------------------------------

def read_file(path, device="cpu", verify=True, remedy="check the path, or fetch it again"):
    """
    A file of tensors, or all that belong together: by their folder, its index.json, or one of them.
    verify   its checksum, where it has one
    remedy   what BadInput says is to be done if it is damaged
    returns  its content, and what a file of this project says about itself (else {})
    """
    path = Path(path)
    is_one = not (path.is_dir() or re.search(r"-\d+-of-\d+\.|\.index\.json$", path.name))
    if is_one:
        with in_one_line(path, remedy):
            return read_one(path, device, verify)
    merged = {}
    for file in find_shards(path):
        with in_one_line(file, remedy):
            merged |= read_one(file, device, verify)[0]
    return merged, {}


def find_shards(path):
    """The files that the index.json names which is this path, or lies in it or beside it"""
    folder = path if path.is_dir() else path.parent
    if (folder / ".metadata").exists():
        raise BadInput(f"{folder} is a checkpoint of torch.distributed: python -m "
                       f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt, if you "
                       "trust it (it is a pickle)")
    indices = [path] if path.suffix == ".json" else list(folder.glob("*.index.json"))
    if not indices:
        raise BadInput(f"{folder} is a folder without an index.json: give the file in it")
    told = read_json(indices[0])
    check_schema(indices[0], told, {"weight_map": dict})
    # by name alone: an index may say anything, but nothing outside its folder is read
    return sorted({folder / Path(str(name)).name for name in told["weight_map"].values()})


# ---- public checkpoints ------------------------------------------------------------------------------------

def go_down(state, levels):
    """To the weights, below what else a checkpoint holds"""
    while found := [key for key in levels if isinstance(state.get(key), dict) and state[key]]:
        state = state[found[0]]
    return state


def bare(name):
    return PREFIXES.sub("", WRAPPERS.sub("", name), count=1)


def read_public(path, verify=True):
    """-> state dict with bare names, and the facts of a file of this project (else {})"""
    state, about = read_file(path, verify=verify)
    state = go_down(state, LEVELS)
    if not state or not all(torch.is_tensor(x) and x.layout == torch.strided for x in state.values()):
        raise BadInput(f"{path} holds no weights at top level nor under {', '.join(LEVELS)}")
    # what cannot be run is named
    for pattern, what in NOT_RUN.items():
        if any(re.search(pattern, name) for name in state):
            raise BadInput(f"{path} {what}")
    coarse = [x.dtype for x in state.values() if x.element_size() < 2 or not x.is_floating_point()]
    if coarse:
        raise BadInput(f"{path} is quantised ({coarse[0]}): fetch the model in bf16, fp16 or fp32")
    renamed = {bare(name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise BadInput(f"{path} holds two tensors of one name, with and without a prefix")
    return renamed, about.get("facts", {})


def read_lora(path, names, verify=True):
    """
    A LoRA, alone or beside the model it belongs to. Its alpha stands beside each pair, or in peft's
    adapter_config.json beside the file, else it is the rank.
    names    of the model's tensors
    returns  name of the weight -> {"up", "down", "alpha"}, for merge_lora(); raises BadInput if anything in
             the file has no place in the model
    """
    state, _ = read_file(path, verify=verify)
    config = Path(path).with_name("adapter_config.json")
    told = read_json(config) if config.exists() else {}
    check_schema(config, told, {"lora_alpha": (float, None)})
    # kohya's names have _ for every dot
    places = {name.removesuffix(".weight").replace(".", "_"): name for name in names}
    found = {}
    for key, tensor in go_down(state, LORA_LEVELS).items():
        match = LORA_KEY.fullmatch(key.removesuffix(".weight"))
        name = match and places.get(bare(match[1]).replace(".", "_"))
        if not name or not torch.is_tensor(tensor):
            raise BadInput(f"--lora {path}: {key} has no place in the model")
        found.setdefault(name, {"alpha": told.get("lora_alpha")})[SIDES[match[2]]] = tensor
    if not found:
        raise BadInput(f"--lora {path} holds no LoRA")
    return found


def merge_lora(weight, up, down, alpha):
    """W + alpha / rank up @ down, in float32; up (out, rank), down (rank, in); alpha None is the rank"""
    scale = 1. if alpha is None else float(alpha) / len(down)
    whole, up, down = (x.float().flatten(1) for x in (weight, up, down))
    return torch.addmm(whole, scale * up, down).view(weight.shape)
