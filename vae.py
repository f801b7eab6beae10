"""
The tiny video autoencoder (TAE): 4 frames of 8x8 pixels <-> one latent of 16 channels, like Wan's own
(wan_vae.py) with a tenth of its parameters.

Every layer is a 2-D convolution over single frames; time enters in two ways. A MemBlock sees each frame
beside the one before it. TPool lays two frames into channels and makes one of them, TGrow makes two of one.
No layer looks ahead, so a video may come in pieces: all that goes from one piece to the next is the state, a
list with the last frame that went into each MemBlock.

    one MemBlock       piece 1                piece 2
    its input          a    b    c            d    e    f          zeros stand before a video
    it sees           0|a  a|b  b|c          c|d  d|e  e|f
    state                        [c] -------> c         [f] -----> for piece 3

The first latent of a video is one frame: encode() puts three copies in front of it, decode() drops three
frames.

    python vae.py              # draws a world, and what the shipped autoencoder makes of it

References: TAEHV (github.com/madebyollin/taehv, MIT), variant taew2_1: same layers, names and numbers, tested
on golden vectors. The small world uses it at small width, trained by train.py --stage vae.
Leaves out: the I2V and TAESD variants of TAEHV.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# pixels that are encoded at once, more than twice as fast as a whole clip: they fit a processor's cache
PIECE = 2 ** 17


@dataclass
class TAEConfig:
    encoder: int = 64                    # channels
    decoder: tuple = (256, 128, 64, 64)  # channels of the four resolutions, coarse to fine
    channels: int = 16                   # latent channels


tiny_tae = TAEConfig(encoder=32, decoder=(64, 64, 48, 32))

conv = partial(nn.Conv2d, kernel_size=3, padding=1)


class MemBlock(nn.Module):
    """Residual block over a frame and the one before it."""
    def __init__(self, c):
        super().__init__()
        first = [conv(2 * c, c), nn.ReLU()]
        self.conv = nn.Sequential(*first, conv(c, c), nn.ReLU(), conv(c, c))

    def forward(self, x, past):
        """x (b f, c, h, w), past (b, c, h, w) the frame before each video's first -> (b f, c, h, w)"""
        before = x.roll(1, dims=0)
        before[::len(x) // len(past)] = past
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class TPool(nn.Module):
    """`stride` frames -> one."""
    def __init__(self, c, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(c * stride, c, 1, bias=False)

    def forward(self, x):
        return self.conv(rearrange(x, "(n s) c h w -> n (s c) h w", s=self.stride))


class TGrow(nn.Module):
    """One frame -> `stride` frames, twice as high and wide."""
    def __init__(self, c, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(c, c * stride, 1, bias=False)

    def forward(self, x):
        # through channels last, as convolutions have them on a CPU
        frames = rearrange(self.conv(x), "n (s c) h w -> (n s) h w c", s=self.stride)
        return F.interpolate(frames.movedim(-1, 1), scale_factor=2)


class SoftClamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class TAE(nn.Module):
    def __init__(self, config: TAEConfig):
        super().__init__()
        self.config = config
        # encoder: space halved three times, time twice
        c = config.encoder
        layers = [conv(3, c), nn.ReLU()]
        for stride in (2, 2, 1):
            layers += [TPool(c, stride), conv(c, c, stride=2, bias=False)]
            layers += [MemBlock(c) for _ in range(3)]
        self.encoder = nn.Sequential(*layers, conv(c, config.channels))
        # decoder: the way back
        widths = config.decoder
        layers = [SoftClamp(), conv(config.channels, widths[0]), nn.ReLU()]
        for c, c_next, stride in zip(widths, widths[1:], (1, 2, 2)):
            layers += [MemBlock(c) for _ in range(3)]
            # TAEHV enlarges first, which gives the same, as TGrow looks at single pixels: four times as many
            layers += [nn.Identity(), TGrow(c, stride), conv(c, c_next, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], 3))

    def initialise(self):
        """Random weights to train from nothing, by which signals keep their size."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        return self

    @staticmethod
    def run(layers, x, past):
        """
        layers   the encoder or the decoder
        x        (b, f, c, h, w)
        past     None at the start of a video, else the state that the last call returned
        returns  (b, f', c', h', w'), state
        """
        b = len(x)
        state = []
        x = rearrange(x, "b f c h w -> (b f) c h w").to(layers[-1].weight.dtype)
        for layer in layers:
            if not isinstance(layer, MemBlock):
                x = layer(x)
                continue
            before = torch.zeros_like(x[:b]) if past is None else past[len(state)]
            # what the next piece needs: a copy, because a view would hold all of x
            state.append(x.unflatten(0, (b, -1))[:, -1].clone())
            x = layer(x, before)
        return rearrange(x, "(b f) c h w -> b f c h w", b=b), state

    def encode_frames(self, frames):
        """
        frames   (b, f, 3, h, w) in [0, 1]; the last one is repeated until 4 divides their number
        returns  (b, n, 16, h / 8, w / 8), a latent for every 4 frames
        """
        b, f, c, h, w = frames.shape
        # TAEHV's rule for an end that fills no latent
        fill = repeat(frames[:, -1], "b c h w -> b f c h w", f=-f % 4)
        frames = torch.cat([frames, fill], dim=1)
        # piece by piece
        latents = []
        state = None
        together = max(12, PIECE // (h * w) // 4 * 4)
        for piece in frames.split(together, dim=1):
            z, state = self.run(self.encoder, piece, state)
            latents.append(z)
        return torch.cat(latents, dim=1)

    def encode(self, video):
        """
        video    (b, 1 + 4 (n - 1), 3, h, w) in [-1, 1]
        returns  (b, n, 16, h / 8, w / 8) latents of about zero mean and unit variance
        """
        # the first latent is one frame, four times
        copies = repeat(video[:, 0], "b c h w -> b 3 c h w")
        return self.encode_frames(torch.cat([copies, video], dim=1) * .5 + .5)

    def decode(self, latents, past=None):
        """
        latents  (b, n, 16, h, w)
        past     None at the start of a video, else the state that was returned before
        returns  video (b, 4n - 3 or 4n, 3, 8h, 8w) in [-1, 1] float32, and the state to go on with
        """
        frames, state = self.run(self.decoder, latents, past)
        video = frames.float().clamp(0, 1) * 2 - 1
        # the first latent is one frame
        if past is None:
            video = video[:, 3:]
        return video, state


if __name__ == "__main__":
    from pathlib import Path

    import imageio.v3 as iio
    from safetensors.torch import load_file

    from world import HELD_OUT, WorldSpec, clip

    tae = TAE(tiny_tae).requires_grad_(False)
    tae.load_state_dict(load_file(Path(__file__).parent / "weights" / "vae.safetensors"))
    # a world that training never sees, 5 seconds of it
    video = torch.from_numpy(clip(WorldSpec(HELD_OUT), 0, 81))
    latents = tae.encode(video[None] * 2 - 1)
    copy = tae.decode(latents)[0][0] * .5 + .5
    psnr = -10 * (copy - video).square().mean().log10()
    print(f"{video.numel():,} numbers -> {latents.numel():,} -> {video.numel():,} at {psnr:.1f} dB")
    # a frame a second
    picture = rearrange(torch.stack([video, copy])[:, ::16], "v f c h w -> (v h) (f w) c")
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/vae.png", picture.mul(255).round().byte())
    print("drawn in out/vae.png: a frame a second, and its copy below")
