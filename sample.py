"""
Makes videos: prompt -> mp4, and a picture of what the model remembered.

    python sample.py --seconds 60
    python sample.py --prompt "Sand. The camera turns left, one turn in 20 seconds. | 20: Snow. ..."
    python sample.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt --prompt "A calm sea at dawn." --vae tae
    python sample.py --teacher --continue clip.mp4     # the context teacher goes on, 21 latents at a time

Chunks of 12 frames are generated, decoded and written one after another, so a long video needs no more memory
than a short one. Beside each mp4 lies its memory picture: frames over time, how surprising each chunk was and
which were kept, and what sink, slow and fast memory hold at the end.

References: Context Forcing, arXiv 2602.06028.
Leaves out: more than one device; a memory picture of the teacher.
"""
import json
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch
from tqdm import tqdm

import world
from bench import bench, memory_estimate, peak_memory
from config import STUDENT, BadInput, parse, pick_device, run, whole_or_absent, within
from erft import extend
from flow import Rollout, generate
from memory import CHUNK
from text import read_prompts
from video import (FPS, THUMBNAILS, chunk_at, chunks_of, frames_in, memory_picture, read_clip, to_uint8,
                   video_writer)
from weights import check_options, load_networks, read_file

# options that make a video what it is: a saved state brings them along
SAVED_OPTIONS = ["prompt", "seed", "memory", "positions", "tau", "steps", "ckpt", "wan", "size", "vae",
                 "dtype"]


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right, one turn in 12 seconds."  # what to show
    prompts: str = ""          # a UTF-8 file with one prompt a line, instead of --prompt
    seeds: int = 1             # videos a prompt, from seed, seed + 1, ...
    seconds: float = 60.0      # length, up to 86,400
    seed: int = 0              # of the noise
    memory: str = "slowfast"   # slowfast | uniform1 | uniform2 | window | longlive | longlive21 | infinity
    positions: str = "bounded"  # bounded | unbounded, up to 255 s
    tau: float = None          # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None          # denoising steps (default: the weights' own)
    ckpt: str = ""             # weights of another student, or teacher
    wan: str = ""              # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS (default: tiny)
    size: str = ""             # with --wan: WIDTHxHEIGHT in pixels (default 832x480; random on cpu 192x128)
    vae: str = ""              # with --wan: wan | tae, which is faster (default wan)
    continue_: str = ""        # a video file to go on from; --seconds counts from its first frame
    teacher: bool = False      # with --continue: the context teacher goes on, 21 latents at a time
    save_state: str = ""       # file for the state after the last whole chunk: at the end, or on a signal
    resume: str = ""           # such a file to go on from, up to --seconds, with its own prompt and settings
    compile: bool = False      # torch.compile from the moment that memory is full
    bench: bool = False        # measure the speed of 16 chunks, write no video
    out: str = "out"           # folder for the videos
    device: str = ""           # cuda | mps | cpu (default: the best there is)
    dtype: str = ""            # bf16 | fp32 (default: bf16 on cuda, else fp32)


# ---- what is asked for ------------------------------------------------------------------------------------

@dataclass
class Job:
    """One video to make."""
    prompt: str
    switches: dict  # chunk -> the text that holds from there on; chunk 0 is the start
    seed: int       # of the noise
    path: Path      # of the mp4


def check(cfg):
    """Refuses what can be refused before anything is loaded."""
    check_options(cfg)
    within("--seconds", cfg.seconds, 0.01, 86400)
    within("--seeds", cfg.seeds, 1, 10 ** 6)
    # those that need or exclude one another
    if cfg.positions == "unbounded" and cfg.seconds > 255:
        raise BadInput("unbounded positions end at 255 s: use --positions bounded")
    if (cfg.save_state or cfg.resume) and (cfg.prompts or cfg.seeds > 1 or cfg.bench or cfg.teacher):
        raise BadInput("--save-state and --resume are for one video of the student: leave out "
                       "--prompts, --seeds, --bench and --teacher")
    if cfg.resume and cfg.continue_:
        raise BadInput("--resume and --continue are two ways to go on: leave one of them out")
    if cfg.teacher and (cfg.bench or not cfg.continue_):
        raise BadInput("--teacher goes on from a clip: give --continue CLIP, and no --bench")


def read_switches(prompt, end):
    """'a | 20: b' -> {0: 'a', 27: 'b'}: which text holds from which chunk on; end: of the video in seconds"""
    first, *parts = prompt.split("|")
    switches = {0: first.strip()}
    before = 0
    for part in parts:
        second, _, text = part.partition(":")
        try:
            second = float(second)
        except ValueError:
            raise BadInput("cannot read a prompt switch: "
                           f"write 'a text | 20: the text from 20 s on', not {part!r}") from None
        if not before < second < end:
            raise BadInput(f"the prompt switches must come one after another, before the end at {end:g} s")
        switches[chunk_at(second)] = text.strip()
        before = second
    if not all(switches.values()):
        raise BadInput("the prompt is empty: give --prompt TEXT, or leave it out for the default one")
    # halves of surrogate pairs: what Python makes of bytes that are no UTF-8
    if re.search("[\ud800-\udfff]", prompt):
        raise BadInput(f"the prompt is no UTF-8 text: {prompt[:60]!r}")
    return switches


def plan_jobs(cfg, done):
    """The options -> list of Job; done: frames that a resumed video has already"""
    prompts = read_prompts(cfg.prompts) if cfg.prompts else [cfg.prompt]
    end = float("inf") if cfg.save_state else cfg.seconds  # a saved video may go on to a later switch
    jobs = {}  # by path: prompts that are alike in their first 120 letters must not share a file
    for prompt in prompts:
        switches = read_switches(prompt, end)
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:120] or "video"
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            stem = f"{name}-{seed}-from-{done}" if done else f"{name}-{seed}"
            if stem in jobs:
                stem = f"{stem}-{len(jobs)}"
            jobs[stem] = Job(prompt, switches, seed, Path(cfg.out) / f"{stem}.mp4")
    return list(jobs.values())


def warn_of_grammar(texts):
    """The tiny text encoder has read nothing but the small world's captions."""
    for text in texts:
        if not re.fullmatch(world.GRAMMAR, text):
            print(f"warning: outside the small world's grammar, so anything may come: {text[:60]!r}; it is "
                  f"{world.GRAMMAR}", file=sys.stderr)
            return


def load_state(cfg, device):
    """-> cfg with the options of the saved video, and its Video.state_dict()"""
    state, _ = read_file(cfg.resume, device)
    if "options" not in state:
        raise BadInput(f"{cfg.resume} is not a state: give a file that --save-state wrote")
    video = state["video"]
    if frames_in(cfg.seconds) <= video["frames"]:
        raise BadInput(f"{cfg.resume} is {video['frames'] / FPS:g} s long already: give --seconds above that")
    # an option that says something else than the state is refused, not ignored
    for name, saved in state["options"].items():
        if getattr(cfg, name) not in (getattr(Config, name), saved):
            raise BadInput(f"{cfg.resume} was made with --{name} {saved}: leave that option out")
    return replace(cfg, **state["options"]), video


# ---- videos -----------------------------------------------------------------------------------------------

@dataclass
class Video:
    """A video under way: with the options, all that a saved state holds."""
    rollout: Rollout
    past: list = None  # what the autoencoder remembers of the frames before, from vae.decode()
    frames: int = 0    # written so far, those of an earlier file included
    surplus: torch.Tensor = torch.zeros(0)          # (f, h, w, 3) uint8 decoded beyond --seconds
    thumbnails: dict = field(default_factory=dict)  # second -> frame (h, w, 3) uint8, for the memory picture

    def state_dict(self):
        """Noise is keyed by (seed, chunk, step), so the chunk's number is all the random state there is."""
        return {**vars(self), "rollout": self.rollout.state_dict(), "past": list(self.past)}

    def write(self, frames, total, file, bar):
        """Decoded frames (f, h, w, 3) uint8 into the file, up to `total` in all; the rest is kept."""
        if self.frames / total * THUMBNAILS >= len(self.thumbnails):
            self.thumbnails[self.frames / FPS] = frames[0].clone()
        room = total - self.frames
        self.surplus = frames[room:].clone()
        for frame in frames[:room]:
            file.append_data(frame.cpu().numpy())
            bar.update()
            self.frames += 1


class StopSignals:
    """
    Ctrl-C and SIGTERM end the program with 130 and 143. Where `patient` is set, the first of them only sets
    `code`, so that the chunk under way is finished and the state saved; the second does not wait.
    """
    def __init__(self):
        self.patient = False
        self.code = 0
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number, stack):
        if self.code or not self.patient:
            sys.exit(128 + number)
        self.code = 128 + number


def text_at(texts, chunk):
    """texts: chunk -> text that holds from there on; -> the one that holds at `chunk`"""
    return texts[max(start for start in texts if start <= chunk)]


def extend_with_teacher(networks, texts, history, grid, seed):
    """
    Generator: the context teacher goes on without end, 21 latents at a time, seeing what slow-fast memory
    would hold of all that is there.
    texts    chunk -> net.text of the prompt that holds from there on
    history  (1, 3m, c, h, w)
    yields   x0 (1, 3, c, h, w)
    """
    while True:
        text = text_at(texts, history.shape[1] // CHUNK)
        new = extend(networks.dit, history, text, grid, networks.sampler, [seed])
        history = torch.cat([history, new], dim=1)
        yield from new.split(CHUNK, dim=1)


def render_video(cfg, networks, job, history, state, stop, bar):
    """
    One video, from its first frame, a clip or a saved state to its mp4 and memory picture.
    history  None, or the latents (1, 3m, c, h, w) of the clip to go on from
    state    None, or Video.state_dict() of the one to go on with
    returns  Video
    """
    total = frames_in(cfg.seconds)
    # 1. the rollout: from nothing, or where a saved one stopped
    begun = 0 if history is None else history.shape[1] // CHUNK
    if state is not None:
        begun = state["rollout"]["chunk"]
    texts = {chunk: networks.text(text) for chunk, text in job.switches.items()}
    rollout = networks.rollout(text_at(texts, max(0, begun - 1)))
    video = Video(rollout)
    if state is not None:
        rollout.load_state_dict(state["rollout"])
        video = Video(**{**state, "rollout": rollout})
    # 2. latents, a chunk at a time; those of a clip come first
    count = chunks_of(total) - begun
    if cfg.teacher:
        chunks = islice(extend_with_teacher(networks, texts, history, rollout.grid, job.seed), count)
    else:
        sampler = networks.sampler
        uncond = networks.text("") if sampler.guidance != 1 else None
        later = {chunk: text for chunk, text in texts.items() if chunk > 0}
        chunks = generate(rollout, [job.seed], count, sampler, networks.latent, uncond, history, later)
    if history is not None:
        chunks = chain(history.split(CHUNK, dim=1), chunks)
    # 3. decode and write them one after another
    about = json.dumps({"AI-generated": True, "prompt": job.prompt, "seed": job.seed, "model": networks.name})
    with video_writer(job.path, about, networks.scale) as file:
        if len(video.surplus):
            video.write(video.surplus, total, file, bar)
        for x0 in chunks:
            decoded, video.past = networks.vae.decode(x0, video.past)
            video.write(to_uint8(decoded)[0].cpu(), total, file, bar)
            if stop.code and rollout.chunk:
                break
    bar.write(f"wrote {job.path}")
    # 4. what the memory holds now
    if not cfg.teacher:
        memory_picture(job.path.with_suffix(".png"), video.thumbnails, rollout, networks.vae, job.prompt)
    return video


@torch.no_grad()
def main():
    started = time.time()
    # 1. what is asked for
    cfg = parse(Config)
    device = pick_device(cfg.device)
    check(cfg)
    state, done = None, 0
    if cfg.resume:
        cfg, state = load_state(cfg, device)
        check(cfg)
        done = state["frames"]
    jobs = plan_jobs(cfg, done)
    texts = sorted({text for job in jobs for text in job.switches.values()})
    if not cfg.wan:
        warn_of_grammar(texts)
    frames = frames_in(cfg.seconds)
    # 2. precision: weights of the raw folder are converted, the tiny ones autocast
    bf16 = cfg.dtype == "bf16" if cfg.dtype else device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cfg.wan)
    stop = StopSignals()
    state_file = whole_or_absent(cfg.save_state) if cfg.save_state else nullcontext()
    with autocast, state_file as state_part:
        # 3. networks
        shipped = "teacher" if cfg.teacher else STUDENT
        networks = load_networks(cfg, shipped, texts, device, torch.bfloat16 if bf16 else torch.float32)
        print(f"{len(jobs)} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {networks.name}, "
              f"{networks.sampler.steps} steps, memory {cfg.memory}")
        if cfg.wan:
            print(f"estimate: weights and KV cache take {memory_estimate(networks) / 1e9:.1f} GB")
        if cfg.bench:
            return bench(networks, jobs[0].switches[0], cfg.seed)
        # 4. the clip to go on from
        history = None
        if cfg.continue_:
            clip = torch.from_numpy(read_clip(cfg.continue_, networks.width, networks.height, frames))
            clip = clip.movedim(-1, -3)[None].to(device) / 127.5 - 1
            history = networks.vae.encode(clip).float()
        # 5. the videos; the bar is delayed, so that no error is told behind it
        stop.patient = bool(cfg.save_state)
        with tqdm(total=frames * len(jobs), initial=done, unit=" frames", delay=.01) as bar:
            for job in jobs:
                video = render_video(cfg, networks, job, history, state, stop, bar)
        # 6. the state, with the options that made the video
        if cfg.save_state:
            options = {name: getattr(cfg, name) for name in SAVED_OPTIONS}
            torch.save({"options": options, "video": video.state_dict()}, state_part)
            print(f"saved {cfg.save_state} at {video.frames / FPS:g} s")
    if stop.code:
        sys.exit(stop.code)
    wall, count = time.time() - started, frames * len(jobs) - done
    print(f"{count} frames in {wall:.1f} s: {count / wall:.0f} frames/s, {peak_memory(device)}")


if __name__ == "__main__":
    run(main)
