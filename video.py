"""
Video files in and out, and a picture of what the memory held.

References: Context Forcing, arXiv 2602.06028.
"""
import logging
import math
import os
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import world
from config import BadInput
from memory import CHUNK, size

FPS = 16


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """Chunks of 3 latents that hold so many frames; the first latent is one frame, the others four."""
    return math.ceil((math.ceil((frames - 1) / 4) + 1) / CHUNK)


def chunk_at(second):
    """The first chunk that begins at this second or later."""
    return math.ceil((round(second * FPS, 6) + 3) / 12) if second else 0


def touch(path):
    """Makes the file, empty, or says why that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise BadInput(f"cannot write to {path.parent}: {error.strerror}") from None


class VideoWriter:
    """One video file under way: with Mp4(...) as file: raw frames into ffmpeg, whole or absent."""
    def __init__(self, path, frames, comment, width, height, scale):
        import imageio_ffmpeg
        self.path, self.part, self.left = path, path.with_name(f".{path.stem}.{os.getpid()}.part.mp4"), frames
        try:
            imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError:
            raise BadInput("ffmpeg is missing: pip install 'imageio[ffmpeg]', or set IMAGEIO_FFMPEG_EXE") from None
        touch(self.part)
        self.pipe = imageio_ffmpeg.write_frames(
            str(self.part), (width, height), fps=FPS, codec="libx264", quality=None, macro_block_size=1,
            output_params=["-crf", "16", "-preset", "veryfast", "-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor",
                           "-metadata", f"comment={comment}"])
        self.pipe.send(None)

    def __enter__(self):
        return self

    def write(self, frames):
        """(f, h, w, 3) uint8; frames past the asked length are dropped"""
        try:
            for frame in frames[:self.left]:
                self.pipe.send(np.ascontiguousarray(frame))
        except OSError as error:
            raise BadInput(f"ffmpeg stopped writing {self.path} ({error.strerror}): is the disk full?") from None
        self.left -= min(self.left, len(frames))

    def __exit__(self, error, *_):
        self.pipe.close()
        if error:
            self.part.unlink(missing_ok=True)
        else:
            os.replace(self.part, self.path)


def to_uint8(video):
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


class Decoder:
    """Latents of one video to frames on the host. On cuda in a stream of its own, beside the next chunk: one chunk late."""
    def __init__(self, vae):
        self.vae, self.past = vae, None
        self.side = torch.cuda.Stream() if next(vae.parameters()).is_cuda else None

    def frames(self, chunks):
        """Iterable of latents (1, 3, c, h, w) -> generator of (f, h, w, 3) uint8"""
        late = []
        for z in chain(chunks, [None]):
            if z is not None and self.side:
                self.side.wait_stream(torch.cuda.current_stream())
                z.record_stream(self.side)
            with torch.cuda.stream(self.side):  # None: changes nothing
                if z is not None:
                    past, self.past = self.past, None  # WanVAE's is used up
                    video, self.past = self.vae.decode(z, past)
                    made = to_uint8(video)[0].to("cpu", non_blocking=self.side is not None)  # pins its copy
                    late.append((made, self.side and self.side.record_event()))
            while len(late) > (self.side is not None and z is not None):
                frames, arrived = late.pop(0)
                if arrived:
                    arrived.synchronize()
                yield frames


def read_video(path, width, height, most):
    """The first `most` frames of a video file at 16 a second, scaled and cropped to (f, h, w, 3) uint8; its own (w, h)"""
    import imageio_ffmpeg
    logging.getLogger("imageio_ffmpeg").setLevel("ERROR")  # it warns of every clip that is scaled
    fit = f"fps={FPS},scale={width}:{height}:force_original_aspect_ratio=increase:flags=area,crop={width}:{height}"
    try:
        source = imageio_ffmpeg.read_frames(str(Path(path).resolve(strict=True)), output_params=["-vf", fit])
        size = next(source)["source_size"]
        frames = [np.frombuffer(frame, np.uint8) for frame, _ in zip(source, range(most))]
        source.close()
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise BadInput(f"cannot read the clip {path} ({str(error).strip().splitlines()[-1][:100]})") from None
    return np.array(frames, np.uint8).reshape(-1, height, width, 3), size


def read_clip(path, width, height, most):
    """What --continue goes on from: of the end of a video file of fewer than `most` frames, (12 m - 3, h, w, 3) uint8."""
    frames, _ = read_video(path, width, height, most + 1)
    if len(frames) < 9 or len(frames) >= most:
        count = f"more than {most}" if len(frames) > most else len(frames)
        raise BadInput(f"the clip {path} has {count} frames at 16 a second: 9 or more are needed, fewer than --seconds gives")
    return frames[(len(frames) + 3) % 12:]


def memory_picture(path, shots, roll, vae, prompt):
    """shots: list of (second, (h, w, 3) uint8 tensor); roll: the finished Rollout"""
    from PIL import Image, ImageDraw
    memory, policy, sims, keeps = roll.memory, roll.memory.policy, torch.cat(roll.similarities).tolist(), torch.cat(roll.kept).tolist()
    held, latents = (torch.cat([getattr(s, name)[0] for s in memory.segments()]) for name in ("frame", "latent"))
    red, grey, blue = (200, 60, 40), (150, 150, 150), (30, 60, 200)
    h, gap, left, base = world.HEIGHT * 2, 4, 70, 330  # base: of bars 190 high, a third or more of which the threshold takes
    w = h * shots[0][1].shape[1] // shots[0][1].shape[0]
    width = left + len(shots) * (w + gap)
    page = Image.new("RGB", (width, 430 + math.ceil(len(held) / len(shots)) * (h + 26)), "white")
    pen = ImageDraw.Draw(page)

    def thumb(frame, i, y, text, colour):
        """Picture number i of those that lie `len(shots)` to a row from y on."""
        x, y = left + i % len(shots) * (w + gap), y + i // len(shots) * (h + 26)
        page.paste(Image.fromarray(frame.numpy()).resize((w, h), Image.NEAREST), (x, y))
        pen.text((x, y + h + 2), text, colour)

    pen.text((gap, 8), f"what the model saw and kept: {prompt}", "black")
    for i, (second, frame) in enumerate(shots):
        thumb(frame, i, 30, f"{second:.0f} s", "black")
    wide, most = (width - left - gap) / len(sims), max(3 * (1 - policy.tau), 1.05 * (1 - min(sims)), 1e-6)
    for i, (sim, keep) in enumerate(zip(sims, keeps)):
        x, tested = left + i * wide, policy.slow and i % policy.interval == 0
        top = base - max(0, 1 - sim) / most * 190
        pen.rectangle([x + 1, top, x + max(2, wide - 1), base], fill=(red if keep else grey) if tested else (215,) * 3)
        if policy.slow and CHUNK * i in held.tolist():
            pen.ellipse([x + wide / 2 - 3, base + 4, x + wide / 2 + 3, base + 10], fill=red)
    pen.line([left, base, width, base], fill="black")
    pen.text((gap, base - 190), "surprisal", "black")
    if policy.keep == "surprisal":
        line = base - max(0, 1 - policy.tau) / most * 190
        pen.line([left, line, width, line], fill=blue)
        pen.text((gap, line - 6), f"1 - {policy.tau:.4f}", blue)
    pen.text((left, base + 14), "each bar a chunk of 0.75 s; red: kept, so its first latent goes to slow memory when it "
             "leaves fast; grey: tested, not kept; pale: not tested; dot: still held at the end", "black")
    pen.text((gap, base + 46), "memory\nat the end", "black")
    parts = [(name, colour) for name, colour in (("sink", (0, 120, 60)), ("slow", red), ("fast", (90,) * 3))
             for _ in range(size(getattr(memory, name)))]
    for i, ((name, colour), src, z) in enumerate(zip(parts, held.tolist(), latents)):
        view = to_uint8(vae.decode(z[None, None])[0][0, -1]).cpu()  # each alone, as the first of a video
        thumb(view, i, base + 46, f"{name} {max(0, 4 * src - 3) / FPS:.1f} s", colour)
    page.save(path)
