"""
The tiny video autoencoder (TAE): 4 frames of 8x8 pixels <-> one latent of 16 channels, as in Wan's own
(wan_vae.py).

Every layer is a 2-D convolution; time enters in two ways. A MemBlock sees each frame beside the frame before
it, so the network is causal and all that it must remember to go on is one feature map a block. Fold lays two
frames into channels, and back. Decoding in pieces of any size is therefore the same computation as decoding
at once.

    python vae.py              # prints sizes, and that streamed decoding equals whole decoding

References: TAEHV (github.com/madebyollin/taehv, MIT), variant taew2_1: same layers, names and numbers, tested
on golden vectors. The small world uses it at small width, trained by train.py --stage vae.
Leaves out: the I2V and TAESD variants of TAEHV.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class TAEConfig:
    encoder: int = 64                    # channels
    decoder: tuple = (256, 128, 64, 64)  # channels of the four resolutions, coarse to fine
    channels: int = 16                   # latent channels


tiny_tae = TAEConfig(encoder=32, decoder=(64, 64, 32, 16))


def conv(c_in, c_out, stride=1, bias=True):
    return nn.Conv2d(c_in, c_out, 3, padding=1, stride=stride, bias=bias)


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it. x (b, f, c, h, w), past (b, c, h, w): the frame before x."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * c, c), nn.ReLU(), conv(c, c), nn.ReLU(), conv(c, c))

    def forward(self, x, past):
        before = torch.cat([past[:, None], x[:, :-1]], dim=1)
        both = rearrange(torch.cat([x, before], dim=2), "b f c h w -> (b f) c h w")
        out = F.relu(self.conv(both) + rearrange(x, "b f c h w -> (b f) c h w"))
        return rearrange(out, "(b f) c h w -> b f c h w", b=x.shape[0])


class Fold(nn.Module):
    """`stride` frames -> one or, to grow, one -> `stride`: a 1x1 convolution, those frames stacked in channels."""
    def __init__(self, c, stride, grow=False):
        super().__init__()
        self.stride, self.grow = stride, grow
        self.conv = nn.Conv2d(c, c * stride, 1, bias=False) if grow else nn.Conv2d(c * stride, c, 1, bias=False)

    def forward(self, x):
        if self.grow:
            return rearrange(self.conv(x), "n (s c) h w -> (n s) c h w", s=self.stride)
        return self.conv(rearrange(x, "(n s) c h w -> n (s c) h w", s=self.stride))


class SoftClamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class TAE(nn.Module):
    def __init__(self, config: TAEConfig):
        super().__init__()
        self.config = config
        e, d = config.encoder, config.decoder
        layers = [conv(3, e), nn.ReLU()]
        for stride in (2, 2, 1):
            layers += [Fold(e, stride), conv(e, e, stride=2, bias=False), MemBlock(e), MemBlock(e), MemBlock(e)]
        self.encoder = nn.Sequential(*layers, conv(e, config.channels))
        layers = [SoftClamp(), conv(config.channels, d[0]), nn.ReLU()]
        for i, stride in enumerate((1, 2, 2)):
            layers += [MemBlock(d[i]), MemBlock(d[i]), MemBlock(d[i]), nn.Upsample(scale_factor=2), Fold(d[i], stride, grow=True),
                       conv(d[i], d[i + 1], bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(d[3], 3))

    @staticmethod
    def run(layers, x, past):
        """
        x     (b, f, c, h, w)
        past  None at the start of a video, else what the last call returned: one feature map a MemBlock
        returns  (b, f', c', h', w'), past
        """
        b, last = x.shape[0], []
        x = rearrange(x, "b f c h w -> (b f) c h w").to(next(layers.parameters()).dtype)
        for layer in layers:
            if isinstance(layer, MemBlock):
                x = rearrange(x, "(b f) c h w -> b f c h w", b=b)
                before = torch.zeros_like(x[:, 0]) if past is None else past[len(last)]
                last.append(x[:, -1])
                x = rearrange(layer(x, before), "b f c h w -> (b f) c h w")
            else:
                x = layer(x)
        return rearrange(x, "(b f) c h w -> b f c h w", b=b), last

    def encode(self, video):
        """
        video    (b, 1 + 4 (n - 1), 3, h, w) in [-1, 1]; the first frame is repeated three times in front
        returns  (b, n, 16, h / 8, w / 8) latents of about zero mean and unit variance
        """
        b, f, c, h, w = video.shape
        if (f - 1) % 4 or h % 8 or w % 8:
            raise ValueError(f"cannot encode {f} frames of {w}x{h}: give 1 + 4n frames and sides that 8 divides")
        video, latents, past = torch.cat([video[:, :1].expand(-1, 3, -1, -1, -1), video], dim=1), [], None
        for piece in video.split(max(12, 2 ** 24 // (h * w) // 4 * 4), dim=1):  # a clip at 832x480 would not fit at once
            z, past = self.run(self.encoder, piece * 0.5 + 0.5, past)
            latents.append(z)
        return torch.cat(latents, dim=1)

    def decode(self, latents, past=None):
        """
        latents  (b, n, 16, h, w)
        past     None for the start of a video: its first 3 frames are copies and dropped; else the state
                 returned before
        returns  video (b, 4n - 3 or 4n, 3, 8h, 8w) in [-1, 1], and the state to go on with
        """
        video, state = self.run(self.decoder, latents, past)
        video = video.float().clamp(0, 1) * 2 - 1
        return (video[:, 3:] if past is None else video), state


if __name__ == "__main__":
    tae, z = TAE(tiny_tae).requires_grad_(False), torch.randn(1, 6, 16, 4, 8)
    whole, (head, past) = tae.decode(z)[0], tae.decode(z[:, :2])
    print(f"{sum(p.numel() for p in tae.parameters()):,} parameters; latents {tuple(z.shape)} -> video {tuple(whole.shape)}; "
          f"streamed - whole: {(torch.cat([head, tae.decode(z[:, 2:], past)[0]], 1) - whole).abs().max():.1e}")
