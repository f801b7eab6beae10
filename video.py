"""
Video files in and out, the manifest beside them, frames and chunks of seconds, and the memory picture.

Frames are uint8 (f, h, w, 3) here, and 16 a second in every file that is written. A chunk is 3 latents, 12
frames, 0.75 s; the first latent of a video holds one frame instead of four, so the first chunk has 9 frames.
All videos are read by one reader, which lets ffmpeg decode whatever it can.

    python sample.py --seconds 60    # writes a video and its memory picture

References: imageio's ffmpeg plugin; Wan's autoencoder (1 + 4 (n - 1) frames <-> n latents).
Leaves out: sound, writing other rates than 16 frames a second.
"""
import math
import re
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps  # comes with imageio

from config import BadInput, in_one_line, warn, whole_or_absent
from memory import CHUNK
from records import read_lines

FPS = 16
# Ctrl-C in the terminal is for us alone: Windows' word for a new session
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
TAGS = "-color_range tv -colorspace bt709 -x264-params cabac=1:colorprim=bt709:transfer=bt709"
FRAMES = 4 * CHUNK  # of a chunk
THUMBNAILS = 12     # in a row of the memory picture
SIZE = 128, 64      # pixels of a thumbnail
COLUMN, ROW = 132, 90    # from one to the next
FRAMES_TOP = 54          # pixels from the top: below the prompt
BARS, BASE = 170, 360    # the bars of surprisal stand between them
BARS_AT_MOST = 528       # 3 pixels each
PALE, CRIMSON, BLUE = (211, 211, 211), (220, 20, 60), (0, 0, 255)
LETTERS = 130            # of the prompt in a line: the widest are 12 pixels wide
# which of them is there depends on the system: letters of all scripts, of most, of some
FONTS = ("Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "malgun.ttf",
         "unifont.ttf", "DejaVuSans.ttf", "segoeui.ttf", "Nirmala.ttf")
MANIFEST = "manifest.jsonl"
RECORD = {"file": str, "prompt": str, "seed": int, "options": dict, "model": str, "sha256": str}

# what is read: ffmpeg turns it upright by itself; pixels are made square, missing lines of fields filled in
SHOWN = "scale='max(iw*sar,4)':'max(ih,4)',setsar=1,yadif=deint=interlaced"
HDR = re.compile("smpte2084|arib-std-b67")
# lines of ffmpeg behind its own marks, as titles may say anything: of a frame, and of what is broken
FRAME = re.compile(r"^\[Parsed_showinfo.* pts_time:([-\d.]+) .* s:(\d+x\d+) ", re.M)
BROKEN = re.compile(r"^(?:\[[^]]* @ \w+\] )?\[(?:error|fatal)\] (Format not on whitelist|.*\S)", re.M)
# what names other files, which ffmpeg would read: playlists, patterns of names, scripts
PLAYLISTS = {*"concat hls dash imf image2 avisynth vapoursynth".split()}
TONE_MAPPING = ("zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
                "zscale=t=bt709:m=bt709:r=tv,format=yuv420p")


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """How many chunks hold so many frames; also, which is the first to begin at this frame or later."""
    return math.ceil((frames + 3) / FRAMES)


def decode_beside(vae, chunks):
    """
    Generator: decodes one chunk after another in a thread beside, and on cuda in a stream of its own; gives
    its frames once the next is made.
    chunks  iterable of latents (1, 3, c, h, w)
    yields  frames (f, h, w, 3) uint8 on the host, and: is all of the chunk finite?
    """
    kind = next(vae.parameters()).device.type
    side = torch.cuda.Stream() if kind == "cuda" else None
    # holds for a thread: handed on to the other
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    past = None

    def decode(x0):
        nonlocal past
        with torch.inference_mode(), autocast, torch.cuda.stream(side):  # None: changes nothing
            decoded, past = vae.decode(x0, past)
            is_finite = x0.isfinite().all() & decoded.isfinite().all()
            return to_uint8(decoded)[0].cpu(), bool(is_finite)

    with ThreadPoolExecutor(1) as thread:
        before = None
        for x0 in chunks:
            if side:
                side.wait_stream(torch.cuda.current_stream())
            now = thread.submit(decode, x0)
            if kind == "mps":
                now.result()  # Metal ends a process whose threads use it at a time
            if before:
                yield before.result()
            before = now
        yield before.result()


def to_uint8(video):
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


# ---- files: out --------------------------------------------------------------------------------------------

def find_ffmpeg():
    """The ffmpeg that imageio finds, or that IMAGEIO_FFMPEG_EXE names; BadInput where it does not run."""
    with in_one_line("ffmpeg is missing", "pip install 'imageio[ffmpeg]', or set IMAGEIO_FFMPEG_EXE"):
        import imageio_ffmpeg
        if not imageio_ffmpeg.get_ffmpeg_version():
            raise OSError("it is no ffmpeg")
        return imageio_ffmpeg.get_ffmpeg_exe()


@lru_cache
def find_formats():
    """All that ffmpeg can read, but for playlists"""
    told = subprocess.run([find_ffmpeg(), "-demuxers"], capture_output=True, text=True)
    names = re.findall(r"^ D[ d.E]* (\S+)", told.stdout, re.M)
    return ",".join({*names} - PLAYLISTS)


@contextmanager
def video_writer(path, width, height, comment="", scale=1):
    """
    with video_writer(path, w, h) as write: write(frame), (h, w, 3) uint8. An mp4, whole or absent.
    comment  its metadata
    scale    each pixel becomes a square of so many
    """
    # the colours that the tags promise, then squares of pixels
    filters = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    if scale > 1:
        filters += f",format=yuv444p,scale=iw*{scale}:ih*{scale}:flags=neighbor"
    words = f"-loglevel level+error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {FPS} -i -"
    words += " -c:v libx264 -crf 16 -preset ultrafast -abort_on empty_output"
    words += f" -vf {filters},format=yuv420p -movflags +faststart {TAGS} -y -metadata"
    words = [find_ffmpeg(), *words.split(), f"comment={comment}"]
    with whole_or_absent(path) as part, TemporaryFile() as log:
        try:
            with subprocess.Popen([*words, f"file:{part.absolute()}"], stdin=subprocess.PIPE, stderr=log,
                                  start_new_session=True, creationflags=NEW_GROUP) as ffmpeg:
                yield lambda frame: ffmpeg.stdin.write(frame.tobytes())
            # older ones end with 0 on a full disk, but not without a word
            if ffmpeg.returncode or log.tell():
                raise OSError(f"ended with {ffmpeg.returncode}")
        # a broken pipe, or that: its own words tell more
        except OSError as error:
            log.seek(0)
            told = BROKEN.findall(log.read().decode("utf-8", "replace")) or [error]
            raise BadInput(f"ffmpeg could not write {path} ({told[0]}): is the disk full?") from None


def read_manifest(folder):
    """
    What sample.py has made in a folder: {file name: record}, a record being a dict of file, prompt, seed,
    options, model (sha256 of the networks) and sha256 (of the file). Of two for one file the later counts.
    """
    records = read_lines(Path(folder, MANIFEST), RECORD)
    return {record["file"]: record for record in records}


# ---- files: in ---------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """A video file as a player shows it: upright, with square pixels, without interlacing, in BT.709."""
    path: str
    width: int         # in pixels
    height: int
    filters: str       # of ffmpeg, that make it so
    damage: str        # what ffmpeg found broken first, "" for nothing
    seconds: list      # when each frame is shown

    def read(self, width, height, most=0):
        """
        Generator of frames (height, width, 3) uint8, scaled and cut at the sides.
        most     0: each frame of the file once, at `seconds`; else so many at first, at 16 a second
        """
        cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
        # any constant rate, so that ffmpeg neither drops nor repeats a frame
        times, options = "settb=1/16,setpts=N,fps=16", []
        # a frame hours later, too, is shown at the end: else copies would be made for all that time
        if most:
            times = f"setpts='min(PTS,{most / FPS}/TB)',fps={FPS}"
            options = ["-frames:v", str(most)]
        filters = f"{self.filters},{times},{cover},crop={width}:{height}"
        words = decoding(self.path, filters, "-f", "rawvideo", "-pix_fmt", "rgb24", *options)
        size = width * height * 3
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ffmpeg:
            while len(frame := ffmpeg.stdout.read(size)) == size:
                yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def decoding(path, filters, *options):
    """ffmpeg's command that writes the frames of a file to its output, and tells of each message its level"""
    # an absolute path behind file: is never taken for an option, an address or a pattern
    source = f"file:{Path(path).absolute()}"
    words = "-hide_banner -nostdin -nostats -loglevel level+info -map 0:V:0".split()
    return [find_ffmpeg(), "-format_whitelist", find_formats(), "-i", source, *words,
            "-vf", filters, *options, "-"]


def open_clip(path, *options):
    """-> Clip; raises BadInput that says why the file cannot be read; options: more of ffmpeg's"""
    if not Path(path).is_file():
        raise BadInput(f"cannot read the clip {path}: there is no such file")
    # what ffmpeg tells of each frame
    words = decoding(path, f"{SHOWN},showinfo", "-f", "null", *options)
    log = subprocess.run(words, capture_output=True).stderr.decode("utf-8", "replace")
    frames, damage = FRAME.findall(log), BROKEN.findall(log)
    if not frames:
        raise BadInput(f"cannot read the clip {path} ({[*damage, 'no frames'][0]}): it shows no picture; "
                       "give a video file, no playlist")
    seconds, sizes = zip(*frames)
    if len(set(sizes)) > 1:
        damage.append("its frames change their size")
    width, height = map(int, sizes[0].split("x"))
    filters = f"{SHOWN},{TONE_MAPPING}" if HDR.search(log) else SHOWN
    return Clip(path, width, height, filters, "".join(damage[:1]), [*map(float, seconds)])


def read_frames(path, width, height, most):
    """
    The first `most` frames of a video file at 16 a second, scaled and cut at the sides to width x height.
    returns  (f, height, width, 3) uint8, and the Clip, as far as it was read
    """
    clip = open_clip(path, "-t", str(most / FPS))
    frames = list(clip.read(width, height, most))
    return np.array(frames, np.uint8).reshape(-1, height, width, 3), clip


def read_clip(path, width, height, most):
    """
    What --continue goes on from: whole chunks from the end of a video file of fewer than `most` frames.
    returns  (12 m - 3, height, width, 3) uint8
    """
    frames, clip = read_frames(path, width, height, most)
    if clip.damage:
        warn(f"{path} is damaged ({clip.damage}): going on from what can be read")
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

    def lacking(font):
        empty = bytes(font.getmask("\uffff"))
        return [letter for letter in set(text) if letter > "~" and bytes(font.getmask(letter)) == empty]
    font = min(fonts, key=lambda font: len(lacking(font)))
    for letter in lacking(font):
        text = text.replace(letter, ascii(letter)[1:-1])
    return font, text


def memory_picture(path, thumbnails, rollout, vae, prompt):
    """
    What a model saw and kept: frames over time, the surprisal of each chunk, what memory holds at the end.
    thumbnails  second -> frame (h, w, 3) uint8
    rollout     the finished one, of one video
    """
    page = Image.new("RGB", (COLUMN * THUMBNAILS, BASE + 220), "white")
    pen = ImageDraw.Draw(page)
    pen.font, shown = font_for(f"What the model drew: {prompt}")
    pen.text((4, 4), textwrap.fill(shown, LETTERS, max_lines=3, placeholder=" ..."), "black")
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
    policy = rollout.memory.policy
    surprisal = (1 - torch.cat(rollout.similarities).cpu()).clamp(min=0)
    kept = torch.cat(rollout.kept).cpu().float() * bool(policy.slow)
    bars = min(len(kept), BARS_AT_MOST)
    heights = F.adaptive_max_pool1d(surprisal[None], bars)[0].numpy()
    shares = F.adaptive_avg_pool1d(kept[None], bars)[0].numpy()
    # a column of pixels for each bar, which is stretched
    threshold = 1 - policy.tau
    top = max(threshold, *heights, 1e-6)
    level = np.linspace(top, 0, BASE - BARS + 1)[1:, None]
    picture = np.full((BASE - BARS, bars, 3), 255, np.uint8)
    picture[level < heights] = PALE
    picture[level < heights * shares] = CRIMSON
    about = "Surprisal of the chunks (red: kept in slow memory"
    if policy.keep == "surprisal":
        picture[np.abs(level - threshold).argmin()] = BLUE
        about += "; a tested chunk above the blue line is"
    stretched = Image.fromarray(picture).resize((page.width, BASE - BARS), Image.NEAREST)
    page.paste(stretched, (0, BARS))
    return about + ")"


def paste_thumbnails(page, top, pictures):
    """pictures: (name, second, frame (h, w, 3) uint8) of each, in rows from `top` down"""
    pen = ImageDraw.Draw(page)
    for i, (name, second, frame) in enumerate(pictures):
        x = i % THUMBNAILS * COLUMN
        y = top + i // THUMBNAILS * ROW
        picture = Image.fromarray(frame.cpu().numpy())
        page.paste(ImageOps.fit(picture, SIZE, Image.NEAREST), (x, y))
        pen.text((x, y + SIZE[1] + 2), f"{name} {second:.1f} s", "black", ImageFont.load_default(12))
