"""
Makes videos: prompt -> mp4, and a picture of what the model remembered.

    python sample.py --seconds 60
    python sample.py --prompt "Sand. The camera turns left from north, one turn in 9 seconds. | 20: Snow. ..."
    python sample.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt --prompt "A calm sea at dawn." --vae tae
    python sample.py --teacher --continue clip.mp4     # the context teacher goes on, 21 latents at a time

Chunks of 12 frames are generated, decoded and written one after another, so a long video needs no more memory
than a short one. A file is named by its prompt, its seed and a hash of all else that makes the picture;
manifest.jsonl beside it says what that is. A memory picture lies there, too (video.py).

Leaves out: more than one device; a memory picture of the teacher.
"""
import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice, product
from pathlib import Path

# first: see its head
from config import (STUDENT, BadInput, StopSignals, check_file, check_schema, check_writable, in_one_line,
                    parse, pick_device, run, tell, use_one_thread, warn, within)

import torch
from tqdm import tqdm

from bench import bench, memory_estimate, peak_memory
from erft import extend
from flow import generate
from memory import CHUNK
from records import append_line
from tensors import hash_content, hash_file, read_file, read_head, write_safetensors
from text import check_prompt, read_prompts
from video import (FPS, MANIFEST, THUMBNAILS, chunks_of, decode_beside, find_ffmpeg, frames_in,
                   memory_picture, open_clip, read_clip, read_manifest, video_writer)
from weights import check_options, load_networks
from world import GRAMMAR

# options that make a video what it is: a saved state brings them along, with the files, which may be moved
OPTIONS = ["prompt", "seed", "memory", "positions", "tau", "steps", "size", "vae", "dtype"]
FILES = ["ckpt", "lora", "wan"]
LONGEST = 86400  # seconds
# what a state says beside its latents; also frames that are written, and how many chunks are a clip's
STATE = {"options": {"prompt": str, "seed": int, "memory": str, "positions": str}, "model": str,
         "clip": range(LONGEST), "frames": range(LONGEST * FPS + 1)}


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right from north, one turn in 12 seconds."  # what to show
    prompts: str = ""          # a UTF-8 file, a prompt a line, instead of --prompt; - or <(command), too
    seeds: int = 1             # videos a prompt, from seed, seed + 1, ...
    seconds: float = 60.0      # length, up to 86,400
    seed: int = 0              # of the noise
    memory: str = "slowfast"   # slowfast | uniform1 | uniform2 | window | longlive | longlive21 | infinity
    positions: str = "bounded"  # bounded | unbounded, up to 255 s
    tau: float = None          # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None          # denoising steps (default: the weights' own)
    ckpt: str = ""             # weights of another student, or teacher
    lora: str = ""             # with --wan: a LoRA to merge into them, which may be in the same file
    no_verify: bool = False    # take files as they are, without verifying their checksums
    wan: str = ""              # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS (default: tiny)
    size: str = ""             # with --wan: WIDTHxHEIGHT in pixels (default 832x480; random on cpu 192x128)
    vae: str = ""              # with --wan: wan | tae, which is faster (default wan)
    continue_: str = ""        # a video file to go on from; --seconds counts from its first frame
    teacher: bool = False      # with --continue: the context teacher goes on, 21 latents at a time
    save_state: str = ""       # file for the state after the last whole chunk: at the end, or on a signal
    resume: str = ""           # such a file to go on from, up to --seconds, with its own prompt and settings
    compile: bool = False      # torch.compile from the moment that memory is full
    bench: bool = False        # measure the parts and the speed of chunks, write no video
    overwrite: bool = False    # a file of the same name that is another's; else a number is added
    out: str = "out"           # folder for the videos
    device: str = ""           # cuda | mps | cpu (default: the best there is)
    dtype: str = ""            # bf16 | fp32 (default: bf16 on cuda, else fp32)


# ---- what is asked for ------------------------------------------------------------------------------------

def check(cfg):
    """Refuses what can be refused before anything is loaded."""
    check_options(cfg)
    most = 255 if cfg.positions == "unbounded" else LONGEST
    within(f"--seconds with --positions {cfg.positions}", cfg.seconds, 0.01, most)
    within("--seeds", cfg.seeds, 1, min(10 ** 6, 2 ** 63 - cfg.seed))
    # what does not go together
    several = cfg.prompts or cfg.seeds > 1 or cfg.bench or cfg.teacher
    is_saved = cfg.save_state or cfg.resume
    no_clip = cfg.teacher and (cfg.bench or not cfg.continue_)
    if is_saved and several or cfg.resume and cfg.continue_ or no_clip:
        raise BadInput("--save-state and --resume are for one video of the student: leave out --prompts, "
                       "--seeds, --bench and --teacher, and --continue with --resume; --teacher goes on from "
                       "a clip: give --continue CLIP, and no --bench")
    own = ("memory", "positions", "tau", "compile")  # of the student
    if cfg.teacher and any(getattr(cfg, name) != getattr(Config, name) for name in own):
        raise BadInput(f"--teacher has one memory of its own: leave out --{', --'.join(own)}")
    # what would be found out after the work
    if cfg.save_state:
        state = Path(cfg.save_state)
        check_file(state)
        if state.suffix in (".mp4", ".png", ".jsonl"):
            raise BadInput(f"--save-state {state} could take the place of a video, its picture or its line: "
                           "give another ending")
        if state.exists():
            _, about = read_head(state, "it is there, and no state: give another name")
            check_schema(state, about, STATE, fault="is there, and no state: give another name")
        check_writable(state.parent)
    if not cfg.bench:
        check_writable(cfg.out)
        check_file(Path(cfg.out, MANIFEST))
        find_ffmpeg()
    if cfg.continue_:
        open_clip(cfg.continue_, "-frames:v", "1")


def read_switches(prompt, end):
    """
    'a | 20: b' -> {0: 'a', 27: 'b'}: which text holds from which chunk on; a bar of the text is written \\|.
    end  of the video in seconds
    """
    switches = {}
    before = -1
    for part in re.split(r"(?<!\\)\|", f"0: {prompt}"):
        second, _, text = part.partition(":")
        with in_one_line("cannot read a prompt switch",
                         "write 'a text | 20: the text from 20 s on', or \\| for a bar"):
            second = float(second)
        # what is not a time of the video counts as 0, so it does not come after
        chunk = chunks_of(second * FPS) if 0 < second < end else 0
        if not before < chunk < chunks_of(end * FPS):
            raise BadInput("the prompt switches must come one after another, each in a chunk (0.75 s) of its "
                           f"own, no later than the last of the {end:g} s")
        text = text.replace("\\|", "|").strip()
        check_prompt(text)
        switches[chunk] = text
        before = chunk
    return switches


def warn_of_grammar(texts):
    """The tiny text encoder has read nothing but the small world's captions."""
    if strange := [text for text in texts if not re.fullmatch(GRAMMAR, text)]:
        warn(f"the tiny model knows captions such as {Config.prompt!r} (GRAMMAR in world.py), so "
             f"anything may come of {strange[0][:60]!r}")


# ---- a video that goes on later ---------------------------------------------------------------------------

def read_options():
    """-> the options, those of --resume among them; latents of its video, or None; what its file says"""
    cfg = parse(Config)
    check(cfg)
    if not cfg.resume:
        return cfg, None, {"frames": 0, "clip": 0}
    state, about = read_file(cfg.resume, verify=not cfg.no_verify,
                             remedy="give a file that --save-state wrote")
    check_schema(cfg.resume, about, STATE)
    check_schema(cfg.resume, state.get("latents"), torch.float32, "latents")
    # a file may hold anything: only these options count, and they are read as the command line is
    words = [f"--{name}={value}" for name, value in about["options"].items()
             if name in OPTIONS + FILES and value is not None]
    try:
        saved = parse(Config, words)
        check_options(saved)
        read_switches(saved.prompt, LONGEST)
    except BadInput as error:
        raise BadInput(f"{cfg.resume} is damaged: {error}") from None
    # one that says something else than the state is refused, but for weights that were moved
    cfg = parse(Config, [*words, *sys.argv[1:]])
    check(cfg)
    for name in OPTIONS:
        if getattr(cfg, name) != getattr(saved, name):
            raise BadInput(f"{cfg.resume} was made with --{name} {getattr(saved, name)}: leave that out")
    if frames_in(cfg.seconds) <= about["frames"]:
        raise BadInput(f"{cfg.resume} is {about['frames'] / FPS:g} s long already: give --seconds above that")
    # a copy: the file is mapped, and may be replaced
    latents, chunks = state["latents"].clone(), max(about["clip"], chunks_of(about["frames"]))
    # where a video could not be written, its state has more of it
    if latents.ndim != 5 or latents.shape[1] % CHUNK or latents.shape[1] < CHUNK * chunks:
        raise BadInput(f"{cfg.resume} is damaged: its latents are no {chunks} chunks")
    return cfg, latents, about


def read_all_prompts(cfg):
    """-> prompts, of which some may stand there twice, and {prompt: its switches}"""
    # a video whose state is saved may go on to a later switch
    read = partial(read_switches, end=LONGEST if cfg.save_state else cfg.seconds)
    prompts = read_prompts(cfg.prompts, read) if cfg.prompts else [cfg.prompt]
    return prompts, {prompt: read(prompt) for prompt in prompts}


def name_video(cfg, record, manifest, taken):
    """
    Where a video goes: its prompt's letters, of every script, its seed, eight digits of all that makes it. A
    number is added where a file stands that is not the same video: one of other content, or of this run.
    """
    # all but white space and ASCII's marks, as far as names of files can have it here
    code = sys.getfilesystemencoding()
    letters = re.sub(r"[\s!-/:-@[-`{-~]+", "-", record["prompt"].lower()).strip("-")
    letters = letters.encode(code, "ignore")[:120].decode(code, "ignore") or "video"
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    done = f"-from-{record['options']['from']}" if record["options"]["from"] else ""
    for number in count(1):
        again = f"-{number}" if number > 1 else ""
        path = Path(cfg.out, f"{letters}-{record['seed']}{done}-{key}{again}.mp4")
        # the same video may be there, but one that may be stopped half-way does not take its place
        made = manifest.get(path.name, {})
        is_same = made.items() >= record.items() and path.is_file() and made["sha256"] == hash_file(path)
        is_there = path.exists() or path.with_suffix(".png").exists()
        is_free = cfg.overwrite or not is_there or is_same and not cfg.save_state
        if is_free and path not in taken:
            taken.add(path)
            return path


# ---- videos -----------------------------------------------------------------------------------------------

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
        now = text_at(texts, history.shape[1] // CHUNK)
        new = extend(networks.dit, history, now, grid, networks.sampler, [seed])
        history = torch.cat([history, new], dim=1)
        yield from new.split(CHUNK, dim=1)


def find_old_chunks(cfg, networks, latents, device):
    """What is there by --continue, or in a state (its latents, or None) -> list of x0 (1, 3, c, h, w)"""
    if cfg.continue_:
        frames = read_clip(cfg.continue_, networks.width, networks.height, frames_in(cfg.seconds))
        clip = torch.from_numpy(frames).movedim(-1, -3)[None].to(device)
        latents = networks.vae.encode(clip / 127.5 - 1)
    if latents is None:
        return []
    if latents.shape[2:] != networks.latent or len(latents) != 1:
        raise BadInput(f"{cfg.resume} holds latents {(*latents.shape,)}, needed are (1, n, "
                       f"*{networks.latent}): give its own --ckpt or --wan")
    return list(latents.to(device).float().split(CHUNK, dim=1))


def make_latents(cfg, networks, switches, seed, old, clip):
    """
    The latents of a video, of which some may be there: a clip's, or a saved video's.
    switches  chunk -> the text that holds from there on
    old       list of x0 (1, 3, c, h, w); the first `clip` of them are a clip's
    returns   the rollout; a generator of x0 (1, 3, c, h, w), one chunk after another, the old ones first
    """
    texts = {chunk: networks.text(text) for chunk, text in switches.items()}
    rollout = networks.rollout(text_at(texts, max(0, clip - 1)))
    left = max(0, chunks_of(frames_in(cfg.seconds)) - len(old))
    if cfg.teacher:
        new = extend_with_teacher(networks, texts, torch.cat(old, dim=1), rollout.grid, seed)
        return rollout, chain(old, islice(new, left))
    # the clean passes of what is there, as when it was made
    del texts[0]  # the rollout has it
    for x0 in old:
        if rollout.chunk >= clip and rollout.chunk in texts:
            rollout.recache(texts[rollout.chunk])
        rollout.read_context()
        rollout.append(x0)
    uncond = networks.text("") if networks.sampler.guidance != 1 else None
    new = generate(rollout, [seed], left, networks.sampler, networks.latent, uncond, texts=texts)
    return rollout, chain(old, new)


def make_video(cfg, networks, path, record, switches, old, clip, stop, bar):
    """
    One video: its mp4, its line in the manifest, its state, its memory picture.
    record    what makes it, for the manifest
    switches  chunk -> the text that holds from there on
    old       list of x0 (1, 3, c, h, w) that are there; the first `clip` of them are a clip's
    """
    prompt, seed, done = record["prompt"], record["seed"], record["options"]["from"]
    rollout, chunks = make_latents(cfg, networks, switches, seed, old, clip)
    kept, thumbnails, frames, written = [], {}, 0, done
    total = frames_in(cfg.seconds)

    def until_signal():
        for number, x0 in enumerate(chunks, 1):
            if cfg.save_state:
                kept.append(x0)
            yield x0
            if stop.code and number > len(old):
                return
    # 1. decode and write one chunk after another, but for what is in an earlier file
    about = {"AI-generated": True, "prompt": prompt, "seed": seed, "model": networks.name}
    comment = json.dumps(about, ensure_ascii=False)
    try:
        with video_writer(path, networks.width, networks.height, comment, networks.scale) as write:
            for decoded, is_finite in decode_beside(networks.vae, until_signal()):
                if not is_finite:
                    raise BadInput(f"the chunk at {frames / FPS:g} s is not finite (NaN or infinity): "
                                   f"are these weights of {networks.name} damaged, or too large for --dtype?")
                if frames / total * THUMBNAILS >= len(thumbnails):
                    thumbnails[frames / FPS] = decoded[0].clone()
                for frame in decoded[max(0, done - frames):total - frames]:
                    write(frame.numpy())
                    bar.update()
                frames = min(total, frames + len(decoded))
        written = frames
        made = {"file": path.name, **record, "frames": frames - done, "sha256": hash_file(path)}
        append_line(Path(cfg.out, MANIFEST), made)
        tell(f"wrote {path}")
    # 2. the state, whatever became of that: what is in no file is written when it goes on
    finally:
        if cfg.save_state and frames:
            saved = {name: getattr(cfg, name) for name in OPTIONS + FILES}
            about = {"options": saved, "model": record["model"], "frames": written, "clip": clip}
            latents = torch.cat(kept, dim=1)[:, :CHUNK * chunks_of(frames)]
            write_safetensors(cfg.save_state, {"latents": latents}, about)
            tell(f"saved {cfg.save_state} at {frames / FPS:g} s")
    # 3. what the memory holds now
    if not cfg.teacher:
        memory_picture(path.with_suffix(".png"), thumbnails, rollout, networks.vae, prompt)


@torch.inference_mode()
def main():
    started = time.time()
    # 1. what is asked for
    cfg, saved, about = read_options()
    device = pick_device(cfg.device)
    prompts, switches = read_all_prompts(cfg)
    texts = sorted({text for by_chunk in switches.values() for text in by_chunk.values()})
    if not cfg.wan:
        use_one_thread()
        warn_of_grammar(texts)
    # 2. precision: weights of the raw folder are converted, the tiny ones autocast
    bf16 = cfg.dtype == "bf16" if cfg.dtype else device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    cfg.dtype = "bf16" if bf16 else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cfg.wan)
    with autocast, StopSignals() as stop:
        # 3. networks
        networks = load_networks(cfg, "teacher" if cfg.teacher else STUDENT, texts, device, dtype)
        total, videos = frames_in(cfg.seconds), len(prompts) * cfg.seeds
        tell(f"{videos} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {networks.name}, "
             f"{networks.sampler.steps} steps, memory {cfg.memory}")
        if cfg.wan:
            print(f"estimate: {memory_estimate(networks) / 1e9:.1f} GB at most")
        if cfg.bench:
            return bench(networks, texts[0])
        # 4. the model
        # steps and tau are options of a video
        form = repr([networks.dit.config, replace(networks.sampler, steps=0, tau=0.)])
        model = hash_content(networks.dit.state_dict() | networks.vae.state_dict(), form)
        if cfg.resume and model != about["model"]:
            raise BadInput(f"{cfg.resume} was made with other weights than {networks.name}, or with another "
                           "autoencoder or --dtype: give its own by --ckpt or --wan")
        # 5. what is there of it
        old = find_old_chunks(cfg, networks, saved, device)
        clip = len(old) if cfg.continue_ else about["clip"]
        # 6. what a video depends on
        cfg.tau, cfg.steps = networks.policy.tau, networks.sampler.steps
        options = {name: getattr(cfg, name) for name in (*OPTIONS[2:], "seconds", "teacher")}
        options["continue"] = hash_file(cfg.continue_) if cfg.continue_ else ""
        if cfg.resume:
            options["continue"] = hash_content({"latents": saved}, clip)
        options["from"] = done = about["frames"]
        # 7. the videos; the bar is delayed, so that no error is told behind it
        stop.patient = bool(cfg.save_state)
        manifest, taken = read_manifest(cfg.out), set()
        with tqdm(total=total * videos, initial=done, unit=" frames", delay=.01) as bar:
            for prompt, seed in product(prompts, range(cfg.seed, cfg.seed + cfg.seeds)):
                record = {"prompt": prompt, "seed": seed, "options": options, "model": model}
                path = name_video(cfg, record, manifest, taken)
                make_video(cfg, networks, path, record, switches[prompt], old, clip, stop, bar)
    if stop.code:
        sys.exit(stop.code)
    wall, made = time.time() - started, total * videos - done
    print(f"{made} frames in {wall:.1f} s: {made / wall:.0f} frames/s, {peak_memory(device)}")


if __name__ == "__main__":
    run(main)
