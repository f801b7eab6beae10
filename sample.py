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
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice, product
from pathlib import Path

# first: see its head
from config import (STUDENT, BadInput, StopSignals, check_schema, check_writable, fast_attention, parse,
                    pick_device, run, use_one_thread, whole_or_absent, within)

import torch
from tqdm import tqdm

from bench import bench, memory_estimate, peak_memory
from erft import extend
from flow import Rollout, generate
from memory import CHUNK
from tensors import hash_file
from text import check_prompt, read_prompts
from video import (FPS, THUMBNAILS, add_to_manifest, chunks_of, find_ffmpeg, frames_in, decode_beside,
                   memory_picture, read_clip, read_manifest, video_writer)
from weights import check_options, load_networks, read_file
from world import GRAMMAR

# options that make a video what it is: a saved state brings them along
SAVED_OPTIONS = ["prompt", "seed", "memory", "positions", "tau", "steps", "ckpt", "lora", "wan", "size",
                 "vae", "dtype"]
# what a file with a state holds
HELD = {"frame": torch.Tensor, "latent": torch.Tensor, "keys": [torch.Tensor], "values": [torch.Tensor]}
MEMORY = {"pending": list, "sink": (HELD, None), "slow": (HELD, None), "fast": (HELD, None)}
ROLLOUT = {"chunk": int, "descriptor": torch.Tensor, "similarities": [torch.Tensor], "kept": [torch.Tensor],
           "memory": MEMORY}
VIDEO = {"rollout": ROLLOUT, "past": [(torch.Tensor, None)], "frames": int, "surplus": torch.Tensor,
         "thumbnails": dict}
STATE = {"options": dict, "video": VIDEO, "model": str}


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right from north, one turn in 12 seconds."  # what to show
    prompts: str = ""          # a UTF-8 file with one prompt a line, instead of --prompt
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
    within("--seconds", cfg.seconds, 0.01, 86400)
    within("--seeds", cfg.seeds, 1, 10 ** 6)
    if cfg.positions == "unbounded" and cfg.seconds > 255:
        raise BadInput("unbounded positions end at 255 s: use --positions bounded")
    if (cfg.save_state or cfg.resume) and (cfg.prompts or cfg.seeds > 1 or cfg.bench or cfg.teacher):
        raise BadInput("--save-state and --resume are for one video of the student: leave out "
                       "--prompts, --seeds, --bench and --teacher")
    if cfg.resume and cfg.continue_:
        raise BadInput("--resume and --continue are two ways to go on: leave one of them out")
    if cfg.teacher and (cfg.bench or not cfg.continue_):
        raise BadInput("--teacher goes on from a clip: give --continue CLIP, and no --bench")
    # what would be found out after the work
    if cfg.save_state and Path(cfg.save_state).is_dir():
        raise BadInput(f"--save-state {cfg.save_state} is a folder: give a file")
    check_writable(Path(cfg.save_state).parent)
    if not cfg.bench:
        check_writable(cfg.out)
        find_ffmpeg()


def read_switches(prompt, end):
    """
    'a | 20: b' -> {0: 'a', 27: 'b'}: which text holds from which chunk on; a bar of the text is written \\|.
    end  of the video in seconds
    """
    switches = {}
    before = -1
    for part in re.split(r"(?<!\\)\|", f"0: {prompt}"):
        second, _, text = part.partition(":")
        try:
            second = float(second)
        except ValueError:
            raise BadInput("cannot read a prompt switch: write 'a text | 20: the text from 20 s on', "
                           f"or \\| for a bar, not {part!r}") from None
        if not before < second < end:
            raise BadInput(f"the prompt switches must come one after another, before the end at {end:g} s")
        text = text.replace("\\|", "|").strip()
        check_prompt(text)
        switches[chunks_of(second * FPS) if second else 0] = text
        before = second
    return switches


def read_all_switches(cfg):
    """The options -> prompts, of which some may stand there twice, and {prompt: its switches}"""
    # a video whose state is saved may go on to a later switch
    read = partial(read_switches, end=float("inf") if cfg.save_state else cfg.seconds)
    prompts = read_prompts(cfg.prompts, read) if cfg.prompts else [cfg.prompt]
    return prompts, {prompt: read(prompt) for prompt in prompts}


def warn_of_grammar(texts):
    """The tiny text encoder has read nothing but the small world's captions."""
    if strange := [text for text in texts if not re.fullmatch(GRAMMAR, text)]:
        print(f"warning: the tiny model knows captions such as {Config.prompt!r} (GRAMMAR in world.py), so "
              f"anything may come of {strange[0][:60]!r}", file=sys.stderr)


# ---- a video that goes on later ---------------------------------------------------------------------------

def load_state(cfg, device):
    """What --resume names -> Video.state_dict(), hash of its networks; its options go into cfg."""
    state, _ = read_file(cfg.resume, device)
    if "options" not in state:
        raise BadInput(f"{cfg.resume} is not a state: give a file that --save-state wrote")
    check_schema(cfg.resume, state, STATE)
    done = state["video"]["frames"]
    if frames_in(cfg.seconds) <= done:
        raise BadInput(f"{cfg.resume} is {done / FPS:g} s long already: give --seconds above that")
    # a file may hold anything: only these options count, and they are read as the command line is
    options = {name: state["options"].get(name) for name in SAVED_OPTIONS}
    try:
        saved = parse(Config, [f"--{name}={value}" for name, value in options.items() if value is not None])
        check_options(saved)
    except BadInput as error:
        raise BadInput(f"{cfg.resume} is damaged: {error}") from None
    # an option that says something else than the state is refused, but for weights that were moved
    for name in SAVED_OPTIONS:
        given, value = getattr(cfg, name), getattr(saved, name)
        if given == getattr(Config, name):
            setattr(cfg, name, value)
        elif given != value and name not in ("ckpt", "lora", "wan"):
            raise BadInput(f"{cfg.resume} was made with --{name} {value}: leave that option out")
    return state["video"], state["model"]


def save_state(cfg, video, model):
    """The video under way, with the options that make it and the hash of its networks"""
    state = {"options": {name: getattr(cfg, name) for name in SAVED_OPTIONS}, "model": model}
    state["video"] = video.state_dict()
    with whole_or_absent(cfg.save_state) as part:
        try:
            torch.save(state, part)
        # torch does not say why it could not write
        except RuntimeError:
            raise OSError("is the disk full?") from None


def hash_networks(networks):
    """sha256 of all weights that make frames of latents and text features"""
    digest = hashlib.sha256()
    for tensor in chain(networks.dit.state_dict().values(), networks.vae.state_dict().values()):
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(cfg, networks, dtype, done):
    """What a picture depends on beside prompt, seed and weights"""
    return {
        **{name: getattr(cfg, name) for name in ("seconds", "memory", "positions", "teacher")},
        "tau": networks.policy.tau,
        "steps": networks.sampler.steps,
        "size": f"{networks.width}x{networks.height}",
        "vae": type(networks.vae).__name__,
        "dtype": str(dtype),
        "continue": hash_file(cfg.continue_) if cfg.continue_ else "",
        "from": done,
    }


def name_video(cfg, record, manifest, taken):
    """
    Where a video goes: its prompt's letters, of every script, its seed, eight digits of all that makes it. A
    number is added where a file stands that is not the same video: one of other content, or of this run.
    """
    # letters, numbers and marks, as far as names of files can have them here
    prompt = unicodedata.normalize("NFC", record["prompt"].lower())
    spaced = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in prompt)
    code = sys.getfilesystemencoding()
    name = "-".join(spaced.split()).encode(code, "ignore")[:120].decode(code, "ignore") or "video"
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    done = f"-from-{record['options']['from']}" if record["options"]["from"] else ""
    stem = f"{name}-{record['seed']}{done}-{key}"
    for number in count(1):
        path = Path(cfg.out, f"{stem}-{number}.mp4" if number > 1 else f"{stem}.mp4")
        is_free = cfg.overwrite or not (path.exists() or path.with_suffix(".png").is_dir())
        # the same video may be there, but one that may be stopped half-way does not take its place
        if path.is_file() and not cfg.save_state:
            made = manifest.get(path.name, {})
            is_free |= made.items() >= record.items() and made["sha256"] == hash_file(path)
        if is_free and path not in taken:
            taken.add(path)
            return path


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
        if len(frames) and self.frames / total * THUMBNAILS >= len(self.thumbnails):
            self.thumbnails[self.frames / FPS] = frames[0].clone()
        room = total - self.frames
        self.surplus = frames[room:].clone()
        for frame in frames[:room]:
            file.append_data(frame.cpu().numpy())
            bar.update()
            self.frames += 1


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


def encode_clip(cfg, networks, frames, device):
    """The end of the clip that --continue names, which has fewer frames -> latents (1, 3m, c, h, w)"""
    clip = torch.from_numpy(read_clip(cfg.continue_, networks.width, networks.height, frames))
    return networks.vae.encode(clip.movedim(-1, -3)[None].to(device) / 127.5 - 1).float()


def render_video(cfg, networks, switches, seed, history, saved, stop, file, bar):
    """
    One video, from its first frame, a clip or a saved state to its last.
    switches  chunk -> the text that holds from there on
    history   None, or the latents (1, 3m, c, h, w) of the clip to go on from
    saved     None, or Video.state_dict() of the one to go on with
    file      of video_writer()
    returns   Video
    """
    total = frames_in(cfg.seconds)
    # 1. the rollout: from nothing, or where a saved one stopped
    begun = 0 if history is None else history.shape[1] // CHUNK
    if saved is not None:
        begun = saved["rollout"]["chunk"]
    texts = {chunk: networks.text(text) for chunk, text in switches.items()}
    rollout = networks.rollout(text_at(texts, max(0, begun - 1)))
    if saved is not None:
        rollout.load_state_dict(saved["rollout"])
    video = Video(**{**(saved or {}), "rollout": rollout})
    # 2. latents, a chunk at a time; those of a clip come first
    left = chunks_of(total) - begun
    if cfg.teacher:
        chunks = islice(extend_with_teacher(networks, texts, history, rollout.grid, seed), left)
    else:
        uncond = networks.text("") if networks.sampler.guidance != 1 else None
        del texts[0]  # the rollout has it
        chunks = generate(rollout, [seed], left, networks.sampler, networks.latent, uncond, history, texts)
    if history is not None:
        chunks = chain(history.split(CHUNK, dim=1), chunks)

    def until_signal():
        for x0 in chunks:
            yield x0
            if stop.code and rollout.chunk:
                return
    # 3. decode and write them one after another
    video.write(video.surplus, total, file, bar)
    for frames, is_finite, video.past in decode_beside(networks.vae, until_signal(), video.past):
        if not is_finite:
            raise BadInput(f"the chunk at {video.frames / FPS:g} s is not finite (NaN or infinity): "
                           f"are these weights of {networks.name} damaged, or too large for --dtype?")
        video.write(frames, total, file, bar)
    return video


@torch.no_grad()
def main():
    started = time.time()
    # 1. what is asked for
    cfg = parse(Config)
    device = pick_device(cfg.device)
    check(cfg)
    saved, done = None, 0
    if cfg.resume:
        saved, model_of_saved = load_state(cfg, device)
        check(cfg)
        done = saved["frames"]
    prompts, switches = read_all_switches(cfg)
    texts = sorted({text for by_chunk in switches.values() for text in by_chunk.values()})
    if not cfg.wan:
        use_one_thread()
        warn_of_grammar(texts)
    # 2. precision: weights of the raw folder are converted, the tiny ones autocast
    bf16 = cfg.dtype == "bf16" if cfg.dtype else device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cfg.wan)
    with autocast, fast_attention(device), StopSignals() as stop:
        # 3. networks
        networks = load_networks(cfg, "teacher" if cfg.teacher else STUDENT, texts, device, dtype)
        frames, videos = frames_in(cfg.seconds), len(prompts) * cfg.seeds
        print(f"{videos} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {networks.name}, "
              f"{networks.sampler.steps} steps, memory {cfg.memory}")
        if cfg.wan:
            print(f"estimate: {memory_estimate(networks) / 1e9:.1f} GB at most")
        if cfg.bench:
            return bench(networks, texts[0])
        model = hash_networks(networks)
        if saved and model != model_of_saved:
            raise BadInput(f"{cfg.resume} was made with other weights than {networks.name}, or with another "
                           "autoencoder or --dtype: give its own by --ckpt or --wan")
        # 4. the clip to go on from
        history = encode_clip(cfg, networks, frames, device) if cfg.continue_ else None
        # 5. the videos; the bar is delayed, so that no error is told behind it
        stop.patient = bool(cfg.save_state)
        about = {"options": describe(cfg, networks, dtype, done), "model": model}
        manifest, taken = read_manifest(cfg.out), set()
        with tqdm(total=frames * videos, initial=done, unit=" frames", delay=.01) as bar:
            for prompt, seed in product(prompts, range(cfg.seed, cfg.seed + cfg.seeds)):
                record = {"prompt": prompt, "seed": seed, **about}
                path = name_video(cfg, record, manifest, taken)
                comment = {"AI-generated": True, "prompt": prompt, "seed": seed, "model": networks.name}
                with video_writer(path, json.dumps(comment), networks.scale) as file:
                    video = render_video(cfg, networks, switches[prompt], seed, history, saved,
                                         stop, file, bar)
                made = {"frames": video.frames - done, "sha256": hash_file(path)}
                add_to_manifest(cfg.out, {"file": path.name, **record, **made})
                bar.write(f"wrote {path}")
                # 6. the state, and what the memory holds now
                if cfg.save_state:
                    save_state(cfg, video, model)
                    bar.write(f"saved {cfg.save_state} at {video.frames / FPS:g} s")
                if not cfg.teacher:
                    picture = path.with_suffix(".png")
                    memory_picture(picture, video.thumbnails, video.rollout, networks.vae, prompt)
    if stop.code:
        sys.exit(stop.code)
    wall, made = time.time() - started, frames * videos - done
    print(f"{made} frames in {wall:.1f} s: {made / wall:.0f} frames/s, {peak_memory(device)}")


if __name__ == "__main__":
    run(main)
