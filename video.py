"""
Video files in and out, the manifest beside them, frames and chunks of seconds, and the memory picture.

Frames are uint8 (f, h, w, 3) here, and 16 a second in every file that is written. A chunk is 3 latents, 12
frames, 0.75 s; the first latent of a video holds one frame instead of four, so the first chunk has 9 frames.
All videos are read by one reader, which lets ffmpeg decode whatever it can.

    python sample.py --seconds 60    # writes a video and its memory picture

References: imageio's ffmpeg plugin; Wan's autoencoder (1 + 4 (n - 1) frames <-> n latents).
Leaves out: sound, writing other rates than 16 frames a second.
"""
import json
import math
import re
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with imageio

from config import BadInput, check_schema, whole_or_absent
from memory import CHUNK

FPS = 16
FRAMES = 4 * CHUNK  # of a chunk
THUMBNAILS = 12     # in a row of the memory picture
SIZE = 128, 64      # pixels of a thumbnail
COLUMN, ROW = 132, 90    # from one to the next
FRAMES_TOP = 54          # pixels from the top: below the prompt
BARS, BASE = 170, 360    # the bars of surprisal stand between them
BARS_AT_MOST = 528       # 3 pixels each
LETTERS = 130            # of the prompt in a line: the widest are 12 pixels wide
# which of them is there depends on the system: letters of all scripts, of most, of some
FONTS = ("Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "malgun.ttf",
         "unifont.ttf", "DejaVuSans.ttf", "segoeui.ttf", "Nirmala.ttf")
MANIFEST = "manifest.jsonl"
RECORD = {"file": str, "prompt": str, "seed": int, "options": dict, "model": str, "sha256": str}

# what is read: ffmpeg turns it upright by itself; pixels are made square, missing lines of fields filled in
SHOWN = "scale='max(iw*sar,4)':'max(ih,4)',setsar=1,yadif=deint=interlaced"
HDR = re.compile("smpte2084|arib-std-b67")
TONE_MAPPING = ("zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
                "zscale=t=bt709:m=bt709:r=tv,format=yuv420p")


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """How many chunks hold so many frames; also, which is the first to begin at this frame or later."""
    return math.ceil((frames + 3) / FRAMES)


def decode_beside(vae, chunks, past=None):
    """
    Generator: decodes one chunk after another, and gives its frames once the next is on its way. On cuda that
    happens in a stream of its own: nothing waits but for the frames' own way to the host.
    chunks  iterable of latents (1, 3, c, h, w)
    past    from vae.decode(), of the chunks before
    yields  frames (f, h, w, 3) uint8 on the host, is all of the chunk finite, and `past` of the last decoded
    """
    side = torch.cuda.Stream() if next(vae.parameters()).is_cuda else None

    def launch():
        nonlocal past
        for x0 in chunks:
            if side is not None:
                side.wait_stream(torch.cuda.current_stream())
                x0.record_stream(side)
            with torch.cuda.stream(side):  # None: changes nothing
                decoded, past = vae.decode(x0, past)
                made = to_uint8(decoded)[0], x0.isfinite().all() & decoded.isfinite().all()
                made = [part.to("cpu", non_blocking=side is not None) for part in made]
                arrived = side and side.record_event()
            yield *made, arrived

    for (frames, is_finite, arrived), _ in pairwise(chain(launch(), [None])):
        if arrived is not None:
            arrived.synchronize()
        yield frames, is_finite, past


def to_uint8(video):
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


# ---- files: out --------------------------------------------------------------------------------------------

def find_ffmpeg():
    """The ffmpeg that imageio finds, or that IMAGEIO_FFMPEG_EXE names; BadInput where it does not run."""
    told = "it is no ffmpeg"
    try:
        import imageio_ffmpeg
        if imageio_ffmpeg.get_ffmpeg_version():
            return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        told = error
    raise BadInput(f"ffmpeg is missing ({told}): pip install 'imageio[ffmpeg]', or set IMAGEIO_FFMPEG_EXE")


@contextmanager
def video_writer(path, comment="", scale=1):
    """
    with video_writer(path) as file: file.append_data(frame), (h, w, 3) uint8. An mp4, whole or absent.
    comment  its metadata
    scale    each pixel becomes a square of so many
    """
    find_ffmpeg()
    from imageio.v2 import get_writer
    # squares of pixels, then the colours that the tags promise
    enlarge = f"scale=iw*{scale}:ih*{scale}:flags=neighbor,format=rgb24"
    convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    words = ["-vf", f"{enlarge},{convert},format=yuv420p", "-crf", "16", "-preset", "veryfast"]
    words += ["-movflags", "+faststart", "-color_range", "tv", "-metadata", f"comment={comment}"]
    for tag in ("-colorspace", "-color_primaries", "-color_trc"):
        words += [tag, "bt709"]
    with whole_or_absent(path) as part:
        try:
            with get_writer(part.absolute(), "FFMPEG", fps=FPS, codec="libx264", quality=None,
                            macro_block_size=1, output_params=words) as file:
                yield file
            # imageio does not ask ffmpeg how it ended: the file must be readable to its end
            _, log = decode(part, "showinfo", "-f", "null")
            is_whole = "pts_time:" in log and not first_error(log)
        # the pipe is broken: ffmpeg has ended
        except OSError:
            is_whole = False
        if not is_whole:
            raise BadInput(f"ffmpeg could not write {path}: is the disk full?")


def read_manifest(folder):
    """
    What sample.py has made in a folder: {file name: record}, a record being a dict of file, prompt, seed,
    options, model (sha256 of the networks) and sha256 (of the file). Of two for one file the later counts.
    """
    path = Path(folder, MANIFEST)
    lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        if line:
            try:
                record = json.loads(line)
                check_schema(path, record, RECORD, f"line {number}")
                records[record["file"]] = record
            except (ValueError, RecursionError) as error:  # BadInput, too
                print(f"passed over: {path}, line {number}: {error}", file=sys.stderr)
    return records


def add_to_manifest(folder, record):
    """One line more; a last line that a full disk cut short is ended first."""
    path = Path(folder, MANIFEST)
    try:
        with open(path, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            is_cut = file.read() not in (b"", b"\n")
            line = json.dumps(record, ensure_ascii=False)
            file.write(f"{is_cut * chr(10)}{line}\n".encode())
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


# ---- files: in ---------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """A video file as a player shows it: upright, with square pixels, without interlacing, in BT.709."""
    path: str
    width: int         # in pixels
    height: int
    filters: str       # of ffmpeg, that make it so
    damage: str = ""   # what ffmpeg found broken first
    seconds: list = None  # when each frame is shown

    def read(self, width, height, *options, rate=None):
        """
        Generator of all frames (height, width, 3) uint8, scaled and cut at the sides; then damage is known.
        options  more of ffmpeg's
        rate     frames a second (default: each frame of the file once, and then `seconds` is known)
        """
        cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
        # any constant rate, so that ffmpeg neither drops nor repeats a frame
        times = f"fps={rate}" if rate else "showinfo,settb=1/16,setpts=N,fps=16"
        filters = f"{self.filters},{times},{cover},crop={width}:{height}"
        words = decoding(self.path, filters, "-f", "rawvideo", "-pix_fmt", "rgb24", *options)
        size = width * height * 3
        count = 0
        with (TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
              subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=file) as ffmpeg):
            while len(frame := ffmpeg.stdout.read(size)) == size:
                count += 1
                yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
            ffmpeg.wait()
            file.seek(0)
            log = file.read()
        self.damage = first_error(log)
        self.seconds = [float(second) for second in re.findall(r"pts_time:([-\d.]+)", log)]
        if not rate and count != len(self.seconds):
            self.damage = self.damage or "its frames change their size"


def decoding(path, filters, *options):
    """ffmpeg's command that writes the frames of a file to its output, and tells of each message its level"""
    # an absolute path behind file: is never taken for an option, an address or a pattern
    source = ["-nostdin", "-nostats", "-loglevel", "level+info", "-i", f"file:{Path(path).absolute()}"]
    return [find_ffmpeg(), "-hide_banner", *source, "-map", "0:V:0", "-vf", filters, *options, "-"]


def decode(path, filters, *options):
    """-> what that command writes, and what it tells"""
    words = decoding(path, filters, *options)
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout, done.stderr.decode("utf-8", "replace")


def first_error(log):
    """The first that ffmpeg calls an error, '' if nothing"""
    # at the start of a line, behind who says it: titles of videos may say anything
    found = re.search(r"^(?:\[[^]]* @ \w+\] )?\[(?:error|fatal)\] (.*)", log, re.M)
    return found[1].strip() if found else ""


def open_clip(path):
    """-> Clip; raises BadInput that says why the file cannot be read"""
    if not Path(path).is_file():
        raise BadInput(f"cannot read the clip {path}: there is no such file")
    # its first frame: a PPM, whose head says how large it is shown
    image, log = decode(path, SHOWN, "-frames:v", "1", "-f", "image2pipe", "-c:v", "ppm")
    size = re.match(rb"P6\s(\d+)\s(\d+)\s", image)
    if not size:
        cause = "no video stream" if "matches no streams" in log else first_error(log) or "no frames"
        raise BadInput(f"cannot read the clip {path} ({cause}): give a video file")
    filters = f"{SHOWN},{TONE_MAPPING}" if HDR.search(log) else SHOWN
    return Clip(path, int(size[1]), int(size[2]), filters)


def read_frames(path, width, height, most):
    """
    The first `most` frames of a video file at 16 a second, scaled and cut at the sides to width x height.
    returns  (f, height, width, 3) uint8, and the Clip
    """
    clip = open_clip(path)
    frames = list(clip.read(width, height, "-frames:v", str(most), rate=FPS))
    return np.array(frames, np.uint8).reshape(-1, height, width, 3), clip


def read_clip(path, width, height, most):
    """
    What --continue goes on from: whole chunks from the end of a video file of fewer than `most` frames.
    returns  (12 m - 3, height, width, 3) uint8
    """
    frames, clip = read_frames(path, width, height, most)
    if clip.damage:
        print(f"warning: {path} is damaged ({clip.damage}): going on from what can be read", file=sys.stderr)
    if not 9 <= len(frames) < most:
        raise BadInput(f"the clip {path} must have from 9 to {most - 1} frames at 16 a second: see --seconds")
    return frames[(len(frames) + 3) % FRAMES:]


# ---- the memory picture -----------------------------------------------------------------------------------

def font_for(text):
    """-> the font, of those that are here, that has most letters of the text; the text as it can show it"""
    # PIL's own font has ASCII alone
    fonts = [ImageFont.load_default(12)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, 12))

    def shown_in(font):
        empty = bytes(font.getmask("\uffff"))
        lacks = {letter for letter in set(text) if letter > "~" and bytes(font.getmask(letter)) == empty}
        return "".join(ascii(letter)[1:-1] if letter in lacks else letter for letter in text)
    # codes are longer than the letters in whose place they stand
    font = min(fonts, key=lambda font: len(shown_in(font)))
    return font, shown_in(font)


def memory_picture(path, thumbnails, rollout, vae, prompt):
    """
    What a model saw and kept: frames over time, the surprisal of each chunk, what memory holds at the end.
    thumbnails  second -> frame (h, w, 3) uint8
    rollout     the finished one, of one video
    """
    page = Image.new("RGB", (COLUMN * THUMBNAILS, BASE + 220), "white")
    pen = ImageDraw.Draw(page)
    pen.font, shown = font_for(f"What the model drew: {prompt}")
    for i, line in enumerate(textwrap.wrap(shown, LETTERS, max_lines=3, placeholder=" ...")):
        pen.text((4, 4 + 16 * i), line, "black")
    # 1. frames over time
    paste_thumbnails(page, FRAMES_TOP, [("", *entry) for entry in thumbnails.items()])
    # 2. surprisal over time
    pen.text((4, BARS - 18), draw_surprisal(page, rollout), "black")
    # 3. what is held, each latent decoded alone, as the first of a video
    pen.text((4, BASE + 6), "What memory holds at the end", "black")
    held = []
    for name in ("sink", "slow", "fast"):
        segment = getattr(rollout.memory, name)
        if segment is not None:
            for number, latent in zip(segment.frame[0].tolist(), segment.latent[0]):
                decoded, _ = vae.decode(latent[None, None])
                held.append((name, max(0, 4 * number - 3) / FPS, to_uint8(decoded)[0, -1]))
    paste_thumbnails(page, BASE + 26, held)
    with whole_or_absent(path) as part:
        page.save(part)


def draw_surprisal(page, rollout):
    """A bar for each chunk; in a long video for several: their most, and the share kept -> what it shows"""
    pen = ImageDraw.Draw(page)
    policy = rollout.memory.policy
    surprisal = (1 - torch.cat(rollout.similarities)).clamp(min=0)
    kept = torch.cat(rollout.kept).float() * bool(policy.slow)
    bars = min(len(kept), BARS_AT_MOST)
    heights = F.adaptive_max_pool1d(surprisal[None], bars)[0].tolist()
    shares = F.adaptive_avg_pool1d(kept[None], bars)[0].tolist()
    scale = (BASE - BARS) / max(1 - policy.tau, *heights, 1e-6)
    step = page.width / bars
    for i, (height, share) in enumerate(zip(heights, shares)):
        x = i * step
        pen.rectangle([x, BASE - height * scale, x + step, BASE], "lightgrey")
        if share:
            pen.rectangle([x, BASE - height * share * scale, x + step, BASE], "crimson")
    about = "Surprisal of the chunks (red: kept in slow memory"
    # the threshold
    if policy.keep == "surprisal":
        y = BASE - (1 - policy.tau) * scale
        pen.line([0, y, page.width, y], "blue")
        about += "; a tested chunk above the blue line is"
    return about + ")"


def paste_thumbnails(page, top, pictures):
    """pictures: (name, second, frame (h, w, 3) uint8) of each, in rows from `top` down"""
    pen = ImageDraw.Draw(page)
    for i, (name, second, frame) in enumerate(pictures):
        x = i % THUMBNAILS * COLUMN
        y = top + i // THUMBNAILS * ROW
        picture = Image.fromarray(frame.cpu().numpy())
        # a sliver of a frame is one pixel high or wide at least
        shrink = min(SIZE[0] / picture.width, SIZE[1] / picture.height)
        shape = [max(1, round(n * shrink)) for n in picture.size]
        page.paste(picture.resize(shape, Image.NEAREST), (x, y))
        pen.text((x, y + SIZE[1] + 2), f"{name} {second:.1f} s", "black", ImageFont.load_default(12))
