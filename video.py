"""
Video files in and out, frames and chunks of seconds, and the memory picture.

Frames are uint8 (f, h, w, 3) here and 16 a second in every file. A chunk is 3 latents, 12 frames, 0.75 s; the
first latent of a video holds one frame instead of four, so the first chunk has 9 frames.

    python sample.py --seconds 60    # writes a video and its memory picture

References: imageio's ffmpeg plugin; Wan's autoencoder (1 + 4 (n - 1) frames <-> n latents).
Leaves out: sound, other rates than 16 frames a second.
"""
import logging
import math
from itertools import islice
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps  # comes with imageio

from config import BadInput, whole_or_absent
from memory import CHUNK

FPS = 16
FRAMES = 4 * CHUNK  # of a chunk
THUMBNAILS = 12          # frames of a video in its memory picture
SIZE = 128, 64           # pixels of a thumbnail
LEFT, STEP, ROW = 70, 132, 90    # pixels: left margin, from thumbnail to thumbnail, from row to row
BARS, BASE, HELD = 140, 330, 376  # pixels from the top: bars between BARS and BASE, what is held from HELD on


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """How many chunks hold so many frames."""
    return math.ceil((frames + 3) / FRAMES)


def chunk_at(second):
    """The first chunk that begins at this second or later."""
    if second == 0:
        return 0
    return math.ceil((round(second * FPS, 6) + 3) / FRAMES)


def to_uint8(video):
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


# ---- files ------------------------------------------------------------------------------------------------

class VideoWriter:
    """with VideoWriter(path) as file: file.write(frames). An mp4, whole or absent."""
    def __init__(self, path, comment="", scale=1):
        """comment: its metadata; scale: each pixel becomes a square of so many"""
        try:
            imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError:
            raise BadInput("ffmpeg is missing: pip install 'imageio[ffmpeg]', "
                           "or set IMAGEIO_FFMPEG_EXE") from None
        self.path = path
        self.whole = whole_or_absent(path)
        self.options = ["-crf", "16", "-preset", "veryfast", "-metadata", f"comment={comment}"]
        self.options += ["-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor"]

    def __enter__(self):
        part = self.whole.__enter__()
        self.writer = imageio.get_writer(part, format="FFMPEG", fps=FPS, codec="libx264", macro_block_size=1,
                                         ffmpeg_params=self.options)
        return self

    def write(self, frames):
        """(f, h, w, 3) uint8"""
        try:
            for frame in frames:
                self.writer.append_data(frame)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"ffmpeg stopped writing {self.path} ({reason}): is the disk full?") from None

    def __exit__(self, *error):
        self.writer.close()
        self.whole.__exit__(*error)


def read_frames(path, width, height, most):
    """
    The first `most` frames of a video file at 16 a second, scaled and cut at the sides to width x height.
    returns  (f, height, width, 3) uint8, and the file's own (width, height)
    """
    logging.getLogger("imageio_ffmpeg").setLevel("ERROR")  # it warns of every clip that is scaled
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
    filters = f"fps={FPS},{cover},crop={width}:{height}"
    try:
        file = Path(path).resolve(strict=True)
        with imageio.get_reader(file, format="FFMPEG", output_params=["-vf", filters]) as reader:
            size = reader.get_meta_data()["source_size"]
            frames = list(islice(reader, most))
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1][:100]
        raise BadInput(f"cannot read the clip {path} ({reason})") from None
    return np.array(frames, np.uint8).reshape(-1, height, width, 3), size


def read_clip(path, width, height, most):
    """
    What --continue goes on from: whole chunks from the end of a video file of fewer than `most` frames.
    returns  (12 m - 3, height, width, 3) uint8
    """
    frames, _ = read_frames(path, width, height, most + 1)
    if not 9 <= len(frames) < most:
        count = f"more than {most}" if len(frames) > most else len(frames)
        raise BadInput(f"the clip {path} has {count} frames at 16 a second: 9 or more are needed, "
                       "fewer than --seconds gives")
    return frames[(len(frames) + 3) % FRAMES:]


# ---- the memory picture -----------------------------------------------------------------------------------

def memory_picture(path, thumbnails, rollout, vae, prompt):
    """
    What a model saw and kept: frames over time, the surprisal of each chunk, what memory holds at the end.
    thumbnails  second -> frame (h, w, 3) uint8
    rollout     the finished one, of one video
    """
    memory = rollout.memory
    rows = math.ceil(memory.frames().shape[1] / THUMBNAILS)
    page = Image.new("RGB", (LEFT + THUMBNAILS * STEP, HELD + rows * ROW), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 8), f"what the model saw and kept: {prompt}", "black")
    # 1. frames over time
    for i, (second, frame) in enumerate(thumbnails.items()):
        paste_thumbnail(page, i, 30, frame, f"{second:.0f} s", "black")
    # 2. surprisal
    draw_surprisal(pen, page.width, rollout)
    # 3. what is held, each latent decoded alone, as the first of a video
    pen.text((4, HELD), "memory\nat the end", "black")
    i = 0
    for name, colour in (("sink", "green"), ("slow", "crimson"), ("fast", "black")):
        segment = getattr(memory, name)
        if segment is None:
            continue
        for number, latent in zip(segment.frame[0].tolist(), segment.latent[0]):
            decoded, _ = vae.decode(latent[None, None])
            second = max(0, 4 * number - 3) / FPS
            paste_thumbnail(page, i, HELD, to_uint8(decoded)[0, -1], f"{name} {second:.1f} s", colour)
            i += 1
    page.save(path)


def paste_thumbnail(page, i, top, frame, caption, colour):
    """frame (h, w, 3) uint8: number i of those that lie in rows from `top` down"""
    x = LEFT + i % THUMBNAILS * STEP
    y = top + i // THUMBNAILS * ROW
    picture = Image.fromarray(frame.cpu().numpy())
    page.paste(ImageOps.contain(picture, SIZE, Image.NEAREST), (x, y))
    ImageDraw.Draw(page).text((x, y + SIZE[1] + 2), caption, colour)


def draw_surprisal(pen, width, rollout):
    """A bar for each chunk from LEFT to `width`, and the threshold."""
    policy = rollout.memory.policy
    surprisal = (1 - torch.cat(rollout.similarities)).clamp(min=0).tolist()
    kept = torch.cat(rollout.kept).tolist()
    # the threshold's line takes a third of the height at most, and the tallest bar nearly all of it
    threshold = max(0, 1 - policy.tau)
    scale = (BASE - BARS) / max(3 * threshold, 1.05 * max(surprisal), 1e-6)
    step = (width - LEFT) / len(surprisal)
    for chunk, value in enumerate(surprisal):
        x = LEFT + chunk * step
        colour = "grey"
        if policy.slow == 0 or chunk % policy.interval > 0:
            colour = "lightgrey"
        elif kept[chunk]:
            colour = "crimson"
        pen.rectangle([x + 1, BASE - value * scale, x + max(2, step - 1), BASE], fill=colour)
    # axis, threshold, legend
    pen.line([LEFT, BASE, width, BASE], fill="black")
    pen.text((4, BARS), "surprisal", "black")
    if policy.keep == "surprisal":
        line = BASE - threshold * scale
        pen.line([LEFT, line, width, line], fill="blue")
        pen.text((4, line - 6), f"1 - {policy.tau:.4f}", "blue")
    legend = ("each bar a chunk of 0.75 s; red: kept, so its first latent goes to slow memory when it leaves "
              "fast; grey: tested, not kept; pale: not tested")
    pen.text((LEFT, BASE + 14), legend, "black")
