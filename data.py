"""
Training clips as latents, encoded once and kept on disk.

The autoencoder is frozen after its own stage, so every later stage trains on latents: clips of the small
world, or a folder of videos with captions. Both have the same three methods: frames() of some clips, text()
of their captions, and draw_history(), what a target has seen (histories.py). Files are written whole, so a
run that was stopped goes on where it stopped.

    python data.py --videos DIR --out clips --wan Wan2.1-T2V-1.3B    # videos with .txt captions -> latents
    torchrun --nproc_per_node 8 data.py --videos DIR ...             # shared by the processes of all nodes

Leaves out: cutting long videos at their scene changes; what comes after 25 s of a clip.
"""
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from config import (STUDENT, BadInput, check_schema, check_writable, fast_autocast, parse,  # first
                    pick_device, run, tell)

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from checkpoint import barrier, get_processes, get_rank, joined_processes
from histories import CLIP_CHUNKS, EMPTY_CLIPS, FULL_MEMORY, Histories, History, held_frames
from memory import CHUNK, PRESETS
from tensors import hash_content, read_file, read_head, write_safetensors
from text import check_prompt, read_text
from video import FPS, FRAMES, find_ffmpeg, read_frames
from weights import WEIGHTS, load_tiny, load_wan
from world import PERIODS, WorldSpec

CLIPS = 1152        # training clips of the small world ...
OPENINGS = 8192     # ... and worlds of which the first chunk alone is met, each with a caption of its own
# folders of videos
LONGEST = 27        # chunks of the longest past (20 s) ...
AHEAD = 7           # ... and of what follows it
RUN = 6             # chunks that surprise, or do not, one after another, in the mean
LONGEST_NAME = 220  # bytes of a shard's name; most disks end at 255
ENCODE_AGAIN = "delete it and run data.py again"


@dataclass
class Config:
    videos: str = ""  # folder of clips to encode, at any depth, each with its caption in a .txt beside it
    out: str = "out"  # folder for the shards, DIR of train.py --data DIR; run again to go on
    wan: str = ""     # a raw Wan2.1-T2V-1.3B folder: with its autoencoder and text encoder (default: tiny)
    size: str = ""    # with --wan: WIDTHxHEIGHT in pixels (default 832x480); smaller clips are skipped
    device: str = ""  # cuda | mps | cpu (default: the best there is)
    no_verify: bool = False  # take files as they are, without verifying their checksums


def frames_of(latents):
    """Video frames of n latents: the first latent is one frame, each later one is four."""
    return max(0, 4 * latents - 3)


# ---- the small world: latents ------------------------------------------------------------------------------

def training_worlds(clips, seed):
    """
    WorldSpecs of a training run's clips; never held-out ones. Of every second one the rate is drawn evenly,
    and not the period: how a fast turn goes on is seen for a few chunks only, until all comes back.
    """
    rng = np.random.default_rng([seed, 0xDA7A])
    specs = [WorldSpec(s) for s in rng.integers(world.HELD_OUT, size=clips).tolist()]
    for i in range(1, clips, 2):
        fastest, slowest = PERIODS[world.make_world(specs[i]).motion.kind]
        rate = np.random.default_rng([specs[i].seed, 0xFA57]).uniform(1 / slowest, 1 / fastest)
        specs[i] = replace(specs[i], seconds=round(1 / rate))
    return specs


@torch.no_grad()
def encode_world(tae, spec, latents, device):
    """A WorldSpec's first frames -> latents (1, n, 16, 4, 8) float32, encoded in bf16 where that is fast."""
    video = torch.from_numpy(world.clip(spec, 0, frames_of(latents))[None])
    with fast_autocast(device):
        return tae.encode(video.to(device) * 2 - 1).float()


def make_files(files, make, title):
    """
    Files that are made once: several processes share those that are missing.
    files    {file: what it is made from}
    make     of that -> {name: tensor}
    returns  the content of each file
    """
    # each process makes its share, and all read what all have made
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
    mark = hash_content(tae.state_dict(), repr((worlds, latents)))[:8]
    folder = Path(folder, f"clips_{mark}")
    files = {folder / f"{i:05d}.safetensors": spec for i, spec in enumerate(worlds)}
    return torch.cat([clip["latents"] for clip in make_files(files, encode, "encoding clips")])


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
            # another order each time that all were taken
            turn, place = divmod(number, len(self.items))
            order = np.random.default_rng([self.seed, turn, 0x5FFE]).permutation(len(self.items))
            taken.append(self.items[order[place]])
        return taken

    def state_dict(self):
        return {"taken": torch.tensor(self.taken)}

    def load_state_dict(self, state):
        self.taken = int(state["taken"])


def take_frames(latents, clip, frame, device):
    """Of latents (clips, n, ...): frames (b, f) of clips (b,), float32; -1 (empty) gives some frame."""
    return latents[clip[:, None], frame.clamp(min=0)].to(device).float()


class WorldClips(Histories):
    """Clips of the small world, with histories of theirs."""
    def __init__(self, seed, cache, features, device, for_student=True):
        """
        cache        (WorldSpecs, latents) -> latents of so many frames each, as from latent_cache()
        features     captions -> (b, m, text_dim)
        for_student  also encoded without landmarks, more worlds' openings, and histories as a student sees
                     them; False: a teacher's contexts
        """
        worlds = training_worlds(CLIPS + OPENINGS, seed)
        specs, others = worlds[:CLIPS], worlds[CLIPS:]
        super().__init__(specs, evict_first=for_student)
        self.features = features
        self.device = device
        latents = CLIP_CHUNKS * CHUNK
        self.latents = cache(specs, latents)
        if for_student:
            empty = [replace(spec, empty=True) for spec in specs[:EMPTY_CLIPS]]
            self.empty = cache(empty, latents)
            # clips of these numbers have a first chunk only
            self.openings = cache(others, CHUNK)
            self.captions += [world.make_world(spec).caption for spec in others]

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
        try:
            caption = read_text(file.with_suffix(".txt")).strip()
            check_prompt(caption)
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
    least = frames_of((FULL_MEMORY + AHEAD) * CHUNK)
    frames, clip = read_frames(file, width, height, frames_of((LONGEST + AHEAD) * CHUNK))
    if clip.damage:
        raise BadInput(f"{file} is damaged ({clip.damage})")
    if clip.width < width or clip.height < height or len(frames) < least:
        raise BadInput(f"{file}: {clip.width}x{clip.height}, {len(frames) / FPS:.1f} s; "
                       f"needed are {width}x{height}, {least / FPS:.1f} s")
    return frames[:len(frames) - (len(frames) + 3) % FRAMES]


def source_of(file, captions):
    """What a clip was encoded from: its caption, and how large its video is (all of it is long to read)"""
    return {"caption": captions[file], "bytes": file.stat().st_size}


def is_encoded(shard, source):
    """Is the clip there, from what source_of() says?"""
    with suppress(BadInput):
        return shard.exists() and read_head(shard, ENCODE_AGAIN)[1].items() >= source.items()
    return False


@torch.no_grad()
def encode_videos(cfg, device):
    """A file a clip: latents (n, 16, h, w), text features (m, dim), bf16; the caption is in the metadata."""
    # what there is to do
    check_writable(cfg.out)
    find_ffmpeg()
    captions = read_captions(cfg.videos)
    # torchrun's processes share the clips
    new = {}
    for file in list(captions)[get_rank()::get_processes()]:
        shard = Path(cfg.out, "clips", f"{file.relative_to(cfg.videos)}.safetensors")
        if len(os.fsencode(shard.name)) > LONGEST_NAME:
            tell(f"skipped: {file}: its name is too long")
        elif not is_encoded(shard, source_of(file, captions)):
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
        write_safetensors(shard, tensors, source_of(file, captions))


def keep_with_gaps(rng, chunks, has_gaps):
    """
    (chunks,) bool: every second chunk is kept; with gaps only where the video surprises, which it does for
    some seconds, and then for some seconds not.
    """
    # it begins or ceases to surprise at random chunks
    turns = rng.random(chunks) < 1 / RUN
    surprises = (np.cumsum(turns) + rng.integers(2)) % 2 == 0
    return torch.from_numpy(surprises | (not has_gaps)) & (torch.arange(chunks) % 2 == 0)


def read_shard_head(file, latent, text_dim):
    """-> caption and number of latents of a clip of encode_videos(); BadInput if they cannot be right"""
    shapes, about = read_head(file, ENCODE_AGAIN)
    caption = about.get("caption")
    # does it fit this model, and is it long enough?
    n, *shape = shapes.get("latents") or [0]
    if shape != list(latent):
        raise BadInput(f"{file} holds latents {shape}, needed are {list(latent)}: "
                       "see --wan and --size of data.py")
    has_text = isinstance(caption, str) and shapes.get("text", [])[1:] == [text_dim]
    if not has_text or n < (FULL_MEMORY + AHEAD) * CHUNK:
        raise BadInput(f"{file} lacks a caption, its text (dim {text_dim}) or latents enough (it has {n}): "
                       f"{ENCODE_AGAIN}")
    return caption, n


class ClipFolder:
    """What encode_videos() wrote, read when it is drawn."""
    def __init__(self, folder, latent, text_dim, device, evict_first=True):
        """latent (c, h, w), text_dim: what the model takes; evict_first as for Histories"""
        self.device = device
        self.files = sorted((Path(folder) / "clips").rglob("[!.]*.safetensors"))
        if not self.files:
            raise BadInput(f"--data {folder} holds no clips that data.py encoded")
        # captions and lengths, from the heads of the files
        heads = [read_shard_head(file, latent, text_dim) for file in self.files]
        self.captions = [caption for caption, _ in heads]
        self.chunks = [n // CHUNK for _, n in heads]
        self.evict_first = evict_first

    def read(self, clip, name):
        """Latents or text of one clip"""
        content, _ = read_file(self.files[clip], remedy=ENCODE_AGAIN)
        check_schema(self.files[clip], content, {name: torch.bfloat16}, fault=f"is damaged, {ENCODE_AGAIN}")
        return content[name]

    def frames(self, clip, frame):
        """Latents (b, f, c, h, w) of frames (b, f) of clips (b,); -1 (empty) gives some frame."""
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
        chunk = torch.tensor([rng.integers(FULL_MEMORY, n + 1) for n in last])
        # for half of them every second chunk is kept, for the others surprisal leaves gaps
        keep = torch.stack([keep_with_gaps(rng, LONGEST + 1, rng.random() < .5) for _ in clip])
        held = held_frames(PRESETS["uniform2"], keep, self.evict_first)
        return History(torch.from_numpy(clip), chunk, held[torch.arange(batch), chunk])


def main():
    cfg = parse(Config)
    if cfg.size and not cfg.wan:
        raise BadInput("--size needs --wan: the tiny model has one size")
    if not cfg.videos:
        raise BadInput("give --videos DIR, a folder of clips with captions; the small world needs none")
    device = pick_device(cfg.device)
    with joined_processes(device):
        encode_videos(cfg, device)


if __name__ == "__main__":
    run(main)
