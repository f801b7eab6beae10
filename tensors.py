"""
Files of tensors, in whatever container and under whatever names: read, checked, written; LoRAs; networks
that are filled from them.

A file is known by how it begins, not by its name: safetensors, a pickle of torch.save, new or old; several
named NAME-1-of-2 are one. No pickle runs code. What is written here carries a sha256 of its content, pickles
the CRC-32 of their zip; both are verified when a file is read, so that one wrong bit is told.

    python weights.py out/vae/vae.safetensors    # ships a file, with its checksum

References: safetensors, torch.save; LoRA, arXiv 2106.09685 (names of peft and of kohya's scripts).
Leaves out: GGUF, 8-bit weights, diffusers' names, torch.distributed.checkpoint (named, with what to do).
"""
import hashlib
import json
import re
import zipfile
from io import BytesIO
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import BadInput, check_schema, in_one_line, whole_or_absent
from records import open_file, read_json

# what is to be done about a file that cannot be read
FETCH = ("check the path, or fetch it again; what --wan needs comes by hf download Wan-AI/Wan2.1-T2V-1.3B, "
         "and taew2_1.pth from https://github.com/madebyollin/taehv/raw/main/")
NO_TENSORS = ("neither safetensors nor of torch.save: is it empty, or a web page? GGUF is for others: fetch "
              "the model as safetensors or .pth; a pointer becomes it by git lfs pull")

SHARD = re.compile(r"-\d+-of-(\d+)\.\w+$")  # one of several files

# where public checkpoints keep their weights: at the top level, or under the first of these, or under both
LEVELS = ("generator_ema", "generator", "ema", "shadow", "model", "module", "state_dict", "generator_lora")

# what training code leaves in names
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.|base_layer\.")
PREFIXES = re.compile(r"^(((module|base_model|model|diffusion_model)\.)+|lora_unet_)")

# what names and types of tensors tell that cannot be run
QUANTISED = "is quantised, or complex: fetch the model in bf16, fp16 or fp32"
NOT_RUN = {
    r"lora_|lokr_|loha_|hada_w|\.diff(_b)? ": "is a LoRA, not a whole model: give it by --lora",
    r"scale_weight|scaled_fp8|absmax|qweight|torch\.(?!bfloat16|float16|float32|float64)\w+":
        QUANTISED,
    r"\.attn1\.": "is in the layout of diffusers: fetch the original files",
}

LORA_KEY = re.compile(r"(.+)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up)|(?P<alpha>alpha))"
                      r"(?:\.\w+)?")

# stay float32: they are small, and what they do shows in bf16
FLOAT32 = re.compile(r"time_|head\.|.*(modulation|norm3)")

ANOTHER_KIND = ("is it another kind of network? Wan2.1-T2V-1.3B and its students need --wan, tiny ones run "
                "without --wan, 14B and image-to-video models not at all")


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
        found.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


# ---- one file ----------------------------------------------------------------------------------------------

def write_safetensors(path, tensors, about={}):
    """A safetensors file, whole or not at all; about: what it says of itself, a dict for JSON"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one entry, because several would stand in the file in any order
    entry = json.dumps({**about, "sha256": hash_content(tensors, about)})
    with whole_or_absent(path) as part, in_one_line(f"cannot write {path}", "is the disk full?"):
        save_file(tensors, part, {"about": entry})


def read_about(path, file):
    """What an open safetensors file says of itself"""
    about = json.loads((file.metadata() or {}).get("about", "{}"))
    check_schema(path, about, dict, "metadata")
    return about


def read_safetensors(path, verify):
    with safe_open(path, "pt") as file:
        about = read_about(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    claimed = about.pop("sha256", None)
    # files of others say nothing
    if verify and (claimed or about) and claimed != hash_content(tensors, about):
        raise ValueError("damaged: its content is not what its sha256 says")
    return tensors, about


def read_pickle(path, is_zip, verify):
    if is_zip and verify:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing, and a bomb would
            if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                raise ValueError("damaged: not what its CRC-32 says; --no-verify takes it as it is")
    # mapped from disk rather than read, unless torch would believe a name that is wrong
    source = path if is_zip and path.suffix != ".safetensors" else BytesIO(path.read_bytes())
    content = torch.load(source, map_location="cpu", weights_only=True, mmap=source is path)
    check_schema(path, content, dict)
    return content


def read_one(path, verify):
    """One file -> its content, and what it says of itself"""
    with open_file(path) as file:
        head = file.read(9)
    # behind the length of a header of JSON
    if head.endswith(b"{"):
        return read_safetensors(path, verify)
    # as torch.save writes, and wrote before 1.6
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"it begins with {head}, {NO_TENSORS}")
    return read_pickle(path, head.startswith(b"PK"), verify), {}


def read_file(path, verify=True, remedy=FETCH):
    """
    A file of tensors, or all that belong together: by their folder, its index.json, or one of them.
    verify   its checksum, where it has one
    remedy   what BadInput says is to be done if it is damaged
    returns  its content, and what a file of this project says about itself (else {})
    """
    path = Path(path)
    files = [path]
    if path.is_dir() or SHARD.search(path.name) or path.name.endswith(".index.json"):
        files = find_shards(path)
    merged = {}
    for file in files:
        with in_one_line(f"cannot read {file}", remedy):
            content, about = read_one(file, verify)
            merged |= content
    return merged, about


def read_head(path, remedy):
    """Of a safetensors file of this project, without its values: name -> shape, and what it says of itself"""
    with in_one_line(f"cannot read {path}", remedy), safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        return shapes, read_about(path, file)


def find_shards(path):
    """All files NAME-1-of-2 that lie in this folder, or beside this index.json or file"""
    folder = path if path.is_dir() else path.parent
    shards = sorted(file for file in folder.glob("*") if SHARD.search(file.name))
    if not shards or len(shards) != int(SHARD.search(shards[0].name)[1]):
        raise BadInput(f"{folder} does not hold all files NAME-1-of-2, and these alone: give the one file in "
                       "it, or fetch them again; a checkpoint of torch.distributed becomes one file, if you "
                       "trust it (it is a pickle), by python -m torch.distributed.checkpoint.format_utils "
                       f"dcp_to_torch {folder} FILE.pt")
    return shards


# ---- public checkpoints ------------------------------------------------------------------------------------

def go_down(state, levels):
    """Down to the dict of weights, below any of these levels, one within another"""
    for _ in levels:
        found = (state[key] for key in levels if isinstance(state.get(key), dict) and state[key])
        state = next(found, state)
    return state


def bare(name):
    return PREFIXES.sub("", WRAPPERS.sub("", name), count=1)


def is_whole(x):
    """No sparse tensor, and none that has fewer numbers than its shape says."""
    return torch.is_tensor(x) and x.layout == torch.strided and x.nbytes <= x.untyped_storage().nbytes()


def read_public(path, verify=True):
    """-> state dict with bare names, and the facts of a file of this project (else {})"""
    state, about = read_file(path, verify=verify)
    state = go_down(state, LEVELS)
    if not state or not all(map(is_whole, state.values())):
        raise BadInput(f"{path} holds no weights at top level nor under {', '.join(LEVELS)}")
    # what cannot be run is named
    told = "\n".join(f"{name} {tensor.dtype}" for name, tensor in state.items())
    for pattern, what in NOT_RUN.items():
        if found := re.search(pattern, told):
            raise BadInput(f"{path}, with {found[0]}, {what}")
    renamed = {bare(str(name)): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise BadInput(f"{path} holds two tensors of one name, with and without a prefix: give one of them")
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
    told = read_json(config, FETCH) if config.exists() else {}
    check_schema(config, {"lora_alpha": 1} | told, {"lora_alpha": float})
    # kohya's names have _ for every dot
    places = {name.removesuffix(".weight").replace(".", "_"): name for name in names}
    found = {}
    for key, tensor in go_down(state, ("generator_lora", "lora", *LEVELS)).items():
        match = LORA_KEY.fullmatch(key.removesuffix(".weight"))
        name = match and places.get(bare(match[1]).replace(".", "_"))
        if not name or not torch.is_tensor(tensor):
            raise BadInput(f"--lora {path}: {key} has no place in the model")
        # in 8 bits or fewer
        if tensor.element_size() < 2:
            raise BadInput(f"--lora {path}, with {tensor.dtype}, {QUANTISED}")
        found.setdefault(name, {"alpha": told.get("lora_alpha")})[match.lastgroup] = tensor
    if not found:
        raise BadInput(f"--lora {path} holds no LoRA")
    for name, parts in found.items():
        if len(parts) < 3:
            raise BadInput(f"--lora {path}: {name} lacks one of lora_A and lora_B")
    return found


def merge_lora(weight, up, down, alpha):
    """W + alpha / rank up @ down, in float32; up (out, rank), down (rank, in); alpha None is the rank"""
    scale = 1. if alpha is None else float(alpha) / len(down)
    whole, up, down = (x.float().flatten(1) for x in (weight, up, down))
    return torch.addmm(whole, scale * up, down).view(weight.shape)


# ---- networks of them -------------------------------------------------------------------------------------

def load_state_dict_strict(net, state, name="weights"):
    """
    Fills the net, ready to run; raises BadInput that lists the first names and shapes that differ, or names a
    tensor that is not finite. A net on the meta device takes the tensors themselves, types and all.
    """
    with in_one_line(f"cannot use {name}", ANOTHER_KIND):
        net.load_state_dict(state, assign=next(net.parameters()).is_meta)
    for key, tensor in net.state_dict().items():
        # the least and the largest, which take no copy of a large tensor
        if not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
            raise BadInput(f"{name}: {key} is not finite (NaN or infinity): damaged, or training went wrong")
    return net.eval().requires_grad_(False)


def empty_net(path, build, verify):
    """build(state dict of a public file), which it fits, without values; and the file's facts"""
    state, facts = read_public(path, verify)
    with in_one_line(f"cannot read {path}", ANOTHER_KIND), torch.device("meta"):
        net = build(state)
        shapes = {name: tensor.to("meta") for name, tensor in state.items()}
        net.load_state_dict(shapes)
    return net, facts


def load_on_device(net, path, device, dtype, lora={}):
    """
    Fills a net on the meta device from a public file, each tensor in the type that it stays in.
    lora  what read_lora() gives, merged into the weights
    """
    ready = {}
    for number, name in enumerate(net.state_dict()):
        # mapped anew: pages that were read count as this process's memory until the file is closed
        if number % 32 == 0:
            state, _ = read_public(path, verify=False)
        tensor = state[name]
        if name in lora:
            with in_one_line(f"cannot merge the LoRA of {name}", "lora_A and lora_B must fit the weight"):
                tensor = merge_lora(tensor, **lora[name])
        kept = torch.float32 if FLOAT32.match(name) else dtype
        # a copy also of what has that type, where the rest is converted: it would keep the file open
        ready[name] = tensor.to(device, kept, copy=tensor.dtype != dtype)
    return load_state_dict_strict(net, ready, path)
