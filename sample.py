"""
Makes videos: prompt -> mp4, and a picture of what the model remembered.

    python sample.py --seconds 60
    python sample.py --prompt "Sand. The camera turns left, one turn in 20 seconds. | 20: Snow. The camera turns left, ..."
    python sample.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt --prompt "A calm sea at dawn." --vae tae
    python sample.py --teacher --continue clip.mp4     # the context teacher goes on, 21 latents at a time

Chunks of 12 frames are generated, decoded and written one after another, so a long video needs no more memory than a short
one. Beside each mp4 lies its memory picture: frames over time, how surprising each chunk was and which were kept, and what
sink, slow and fast memory hold at the end.

References: Context Forcing, arXiv 2602.06028. Leaves out: more than one device; a memory picture of the teacher.
"""
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import world
from bench import bench, estimate, peak_line
from config import STUDENT, BadInput, one_of, parse, pick_device, run
from erft import extend
from flow import generate
from memory import CHUNK, PRESETS
from text import read_prompts
from video import FPS, Decoder, VideoWriter, chunk_at, chunks_of, frames_in, memory_picture, read_clip, touch
from weights import VAES, WEIGHTS, load_tiny, read_file, wan_models

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.MATH]  # on cuda, the fastest first


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
    wan: str = ""              # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS (default: the shipped tiny models)
    size: str = ""             # with --wan: WIDTHxHEIGHT in pixels (default 832x480; random on the cpu 192x128)
    vae: str = ""              # with --wan: wan | tae, which is faster (default wan)
    continue_: str = ""        # a video file to go on from; --seconds counts from its first frame
    teacher: bool = False      # with --continue: the context teacher goes on, 21 latents at a time
    save_state: str = ""       # file for the state after the last whole chunk, at the end, on Ctrl-C and on SIGTERM
    resume: str = ""           # such a file to go on from, up to --seconds
    compile: bool = False      # torch.compile from the moment that memory is full
    bench: bool = False        # measure speed and memory, write no video
    out: str = "out"           # folder for the videos
    device: str = ""           # cuda | mps | cpu (default: the best there is)
    dtype: str = ""            # bf16 | fp32 (default: bf16 on cuda, else fp32)


# ---- what is asked for -------------------------------------------------------------------------------------------------

def check(cfg):
    """The options that can be wrong before anything is loaded -> list of prompts, each with its switches (see segments)."""
    for name, allowed in (("memory", PRESETS), ("positions", ("bounded", "unbounded")), ("dtype", ("", "bf16", "fp32")),
                          ("vae", ("", *VAES))):
        one_of(f"--{name}", getattr(cfg, name), allowed)
    saved, several = cfg.save_state or cfg.resume, cfg.prompts or cfg.seeds > 1 or cfg.bench
    for wrong, told in (
            (not 0 < cfg.seconds <= 86400, f"--seconds must be above 0 and at most 86400, not {cfg.seconds:g}"),
            (cfg.positions == "unbounded" and cfg.seconds > 255, "unbounded positions end at 255 s: use --positions bounded"),
            (cfg.tau is not None and not -1 <= cfg.tau <= 1, f"--tau is a cosine: it must lie in [-1, 1], not {cfg.tau}"),
            ((cfg.steps is not None and cfg.steps < 1) or cfg.seeds < 1 or not 0 <= cfg.seed < 2 ** 63,
             "--steps and --seeds must be at least 1, --seed from 0 to 2^63 - 1"),
            (not cfg.wan and (cfg.size or cfg.vae == "wan"),
             "--size and --vae wan need --wan: the tiny model has one size and one autoencoder"),
            (saved and several or cfg.resume and cfg.continue_,
             "--save-state and --resume are for one video: leave out --prompts, --seeds, --bench and --continue"),
            (cfg.teacher and (not cfg.continue_ or cfg.save_state or cfg.bench),
             "--teacher goes on from a clip: give --continue CLIP, and leave out --save-state, --resume and --bench")):
        if wrong:
            raise BadInput(told)
    end = math.inf if cfg.save_state else cfg.seconds  # a saved video may go on to a later switch
    prompts = [(p, segments(p, end)) for p in (read_prompts(cfg.prompts) if cfg.prompts else [cfg.prompt])]
    odd = [text for _, parts in prompts for _, text in parts if not cfg.wan and world.parse_caption(text) is None]
    if odd:
        print(f"warning: outside the small world's grammar, so anything may come: {odd[0][:60]!r}; it is {world.GRAMMAR}",
              file=sys.stderr)
    return prompts


def segments(prompt, end):
    """'a | 20: b' -> [(0, 'a'), (27, 'b')]: which text holds from which chunk on; end: of the video, seconds"""
    if len(prompt) > 4000:
        raise BadInput(f"a prompt of {len(prompt)} characters: 4000 are the most, and 512 tokens hold about 2000")
    if odd := re.search(r"[^\t\n\r -~\xa0-\ud7ff\ue000-\U0010ffff]", prompt):  # control characters, halves of pairs
        raise BadInput(f"the prompt holds U+{ord(odd[0]):04X}, which is no text: remove it")
    try:
        parts = [part.partition(":")[::2] for part in f"0:{prompt}".split("|")]
        found = [(float(at), text.strip()) for at, text in parts]
    except ValueError:
        raise BadInput(f"cannot read a prompt switch in {prompt[:60]!r}: write 'a text | 20: the text from 20 s on'") from None
    if not all(text for _, text in found):
        raise BadInput("the prompt is empty: give --prompt TEXT, or leave it out for the default one")
    times = [at for at, _ in found] + [end]
    if not all(a < b for a, b in zip(times, times[1:])):
        raise BadInput(f"prompt switches must come one after another, before the end at {end:g} s: {prompt[:60]!r}")
    return [(chunk_at(second), text) for second, text in found]


# ---- speed and memory -------------------------------------------------------------------------------------------------


# ---- videos --------------------------------------------------------------------------------------------------------------

# what a saved state holds: options that make a video
KEPT = ("prompt", "seed", "memory", "positions", "tau", "steps", "ckpt", "wan", "size", "vae", "dtype")


def load_state(cfg, device):
    """-> cfg with the options of the saved video, the state that film() saved"""
    state, default = read_file(cfg.resume, "the state", True, device)[0], asdict(Config())
    if not isinstance(state, dict) or "options" not in state:
        raise BadInput(f"{cfg.resume} is not a state: give a file that --save-state wrote")
    for name, value in state["options"].items():
        if getattr(cfg, name) not in (default[name], value):
            raise BadInput(f"{cfg.resume} was made with --{name} {value}, not {getattr(cfg, name)}: leave the option out")
    return replace(cfg, **state["options"]), state


def teach(m, roll, texts, history, seed):
    """The context teacher goes on, 21 latents at a time, from what memory.frames_in_memory holds of all that is there; a chunk each."""
    while True:
        text = texts[max(turn for turn in texts if turn <= history.shape[1] // CHUNK)]
        new = extend(m.dit, history, text, roll.grid, m.sampler, [seed])
        history = torch.cat([history, new], dim=1)
        yield from new.split(CHUNK, dim=1)


def film(cfg, m, prompt, parts, seed, path, history, state, bar, stop):
    """
    One video, from its first frame, a clip or a saved state to its mp4 and memory picture. parts: of the prompt, from
    segments(); history: None, or the latents (1, 3m, c, h, w) of the clip; stop: no longer empty once a signal came.
    """
    frames, made = frames_in(cfg.seconds), state["done"] if state else 0
    given = 0 if history is None else history.shape[1] // CHUNK
    if any(0 < turn < given for turn, _ in parts):
        raise BadInput(f"the prompt switches inside the clip, its first {given * .75:g} s: {prompt[:60]!r}")
    texts = {turn: m.text(text) for turn, text in parts}
    roll, decoder, shots, left = m.rollout(texts[0]), Decoder(m.vae), [], []
    if state:
        roll.load_state_dict(state["rollout"])
        decoder.past, shots = state["past"], [(at, frame.cpu()) for at, frame in state["shots"]]
        left = [state["left"].cpu()] * bool(len(state["left"]))
        roll.text = texts[max(turn for turn in texts if turn < roll.chunk)]
    count = chunks_of(frames) - max(given, roll.chunk)
    empty = m.text("") if m.sampler.guidance != 1 else None
    new = (islice(teach(m, roll, texts, history, seed), count) if cfg.teacher else
           generate(roll, [seed], count, m.sampler, m.latent, empty, history, {turn: texts[turn] for turn in texts if turn}))

    def chunks():
        for z in chain(history.split(CHUNK, dim=1) if given else (), new):
            yield z
            if stop and roll.chunk:
                return

    about = json.dumps({"AI-generated": True, "prompt": prompt, "seed": seed, "model": m.name})
    with VideoWriter(path, frames - made, about, m.width, m.height, m.scale) as file:
        for clip in chain(left, decoder.frames(chunks())):
            file.write(clip.numpy())
            if made / frames * 12 >= len(shots):
                shots.append((made / FPS, clip[0].clone()))
            bar.update(min(len(clip), frames - made))
            made += len(clip)
    if not cfg.teacher:
        memory_picture(path.with_suffix(".png"), shots, roll, m.vae, prompt)
    bar.write(f"wrote {path}" + (f" and {path.stem}.png" if not cfg.teacher else ""))
    if cfg.save_state:  # noise is keyed by (seed, chunk, step), so the chunk is the random state
        torch.save({"options": {k: getattr(cfg, k) for k in KEPT}, "done": min(made, frames), "past": list(decoder.past),
                    "rollout": roll.state_dict(),
                    "shots": shots, "left": clip[len(clip) - max(0, made - frames):].clone()}, f"{cfg.save_state}.part")
        os.replace(f"{cfg.save_state}.part", cfg.save_state)
        bar.write(f"saved {cfg.save_state} at {min(made, frames) / FPS:g} s: --resume {cfg.save_state} goes on")


def main():
    cfg, state, stop, started = parse(Config), None, [], time.time()
    device = pick_device(cfg.device)
    if cfg.resume:
        cfg, state = load_state(cfg, device)
    prompts, frames, done = check(cfg), frames_in(cfg.seconds), state["done"] if state else 0
    if frames <= done:
        raise BadInput(f"{cfg.resume} is {done / FPS:g} s long already: give --seconds above that")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    jobs = {}  # by file: a prompt given twice, or two alike in their first 120 letters, must not share one
    for prompt, parts in prompts:
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:120] or "video"
            path = Path(cfg.out) / (f"{name}-{seed}" + (f"-from-{done}" if done else "") + ".mp4")
            path = path if path not in jobs else path.with_stem(f"{path.stem}-{len(jobs)}")
            jobs[path] = prompt, parts, seed

    def interrupted(number, frame):
        if not cfg.save_state or stop:
            sys.exit(128 + number)
        stop.append(number)  # the chunk under way is finished first; a second signal does not wait

    with (torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16 and not cfg.wan),
          sdpa_kernel(ATTENTION, set_priority=True) if device.type == "cuda" else nullcontext(), ExitStack() as stack):
        if cfg.save_state:
            part = Path(f"{cfg.save_state}.part")
            touch(part)
            stack.callback(part.unlink, missing_ok=True)
        texts = sorted({text for _, parts in prompts for _, text in parts})
        shipped = WEIGHTS / ("teacher.safetensors" if cfg.teacher else f"{STUDENT}.safetensors")
        m = wan_models(cfg, texts, device, dtype) if cfg.wan else load_tiny(cfg.ckpt or shipped, device)
        sampler = replace(m.sampler, steps=cfg.steps or m.sampler.steps, tau=m.sampler.tau if cfg.tau is None else cfg.tau)
        m = replace(m, sampler=sampler, policy=replace(PRESETS[cfg.memory], tau=sampler.tau), positions=cfg.positions,
                    compiled=torch.compile(m.dit, dynamic=False) if cfg.compile else None)
        print(f"{len(jobs)} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {m.name}, {sampler.steps} steps, "
              f"memory {cfg.memory}")
        if cfg.wan:
            print(f"estimate on {device.type}, GiB:", {k: round(v / 2 ** 30, 2) for k, v in estimate(m).items()})
        if cfg.bench:
            return bench(cfg, m, texts[0])
        history = None
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, interrupted))
        if cfg.continue_:
            clip = torch.from_numpy(read_clip(cfg.continue_, m.width, m.height, frames)).movedim(-1, -3)
            history = m.vae.encode(clip[None].to(device) / 127.5 - 1).float()
        bar = tqdm(total=frames * len(jobs), initial=done, unit=" frames", delay=.01)  # delay: not before any error
        stack.enter_context(bar)
        for path, job in jobs.items():
            film(cfg, m, *job, path, history, state, bar, stop)
            if stop:
                sys.exit(128 + stop[0])
    wall, count = time.time() - started, frames * len(jobs) - done
    print(f"{count} frames in {wall:.1f} s: {count / wall:.0f} frames/s, {peak_line()}")


if __name__ == "__main__":
    run(main)
