"""
Wan's video autoencoder: a video's first frame <-> one latent, every 4 frames after it <-> one more. A latent
has 16 channels, and one place for 8x8 pixels.

It convolves over time and space and never looks ahead: a convolution over time sees a frame and the two
before it. So a video may come in pieces, and the memory it takes does not grow with its length: encode() goes
through 1, 4, 4, ... frames, decode() through one latent after another. Each convolution over time remembers
its last input frames:

    one convolution    piece n - 1        piece n            piece n + 1
    its input           .. a  b           c  d  e  f          g  h  i  j
    remembered             [a b] -------> in front            [e f] -----> in front
    it sees                              [a b] c d e f                    [e f] g h i j
    its output                     of abc, bcd, cde, def          of efg, fgh, ghi, hij

What all of them remember is the state: convolution -> its last input frames, empty where a video starts.

    python wan_vae.py          # decodes one latent after another, beside decoding at once

Reference: the VAE of Wan 2.1 (arXiv 2503.20314; names and shapes of its 194 tensors), tested on golden
vectors.
Leaves out: the log-variance that Wan's encoder also makes (latents are the mean, not a sample).
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# of Wan's latents, one a channel: what a DiT sees is (latent - MEAN) / STD
MEAN = torch.tensor([-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508,
                     .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503, -.2921])[:, None, None]
STD = torch.tensor([2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160])[:, None, None]
# the three steps from a resolution to the next coarser one halve space; which of them halve time, too?
HALVES_TIME = (False, True, True)


@dataclass
class WanVAEConfig:
    dim: int = 96               # channels at full resolution
    mult: tuple = (1, 2, 4, 4)  # of dim, at the four resolutions, fine to coarse
    channels: int = 16          # latent channels
    blocks: int = 2             # residual blocks at a resolution; the decoder has one more


def each_frame(layers, x):
    """2-D layers on each frame of x (b, c, f, h, w)."""
    frames = layers(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=len(x))


class CausalConv(nn.Conv3d):
    """Convolution over 3 frames, the newest last; zeros stand before a video. x (b, c, f, h, w)"""
    def __init__(self, c_in, c_out, space=3, stride=1):
        padding = (0, space // 2, space // 2)
        super().__init__(c_in, c_out, (3, space, space), stride=(stride, 1, 1), padding=padding)
        self.keep = 3 - stride  # frames to remember

    def forward(self, x, state):
        if self in state:
            x = torch.cat([state[self], x], dim=2)
        else:
            x = F.pad(x, (0, 0, 0, 0, self.keep, 0))
        # a copy, because a view would hold all of x
        state[self] = x[:, :, -self.keep:].clone()
        return super().forward(x)


class CausalSequential(nn.Sequential):
    """Layers after one another, of which some remember."""
    def forward(self, x, state):
        for layer in self:
            remembers = isinstance(layer, (CausalConv, CausalSequential, ResidualBlock, Downsample, Upsample))
            x = layer(x, state) if remembers else layer(x)
        return x


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each pixel."""
    def __init__(self, c, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *[1] * axes))

    def forward(self, x):
        return F.normalize(x, dim=1) * len(self.gamma) ** .5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        # the identity stands where Wan was trained with dropout
        self.residual = CausalSequential(
            ChannelNorm(c_in), nn.SiLU(), CausalConv(c_in, c_out),
            ChannelNorm(c_out), nn.SiLU(), nn.Identity(), CausalConv(c_out, c_out))
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, state):
        return self.shortcut(x) + self.residual(x, state)


class FrameAttention(nn.Module):
    """One head over the pixels of each frame. x (b, c, f, h, w)"""
    def __init__(self, c):
        super().__init__()
        self.norm = ChannelNorm(c, axes=2)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return x + each_frame(self.attend, x)

    def attend(self, x):
        # contiguous: kernels that keep no table of scores want the channels of a pixel side by side
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (s c) h w -> s n 1 (h w) c", s=3).contiguous()
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Half as high and as wide and, where `time`, one frame of two; a video's first frame stays one."""
    def __init__(self, c, time):
        super().__init__()
        # padded on the right and at the bottom only
        pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.resample = nn.Sequential(pad, nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = CausalConv(c, c, space=1, stride=2) if time else None

    def forward(self, x, state):
        x = each_frame(self.resample, x)
        conv = self.time_conv
        if conv in state:
            return conv(x, state)
        # the first frame passes time by, and is remembered
        if conv is not None:
            state[conv] = x
        return x


class Upsample(nn.Module):
    """Twice as high and as wide and, where `time`, two frames of one; a video's first frame stays one."""
    def __init__(self, c, time):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c // 2, 3, padding=1))
        self.time_conv = CausalConv(c, 2 * c, space=1) if time else None

    def forward(self, x, state):
        conv = self.time_conv
        if conv in state:
            x = rearrange(conv(x, state), "b (s c) f h w -> b c (f s) h w", s=2)
        elif conv is not None:
            # the first frame passes time by, and is not even remembered: two frames of zeros are
            state[conv] = torch.zeros_like(x).repeat(1, 1, 2, 1, 1)
        return each_frame(self.resample, x)


class Decoder(CausalSequential):
    """
    Its layers behind the last doubling of time take one frame after another, because their maps are as large
    as the video: for four frames at once they would need three times the memory.
    """
    def forward(self, x, state):
        layers = [self.conv1, self.middle, *self.upsamples, self.head]
        doubling = [i for i, layer in enumerate(layers) if getattr(layer, "time_conv", None)]
        late = CausalSequential(*layers[doubling[-1] + 1:])
        x = CausalSequential(*layers[:doubling[-1] + 1])(x, state)
        return torch.cat([late(frame, state) for frame in x.split(1, dim=2)], dim=2)


def residual_blocks(c_in, c_out, blocks):
    return [ResidualBlock(c_in, c_out), *(ResidualBlock(c_out, c_out) for _ in range(blocks - 1))]


def middle(c):
    return CausalSequential(ResidualBlock(c, c), FrameAttention(c), ResidualBlock(c, c))


def head(c_in, c_out):
    return CausalSequential(ChannelNorm(c_in), nn.SiLU(), CausalConv(c_in, c_out))


def encoder(config):
    """(b, 3, 1 frame at a video's start, then 4, h, w) -> mean and log-variance (b, 32, 1, h / 8, w / 8)"""
    widths = [config.dim * times for times in config.mult]
    # fine to coarse
    layers = residual_blocks(widths[0], widths[0], config.blocks)
    for c_in, c_out, time in zip(widths, widths[1:], HALVES_TIME):
        layers.append(Downsample(c_in, time))
        layers += residual_blocks(c_in, c_out, config.blocks)
    return CausalSequential(OrderedDict(
        conv1=CausalConv(3, widths[0]),
        downsamples=CausalSequential(*layers),
        middle=middle(widths[-1]),
        head=head(widths[-1], 2 * config.channels)))


def decoder(config):
    """(b, 16, 1, h, w) -> (b, 3, 1 frame at a video's start, then 4, 8h, 8w)"""
    widths = [config.dim * times for times in reversed(config.mult)]
    # coarse to fine; an Upsample halves the channels
    layers = residual_blocks(widths[0], widths[0], config.blocks + 1)
    for c_in, c_out, time in zip(widths, widths[1:], reversed(HALVES_TIME)):
        layers.append(Upsample(c_in, time))
        layers += residual_blocks(c_in // 2, c_out, config.blocks + 1)
    return Decoder(OrderedDict(
        conv1=CausalConv(config.channels, widths[0]),
        middle=middle(widths[0]),
        upsamples=CausalSequential(*layers),
        head=head(widths[-1], 3)))


class WanVAE(nn.Module):
    """Encodes and decodes as vae.TAE does, with Wan's own weights."""
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.conv1 = nn.Conv3d(2 * config.channels, 2 * config.channels, 1)
        self.conv2 = nn.Conv3d(config.channels, config.channels, 1)

    def encode(self, video):
        """
        video    (b, 1 + 4 (n - 1), 3, h, w) in [-1, 1]
        returns  (b, n, 16, h / 8, w / 8) latents of about zero mean and unit variance, float32
        """
        f = video.shape[1]
        if f % 4 != 1:
            raise ValueError(f"{f} frames: give 1 + 4n")
        # piece by piece
        x = rearrange(video, "b f c h w -> b c f h w").to(self.conv1.weight.dtype)
        state = {}
        pieces = x.split([1] + [4] * (f // 4), dim=2)
        coded = torch.cat([self.encoder(piece, state) for piece in pieces], dim=2)
        # the mean, normalised
        mean, log_variance = self.conv1(coded).chunk(2, dim=1)
        latents = rearrange(mean, "b c f h w -> b f c h w").float()
        return (latents - MEAN.to(video.device)) / STD.to(video.device)

    def decode(self, latents, past=None):
        """
        latents  (b, n, 16, h, w)
        past     None at the start of a video, else the state that was returned before, which is overwritten
        returns  video (b, 4n - 3 or 4n, 3, 8h, 8w) in [-1, 1] float32, and the state to go on with
        """
        state = {} if past is None else past
        # back from normalised latents
        latents = latents * STD.to(latents.device) + MEAN.to(latents.device)
        x = self.conv2(rearrange(latents, "b f c h w -> b c f h w").to(self.conv2.weight.dtype))
        # one latent after another
        frames = [self.decoder(piece, state).float() for piece in x.split(1, dim=2)]
        return rearrange(torch.cat(frames, dim=2), "b c f h w -> b f c h w").clamp(-1, 1), state


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(dim=8)).requires_grad_(False)
    latents = torch.randn(1, 5, 16, 2, 2)
    whole, _ = vae.decode(latents)
    state = None
    for i, latent in enumerate(latents.split(1, dim=1)):
        frames, state = vae.decode(latent, state)
        first = max(0, 4 * i - 3)
        error = (frames - whole[:, first:4 * i + 1]).abs().max()
        print(f"latent {i} -> frames {first}..{4 * i}, {error:.5f} from those decoded at once")
