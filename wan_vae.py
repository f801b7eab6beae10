"""
Wan's video autoencoder: 4 frames of 8x8 pixels <-> one latent of 16 channels, of which the first stands for
one frame.

It convolves over time and space and never looks ahead: each convolution remembers its last two frames.
Decoding in pieces of any size is therefore the same computation as decoding at once.

Reference: the VAE of Wan 2.1 (arXiv 2503.20314; names and shapes of its 194 tensors), tested on golden
vectors.
Leaves out: the log-variance of Wan's encoder (latents are its mean).
"""
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

MEAN = (-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508, .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503,
        -.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251,
       1.9160)


@dataclass
class WanVAEConfig:
    dim: int = 96               # channels at full resolution
    mult: tuple = (1, 2, 4, 4)  # of dim, at the four resolutions, fine to coarse
    channels: int = 16          # latent channels


@lru_cache
def scaling(device):
    """Mean and standard deviation of Wan's latents, (16, 1, 1) each: copied to a device once."""
    return [torch.tensor(z, device=device)[:, None, None] for z in (MEAN, STD)]


class CausalConv(nn.Conv3d):
    """
    Convolution over time that sees a frame and the two before it. x (b, c, f, h, w). state, here and below: a
    deque with one entry a layer that remembers, None at the start of a video; a layer takes its own from the
    front and puts the new one at the back, so after a pass they stand in order again.
    """
    def __init__(self, c_in, c_out, space=3, stride=1):
        super().__init__(c_in, c_out, (3, space, space), stride=(stride, 1, 1), padding=(0, space // 2, space // 2))

    def forward(self, x, state):
        past, keep = state.popleft(), 3 - self.stride[0]
        x = F.pad(x, (0, 0, 0, 0, keep, 0)) if past is None else torch.cat([past, x], dim=2)
        state.append(x[:, :, -keep:].clone())  # a view would hold all of x
        return super().forward(x)


class ChannelNorm(nn.Module):
    def __init__(self, c, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *[1] * axes))

    def forward(self, x):
        return F.normalize(x, dim=1) * len(self.gamma) ** .5 * self.gamma


def through(layers, x, state):
    """x through layers of which some remember."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, (CausalConv, ResidualBlock, Resample)) else layer(x)
    return x


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(ChannelNorm(c_in), nn.SiLU(), CausalConv(c_in, c_out), ChannelNorm(c_out), nn.SiLU(),
                                      nn.Identity(), CausalConv(c_out, c_out))  # the identity stands where dropout was
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, state):
        return self.shortcut(x) + through(self.residual, x, state)


class FrameAttention(nn.Module):
    """One head over the pixels of each frame. x (b, c, f, h, w)"""
    def __init__(self, c):
        super().__init__()
        self.norm, self.to_qkv, self.proj = ChannelNorm(c, 2), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        frames = self.norm(rearrange(x, "b c f h w -> (b f) c h w"))
        q, k, v = rearrange(self.to_qkv(frames), "n (s c) h w -> s n 1 (h w) c", s=3)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + rearrange(self.proj(y), "(b f) c h w -> b c f h w", b=len(x))


class Resample(nn.Module):
    """
    Space by 2, up or down, and time by 2 where `time`. A video's first frame is neither joined nor doubled:
    it passes time by, and on the way up the frames after it do not even see it (zeros stand in its place).
    """
    def __init__(self, c, up, time):
        super().__init__()
        self.up = up  # down: padded on the right and at the bottom only
        self.resample = nn.Sequential(*[nn.Upsample(scale_factor=2), nn.Conv2d(c, c // 2, 3, padding=1)] if up else
                                      [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)])
        self.time_conv = (CausalConv(c, 2 * c, 1) if up else CausalConv(c, c, 1, stride=2)) if time else None

    def space(self, x):
        return rearrange(self.resample(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=len(x))

    def forward(self, x, state):
        x = x if self.up else self.space(x)
        if self.time_conv and state[0] is None:
            state.popleft()
            state.append(torch.zeros_like(x).repeat(1, 1, 2, 1, 1) if self.up else x)
        elif self.time_conv:
            x = self.time_conv(x, state)
            x = rearrange(x, "b (s c) f h w -> b c (f s) h w", s=2) if self.up else x
        return self.space(x) if self.up else x


class Coder(nn.Module):
    """Wan's encoder or decoder; its parts are named as in the official weights."""
    def __init__(self, c, up):
        super().__init__()
        wide, deep, layers = [c.dim * m for m in c.mult][::-1 if up else 1], c.dim * c.mult[-1], []
        at = wide[0]
        self.conv1 = CausalConv(c.channels if up else 3, at)
        for i, width in enumerate(wide):
            for _ in range(2 + up):
                layers.append(ResidualBlock(at, width))
                at = width
            if i + 1 < len(wide):
                layers.append(Resample(at, up, time=i < 2 if up else i > 0))
                at = at // 2 if up else at
        self.middle = nn.Sequential(ResidualBlock(deep, deep), FrameAttention(deep), ResidualBlock(deep, deep))
        self.add_module("upsamples" if up else "downsamples", nn.Sequential(*layers))
        self.head = nn.Sequential(ChannelNorm(at), nn.SiLU(), CausalConv(at, 3 if up else 2 * c.channels))
        last = 1 + max(i for i, layer in enumerate(layers) if isinstance(layer, Resample) and layer.time_conv)
        self.order = (*self.middle, *layers[:last]) if up else (*layers, *self.middle, *self.head)
        self.late = (*layers[last:], *self.head) if up else ()  # the widest maps, frame by frame: a third of the memory
        self.slots = [sum(isinstance(m, CausalConv) for m in nn.ModuleList(p).modules()) for p in (self.order, self.late)]

    def forward(self, x, past):
        """x (b, c, f, h, w), at the start of a video one frame; past: None there, else what the last call returned, used up"""
        state = past if isinstance(past, deque) else deque(past or [None] * (1 + sum(self.slots)))
        x = through(self.order, self.conv1(x, state), state)
        late = deque(state.popleft() for _ in range(self.slots[1]))
        x = torch.cat([through(self.late, frame, late) for frame in x.split(1, dim=2)], dim=2)
        state.extend(late)
        return x, state


class WanVAE(nn.Module):
    """Same interface as TAE. Works on one latent (4 frames) at a time: the memory it needs does not grow with the clip."""
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        c = self.config = config
        self.encoder, self.decoder = Coder(c, up=False), Coder(c, up=True)
        self.conv1, self.conv2 = (nn.Conv3d(n, n, 1) for n in (2 * c.channels, c.channels))

    def encode(self, video):
        """video (b, 1 + 4 (n - 1), 3, h, w) in [-1, 1] -> (b, n, 16, h / 8, w / 8) latents, normalised; float32"""
        b, f, c, h, w = video.shape
        if (f - 1) % 4 or h % 8 or w % 8:
            raise ValueError(f"cannot encode {f} frames of {w}x{h}: give 1 + 4n frames and sides that 8 divides")
        latents, past, (mean, std) = [], None, scaling(video.device)
        for piece in video.to(self.conv1.weight.dtype).split([1] + [4] * (f // 4), dim=1):
            z, past = self.encoder(rearrange(piece, "b f c h w -> b c f h w"), past)
            latents.append(rearrange(self.conv1(z).chunk(2, dim=1)[0], "b c f h w -> b f c h w").float())
        return (torch.cat(latents, dim=1) - mean) / std

    def decode(self, latents, past=None):
        """latents (b, n, 16, h, w), past as TAE.decode's but used up -> video (b, 4n - 3 or 4n, 3, 8h, 8w) in [-1, 1], past"""
        mean, std = scaling(latents.device)
        z, frames = self.conv2(rearrange(latents * std + mean, "b f c h w -> b c f h w").to(self.conv2.weight.dtype)), []
        for piece in z.split(1, dim=2):
            x, past = self.decoder(piece, past)
            frames.append(rearrange(x, "b c f h w -> b f c h w").float())
        return torch.cat(frames, dim=1).clamp(-1, 1), past
