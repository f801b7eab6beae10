"""
The Wan 2.1 video DiT, able to run causally: one set of weights, three ways to look.

A video's latents become tokens; each block attends over tokens, attends to the text, and passes an MLP, all three scaled
and shifted by the noise level of the token's own frame. What a token may see is decided outside: nothing given = the whole
clip (bidirectional), a frame mask = block-causal training, memory keys and values = generation chunk by chunk. The forward
is pure: it returns the keys and values that it made and writes nothing.

    python model.py            # sizes of the two configs, and the work of one pass

References: Wan 2.1, arXiv 2503.20314 (names and shapes of its raw weights, all 825); Self-Forcing, arXiv 2506.08009
(one timestep per frame). Tested against both on golden vectors.
Leaves out: image-to-video inputs, flash-attention kernels (scaled_dot_product_attention picks one), the 14B model.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from rope import apply_rope, rope_cos_sin


@dataclass
class DiTConfig:  # the defaults are Wan2.1-T2V-1.3B
    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    freq_dim: int = 256   # sinusoid of the noise level
    text_dim: int = 4096  # width of the text encoder's features
    text_len: int = 512   # text positions, padded with zeros and attended
    channels: int = 16    # latent channels, in and out
    patch: tuple = (2, 2)  # latent pixels a token is high and wide
    recompute: bool = False  # training: keep only the blocks' inputs, and run each again in the backward pass


tiny_dit = DiTConfig(dim=128, ffn_dim=480, heads=4, layers=7, freq_dim=64, text_dim=64, text_len=96, patch=(4, 1))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


def modulate(x, shift, scale):
    """LayerNorm without weights, then one scale and shift a frame: x (b, f n, c); shift, scale (b, f, 1, c); float32"""
    y = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, y, 1 + scale).flatten(1, 2)


def gated(x, y, gate):
    """x + gate y with one gate a frame: x, y (b, f n, c), gate (b, f, 1, c); float32"""
    f = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, f), y.float().unflatten(1, f), gate).flatten(1, 2)


def attend(q, k, v, mask=None):
    """q (b, n, k, d), k and v (b, s, k, d), mask (b or 1, 1, n, s) True = seen  ->  (b, n, k d)"""
    q, k, v = (rearrange(z, "b n k d -> b k n d") for z in (q, k.to(q.dtype), v.to(q.dtype)))
    if q.device.type == "cpu" and torch.is_grad_enabled():  # training on a CPU: torch's backward of sdpa takes twice as long
        score = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            score = score + torch.zeros_like(mask, dtype=score.dtype).masked_fill_(~mask, -1e9)
        with torch.autocast("cpu", enabled=False):
            return rearrange(score.softmax(-1) @ v.to(score.dtype), "b k n d -> b n (k d)")
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b k n d -> b n (k d)")


class Attention(nn.Module):
    """Projections of Wan's self- and cross-attention: q and k are normalised over all heads together."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def split(self, x):
        return rearrange(x, "b n (k d) -> b n k d", k=self.heads)

    def queries(self, x):
        return self.split(self.norm_q(self.q(x)))

    def keys_values(self, x):
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))


class SelfAttention(Attention):
    def forward(self, x, rope, memory, mask, prefix):
        """
        x       (b, n, c)
        rope    cos, sin of the n tokens (rope_cos_sin)
        memory  None, or keys (rotated already) and values (b, s, k, d) that stand before the n tokens; values may be a list
                of parts, so that a memory of several need not be copied together twice
        prefix  the first so many tokens see each other only, the others see everything: two calls, no mask
        returns (b, n, c), and this call's own un-rotated keys and values
        """
        k, v = self.keys_values(x)
        q, keys, values = apply_rope(self.queries(x), rope), apply_rope(k, rope), v
        if memory is not None:
            old = memory[1] if isinstance(memory[1], list) else [memory[1]]
            keys = torch.cat([memory[0].to(k.dtype), keys], dim=1)
            values = torch.cat([*(z.to(v.dtype) for z in old), v], dim=1)
        y = attend(q[:, prefix:], keys, values, mask)
        if prefix:
            y = torch.cat([attend(q[:, :prefix], keys[:, :prefix], values[:, :prefix]), y], dim=1)
        return self.o(y), (k, v)


class CrossAttention(Attention):
    def forward(self, x, text):
        """x (b, n, c); text: keys and values (b, m, k, d), made once a prompt by DiT.text"""
        return self.o(attend(self.queries(x), *text))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(c.dim, c.heads), CrossAttention(c.dim, c.heads)
        self.norm3 = nn.LayerNorm(c.dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim ** 0.5)

    def forward(self, x, e, text, rope, memory, mask, prefix):
        """x (b, n, c) float32; e (b, f, 6, c) float32: shift, scale, gate for attention, then for the MLP, per frame"""
        dtype = self.ffn[0].weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = e.unsqueeze(3).unbind(2)  # (b, f, 1, c) each
        y, kv = self.self_attn(modulate(x, shift1, scale1).to(dtype), rope, memory, mask, prefix)
        x = gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x.to(self.norm3.weight.dtype)).to(dtype), text)
        return gated(x, self.ffn(modulate(x, shift2, scale2).to(dtype)), gate2), kv


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head = nn.Linear(c.dim, c.channels * c.patch[0] * c.patch[1])
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim ** 0.5)

    def forward(self, x, e):
        """x (b, n, c), e (b, f, 2, c) float32: shift, scale"""
        shift, scale = e.unsqueeze(3).unbind(2)  # (b, f, 1, c) each
        return self.head(modulate(x, shift, scale).to(self.head.weight.dtype))


class DiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.channels, c.dim, (1, *c.patch), (1, *c.patch))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = Head(c)

    def initialise(self):
        """Random weights for training from nothing; the head starts at zero, so the first prediction is v = 0."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.head.head.weight)
        return self

    def text(self, features):
        """
        features (b, m, text_dim), zero where padded; made text_len long by zeros, which ARE attended, as in Wan
        returns  one (keys, values) pair a layer, each (b, text_len, k, d): computed once a prompt
        """
        features = F.pad(features, (0, 0, 0, self.config.text_len - features.shape[1]))
        x = self.text_embedding(features.to(self.text_embedding[0].weight.dtype))
        return [block.cross_attn.keys_values(x) for block in self.blocks]

    def time(self, t):
        """
        t (b, f) noise levels in [0, 1] -> one table (b, f, 6, c) a block and the head's (b, f, 2, c), float32: all that the
        noise level means to the network. The head's is of the embedding itself, the blocks' of its projection.
        """
        half = self.config.freq_dim // 2
        freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = 1000 * t.double()[..., None] * freq  # never in bf16: 937.5 would become 936
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):
            e = self.time_embedding(wave.to(self.time_embedding[0].weight.dtype))
            e6 = rearrange(self.time_projection(e), "b f (s c) -> b f s c", s=6).float()
        return [e6 + block.modulation.float() for block in self.blocks], e.float()[:, :, None] + self.head.modulation.float()

    def forward(self, x, t, text, rope, memory=None, mask=None, prefix=0, tables=None):
        """
        x        (b, f, c, h, w) noised latents
        t        (b, f)          noise level of each frame, 0 clean .. 1 noise
        text     from self.text()
        rope     cos, sin of the tokens of x (rope_cos_sin over its latents' positions)
        memory   None, or one (keys, values) pair a layer, each (b, s, k, d), keys rotated: seen by all tokens of x
        mask     None (every frame of x sees every frame of x), or (b or 1, f, f) bool, True = row sees column
        prefix   so many frames in front are context: they see each other only, the frames after them see all
        tables   None, or self.time(t), where the same t returns again and again
        returns  v (b, f, c, h, w) float32, the velocity noise - x0; and one (keys, values) pair a layer of x's tokens,
                 keys after norm_k and before rotation
        source: Wan 2.1 (modulation order shift, scale, gate; head uses the embedding, blocks its projection)
        """
        f, (p, q) = x.shape[1], self.config.patch
        h = x.shape[3] // p
        tokens = rearrange(x, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        weight = self.patch_embedding.weight
        x = F.linear(tokens.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias).float()  # (b, n, c)
        e6, e = self.time(t) if tables is None else tables
        if mask is not None:
            spread = x.shape[1] // f
            mask = repeat(mask, "b f g -> b 1 (f n) (g m)", n=spread, m=spread)
            if memory:
                mask = F.pad(mask, (memory[0][0].shape[1], 0), value=True)
        kv = []
        for i, block in enumerate(self.blocks):
            given = x, e6[i], text[i], rope, memory and memory[i], mask, prefix * (x.shape[1] // f)
            again = self.config.recompute and torch.is_grad_enabled()  # safe: the forward is pure
            x, made = checkpoint(block, *given, use_reentrant=False) if again else block(*given)  # (b, n, c)
            kv.append(made)
        v = self.head(x, e).float()
        return rearrange(v, "b (f h w) (p q c) -> b f c (h p) (w q)", f=f, h=h, p=p, q=q), kv


if __name__ == "__main__":
    for name, config in (("Wan2.1-T2V-1.3B", DiTConfig()), ("tiny", tiny_dit)):
        with torch.device("meta"):
            net = DiT(config)
        print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters in {len(net.state_dict())} tensors")
