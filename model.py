"""
The Wan 2.1 video DiT, able to run causally: one set of weights, four ways to look.

A video's latents become tokens; each block attends over tokens, attends to the text, and passes an MLP. AdaLN
scales and shifts by the noise level of the token's own frame. What a token may see is decided outside:
nothing given = the whole clip (bidirectional), a frame mask = block-causal training (teacher forcing), keys
and values from the KV cache = generation chunk by chunk, a prefix = a clean context that sees itself alone
(teacher and critic). The forward is pure: it returns the keys and values that it made and writes nothing.

    python model.py            # parameters of the two configs

References: Wan 2.1, arXiv 2503.20314 (names and shapes of its raw weights, all 825); DiT, arXiv 2212.09748
(AdaLN); Self-Forcing, arXiv 2506.08009 (one noise level per frame). Tested on golden vectors of Wan's and
Self-Forcing's code.
Leaves out: image-to-video inputs, flash-attention kernels (scaled_dot_product_attention picks one), the 14B
model.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from rope import apply_rope


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

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be a multiple of twice the heads, {self.heads}")

    @property
    def head_dim(self):
        return self.dim // self.heads


tiny_dit = DiTConfig(
    dim=128,
    ffn_dim=480,
    heads=4,
    layers=7,
    freq_dim=64,
    text_dim=64,
    text_len=32,
    patch=(4, 1),
)


# ---- parts -------------------------------------------------------------------------------------------------

def linear(x, layer):
    """
    layer(x), but on a CPU larger products go to oneDNN. torch takes MKL, which leaves AVX-512 unused on
    processors that are not Intel's: measured on an AMD EPYC, 110 GFLOP/s a core, not 250.
    """
    is_small = x.numel() * layer.out_features < 2 ** 22
    if is_small or torch.is_grad_enabled() or not has_onednn(x):
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def has_onednn(x):
    is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.is_cpu and is_float32 and torch.backends.mkldnn.is_available()


class MLP(nn.Sequential):
    """Two linear layers, and an activation between"""
    def __init__(self, c_in, hidden, c_out, activation):
        super().__init__(nn.Linear(c_in, hidden), activation, nn.Linear(hidden, c_out))

    def forward(self, x):
        first, activation, last = self
        return linear(activation(linear(x, first)), last)


def rms_norm(x, norm):
    """norm(x), but in x's dtype: autocast would make it float32"""
    weight = norm.weight.type_as(x)
    return torch.rms_norm(x, weight.shape, weight, norm.eps).type_as(x)


def modulate(x, shift, scale):
    """
    A LayerNorm: shift + scale norm(x); AdaLN, where these are made of the noise level.
    x (b, f, n, c); shift, scale (b, f, 1, c), one a frame, or (c,); the scale around 1; float32
    returns  (b, f, n, c)
    """
    return torch.addcmul(shift, torch.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def timestep_embedding(t, dim):
    """
    t        (b, f) noise levels in [0, 1], which Wan counts in thousandths
    returns  (b, f, dim) float32: cosines, then sines, of 1000 t at dim / 2 frequencies
    """
    # Made on the CPU in float64, which not every device has, and moved as float32: in bfloat16 937.5 is 936.
    home = "meta" if t.is_meta else "cpu"
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=home) / half)
    angle = 1000 * t.to(home).double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(t.device)


def attend(q, k, v, mask=None):
    """
    Softmax attention. On a CPU another kernel runs while gradients are enabled, so the same call gives other
    last bits with and without torch.no_grad().
    q        (b, n, heads, d); k, v (b, s, heads, d)
    mask     None, or (b or 1, 1, n, s) bool, True = seen
    returns  (b, n, heads d)
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, n or s, d)
    # on a CPU the backward of this takes half the time of the fused kernel's
    if q.is_cpu and torch.is_grad_enabled():
        score = (q * q.shape[-1] ** -0.5) @ k.mT  # (b, heads, n, s)
        if mask is not None:
            score = score + torch.zeros_like(mask, dtype=score.dtype).masked_fill_(~mask, -1e9)
        with torch.autocast("cpu", enabled=False):
            y = score.softmax(-1) @ v.to(score.dtype)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Wan's cross-attention, and its self-attention's projections; q, k normalised over all heads together"""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim, eps=1e-6)

    def split(self, x):
        """(b, ..., c) -> (b, n, heads, d): all tokens, head by head"""
        return x.view(x.shape[0], -1, self.heads, self.head_dim)

    def queries(self, x):
        return self.split(rms_norm(linear(x, self.q), self.norm_q))

    def keys_values(self, x):
        k = rms_norm(linear(x, self.k), self.norm_k)
        return self.split(k), self.split(linear(x, self.v))

    def forward(self, x, text):
        """
        x        (b, f, n, c)
        text     keys and values (b, m, heads, d), made once a prompt by DiT.text
        returns  (b, f n, c)
        """
        return linear(attend(self.queries(x), *text), self.o)


class SelfAttention(Attention):
    def forward(self, x, rope, memory, mask, prefix):
        """
        x        (b, f, n, c): n tokens a frame
        rope     cos and sin of the f n tokens (rope_cos_sin)
        memory   None, or what stands before them in the KV cache, a memory.LayerCache of s tokens
        mask     None, or (b or 1, 1, f n, s + f n) bool
        prefix   the first so many tokens see each other only, the others see everything: two calls, no mask
                 and no memory
        returns  (b, f n, c), and this call's own keys, not rotated, and values
        """
        k, v = self.keys_values(x)
        q = apply_rope(self.queries(x), rope)
        keys, values = apply_rope(k, rope), v
        # the KV cache stands in front
        if memory is not None:
            keys, values = memory.extend(keys, values)
        y = attend(q[:, prefix:], keys, values, mask)
        # context that does not see what follows it
        if prefix:
            context = attend(q[:, :prefix], keys[:, :prefix], values[:, :prefix])
            y = torch.cat([context, y], dim=1)
        return linear(y, self.o), (k, v)


def learned_modulation(parts, dim):
    """AdaLN's own shifts, scales and gates of a layer, random; with no values on the meta device"""
    values = torch.empty(1, parts, dim)
    # random numbers there would make torch import its compiler, which takes most of a second
    return nn.Parameter(values if values.is_meta else values.normal_() / dim ** 0.5)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = SelfAttention(c.dim, c.heads)
        self.cross_attn = Attention(c.dim, c.heads)
        self.norm3 = nn.LayerNorm(c.dim, eps=1e-6)
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, nn.GELU(approximate="tanh"))
        self.modulation = learned_modulation(6, c.dim)

    def forward(self, x, modulation, text, rope, memory, mask, prefix):
        """
        x           (b, f, n, c) float32, the residual stream
        modulation  six of (b, f, 1, c) float32: shift, 1 + scale, gate for self-attention, then for the MLP
        """
        dtype = self.self_attn.o.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        # self-attention
        y, kv = self.self_attn(modulate(x, shift1, scale1).to(dtype), rope, memory, mask, prefix)
        x = torch.addcmul(x, y.view_as(x), gate1)
        # cross-attention, neither modulated nor gated
        y = modulate(x, self.norm3.bias, self.norm3.weight).to(dtype)
        x = x + self.cross_attn(y, text).view_as(x)
        # MLP
        y = self.ffn(modulate(x, shift2, scale2).to(dtype))
        return torch.addcmul(x, y, gate2), kv


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head = nn.Linear(c.dim, c.channels * c.patch[0] * c.patch[1])
        self.modulation = learned_modulation(2, c.dim)

    def forward(self, x, modulation):
        """x (b, f, n, c), modulation two of (b, f, 1, c) float32: shift, 1 + scale"""
        return self.head(modulate(x, *modulation).to(self.head.weight.dtype))


# ---- the network -------------------------------------------------------------------------------------------

class DiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        c = config
        self.patch_embedding = nn.Conv3d(c.channels, c.dim, (1, *c.patch), (1, *c.patch))
        self.text_embedding = MLP(c.text_dim, c.dim, c.dim, nn.GELU(approximate="tanh"))
        self.time_embedding = MLP(c.freq_dim, c.dim, c.dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = Head(c)

    def initialise(self):
        """Random weights to train from nothing. The head starts at zero, so the first prediction is v = 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.head.weight)
        # a perfect match of normalised queries and keys scores sqrt(d): with narrow heads, too little to win
        # against a whole memory of others
        for block in self.blocks:
            nn.init.constant_(block.self_attn.norm_q.weight, 2.)
            nn.init.constant_(block.self_attn.norm_k.weight, 2.)
        return self

    def text(self, features):
        """
        features (b, m, text_dim), zero where padded; made text_len long by zeros, which ARE attended, as in
        Wan
        returns  one (keys, values) pair a layer, each (b, text_len, heads, d): computed once a prompt
        """
        features = F.pad(features, (0, 0, 0, self.config.text_len - features.shape[1]))
        x = self.text_embedding(features.to(self.text_embedding[0].weight.dtype))
        return [block.cross_attn.keys_values(x) for block in self.blocks]

    def time(self, t):
        """
        t (b, f) noise levels in [0, 1] -> all that they mean to the network, float32: six (b, f, 1, c) for
        each block, and two for the head, scales with their 1. The head's come from the embedding itself, the
        blocks' from its projection.
        """
        wave = timestep_embedding(t, self.config.freq_dim)
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):
            embedding = self.time_embedding(wave.to(self.time_embedding[0].weight.dtype))
            projection = self.time_projection(embedding)
        projection = rearrange(projection.float(), "b f (s c) -> s b f 1 c", s=6)
        own = [rearrange(part.modulation.float(), "1 s c -> s 1 1 1 c") for part in (*self.blocks, self.head)]
        blocks = []
        for modulation in own[:-1]:
            shift1, scale1, gate1, shift2, scale2, gate2 = projection + modulation
            blocks.append((shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2))
        shift, scale = embedding.float()[:, :, None] + own[-1]
        return blocks, (shift, 1 + scale)

    def forward(self, x, t, text, rope, memory=None, mask=None, prefix=0, modulation=None, with_kv=True):
        """
        x           (b, f, c, h, w) noised latents
        t           (b, f)          noise level of each frame, 0 clean .. 1 noise
        text        from self.text()
        rope        cos and sin of the tokens of x (rope_cos_sin over its latents' positions)
        memory      None, or one memory.LayerCache a layer, seen by all tokens of x
        mask        None (every frame of x sees every frame of x), or (b or 1, f, f) bool, True = row sees
                    column
        prefix      so many frames in front are context: they see each other only, the frames after them see
                    all
        modulation  None, or self.time(t), where the same t returns again and again
        with_kv     False: the second of what is returned stays empty; of 42 latents of Wan it would be 12 GB
        returns     v (b, f, c, h, w) float32, the velocity noise - x0; and one (keys, values) pair a layer of
                    x's tokens, keys after norm_k and before rotation, each (b, f n, heads, d)
        source: Wan 2.1 (order of the modulations: shift, scale, gate)
        """
        # latents to tokens; the patches do not overlap, so the convolution is a matrix product
        p, q = self.config.patch
        h = x.shape[3] // p
        patches = rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=q)
        weight = self.patch_embedding.weight
        x = F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias).float()
        n = x.shape[2]

        # which frame sees which -> which token sees which; all see the memory
        if mask is not None:
            mask = repeat(mask, "b f g -> b 1 (f n) (g m)", n=n, m=n)
            if memory is not None:
                mask = F.pad(mask, (memory[0].held, 0), value=True)

        # the blocks
        block_modulation, head_modulation = self.time(t) if modulation is None else modulation
        kv = []
        for i, block in enumerate(self.blocks):
            # safe to run again, because the forward is pure
            if self.config.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, made = block(x, modulation=block_modulation[i], text=text[i], rope=rope,
                            memory=None if memory is None else memory[i], mask=mask, prefix=prefix * n)
            if with_kv:
                kv.append(made)

        # tokens to latents; the channel is a patch's fastest index
        v = self.head(x, head_modulation).float()
        return rearrange(v, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h, p=p, q=q), kv


if __name__ == "__main__":
    for name, config in (("Wan2.1-T2V-1.3B", DiTConfig()), ("tiny", tiny_dit)):
        with torch.device("meta"):
            net = DiT(config)
        count = sum(p.numel() for p in net.parameters())
        print(f"{name}: {count:,} parameters in {len(net.state_dict())} tensors")
