"""
Makes videos: prompt -> mp4, and a picture of what the model remembered.

    python sample.py --seconds 60
    python sample.py --prompt "Sand. The camera turns left, one turn in 20 seconds. | 20: Snow. The camera turns left, ..."
    python sample.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt --prompt "A calm sea at dawn." --vae tae

Chunks of 12 frames are generated, decoded and written one after another, so a long video needs no more memory than a short
one. Beside each mp4 lies its memory picture: frames over time, how surprising each chunk was and which were kept, and what
sink, slow and fast memory hold at the end.

References: Context Forcing, arXiv 2602.06028. Leaves out so far: sampling with the teacher; more than one device.
"""
import json
import math
import os
import re
import resource
import signal
import sys
import time
import unicodedata
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from config import BadInput, one_of, parse, pick_device, run
from flow import Rollout, Sampler, generate
from memory import CHUNK, PRESETS, size
from model import DiT, DiTConfig, dit_config, flops, load, read_public, take
from rope import MAX_POSITION
from text import TextConfig, TextEncoder, bytes_to_ids, encode_prompts
from vae import TAE, TAEConfig, WanVAE, WanVAEConfig, public_vae

WEIGHTS = Path(__file__).parent / "weights"
FPS = 16
DIT, T5, TOKENIZER = "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"
VAES = {"wan": "Wan2.1_VAE.pth", "tae": "taew2_1.pth"}
PEAK = 790e12  # FLOP/s that a large bf16 matrix product reaches on an H100: what --bench measures a GPU against


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
    wan: str = ""              # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS (default: the shipped tiny models)
    size: str = ""             # with --wan: WIDTHxHEIGHT in pixels (default 832x480; random on the cpu 192x128)
    vae: str = ""              # with --wan: wan | tae, which is faster (default wan)
    continue_: str = ""        # a video file to go on from; --seconds counts from its first frame
    save_state: str = ""       # file for the state after the last whole chunk, at the end, on Ctrl-C and on SIGTERM
    resume: str = ""           # such a file to go on from, up to --seconds
    compile: bool = False      # torch.compile from the moment that memory is full
    bench: bool = False        # measure speed and memory, write no video
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
    one_of("--vae", cfg.vae or "tae", VAES)
    if not cfg.wan and (cfg.size or cfg.vae == "wan"):
        raise BadInput("--size and --vae wan need --wan: the tiny model has one size and one autoencoder")
    if cfg.save_state + cfg.resume and (cfg.prompts or cfg.seeds > 1 or cfg.bench) or cfg.resume and cfg.continue_:
        raise BadInput("--save-state and --resume are for one video: leave out --prompts, --seeds, --bench and --continue")
    if cfg.prompts:
        try:
            prompts = [p for p in map(str.strip, Path(cfg.prompts).read_text(encoding="utf-8").splitlines()) if p]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read --prompts {cfg.prompts}: {error}") from None
    if not prompts:
        raise BadInput("the prompt is empty: give --prompt TEXT, or leave it out for the default one")
    told = bool(cfg.wan)
    for p in prompts:
        # a saved video may go on to a later switch
        for _, text in segments(p, math.inf if cfg.save_state else cfg.seconds):
            if not told and world.parse_caption(text) is None:
                print(f"warning: outside the small world's grammar, so anything may come: {text[:60]!r}; it is "
                      f"{world.GRAMMAR}", file=sys.stderr)
                told = True
    return prompts


def segments(prompt, end=math.inf):
    """'a | 20: b' -> [(0.0, 'a'), (20.0, 'b')]: which text holds from which second on"""
    if len(prompt) > 4000:
        raise BadInput(f"a prompt of {len(prompt)} characters: 4000 are the most, and 512 tokens hold about 2000")
    for c in prompt:
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r":
            raise BadInput(f"the prompt holds U+{ord(c):04X}, which is no text: remove it")
    first, *later = prompt.split("|")
    found = [(0.0, first.strip())]
    for part in later:
        at, _, text = part.partition(":")
        try:
            found.append((float(at), text.strip()))
        except ValueError:
            raise BadInput(f"cannot read the prompt switch {part.strip()[:40]!r}: write 'a text | 20: the text from 20 s "
                           "on'") from None
    if not all(text for _, text in found):
        raise BadInput("the prompt is empty: give --prompt TEXT, or leave it out for the default one")
    times = [at for at, _ in found] + [end]
    if not all(a < b for a, b in zip(times, times[1:])):
        raise BadInput(f"prompt switches must come one after another, before the end at {end:g} s: {prompt[:60]!r}")
    return found


def chunk_at(second):
    """The first chunk that begins at this second or later."""
    return math.ceil((round(second * FPS, 6) + 3) / 12) if second else 0


def frames_in(seconds):
    return max(1, round(seconds * FPS))


def chunks_of(frames):
    """Chunks of 3 latents that hold so many frames; the first latent is one frame, the others four."""
    return math.ceil((math.ceil((frames - 1) / 4) + 1) / CHUNK)


class Mp4:
    """One video file under way: raw frames into ffmpeg, whole or absent. Raises BadInput where it cannot be written."""
    def __init__(self, path, frames, comment, width, height, scale):
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
        self.pipe = imageio_ffmpeg.write_frames(
            str(self.part), (width, height), fps=FPS, codec="libx264", quality=None, macro_block_size=1,
            output_params=["-crf", "16", "-preset", "veryfast", "-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor",
                           "-metadata", f"comment={comment}"])
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
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


class Decoder:
    """
    Latents to uint8 frames (b, f, h, w, 3) on the host. On cuda it works on a stream of its own, beside the next chunk, so
    that frames come out one chunk late. vae None: waits for the latents and hands them out, for timing.
    """
    def __init__(self, vae, device):
        self.vae, self.past, self.side = vae, None, torch.cuda.Stream() if vae and device.type == "cuda" else None

    def decode(self, z):
        past, self.past = self.past, None  # WanVAE's is used up
        video, self.past = self.vae.decode(z, past)
        return to_uint8(video)

    def frames(self, chunks):
        late = []
        for z in chunks:
            if self.side is None:
                yield (self.decode(z) if self.vae else z).cpu().numpy()
                continue
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                z.record_stream(self.side)
                late.append((self.decode(z).to("cpu", non_blocking=True), self.side.record_event()))  # .to() pins its copy
            yield from self.arrived(late, 1)
        yield from self.arrived(late, 0)

    def arrived(self, late, under_way):
        while len(late) > under_way:
            frames, event = late.pop(0)
            event.synchronize()
            yield frames.numpy()


def read_clip(path, width, height, most):
    """A video file's frames at 16 a second, scaled and cropped to (f, height, width, 3) uint8; of its end, f = 12 m - 3."""
    import imageio_ffmpeg
    fit = f"fps={FPS},scale={width}:{height}:force_original_aspect_ratio=increase:flags=area,crop={width}:{height}"
    try:
        source = imageio_ffmpeg.read_frames(str(Path(path).resolve(strict=True)), output_params=["-vf", fit])
        next(source)
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame, _ in zip(source, range(most + 1))]
        source.close()
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise BadInput(f"cannot read the clip {path} ({str(error).strip().splitlines()[-1][:100]})") from None
    if len(frames) < 9 or len(frames) >= most:
        count = f"more than {most}" if len(frames) > most else len(frames)
        raise BadInput(f"the clip {path} has {count} frames at 16 a second: 9 or more are needed, fewer than --seconds gives")
    return np.stack(frames[(len(frames) + 3) % 12:])


def memory_picture(path, shots, roll, tae, prompt, b):
    """shots: list of (second, (h, w, 3) uint8); roll: the finished Rollout; b: which of its videos"""
    from PIL import Image, ImageDraw
    memory, policy = roll.memory, roll.memory.policy
    sims, keeps = (torch.stack(z)[:, b].tolist() for z in (roll.sims, roll.keeps))
    h, gap, left = world.HEIGHT * 2, 4, 70
    w = h * shots[0][1].shape[1] // shots[0][1].shape[0]
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
        views = [tae.decode(z[None, None])[0][0, -1] for z in held[1][b]]  # every latent alone, as the first of a video
    for i, (part, src, view) in enumerate(zip(parts, held[0][b].tolist(), to_uint8(torch.stack(views)).cpu().numpy())):
        x, y = left + i % columns * (w + gap), top + i // columns * (h + 26)
        thumb(view, x, y)
        colour = {"sink": (0, 120, 60), "slow": (200, 60, 40), "fast": (90, 90, 90)}[part]
        pen.text((x, y + h + 2), f"{part} {max(0, 4 * src - 3) / FPS:.1f} s", colour)
    page.save(path)


# ---- models ------------------------------------------------------------------------------------------------------------

@dataclass
class Models:
    dit: DiT
    vaes: dict         # name -> autoencoder; the first is the one to use
    features: object   # list of texts -> (b, m, text_dim)
    sampler: Sampler
    name: str          # of the weights
    width: int = world.WIDTH  # of the video, in pixels
    height: int = world.HEIGHT
    scale: int = 8     # each pixel becomes a square of so many in the file


def tiny_models(cfg, device):
    ckpt = cfg.ckpt or WEIGHTS / "init_ar.safetensors"
    dit, facts = load(ckpt, DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    dit, encoder, tae = dit.to(device), encoder.to(device), tae.to(device, memory_format=torch.channels_last)

    def features(texts):
        return encoder(*(z.to(device) for z in bytes_to_ids(texts, dit.config.text_len)))
    return Models(dit, {"tae": tae}, features, Sampler(**facts["sampler"]), Path(ckpt).name)


def numbers(name, text):
    try:
        a, b = map(int, text.split("x"))
        return a, b
    except ValueError:
        raise BadInput(f"{name} {text!r} must be two whole numbers with an x between, as 832x480") from None


def wan_models(cfg, texts, device, dtype):
    """The raw Wan directory, or random weights of its form; the text encoder has come and gone before the rest is read."""
    random, _, form = cfg.wan.partition(":")
    small, config, facts, kinds = random == "random" and device.type == "cpu", DiTConfig(), {}, [cfg.vae or "wan"]
    width, height = numbers("--size", cfg.size or ("192x128" if small else "832x480"))
    if width % 16 or height % 16 or min(width, height) < 16:
        raise BadInput(f"--size {width}x{height}: both must be multiples of 16")
    if random == "random":
        dim, layers = numbers("--wan random:", form or ("512x8" if small else "1536x30"))
        if min(dim, layers) < 1 or dim % (128 if dim > 128 else 16):
            raise BadInput(f"--wan random:{dim}x{layers}: dim must be a multiple of 128, or of 16 below that")
        config, w = DiTConfig(dim, dim * 35 // 6, max(1, dim // 128), layers), 96 if dim >= 1536 else max(4, dim // 64)
        folder, ckpt, kinds = Path("random"), Path("random weights"), kinds + [k for k in VAES if cfg.bench and k not in kinds]
        with torch.device("meta"):
            nets = {DIT: DiT(config), "wan": WanVAE(WanVAEConfig(w)),
                    "tae": TAE(TAEConfig(w * 2 // 3, tuple(w * i // 3 for i in (8, 4, 2, 2))))}
        torch.manual_seed(0)
        states = {k: {name: torch.randn(z.shape, device=device) * .02 for name, z in nets[k].state_dict().items()}
                  for k in (DIT, *kinds)}
        known = {t: torch.zeros(1, config.text_dim) for t in texts}
    else:
        folder, ckpt = Path(cfg.wan), Path(cfg.ckpt or Path(cfg.wan) / DIT)
        kinds += [k for k in VAES if cfg.bench and k not in kinds and (folder / VAES[k]).exists()]
        lacks = [f for f in [DIT] * (not cfg.ckpt) + [T5, TOKENIZER] + [VAES[k] for k in kinds] if not (folder / f).is_file()]
        get = [f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {folder}"] * bool(set(lacks) - {VAES["tae"]})
        if VAES["tae"] in lacks:
            get.append(f"curl -L -o {folder / VAES['tae']} https://github.com/madebyollin/taehv/raw/main/taew2_1.pth")
        if lacks:
            raise BadInput(f"{folder} lacks {', '.join(lacks)}: {' && '.join(get)}")
        if not cfg.ckpt:
            print("warning: without --ckpt this is the base model, not trained to run causally in 4 steps", file=sys.stderr)
        state, facts = read_public(ckpt)
        config = dit_config(state, folder, ckpt)
        texts = texts + [""] * (Sampler(**facts.get("sampler", {})).guidance != 1)
        roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 20e9
        known = encode_prompts(texts, folder / T5, folder / TOKENIZER, Path(cfg.out) / "text",
                               device if roomy else torch.device("cpu"), config.text_len)
        torch.cuda.empty_cache()
        states = {DIT: state, **{k: read_public(folder / VAES[k])[0] for k in kinds}}
        with torch.device("meta"):
            nets = {DIT: DiT(config), **{k: public_vae(k, states[k], folder / VAES[k]) for k in kinds}}
    dit, *vaes = (take(nets[k], states.pop(k), ckpt if k == DIT else folder / VAES[k], device, dtype) for k in (DIT, *kinds))

    def features(texts):
        return pad_sequence([known[t] for t in texts], batch_first=True).to(device)
    return Models(dit, dict(zip(kinds, vaes)), features, Sampler(**facts.get("sampler", {})), ckpt.name, width, height, 1)


def estimate(m, policy, b):
    """Bytes on the device: weights, what the memory holds and its rotated keys, one pass, decoding."""
    c, size = m.dit.config, m.dit.blocks[0].ffn[0].weight.element_size()
    tokens, held = m.width * m.height // 256 * b, policy.sink + policy.slow + policy.fast
    pixels, wide = m.width * m.height * b * size, next(iter(m.vaes.values()))
    weights = sum(p.numel() * p.element_size() for net in (m.dit, wide) for p in net.parameters())
    # decoding: at full resolution Wan's VAE remembers 2 frames before each of 7 convolutions, as much again at the coarser
    # ones, and works on about 10 feature maps of a frame; the TAE on about 4 of 12 frames
    decoding = pixels * (wide.config.dim * (2 * 14 + 10) if isinstance(wide, WanVAE) else wide.config.decoder[-1] * 4 * 12)
    return {"weights": weights, "memory": c.layers * c.dim * size * (tokens * (3 * held - 3) + 2 * c.text_len * b),
            "pass": tokens * (3 * (c.ffn_dim * size + 16 * c.dim * 4) + 2 * held * c.dim * size), "decoding": decoding}


def peak():
    """Most host memory used so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def peak_line(device):
    return f"peak memory {peak():.2f} GiB" + (
        f", on the device {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if device.type == "cuda" else "")


# ---- measuring -----------------------------------------------------------------------------------------------------------

def bench(cfg, m, policy, device, dtype, compiled):
    """One table: frames a second with nothing, with each autoencoder; first frame; memory; share of what the FLOPs allow."""
    chunks, steps, c = chunks_of(frames_in(cfg.seconds)), m.sampler.steps, m.dit.config
    if chunks < 16:
        raise BadInput("--bench needs --seconds 12 or more: the first 10 chunks fill the memory")
    work = (steps + 1) * flops(c, m.height // 8, m.width // 8, policy.sink + policy.slow + policy.fast - CHUNK)
    rate, how = PEAK, "790 TFLOP/s, an H100's large bf16 product"
    if device.type != "cuda":
        x, spent = torch.randn(2048, 2048, device=device, dtype=dtype), [time.perf_counter()]
        for _ in range(5):
            x @ x
            spent.append(time.perf_counter())
        rate = 2 * 2048 ** 3 / min(b - a for a, b in zip(spent, spent[1:]))
        how = f"{rate / 1e12:.3f} TFLOP/s, a product of 2048 x 2048 matrices here"
    print(f"a chunk: {work / 1e12:.4f} TFLOP in {steps + 1} passes, so at most {12 * rate / work:.1f} frames/s at {how}\n"
          f"{'':16}{'frames/s':>9} {'share':>6} {'first frame':>12} {'chunk 10-14':>12} {'last 5':>8} {'GiB at chunk 10':>16} "
          f"{'at the end':>11}")
    latent = (c.channels, m.height // 8, m.width // 8)
    grid, text = (latent[1] // c.patch[0], latent[2] // c.patch[1]), m.dit.text(m.features([segments(cfg.prompt)[0][1]]))
    for name, vae in {"DiT only": None, **{f"with {k}": v for k, v in m.vaes.items()}}.items():
        for n in (2 if compiled is None else 9, chunks):  # the first time to warm up
            roll = Rollout(m.dit, text, policy, grid, cfg.positions, m.sampler.pool, compiled)
            at, used = [time.perf_counter()], []
            for _ in Decoder(vae, device).frames(generate(roll, [cfg.seed], n, m.sampler, latent)):
                at.append(time.perf_counter())
                used.append(torch.cuda.memory_allocated() / 2 ** 30 if device.type == "cuda" else peak())
        each = [b - a for a, b in zip(at, at[1:])]
        fps = 12 / median(each[10:])
        print(f"{name:16}{fps:9.2f} {fps * work / 12 / rate:6.1%} {each[0]:10.2f} s {median(each[10:15]):10.3f} s "
              f"{median(each[-5:]):6.3f} s {used[10]:16.2f} {used[-1]:11.2f}", flush=True)
    print(peak_line(device))


# ---- stop and go on ------------------------------------------------------------------------------------------------------

# options that make a video, and what of its rollout and memory goes on
KEPT = ("prompt", "seed", "memory", "positions", "tau", "steps", "ckpt", "wan", "size", "vae", "dtype")
ROLL, MEMORY = ("chunk", "before", "sims", "keeps"), ("sink", "slow", "fast", "marks", "full")


def save_state(path, cfg, roll, decoder, spare, shots):
    """All that going on needs, written whole. Noise is keyed by (seed, chunk, step), so the chunk is the random state."""
    torch.save({"options": {k: v for k, v in asdict(cfg).items() if k in KEPT}, "roll": {k: vars(roll)[k] for k in ROLL},
                "memory": {k: vars(roll.memory)[k] for k in MEMORY}, "past": list(decoder.past),
                "spare": torch.from_numpy(spare), "shots": [(second, torch.from_numpy(frame)) for second, frame in shots]}, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_state(cfg, device):
    """-> cfg with the options of the saved video, the state"""
    try:
        state = torch.load(cfg.resume, map_location=device, weights_only=True)
        options, default = state["options"], asdict(Config())
    except FileNotFoundError:
        raise BadInput(f"no state at {cfg.resume}: check the path") from None
    except Exception as error:  # torch.load raises whatever the damage makes it meet
        why = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise BadInput(f"cannot read the state {cfg.resume} ({why})") from None
    for name, value in asdict(cfg).items():
        if name in KEPT and value not in (default[name], options[name]):
            raise BadInput(f"{cfg.resume} was made with --{name} {options[name]}, not {value}: leave the option out")
    return replace(cfg, **options), state


# ---- videos --------------------------------------------------------------------------------------------------------------

def main():
    cfg, state = parse(Config), None
    device = pick_device(cfg.device)
    if cfg.resume:
        cfg, state = load_state(cfg, device)
    prompts = check(cfg)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    started, frames = time.time(), frames_in(cfg.seconds)
    done = 12 * state["roll"]["chunk"] - 3 - state["spare"].shape[1] if state else 0  # frames in the first part's file
    if state and frames <= done:
        raise BadInput(f"{cfg.resume} is {done / FPS:g} s long already: give --seconds above that")
    if cfg.save_state:
        try:
            Path(cfg.save_state).parent.mkdir(parents=True, exist_ok=True)
            Path(f"{cfg.save_state}.part").touch()
            Path(f"{cfg.save_state}.part").unlink()
        except OSError as error:
            raise BadInput(f"cannot write to {cfg.save_state}: {error.strerror}") from None
    texts = sorted({text for p in prompts for _, text in segments(p)})
    m = wan_models(cfg, texts, device, dtype) if cfg.wan else tiny_models(cfg, device)
    m.sampler = replace(m.sampler, steps=cfg.steps or m.sampler.steps, tau=m.sampler.tau if cfg.tau is None else cfg.tau)
    policy = replace(PRESETS[cfg.memory], tau=m.sampler.tau)
    compiled = torch.compile(m.dit, dynamic=False) if cfg.compile else None
    jobs = [(p, cfg.seed + k) for p in prompts for k in range(cfg.seeds)]
    names = []  # a prompt given twice, or two alike in their first 120 letters, must not share a file
    for p, seed in jobs:
        name = f"{re.sub(r'[^a-z0-9]+', '-', p.lower()).strip('-')[:120] or 'video'}-{seed}{f'-from-{done}' if done else ''}"
        names.append(name if name not in names else f"{name}-{len(names)}")
    print(f"{len(jobs)} video(s) of {cfg.seconds:g} s, seed {cfg.seed}, model {m.name}, {m.sampler.steps} steps, "
          f"memory {cfg.memory}")
    together = 8 if not cfg.wan else 1  # videos side by side
    if cfg.wan:
        needs = estimate(m, policy, together)
        print(f"estimate: {sum(needs.values()) / 2 ** 30:.2f} GiB on {device.type} (" + ", ".join(
            f"{k} {v / 2 ** 30:.2f}" for k, v in needs.items()) + ")")
    loaded, first, files, bar, stop, made = time.time(), None, [], None, [], 0

    def interrupted(number, frame):
        if not cfg.save_state or stop:
            sys.exit(128 + number)
        stop.append(number)  # the chunk under way is finished first; a second signal does not wait
    for number in (signal.SIGTERM, *([signal.SIGINT] if cfg.save_state else [])):
        signal.signal(number, interrupted)
    cudnn_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with (torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16 and not cfg.wan),
          sdpa_kernel(cudnn_first, set_priority=True) if device.type == "cuda" else nullcontext()):
        if cfg.bench:
            return bench(cfg, m, policy, device, dtype, compiled)
        vae, history, given = next(iter(m.vaes.values())), None, 0
        if cfg.continue_:
            clip = torch.from_numpy(read_clip(cfg.continue_, m.width, m.height, frames)).movedim(-1, -3)
            history = vae.encode(clip[None].to(device) / 127.5 - 1).float()
            given = history.shape[1] // CHUNK
        try:
            while jobs:
                parts = [segments(p) for p, _ in jobs[:together]]
                turns = [chunk_at(second) for second, _ in parts[0]]
                alike = next((i for i, s in enumerate(parts) if [chunk_at(second) for second, _ in s] != turns), len(parts))
                part, part_names, jobs, names = jobs[:alike], names[:alike], jobs[alike:], names[alike:]
                if any(0 < turn < given for turn in turns):
                    raise BadInput(f"the prompt switches inside the clip, its first {given * .75:g} s: {part[0][0][:60]!r}")
                about = [{"AI-generated": True, "prompt": p, "seed": s, "model": m.name} for p, s in part]
                files = [Mp4(Path(cfg.out) / f"{n}.mp4", frames - done, json.dumps(a), m.width, m.height, m.scale)
                         for n, a in zip(part_names, about)]
                bar = bar if bar is not None else tqdm(
                    total=frames / FPS * (len(part) + len(jobs)), initial=done / FPS,
                    bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s of video [{elapsed}<{remaining}{postfix}]")
                p, q = m.dit.config.patch
                latent = (m.dit.config.channels, m.height // 8, m.width // 8)
                texts = {turn: m.dit.text(m.features([s[i][1] for s in parts[:alike]])) for i, turn in enumerate(turns)}
                empty = m.dit.text(m.features([""] * len(part))) if m.sampler.guidance != 1 else None
                grid = latent[1] // p, latent[2] // q
                roll = Rollout(m.dit, texts.pop(0), policy, grid, cfg.positions, m.sampler.pool, compiled)
                decoder, shots, made, source = Decoder(vae, device), [[] for _ in part], done, ()
                if state:
                    vars(roll).update(state["roll"])
                    vars(roll.memory).update(state["memory"])
                    decoder.past, source = state["past"], [state["spare"].cpu().numpy()] * (state["spare"].numel() > 0)
                    shots = [[(second, frame.cpu().numpy()) for second, frame in state["shots"]]]
                    roll.text = texts.get(max((turn for turn in texts if turn < roll.chunk), default=None), roll.text)
                past = history if history is None else history.expand(len(part), -1, -1, -1, -1)

                def chunks():
                    count = chunks_of(frames) - max(given, roll.chunk)
                    todo = generate(roll, [s for _, s in part], count, m.sampler, latent, empty, past, texts)
                    for z in chain(() if past is None else past.split(CHUNK, dim=1), todo):
                        yield z
                        if stop and roll.chunk:
                            return
                for clips in chain(source, decoder.frames(chunks())):
                    for file, clip, shot in zip(files, clips, shots):
                        file.write(clip)
                        if made / frames * 12 >= len(shot):
                            shot.append((made / FPS, clip[0].copy()))
                    first = first or time.time() - loaded
                    bar.update(max(0, min(clips.shape[1], frames - made)) / FPS * len(part))
                    made += clips.shape[1]
                    bar.set_postfix_str(f"{(bar.n - bar.initial) * FPS / (time.time() - started):.0f} frames/s")
                for i, (file, (prompt, _)) in enumerate(zip(files, part)):
                    file.close()
                    memory_picture(file.path.with_suffix(".png"), shots[i], roll, vae, prompt, i)
                    bar.write(f"wrote {file.path} and {file.path.with_suffix('.png').name}")
                if cfg.save_state:
                    save_state(cfg.save_state, cfg, roll, decoder, clips[:, clips.shape[1] - max(0, made - frames):], shots[0])
                    bar.write(f"saved {cfg.save_state} at {min(made, frames) / FPS:g} s: --resume {cfg.save_state} goes on")
                files = []
                if stop:
                    sys.exit(128 + stop[0])
        finally:
            for file in files:
                file.abandon()
            if bar is not None:
                bar.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if cfg.save_state:
                Path(f"{cfg.save_state}.part").unlink(missing_ok=True)
    wall, count = time.time() - started, frames * len(prompts) * cfg.seeds - done
    print(f"{count} frames in {wall:.1f} s: {count / wall:.0f} frames/s, first frame {first:.2f} s after loading, "
          f"{peak_line(device)}")


if __name__ == "__main__":
    run(main)
