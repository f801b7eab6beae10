"""
Makes videos: prompt -> mp4, and a picture of what the model remembered.

    python sample.py --seconds 60
    python sample.py --prompt "Sand. The camera turns left, one turn in 20 seconds." --memory longlive --seed 3

Chunks of 12 frames are generated, decoded and written one after another, so a long video needs no more memory than a short
one. Beside each mp4 lies its memory picture: frames over time, how surprising each chunk was and which were kept, and what
sink, slow and fast memory hold at the end.

References: Context Forcing, arXiv 2602.06028. Leaves out so far: the full-size model, prompt switches, continuing a clip.
"""
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world
from config import BadInput, one_of, parse, pick_device, run
from flow import Rollout, Sampler, generate
from memory import CHUNK, PRESETS, size
from model import DiT, DiTConfig, load
from rope import MAX_POSITION
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig

WEIGHTS = Path(__file__).parent / "weights"
FPS, SCALE = 16, 8  # each of the small world's pixels becomes a square of 8 x 8


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right, one turn in 12 seconds."  # what to show
    prompts: str = ""          # a UTF-8 file with one prompt a line, instead of --prompt; made side by side
    seeds: int = 1             # videos a prompt, from seed, seed + 1, ...
    seconds: float = 60.0      # length, up to 86,400
    seed: int = 0              # of the noise
    memory: str = "slowfast"   # slowfast | uniform1 | uniform2 | window | longlive | longlive21 | infinity
    positions: str = "bounded"  # bounded | unbounded
    tau: float = None          # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None          # denoising steps (default: the weights' own)
    ckpt: str = ""             # weights of another student
    out: str = "out"           # folder for the videos
    device: str = ""           # cuda | mps | cpu (default: the best there is)
    dtype: str = ""            # bf16 | fp32 (default: bf16 on cuda, else fp32)


def check(cfg):
    """The options that can be wrong before anything is loaded -> list of prompts."""
    if not (math.isfinite(cfg.seconds) and 0 < cfg.seconds <= 86400):
        raise BadInput(f"--seconds must be above 0 and at most 86400, not {cfg.seconds:g}")
    if cfg.tau is not None and not -1 <= cfg.tau <= 1:
        raise BadInput(f"--tau is a cosine: it must lie in [-1, 1], not {cfg.tau:g}")
    if (cfg.steps is not None and cfg.steps < 1) or cfg.seeds < 1 or not 0 <= cfg.seed < 2 ** 63:
        raise BadInput("--steps and --seeds must be at least 1, --seed from 0 to 2^63 - 1")
    one_of("--memory", cfg.memory, PRESETS)
    one_of("--positions", cfg.positions, ("bounded", "unbounded"))
    one_of("--dtype", cfg.dtype or "fp32", ("bf16", "fp32"))
    chunks = chunks_of(frames_in(cfg.seconds))
    if cfg.positions == "unbounded" and chunks * CHUNK > MAX_POSITION:
        raise BadInput(f"unbounded positions end at {MAX_POSITION} latents (256 s), {cfg.seconds:g} s asked for: "
                       "use --positions bounded")
    prompts = [cfg.prompt]
    if cfg.prompts:
        try:
            prompts = [p for p in map(str.strip, Path(cfg.prompts).read_text(encoding="utf-8").splitlines()) if p]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read --prompts {cfg.prompts}: {error}") from None
    if not prompts or not all(p.strip() for p in prompts):
        raise BadInput("the prompt is empty: give --prompt TEXT, or leave it out for the default one")
    for p in prompts:
        if world.parse_caption(p) is None:
            print(f"warning: outside the small world's grammar, so anything may come: {p[:60]!r}; it is {world.GRAMMAR}",
                  file=sys.stderr)
            break
    return prompts


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """Chunks of 3 latents that hold so many frames; the first latent is one frame, the others four."""
    return math.ceil((math.ceil((frames - 1) / 4) + 1) / CHUNK)


class Mp4:
    """One video file under way: raw frames into ffmpeg, whole or absent. Raises BadInput where it cannot be written."""
    def __init__(self, path, frames, comment):
        import imageio_ffmpeg
        self.path, self.part, self.left = path, path.with_name(f".{path.stem}.{os.getpid()}.part.mp4"), frames
        try:
            imageio_ffmpeg.get_ffmpeg_exe()
            path.parent.mkdir(parents=True, exist_ok=True)
            self.part.touch()
        except RuntimeError:
            raise BadInput("ffmpeg is missing: pip install 'imageio[ffmpeg]', or set IMAGEIO_FFMPEG_EXE") from None
        except OSError as error:
            raise BadInput(f"cannot write to {path.parent}: {error.strerror}") from None
        scale = f"scale=iw*{SCALE}:ih*{SCALE}:flags=neighbor"
        self.pipe = imageio_ffmpeg.write_frames(
            str(self.part), (world.WIDTH, world.HEIGHT), fps=FPS, codec="libx264", quality=None, macro_block_size=1,
            output_params=["-crf", "16", "-preset", "veryfast", "-vf", scale, "-metadata", f"comment={comment}"])
        self.pipe.send(None)

    def write(self, frames):
        """(f, h, w, 3) uint8; frames past the asked length are dropped"""
        try:
            for frame in frames[:self.left]:
                self.pipe.send(np.ascontiguousarray(frame))
        except OSError as error:
            raise BadInput(f"ffmpeg stopped writing {self.path} ({error.strerror}): is the disk full?") from None
        self.left -= min(self.left, len(frames))

    def close(self):
        self.pipe.close()
        os.replace(self.part, self.path)

    def abandon(self):
        self.pipe.close()
        self.part.unlink(missing_ok=True)


def to_uint8(video):
    """(f, 3, h, w) in [-1, 1] -> (f, h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def memory_picture(path, shots, roll, tae, prompt, b):
    """shots: list of (second, (h, w, 3) uint8); roll: the finished Rollout; b: which of its videos"""
    from PIL import Image, ImageDraw
    memory, policy = roll.memory, roll.memory.policy
    sims, keeps = (torch.stack(z)[:, b].tolist() for z in (roll.sims, roll.keeps))
    w, h, gap, left = world.WIDTH * 2, world.HEIGHT * 2, 4, 70
    columns, across = len(shots), left + len(shots) * (w + gap)
    held = memory.read()
    rows = math.ceil(size(held) / columns)
    page = Image.new("RGB", (across, 430 + rows * (h + 26)), "white")
    pen = ImageDraw.Draw(page)

    def thumb(frame, x, y):
        page.paste(Image.fromarray(frame).resize((w, h), Image.NEAREST), (x, y))

    pen.text((gap, 8), f"what the model saw and kept: {prompt}", "black")
    for i, (second, frame) in enumerate(shots):
        thumb(frame, left + i * (w + gap), 30)
        pen.text((left + i * (w + gap), 32 + h), f"{second:.0f} s", "black")
    top, high = 140, 190  # how surprising each chunk was: 1 - similarity, the threshold at a third of the height or lower
    wide, most = (across - left - gap) / len(sims), max(3 * (1 - policy.tau), 1.05 * (1 - min(sims)), 1e-6)

    def level(sim):
        return top + high - max(0, 1 - sim) / most * high

    kept_at = {int(i) for i in held[0][b].tolist()}
    for i, (sim, keep) in enumerate(zip(sims, keeps)):
        x = left + i * wide
        tested = policy.slow and i % policy.interval == 0
        colour = (200, 60, 40) if keep and tested else (150, 150, 150) if tested else (215, 215, 215)
        pen.rectangle([x + 1, level(sim), x + max(2, wide - 1), top + high], fill=colour)
        if policy.slow and CHUNK * i in kept_at:
            pen.ellipse([x + wide / 2 - 3, top + high + 4, x + wide / 2 + 3, top + high + 10], fill=(200, 60, 40))
    pen.line([left, top + high, across, top + high], fill="black")
    pen.text((gap, top), "surprisal", "black")
    if policy.keep == "surprisal":
        pen.line([left, level(policy.tau), across, level(policy.tau)], fill=(30, 60, 200))
        pen.text((gap, level(policy.tau) - 6), f"1 - {policy.tau:.4f}", (30, 60, 200))
    pen.text((left, top + high + 14), "each bar a chunk of 0.75 s; red: kept, so its first latent goes to slow memory when it "
             "leaves fast; grey: tested, not kept; pale: not tested; dot: still held at the end", "black")
    top += high + 46
    pen.text((gap, top), "memory\nat the end", "black")
    parts = ["sink"] * size(memory.sink) + ["slow"] * size(memory.slow) + ["fast"] * size(memory.fast)
    with torch.no_grad():
        views = tae.decode(held[1][b][:, None])[0][:, -1]  # every latent alone, as the first of a video
    for i, (part, src, view) in enumerate(zip(parts, held[0][b].tolist(), to_uint8(views))):
        x, y = left + i % columns * (w + gap), top + i // columns * (h + 26)
        thumb(view, x, y)
        colour = {"sink": (0, 120, 60), "slow": (200, 60, 40), "fast": (90, 90, 90)}[part]
        pen.text((x, y + h + 2), f"{part} {max(0, 4 * src - 3) / FPS:.1f} s", colour)
    page.save(path)


def main():
    cfg = parse(Config)
    prompts = check(cfg)
    device = pick_device(cfg.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    started, frames = time.time(), frames_in(cfg.seconds)
    ckpt = cfg.ckpt or WEIGHTS / "init_ar.safetensors"
    dit, facts = load(ckpt, DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    dit, encoder, tae = dit.to(device), encoder.to(device), tae.to(device, memory_format=torch.channels_last)
    sampler = Sampler(**facts["sampler"])
    sampler = replace(sampler, steps=cfg.steps or sampler.steps, tau=sampler.tau if cfg.tau is None else cfg.tau)
    policy = replace(PRESETS[cfg.memory], tau=sampler.tau)

    jobs = [(p, cfg.seed + k) for p in prompts for k in range(cfg.seeds)]
    names = []  # a prompt given twice, or two alike in their first 120 letters, must not share a file
    for p, seed in jobs:
        name = f"{re.sub(r'[^a-z0-9]+', '-', p.lower()).strip('-')[:120] or 'video'}-{seed}"
        names.append(name if name not in names else f"{name}-{len(names)}")
    print(f"{len(jobs)} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {Path(ckpt).name}, {sampler.steps} steps, "
          f"memory {cfg.memory}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    first, files, bar = None, [], None
    try:
        for at in range(0, len(jobs), 8):  # eight videos side by side
            part, part_names = jobs[at:at + 8], names[at:at + 8]
            about = [{"AI-generated": True, "prompt": p, "seed": s, "model": Path(ckpt).name} for p, s in part]
            files = [Mp4(Path(cfg.out) / f"{n}.mp4", frames, json.dumps(a)) for n, a in zip(part_names, about)]
            bar = bar if bar is not None else tqdm(
                total=cfg.seconds * len(jobs),
                bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s of video [{elapsed}<{remaining}{postfix}]")
            ids, mask = (z.to(device) for z in bytes_to_ids([p for p, _ in part], dit.config.text_len))
            grid = world.HEIGHT // 8 // dit.config.patch[0], world.WIDTH // 8 // dit.config.patch[1]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                roll = Rollout(dit, dit.text(encoder(ids, mask)), policy, grid, cfg.positions, sampler.pool)
                empty = dit.text(encoder(*(z.to(device) for z in bytes_to_ids([""] * len(part), dit.config.text_len))))
                latent = (dit.config.channels, world.HEIGHT // 8, world.WIDTH // 8)
                past, shots, made = None, [[] for _ in part], 0
                for z in generate(roll, [s for _, s in part], chunks_of(frames), sampler, latent, empty):
                    video, past = tae.decode(z, past)
                    for file, clip, shot in zip(files, video, shots):
                        clip = to_uint8(clip)
                        file.write(clip)
                        if made / frames * 12 >= len(shot):
                            shot.append((made / FPS, clip[0].copy()))
                    first = first or time.time() - started
                    bar.update(min(video.shape[1], frames - made) / FPS * len(part))
                    made += video.shape[1]
                    bar.set_postfix_str(f"{bar.n * FPS / (time.time() - started):.0f} frames/s")
                for i, (file, (prompt, _)) in enumerate(zip(files, part)):
                    file.close()
                    memory_picture(file.path.with_suffix(".png"), shots[i], roll, tae, prompt, i)
                    bar.write(f"wrote {file.path} and {file.path.with_suffix('.png').name}")
            files = []
    finally:
        for file in files:
            file.abandon()
        if bar is not None:
            bar.close()
    wall = time.time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
    print(f"{frames * len(jobs)} frames in {wall:.1f} s: {frames * len(jobs) / wall:.0f} frames/s, "
          f"first frame after {first:.2f} s, peak memory {peak:.2f} GiB"
          + (f", on the device {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if device.type == "cuda" else ""))


if __name__ == "__main__":
    run(main)
