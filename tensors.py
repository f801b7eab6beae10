"""
Files of tensors, in whatever container and under whatever names: read, checked, written; LoRAs.

A file is known by how it begins, not by its name: safetensors, a pickle of torch.save, new or old, or several
files with an index.json. No pickle runs code. What is written here carries a sha256 of its content, pickles
the CRC-32 of their zip; both are verified when a file is read, so that one wrong bit is told. What a file
says of itself is believed only within the bounds that its tensors set.

    python weights.py weights/vae.safetensors    # writes a file of weights/ anew, with its checksum

References: safetensors, torch.save; LoRA, arXiv 2106.09685 (names of peft and of kohya's scripts).
Leaves out: GGUF, 8-bit weights, diffusers' names, torch.distributed.checkpoint (named, with what to do).
"""
import hashlib
import json
import math
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import BadInput, whole_or_absent

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


# ---- what a file says of itself ----------------------------------------------------------------------------

def read_json(path):
    """The object in a file of JSON, of 1 MB at most"""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path} ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object")
    return content


def fits(kind, value, allowed):
    if kind is tuple:
        return isinstance(value, list) and all(fits(int, number, allowed) for number in value)
    if kind is str:
        return value in allowed
    if kind is bool:
        return isinstance(value, bool)
    # bool, an int to Python, is none here; NaN is in no range
    return type(value) in (int, kind) and allowed[0] <= value <= allowed[1]


def make_checked(cls, values, where, most, ranges):
    """
    cls(**values), a dataclass, of what a file says; BadInput names the file and the field that cannot be.
    where   the file, and the place in it
    most    of numbers; the least is 1
    ranges  field -> (lowest, highest), or the words it may be, where that differs
    """
    kinds = {field.name: field.type for field in fields(cls)}
    for name, value in values.items():
        allowed = ranges.get(name, (1, most))
        if name not in kinds or not fits(kinds[name], value, allowed):
            raise BadInput(f"{where}: {name} cannot be {str(value)[:40]!r}")
    try:
        return cls(**values)
    except ValueError as error:  # of its own rules
        raise BadInput(f"{where}: {error}") from None


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

def write_safetensors(path, tensors, about=None):
    """A safetensors file, whole or not at all; about: what it says of itself, a dict for JSON"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about or {}
    # one entry, because several would stand in the file in any order
    entry = json.dumps({**about, "sha256": hash_content(tensors, about)})
    try:
        with whole_or_absent(path) as part:
            save_file(tensors, part, {"about": entry})
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


@contextmanager
def in_one_line(path, remedy):
    """Whatever damage makes the reading of a file raise"""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        if "Weights only load failed" in why:
            why = "it holds more than tensors, whose code is not run, or is damaged"
        raise BadInput(f"cannot read {path} ({why}): {remedy}") from None


def read_about(file):
    """What an open safetensors file of this project says of itself (else {})"""
    about = json.loads((file.metadata() or {}).get("about", "{}"))
    if not isinstance(about, dict):
        raise ValueError("about must be a JSON object")
    return about


def read_head(path, remedy):
    """Of a safetensors file of this project, without its values: name -> shape, and what it says of itself"""
    with in_one_line(path, remedy), safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, read_about(file)


def read_safetensors(path, verify):
    with safe_open(path, "pt") as file:
        about = read_about(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    claimed = about.pop("sha256", None)
    if verify and claimed and claimed != hash_content(tensors, about):
        raise ValueError("damaged: its content is not what its sha256 says")
    return tensors, about


def verify_zip(path):
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("compressed, which torch.save does not do")
        broken = archive.testzip()
    if broken:
        raise ValueError(f"damaged: {broken} is not what its CRC-32 says; --no-verify takes it as it is")


def read_one(path, device, verify):
    with open(path, "rb") as file:
        head = file.read(32)
    for begin, what in NOT_TENSORS.items():
        if head.startswith(begin):
            raise BadInput(f"{path} {what}")
    if not head:
        raise ValueError("it is empty")
    if head[8:9] == b"{":  # behind the length of a header of JSON
        return read_safetensors(path, verify)
    is_zip = head.startswith(b"PK\3\4")
    if not is_zip and not head.startswith(b"\x80"):  # as torch.save writes, and wrote before 1.6
        raise BadInput(f"{path} is no file of tensors, neither safetensors nor torch.save's: check the path")
    if is_zip and verify:
        verify_zip(path)
    # mapped from disk rather than read, unless torch would believe a name that is wrong
    is_mapped = is_zip and path.suffix != ".safetensors"
    with open(path, "rb") as file:
        source = path if is_mapped else file
        content = torch.load(source, map_location=device, weights_only=True, mmap=is_mapped)
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, not tensors by name: check the path")
    return content, {}


# ---- a file, or several that belong together ---------------------------------------------------------------

def read_file(path, device="cpu", verify=True, remedy="check the path, or fetch it again"):
    """
    A file of tensors, an index.json of several, or the folder of one.
    verify   its checksum, where it has one
    remedy   what BadInput says is to be done if it is damaged
    returns  its content, and what a file of this project says about itself (else {})
    """
    path = Path(path)
    if path.is_dir():
        path = find_index(path)
    if path.name.endswith(".index.json"):
        return read_shards(path, device, verify, remedy), {}
    if re.search(r"-\d+-of-\d+\.", path.name):
        raise BadInput(f"{path} is one of several files that belong together: give their folder")
    with in_one_line(path, remedy):
        return read_one(path, device, verify)


def find_index(folder):
    if (folder / ".metadata").exists():
        raise BadInput(f"{folder} is a checkpoint of torch.distributed: python -m "
                       f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt, if you "
                       "trust it (it is a pickle)")
    for index in folder.glob("*.index.json"):
        return index
    raise BadInput(f"{folder} is a folder without an index.json: give the file in it")


def read_shards(index, device, verify, remedy):
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
        raise BadInput(f"{index}: weight_map must name files beside it")
    merged = {}
    for name in sorted(set(files.values())):
        with in_one_line(index.parent / name, remedy):
            merged |= read_one(index.parent / name, device, verify)[0]
    return merged


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


@dataclass
class LoRA:
    """W becomes W + alpha / rank up @ down."""
    up: torch.Tensor    # (out, rank)
    down: torch.Tensor  # (rank, in)
    alpha: float

    def merge(self, weight):
        """-> float32, of the weight's shape"""
        change = self.up.float() @ self.down.float()
        return weight.float() + self.alpha / len(self.down) * change.reshape(weight.shape)


def read_lora(path, shapes, verify=True):
    """
    A LoRA, alone or beside the model it belongs to. Its alpha stands beside each pair, or in peft's
    adapter_config.json beside the file, else it is the rank.
    shapes   of the model's tensors, by name
    returns  name of the weight -> LoRA; raises BadInput if anything in the file has no place in the model
    """
    # what is said of all pairs
    state, _ = read_file(path, verify=verify)
    config = Path(path).with_name("adapter_config.json")
    alpha = read_json(config).get("lora_alpha") if config.exists() else None
    # kohya's names have _ for every dot
    places = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes}
    found = {}
    for key, tensor in go_down(state, LORA_LEVELS).items():
        match = LORA_KEY.fullmatch(key.removesuffix(".weight"))
        name = match and places.get(bare(match[1]).replace(".", "_"))
        if not name or not torch.is_tensor(tensor):
            raise BadInput(f"--lora {path}: {key} has no place in the model")
        found.setdefault(name, {"alpha": alpha})[SIDES[match[2]]] = tensor
    if not found:
        raise BadInput(f"--lora {path} holds no LoRA")
    return {name: pair_up(path, name, parts, shapes[name]) for name, parts in found.items()}


def pair_up(path, name, parts, shape):
    """-> LoRA of two sides, which together must have the shape of the weight"""
    sides = [parts[side].flatten(1) for side in ("up", "down") if side in parts and parts[side].ndim > 1]
    sizes = [list(side.shape) for side in sides]
    rank = sizes[-1][0] if sizes else 0
    if rank == 0 or sizes != [[shape[0], rank], [rank, math.prod(shape[1:])]]:
        raise BadInput(f"--lora {path}: {name} needs lora_A and lora_B that fit {list(shape)}")
    alpha = rank if parts["alpha"] is None else float(parts["alpha"])
    return LoRA(*sides, alpha)
