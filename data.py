"""
Training clips as latents, encoded once and kept on disk, and which past each of their chunks is trained with.

The autoencoder is frozen after its own stage, so every later stage trains on latents: clips of the small
world, or a folder of videos with captions. Both have the same three methods: frames() of some clips, text()
of their captions, and draw_history(): which chunk is predicted, and which latents a memory policy would hold
then (memory.frames_in_memory). Files are written whole, so a run that was stopped goes on where it stopped.

    python data.py             # prints what memory would hold of a clip, and where something comes back
    python data.py --videos DIR --out clips --wan Wan2.1-T2V-1.3B    # videos with .txt captions -> latents
    torchrun --nproc_per_node 8 data.py --videos DIR ...             # shared by the processes of all nodes

References: Context Forcing, arXiv 2602.06028, section 3.3 (histories of 5-20 s, selected by the memory's own
policy).
Leaves out: cutting long videos at their scene changes; what comes after 25 s of a clip.
"""
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from config import (STUDENT, BadInput, check_schema, check_writable, fast_autocast, parse,  # first
                    pick_device, run, tell)

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from checkpoint import barrier, get_processes, get_rank
from memory import CHUNK, PRESETS, frames_in_memory
from tensors import read_file, read_head, write_safetensors
from text import read_text
from video import FPS, FRAMES, find_ffmpeg, read_frames
from weights import WEIGHTS, load_tiny, load_wan
from world import WorldSpec

FULL = 7                  # chunks, 21 latents: the shortest past that a target is drawn behind
CLIPS = 768               # training clips of the small world
CHUNKS = 41               # of each: pasts of up to 40 chunks (30 s) and a target
EMPTY_CLIPS = 384         # clips that are also encoded without houses
LINGERS = 3.5             # columns: a chunk that moves less lingers; the slowest turn moves 4.4
BACK = .5                 # share of the targets whose view is one that comes back
LONGEST = 27              # folders of videos: chunks of the longest past (20 s) ...
AHEAD = 7                 # ... and of what follows it
RUN = 6                   # chunks that surprise, or do not, one after another, in the mean
LONGEST_NAME = 220        # bytes of a shard's name; most disks end at 255
ENCODE_AGAIN = "delete it and run data.py again"

KEEP_RULES = ("uniform2", "uniform1", "moving")  # of slow memory: a third of the samples each
OTHER_POLICIES = ("longlive", "longlive21", "infinity", "window")  # those of the comparison ...
OTHER = .15  # ... and their share of the samples


@dataclass
class Config:
    videos: str = ""  # folder of clips to encode, at any depth, each with its caption in a .txt beside it
    out: str = "out"  # folder for the shards, DIR of train.py --data DIR; run again to go on
    wan: str = ""     # a raw Wan2.1-T2V-1.3B folder: with its autoencoder and text encoder (default: tiny)
    size: str = ""    # with --wan: WIDTHxHEIGHT in pixels (default 832x480); smaller clips are skipped
    device: str = ""  # cuda | mps | cpu (default: the best there is)
    no_verify: bool = False  # take files as they are, without verifying their checksums


@dataclass
class History:
    """What a batch of samples has seen when it predicts a chunk."""
    clip: torch.Tensor   # (b,) numbers of the clips
    chunk: torch.Tensor  # (b,) numbers of the chunks to predict
    frame: torch.Tensor  # (b, m) frame numbers of the latents in memory then, -1 = empty


def frames_of(latents):
    """Video frames of n latents: the first latent is one frame, each later one is four."""
    return 1 + 4 * (latents - 1)


def held_frames(policy, keep, evict_first=True):
    """
    memory.frames_in_memory as one tensor.
    keep     (b, chunks) bool: which chunks become keyframes
    returns  (b, chunks, 18, or 21 before room is made) frame numbers, -1 = empty
    """
    places = 18 if evict_first else 21
    held = frames_in_memory(policy, keep[:, :-1], evict_first)
    padded = [F.pad(frame, (0, places - frame.shape[1]), value=-1) for frame in held]
    return torch.stack(padded, dim=1)


# ---- the small world: latents ------------------------------------------------------------------------------

def training_worlds(clips, seed):
    """WorldSpecs of a training run's clips; never held-out ones."""
    rng = np.random.default_rng([seed, 0xDA7A])
    return [WorldSpec(s) for s in rng.integers(world.HELD_OUT, size=clips).tolist()]


@torch.no_grad()
def encode_world(tae, spec, latents, device):
    """A WorldSpec's first frames -> latents (1, n, 16, 4, 8) float32, encoded in bf16 where that is fast."""
    video = torch.from_numpy(world.clip(spec, 0, frames_of(latents))[None])
    with fast_autocast(device):
        return tae.encode(video.to(device) * 2 - 1).float()


def fingerprint(net, about=""):
    """Eight letters that tell these weights, and whatever `about` says, from others."""
    digest = hashlib.sha256(about.encode())
    for p in net.parameters():
        digest.update(p.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def make_files(files, make, title):
    """
    Files that are made once: several processes share those that are missing.
    files    {file: what it is made from}
    make     of that -> {name: tensor}
    returns  the content of each file
    """
    mine = list(files)[get_rank()::get_processes()]
    missing = [file for file in mine if not file.exists()]
    for file in tqdm(missing, title, disable=not missing):
        write_safetensors(file, make(files[file]))
    barrier()
    return [read_file(file, remedy="delete it, and it is made again")[0] for file in files]


def latent_cache(folder, tae, worlds, latents, device):
    """The first `latents` latents of each world, (clips, latents, 16, 4, 8) bfloat16, kept in `folder`."""
    def encode(spec):
        return {"latents": encode_world(tae, spec, latents, device).bfloat16()}

    # others never meet these latents: the folder's name depends on autoencoder and worlds
    folder = Path(folder, f"clips_{fingerprint(tae, repr((worlds[0], worlds[-1], latents)))}")
    files = {folder / f"{i:05d}.safetensors": spec for i, spec in enumerate(worlds)}
    return torch.cat([clip["latents"] for clip in make_files(files, encode, "encoding clips")])


# ---- the small world: histories ----------------------------------------------------------------------------
# Headings are closed form: where the camera lingers, and what comes back, is known without a frame.

class Histories:
    """What memory would hold at each chunk of each clip, and how often that chunk is drawn as a target."""
    def __init__(self, specs, chunks=CHUNKS, evict_first=True):
        """
        specs        list of WorldSpec
        evict_first  as in memory.frames_in_memory: what a student sees, or (False) a teacher's context
        """
        # where the camera looks, in columns, unwrapped: 12 frames a chunk, the first frame of all 4 times
        frames = np.maximum(0, np.arange(FRAMES * chunks) - 3)
        worlds = [world.make_world(spec) for spec in specs]
        heading = np.stack([w.motion.heading(w.start, frames) for w in worlds])
        self.heading = torch.from_numpy(heading[:, 3::4])  # (b, latents) at the last frame of each
        heading = rearrange(heading, "b (c f) -> b c f", f=FRAMES)
        self.captions = [w.caption for w in worlds]

        # which houses are half in view or more, at each latent: (b, latents, 8) bool
        distance = torch.from_numpy(np.abs(world.offsets(self.heading.numpy())))
        self.in_view = distance < world.WIDTH / 2
        # of those in each chunk's last view, the one that was out of view longest ago: when it was so
        frame = torch.arange(CHUNK * chunks)[:, None]
        gone = torch.where(distance > world.GONE, frame, -1).cummax(1).values
        gone = F.pad(gone[:, CHUNK - 1:-1:CHUNK], (0, 0, 1, 0), value=-1)  # before each chunk
        was_gone = (gone >= 0) & self.in_view[:, CHUNK - 1::CHUNK]
        self.apart = torch.where(was_gone, gone, CHUNK * chunks).amin(2)  # (b, chunks)
        self.apart[~was_gone.any(2)] = -1

        # how far the camera moves within each chunk, and so which chunks become keyframes, by each rule
        self.moved = torch.from_numpy(np.abs(heading[:, :, -1] - heading[:, :, 0]))  # (b, chunks)
        every = torch.ones_like(self.moved, dtype=torch.bool)
        even = every & (torch.arange(chunks) % 2 == 0)
        self.keep = {"uniform2": even, "uniform1": every, "moving": even & (self.moved > LINGERS)}

        # and so what memory holds at each chunk: (b, chunks, 18 or 21) frame numbers, -1 = empty
        self.held = {}
        for name in KEEP_RULES + OTHER_POLICIES:
            policy = PRESETS["slowfast" if name in KEEP_RULES else name]
            self.held[name] = held_frames(policy, self.keep.get(name, every), evict_first)

        # where all houses in view were seen before one of them was gone, and are held: (b, chunks) bool
        self.back = {name: self.comes_back(held) for name, held in self.held.items()}

    def comes_back(self, held):
        """held (b, chunks, m) -> (b, chunks) bool"""
        clip = torch.arange(len(held))[:, None, None]
        is_before = (held >= 0) & (held <= self.apart[..., None])
        remembered = (self.in_view[clip, held] & is_before[..., None]).any(2)
        return (remembered | ~self.in_view[:, CHUNK - 1::CHUNK]).all(2)

    def draw_history(self, rng, batch, ahead=1, lookup=False):
        """
        ahead    so many chunks follow the past
        lookup   only what comes back, and in clips that are also encoded without houses
        returns  History
        """
        drawn = []
        for _ in range(batch):
            # a policy or keep rule
            other = rng.random() < OTHER and ahead == 1 and not lookup
            name = str(rng.choice(OTHER_POLICIES if other else KEEP_RULES))
            # a chunk of a clip: mostly one whose view comes back
            back = self.back[name][:EMPTY_CLIPS if lookup else None, FULL:self.moved.shape[1] - ahead + 1]
            if not lookup and rng.random() > BACK or not back.any():
                back = torch.ones_like(back)
            options = back.nonzero()
            clip, chunk = options[rng.integers(len(options))].tolist()
            drawn.append((clip, FULL + chunk, self.held[name][clip, FULL + chunk]))
        clip, chunk, frame = zip(*drawn)
        return History(torch.tensor(clip), torch.tensor(chunk), torch.stack(frame))


class Shuffled:
    """Items in random order, all of them before any returns; several processes share them out."""
    def __init__(self, items, seed):
        self.items, self.seed = items, seed
        self.taken = 0  # by all processes

    def take(self, count):
        """-> list of the next `count`; all processes must ask alike"""
        first = self.taken + get_rank() * count
        self.taken += get_processes() * count
        taken = []
        for number in range(first, first + count):
            turn, place = divmod(number, len(self.items))
            order = np.random.default_rng([self.seed, turn, 0x5FFE]).permutation(len(self.items))
            taken.append(self.items[order[place]])
        return taken

    def state_dict(self):
        return {"taken": torch.tensor(self.taken)}

    def load_state_dict(self, state):
        self.taken = int(state["taken"])


def take_frames(latents, clip, frame, device):
    """Of latents (clips, n, ...): frames (b, f) of clips (b,), as float32; -1, an empty place, gives any."""
    return latents[clip[:, None], frame.clamp(min=0)].to(device).float()


class WorldClips(Histories):
    """Clips of the small world, with histories of theirs."""
    def __init__(self, seed, cache, features, device, for_student=True):
        """
        cache        (WorldSpecs, latents) -> latents of so many frames each, as from latent_cache()
        features     captions -> (b, m, text_dim)
        for_student  also encoded without houses, and histories as a student sees them; False: a teacher's
                     contexts
        """
        specs = training_worlds(CLIPS, seed)
        super().__init__(specs, CHUNKS, evict_first=for_student)
        self.features = features
        self.device = device
        self.latents = cache(specs, CHUNKS * CHUNK)
        if for_student:
            self.empty = cache([replace(spec, empty=True) for spec in specs[:EMPTY_CLIPS]], CHUNKS * CHUNK)

    def frames(self, clip, frame):
        """Latents (b, f, c, h, w) of frames (b, f) of clips (b,)"""
        return take_frames(self.latents, clip, frame, self.device)

    def text(self, clip):
        return self.features([self.captions[c] for c in clip])


# ---- folders of videos -------------------------------------------------------------------------------------

def read_captions(folder):
    """-> {video file: the caption in the .txt beside it}; lists what has none"""
    captions = {}
    for file in sorted(Path(folder).rglob("[!.]*")):
        if file.is_dir() or file.suffix.lower() == ".txt":
            continue
        text = file.with_suffix(".txt")
        try:
            caption = read_text(text).strip()
            if not caption:
                raise BadInput(f"{text} is empty")
            captions[file] = caption
        except BadInput as reason:
            tell(f"skipped: {file}: {reason}")
    if not captions:
        raise BadInput(f"--videos {folder} holds no video with a caption in a .txt of the same name")
    return captions


def read_whole_chunks(file, width, height):
    """
    The first whole chunks of a video, 25 s at most -> (f, h, w, 3) uint8; BadInput if it is too small or
    damaged.
    """
    least = frames_of((FULL + AHEAD) * CHUNK)
    frames, clip = read_frames(file, width, height, frames_of((LONGEST + AHEAD) * CHUNK))
    if clip.damage:
        raise BadInput(f"{file} is damaged ({clip.damage})")
    if clip.width < width or clip.height < height or len(frames) < least:
        raise BadInput(f"{file}: {clip.width}x{clip.height}, {len(frames) / FPS:.1f} s; "
                       f"needed are {width}x{height}, {least / FPS:.1f} s")
    return frames[:len(frames) - (len(frames) + 3) % FRAMES]


@torch.no_grad()
def encode_videos(cfg, device):
    """A file a clip: latents (n, 16, h, w), text features (m, dim), bf16; the caption is in the metadata."""
    check_writable(cfg.out)
    find_ffmpeg()
    captions = read_captions(cfg.videos)
    # torchrun's processes share the clips
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    new = {}
    for file in list(captions)[rank::processes]:
        shard = Path(cfg.out, "clips", f"{file.relative_to(cfg.videos)}.safetensors")
        if len(os.fsencode(shard.name)) > LONGEST_NAME:
            tell(f"skipped: {file}: its name is too long")
        elif not shard.exists():
            new[file] = shard
    # the autoencoder, and text features of the captions
    if cfg.wan:
        networks = load_wan(cfg.wan, "", cfg.size, "wan", device, torch.float32, Path(cfg.out, "text"),
                            [captions[file] for file in new], verify=not cfg.no_verify)
    else:
        networks = load_tiny(WEIGHTS / f"{STUDENT}.safetensors", device)
    for file, shard in tqdm(new.items(), "encoding clips"):
        try:
            frames = read_whole_chunks(file, networks.width, networks.height)
        except BadInput as reason:
            tell(f"skipped: {reason}")
            continue
        # encode, write
        video = torch.from_numpy(frames).to(device).movedim(-1, 1)[None]
        with fast_autocast(device):
            latents = networks.vae.encode(video / 127.5 - 1)[0]
            text = networks.features([captions[file]])[0]
        tensors = {"latents": latents.bfloat16(), "text": text.bfloat16()}
        write_safetensors(shard, tensors, {"caption": captions[file]})


def keep_with_gaps(rng, chunks, has_gaps):
    """
    (chunks,) bool: every second chunk is kept; with gaps only where the video surprises, which it does for
    some seconds, and then for some seconds not.
    """
    turns = rng.random(chunks) < 1 / RUN
    surprises = (np.cumsum(turns) + rng.integers(2)) % 2 == 0
    return torch.from_numpy(surprises | (not has_gaps)) & (torch.arange(chunks) % 2 == 0)


def read_shard_head(file, latent):
    """-> caption and number of latents of a clip of encode_videos(); BadInput if they cannot be right"""
    shapes, about = read_head(file, ENCODE_AGAIN)
    caption = about.get("caption")
    n, *shape = shapes.get("latents", [0])
    if shape != list(latent):
        raise BadInput(f"{file} holds latents {shape}, needed are {list(latent)}: "
                       "see --wan and --size of data.py")
    if not isinstance(caption, str) or n < (FULL + AHEAD) * CHUNK or len(shapes.get("text", [])) != 2:
        raise BadInput(f"{file} lacks a caption, its text or latents enough (it has {n}): {ENCODE_AGAIN}")
    return caption, n


class ClipFolder:
    """What encode_videos() wrote, read when it is drawn."""
    def __init__(self, folder, latent, device, evict_first=True):
        """latent: (c, h, w) that the model takes; evict_first as for Histories"""
        self.device = device
        self.files = sorted((Path(folder) / "clips").rglob("[!.]*.safetensors"))
        if not self.files:
            raise BadInput(f"--data {folder} holds no clips that data.py encoded")
        # captions and lengths, from the heads of the files
        self.captions = []
        self.chunks = []
        for file in self.files:
            caption, latents = read_shard_head(file, latent)
            self.captions.append(caption)
            self.chunks.append(latents // CHUNK)
        self.evict_first = evict_first

    def read(self, clip, name):
        """Latents or text of one clip"""
        content, _ = read_file(self.files[clip], remedy=ENCODE_AGAIN)
        check_schema(self.files[clip], content, {name: torch.bfloat16}, fault=f"is damaged, {ENCODE_AGAIN}")
        return content[name]

    def frames(self, clip, frame):
        """Latents (b, f, c, h, w) of frames (b, f) of clips (b,); -1, an empty place, gives any."""
        rows = zip(clip, frame.clamp(min=0))
        latents = [self.read(c, "latents")[numbers] for c, numbers in rows]
        return torch.stack(latents).to(self.device).float()

    def text(self, clip):
        features = [self.read(c, "text") for c in clip]
        return pad_sequence(features, batch_first=True).to(self.device)

    def draw_history(self, rng, batch, ahead=1, lookup=False):
        """Pasts of 7 to 27 chunks, with `ahead` chunks behind them -> History"""
        clip = rng.integers(len(self.files), size=batch)
        last = [min(LONGEST, self.chunks[c] - ahead) for c in clip]
        chunk = torch.tensor([rng.integers(FULL, n + 1) for n in last])
        # for half of them every second chunk is kept, for the others surprisal leaves gaps
        keep = torch.stack([keep_with_gaps(rng, LONGEST + 1, rng.random() < .5) for _ in clip])
        held = held_frames(PRESETS["uniform2"], keep, self.evict_first)
        return History(torch.from_numpy(clip), chunk, held[torch.arange(batch), chunk])


def main():
    cfg = parse(Config)
    if cfg.size and not cfg.wan:
        raise BadInput("--size needs --wan: the tiny model has one size")
    if cfg.videos:
        return encode_videos(cfg, pick_device(cfg.device))
    # otherwise: what memory would hold at chunk 30 of a clip, and which chunks are targets more often
    histories = Histories([WorldSpec(0, "aside")])
    print(histories.captions[0])
    print("memory at chunk 30:", histories.held["moving"][0, 30].tolist())
    print("something comes back:", "".join("#" if back else "." for back in histories.back["moving"][0]))


if __name__ == "__main__":
    run(main)
