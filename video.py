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
from contextlib import contextmanager
from itertools import islice

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps  # comes with imageio

from config import BadInput, whole_or_absent
from memory import CHUNK

FPS = 16
FRAMES = 4 * CHUNK  # of a chunk
THUMBNAILS = 12     # in a row of the memory picture
SIZE = 128, 64      # pixels of a thumbnail
COLUMN, ROW = 132, 90    # from one to the next
BARS, BASE = 130, 320    # pixels from the top: the bars of surprisal stand between them


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """How many chunks hold so many frames."""
    return math.ceil((frames + 3) / FRAMES)


def chunk_at(second):
    """The first chunk that begins at this second, above 0, or later."""
    return math.ceil((second * FPS + 3) / FRAMES)


def to_uint8(video):
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


# ---- files ------------------------------------------------------------------------------------------------

@contextmanager
def video_writer(path, comment="", scale=1):
    """
    with video_writer(path) as file: file.append_data(frame), (h, w, 3) uint8. An mp4, whole or absent.
    comment  its metadata
    scale    each pixel becomes a square of so many
    """
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise BadInput("ffmpeg is missing: pip install 'imageio[ffmpeg]'") from None
    options = ["-crf", "16", "-preset", "veryfast", "-metadata", f"comment={comment}"]
    options += ["-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor"]
    with whole_or_absent(path) as part:
        # macro_block_size=1: any size, as it is
        writer = imageio.get_writer(part, format="FFMPEG", fps=FPS, macro_block_size=1, ffmpeg_params=options)
        try:
            with writer:
                yield writer
        except OSError as error:
            raise BadInput(f"ffmpeg stopped writing {path} ({error}): is the disk full?") from None


def read_frames(path, width, height, most):
    """
    The first `most` frames of a video file at 16 a second, scaled and cut at the sides to width x height.
    returns  (f, height, width, 3) uint8, and the file's own (width, height)
    """
    logging.getLogger("imageio_ffmpeg").setLevel("ERROR")  # it warns of every clip that is scaled
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
    filters = f"fps={FPS},{cover},crop={width}:{height}"
    try:
        with imageio.get_reader(path, format="FFMPEG", output_params=["-vf", filters]) as reader:
            size = reader.get_meta_data()["source_size"]
            frames = list(islice(reader, most))
    except (OSError, RuntimeError, ValueError, IndexError):
        raise BadInput(f"cannot read the clip {path}: give a video file") from None
    return np.array(frames, np.uint8).reshape(-1, height, width, 3), size


def read_clip(path, width, height, most):
    """
    What --continue goes on from: whole chunks from the end of a video file of fewer than `most` frames.
    returns  (12 m - 3, height, width, 3) uint8
    """
    frames, _ = read_frames(path, width, height, most)
    if not 9 <= len(frames) < most:
        raise BadInput(f"the clip {path} must have from 9 to {most - 1} frames at 16 a second: see --seconds")
    return frames[(len(frames) + 3) % FRAMES:]


# ---- the memory picture -----------------------------------------------------------------------------------

def memory_picture(path, thumbnails, rollout, vae, prompt):
    """
    What a model saw and kept: frames over time, the surprisal of each chunk, what memory holds at the end.
    thumbnails  second -> frame (h, w, 3) uint8
    rollout     the finished one, of one video
    """
    page = Image.new("RGB", (COLUMN * THUMBNAILS, BASE + 190), "white")
    pen = ImageDraw.Draw(page)
    about = f"what the model drew; surprisal (red: kept); what memory holds at the end: {prompt}"
    pen.text((4, 8), about, "black")
    # 1. frames over time
    for i, (second, frame) in enumerate(thumbnails.items()):
        paste_thumbnail(page, i, 26, frame, f"{second:.0f} s")
    # 2. surprisal: a bar for each chunk, and the threshold
    policy = rollout.memory.policy
    surprisal = (1 - torch.cat(rollout.similarities)).clamp(min=0).tolist()
    scale = (BASE - BARS) / max(1 - policy.tau, *surprisal, 1e-6)
    step = page.width / len(surprisal)
    for chunk, value in enumerate(surprisal):
        x = chunk * step
        colour = "crimson" if policy.slow and rollout.kept[chunk] else "lightgrey"
        pen.rectangle([x, BASE - value * scale, x + step, BASE], colour)
    if policy.keep == "surprisal":
        y = BASE - (1 - policy.tau) * scale
        pen.line([0, y, page.width, y], "blue")
    # 3. what is held, each latent decoded alone, as the first of a video
    latents = torch.cat([segment.latent for segment in rollout.memory.segments()], dim=1)
    for i, number in enumerate(rollout.memory.frames()[0].tolist()):
        decoded, _ = vae.decode(latents[:, i:i + 1])
        second = max(0, 4 * number - 3) / FPS
        paste_thumbnail(page, i, BASE + 10, to_uint8(decoded)[0, -1], f"{second:.1f} s")
    page.save(path)


def paste_thumbnail(page, i, top, frame, caption):
    """frame (h, w, 3) uint8: number i of those that lie in rows from `top` down"""
    x = i % THUMBNAILS * COLUMN
    y = top + i // THUMBNAILS * ROW
    picture = Image.fromarray(frame.cpu().numpy())
    page.paste(ImageOps.contain(picture, SIZE, Image.NEAREST), (x, y))
    ImageDraw.Draw(page).text((x, y + SIZE[1] + 2), caption, "black")
