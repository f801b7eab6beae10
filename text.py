"""
The UMT5 text encoder: prompts -> features that the DiT attends to.

A pre-norm transformer encoder without biases and without 1/sqrt(d); where a word stands enters through a learned bias on
attention scores, one table of 32 distance buckets a layer. The small world runs the same class at small width on bytes:
id = byte + 2, 1 ends a caption, 0 pads.

    python text.py             # encodes a caption with an untrained tiny encoder

References: T5, arXiv 1910.10683; UMT5, arXiv 2304.09151; Wan 2.1 (names and shapes of its 242 tensors, cleaning of prompts).
Tested on golden vectors of the official code.
Leaves out: a tokenizer of its own (the full-size encoder reads tokenizer.json with the package `tokenizers`).
"""
import html
import importlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from config import BadInput
from model import RMSNorm


@dataclass
class TextConfig:  # the defaults are UMT5-XXL
    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32


tiny_text = TextConfig(vocab=258, dim=64, dim_attn=64, dim_ffn=128, heads=2, layers=2)


def bucket(offset, buckets=32, max_distance=128):
    """
    offset   key position minus query position, any int tensor
    returns  bucket number of the same shape: half for each sign, 8 exact distances, then logarithmic up to 128
    """
    half, exact, far = buckets // 2, buckets // 4, offset.abs()
    log = exact + (torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return (offset > 0).long() * half + torch.where(far < exact, far, log.clamp(max=half - 1))


class TextAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v = (nn.Linear(c.dim, c.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(c.dim_attn, c.dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (rearrange(f(x), "b m (k d) -> b k m d", k=self.heads) for f in (self.q, self.k, self.v))
        score = torch.einsum("bkqd,bksd->bkqs", q, k) + bias
        y = torch.einsum("bkqs,bksd->bkqd", score.float().softmax(-1).to(v.dtype), v)
        return self.o(rearrange(y, "b k m d -> b m (k d)"))


class GatedMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c.dim, c.dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1, self.fc2 = nn.Linear(c.dim, c.dim_ffn, bias=False), nn.Linear(c.dim_ffn, c.dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class TextBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim), RMSNorm(c.dim)
        self.attn, self.ffn = TextAttention(c), GatedMLP(c)
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(c.buckets, c.heads)})

    def forward(self, x, mask):
        """x (b, m, dim); mask (b, 1, 1, m) is 0 where a key may be seen and the type's lowest number where not"""
        at = torch.arange(x.shape[1], device=x.device)
        table = self.pos_embedding["embedding"]
        bias = rearrange(table(bucket(at[None] - at[:, None], table.num_embeddings)), "q s k -> 1 k q s")
        x = x + self.attn(self.norm1(x), bias + mask)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)

    def forward(self, ids, mask):
        """
        ids, mask  (b, m) int; mask is 1 on real tokens
        returns    (b, m, dim) features, zero where padded, as the DiT takes them
        """
        x = self.token_embedding(ids)
        lowest = torch.finfo(x.dtype).min
        hide = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask == 0, lowest)[:, None, None]
        for block in self.blocks:
            x = block(x, hide)
        return self.norm(x) * mask[..., None].to(x.dtype)


def bytes_to_ids(captions, length=96):
    """list of str -> ids (b, length), mask (b, length): UTF-8 bytes + 2, an end mark, zeros; longer captions are cut."""
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    for row, caption in zip(ids, captions):
        b = list(caption.encode("utf-8")[:length - 1])
        row[:len(b) + 1] = torch.tensor([x + 2 for x in b] + [1])
    return ids, (ids > 0).long()


def read_prompts(path):
    """A UTF-8 file, one prompt a line -> list of str"""
    try:
        prompts = [p for p in map(str.strip, Path(path).read_text("utf-8").splitlines()) if p]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts {path}: {error}") from None
    if not prompts:
        raise BadInput(f"{path} holds no prompts: write one a line")
    return prompts


# ---- the full-size encoder's prompts -----------------------------------------------------------------------------------

def need(package):
    """A package that only the full-size model uses."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{package} is missing: pip install -r requirements-wan.txt") from None


def clean(prompt):
    """Wan's cleaning: broken Unicode mended, full-width forms to ASCII, HTML entities resolved twice, white space single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(need("ftfy").fix_text(prompt)))).strip()


if __name__ == "__main__":
    torch.manual_seed(0)
    encoder, (ids, mask) = TextEncoder(tiny_text), bytes_to_ids(["Snow. The camera turns right, one turn in 16 seconds."])
    print(f"{sum(p.numel() for p in encoder.parameters()):,} parameters; {int(mask.sum())} ids -> features "
          f"{tuple(encoder(ids, mask).shape)}")
