"""
The UMT5 text encoder: prompts -> features that the DiT attends to.

A pre-norm transformer encoder without biases and without 1/sqrt(d); where a word stands enters through a
learned bias on attention scores, one table of 32 distance buckets a layer. The small world runs the same
class at small width on words and digits: an id is a hash of one, 1 ends a caption, 0 pads.

    python text.py             # encodes a caption with an untrained tiny encoder

References: T5, arXiv 1910.10683; UMT5, arXiv 2304.09151; Wan 2.1 (names and shapes of its 242 tensors,
cleaning of prompts). Tested on golden vectors of the official code.
Leaves out: a tokenizer of its own (the full-size encoder reads tokenizer.json with the package `tokenizers`).
"""
import html
import math
import re
import zlib
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import nn

from config import BadInput, in_one_line, warn
from records import open_file
from tensors import FETCH


@dataclass
class TextConfig:  # the defaults are UMT5-XXL
    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32

    def __post_init__(self):
        if self.dim_attn % self.heads:
            raise ValueError(f"dim_attn {self.dim_attn} must be a multiple of the heads, {self.heads}")


END = 1  # the id of the mark that ends a text; 0 pads
MOST_LETTERS = 4000  # of a prompt
MOST_TOKENS = 512  # of a prompt, the end mark among them
MOST_BYTES = 2 ** 28  # of a text: a pipe may have no end

tiny_text = TextConfig(vocab=1000, dim=64, dim_attn=64, dim_ffn=128, heads=2, layers=2)


def bucket(offset, buckets):
    """
    offset   key position minus query position, any int tensor
    returns  bucket number of the same shape: half for each sign, 8 exact distances, then logarithmic up to
             128
    """
    # near distances have a bucket each, far ones share
    half = buckets // 2
    exact = buckets // 4
    far = offset.abs()
    # 0 at a distance of 8, 1 at 128
    octaves = torch.log(far.clamp(min=1).float() / exact) / math.log(128 / exact)
    log = exact + (octaves * (half - exact)).long()
    return (offset > 0).long() * half + torch.where(far < exact, far, log.clamp(max=half - 1))


Linear = partial(nn.Linear, bias=False)  # UMT5 has no biases


class Embedding(nn.Embedding):
    def reset_parameters(self):
        # random numbers on the meta device would make torch import its compiler
        if not self.weight.is_meta:
            super().reset_parameters()


class TextAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q = Linear(c.dim, c.dim_attn)
        self.k = Linear(c.dim, c.dim_attn)
        self.v = Linear(c.dim, c.dim_attn)
        self.o = Linear(c.dim_attn, c.dim)

    def forward(self, x, bias):
        """x (b, m, dim); bias (1 or b, k, m, m) is added to the scores, which are not divided by sqrt(d)"""
        qkv = (self.q, self.k, self.v)
        q, k, v = (rearrange(project(x), "b m (k d) -> b k m d", k=self.heads) for project in qkv)
        # no 1/sqrt(d): the weights were trained without it
        score = torch.einsum("bkqd,bksd->bkqs", q, k) + bias
        y = torch.einsum("bkqs,bksd->bkqd", score.float().softmax(-1).to(v.dtype), v)
        return self.o(rearrange(y, "b k m d -> b m (k d)"))


class GatedMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(Linear(c.dim, c.dim_ffn), nn.GELU(approximate="tanh"))
        self.fc1 = Linear(c.dim, c.dim_ffn)
        self.fc2 = Linear(c.dim_ffn, c.dim)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class TextBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.dim, eps=1e-6)
        self.norm2 = nn.RMSNorm(c.dim, eps=1e-6)
        self.attn = TextAttention(c)
        self.ffn = GatedMLP(c)
        self.pos_embedding = nn.ModuleDict({"embedding": Embedding(c.buckets, c.heads)})

    def forward(self, x, mask):
        """x (b, m, dim); mask (b, 1, 1, m): 0 where a key may be seen, the type's lowest number where not"""
        # where a word stands enters through its distance to the others
        position = torch.arange(x.shape[1], device=x.device)
        offset = position[None] - position[:, None]
        table = self.pos_embedding["embedding"]
        bias = rearrange(table(bucket(offset, table.num_embeddings)), "q s k -> 1 k q s")
        # pre-norm, as everywhere
        x = x + self.attn(self.norm1(x), bias + mask)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def forward(self, ids, mask):
        """
        ids, mask  (b, m) int; mask is 1 on real tokens
        returns    (b, m, dim) features, zero where padded, as the DiT takes them
        """
        x = self.token_embedding(ids)
        # what is added to the scores: 0, or the type's lowest number where a key is padding
        hide = torch.where(mask == 0, torch.finfo(x.dtype).min, 0.).to(x.dtype)
        hide = rearrange(hide, "b s -> b 1 1 s")
        for block in self.blocks:
            x = block(x, hide)
        return self.norm(x) * mask[..., None].to(x.dtype)


def words_to_ids(captions, length=32):
    """
    List of str -> ids (b, length): a hash of each word or digit with its place, an end mark, zeros; and a
    mask (b, length), 1 where no 0. Longer captions are cut.
    """
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    for row, caption in zip(ids, captions):
        # words are further apart than their letters, and digits make all numbers: 42 is read as 4_ 2
        spaced = re.sub(r"\d(?=(\d*))", lambda digit: f" {digit[0]}{'_' * len(digit[1])} ", caption)
        words = re.findall(r"\w+", spaced)[:length - 1]
        # 0 pads, 1 ends
        codes = [2 + zlib.crc32(word.encode()) % (tiny_text.vocab - 2) for word in words]
        row[:len(codes) + 1] = torch.tensor([*codes, END])
    return ids, (ids > 0).long()


def encode_captions(encoder, device, captions):
    """List of str -> what the small world's encoder makes of them, (b, 32, dim)"""
    ids, mask = words_to_ids(captions)
    return encoder(ids.to(device), mask.to(device))


def open_text(path):
    """A file; -, standard input; /dev/fd/N, which is <(command). Other pipes may be waited for in vain"""
    match = re.fullmatch(r"-|/dev/fd/(\d+)", str(path))
    return open(int(match[1] or 0), "rb", closefd=False) if match else open_file(path)


def read_text(path):
    """What a file of UTF-8 or, with its mark, UTF-16 holds, without the mark; read once"""
    with in_one_line(f"cannot read the text {path}", "write it in UTF-8"), open_text(path) as file:
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def check_prompt(prompt):
    """Raises BadInput for what is no text to an encoder; tabs and ends of lines are white space."""
    # also halves of surrogate pairs, what Python makes of bytes that are no UTF-8
    strange = re.search("[\ud800-\udfff\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", prompt)
    if strange or not 0 < len(prompt.strip()) <= MOST_LETTERS:
        raise BadInput(f"the prompt is empty, has control characters or more than {MOST_LETTERS} letters, "
                       f"or is no UTF-8: {prompt[:60]!r}")


def read_prompts(path, check=check_prompt):
    """A UTF-8 file, one prompt a line -> list of str; check(prompt) raises BadInput for a bad one."""
    prompts = []
    # not splitlines(), which ends lines at marks within them too
    lines = map(str.strip, re.split(r"\r\n|\r|\n", read_text(path)))
    for number, line in enumerate(lines, 1):
        if line:
            try:
                check(line)
            except BadInput as error:
                raise BadInput(f"{path}, line {number}: {error}") from None
            prompts.append(line)
    if not prompts:
        raise BadInput(f"{path} holds no prompts: write one a line")
    return prompts


# ---- the full-size encoder's prompts -----------------------------------------------------------------------

def clean(prompt):
    """Wan's cleaning: Unicode mended, full-width forms to ASCII, HTML entities twice, white space single."""
    import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


def read_tokenizer(path):
    """The tokenizer of UMT5, from its tokenizer.json"""
    from tokenizers import Tokenizer
    with in_one_line(f"cannot read {path}", FETCH), open_file(path) as file:
        tokenizer = Tokenizer.from_buffer(file.read())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenise(tokenizer, prompt):
    """-> ids (1, m), m <= 512: the cleaned prompt and an end mark. The DiT pads the features, not this."""
    ids = tokenizer.encode(clean(prompt), add_special_tokens=False).ids
    if len(ids) >= MOST_TOKENS:
        warn(f"{len(ids) + 1} tokens, cut after {MOST_TOKENS}: {prompt[:60]!r}")
    return torch.tensor([ids[:MOST_TOKENS - 1] + [END]])


if __name__ == "__main__":
    encoder = TextEncoder(tiny_text)
    ids, mask = words_to_ids(["Snow. The camera turns right from north, one turn in 16 seconds."])
    features = encoder(ids, mask)
    print(f"{int(mask.sum())} ids, then 0 -> features {tuple(features.shape)}, zero from there on")
