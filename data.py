"""
Training clips as latents, encoded once and kept on disk: those of the small world, or a folder of videos.

The autoencoder is frozen after its own stage, so every later stage trains on latents: a folder of safetensors shards, each
written whole, so that a stopped run goes on with the shard it stopped at. Batches of clips with a past are drawn here too:
which latents a memory policy would hold (memory.frames_in_memory), and how often windows in which a landmark comes back are drawn.

    python data.py             # prints what the policies hold for one clip, and how windows are weighted
    python data.py --videos DIR --out clips --wan Wan2.1-T2V-1.3B    # clips with a .txt caption beside each -> shards

References: Context Forcing, arXiv 2602.06028, section 3.3 (histories of 5-20 s, selected by the memory's own policy).
Leaves out: cutting long videos at their scene changes; what comes after 25 s of a clip.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from config import STUDENT, BadInput, fast_autocast, parse, pick_device, run
from memory import CHUNK, PRESETS, frames_in_memory
from video import FPS, read_frames
from weights import WEIGHTS, load_tiny, wan_networks, wan_text, write_safetensors
from world import WorldSpec

CHUNKS = 41                     # of a training clip: histories of up to 40 chunks (30 s) and a target
LINGERS = 3.5                   # columns: a chunk that moves less lingers; the slowest turn moves 4.4
BACK = 12                       # windows in which a landmark or the camera turns back are drawn so many times as often
LESSON_CHUNKS = 27              # of a lesson clip
SHARD = 64                      # clips a file
PAST, AHEAD = (7, 27), 7        # folders of videos: chunks of a past (5 to 20 s), and of what follows


@dataclass
class Config:
    videos: str = ""  # folder of clips to encode, at any depth, each with its caption in a .txt of the same name
    out: str = "out"  # folder for the shards, DIR of train.py --data DIR; run again to go on
    wan: str = ""     # a raw Wan2.1-T2V-1.3B folder: its autoencoder and text encoder (default: the shipped tiny ones)
    size: str = ""    # with --wan: WIDTHxHEIGHT in pixels (default 832x480; else 64x32); smaller clips are skipped
    device: str = ""  # cuda | mps | cpu (default: the best there is)


def frames_of(latents):
    """Video frames of n latents: the first latent is one frame, each later one is four."""
    return 1 + 4 * (latents - 1)


def training_worlds(clips, seed):
    """The WorldSpecs of a training run's clips; never held-out ones."""
    return [WorldSpec(int(s)) for s in np.random.default_rng([seed, 0xDA7A]).integers(world.HELD_OUT, size=clips)]


def lesson_worlds(clips, seed):
    """Worlds for the first lessons in remembering: steady turns of 8 to 16 s, so all comes back within 12 keyframes."""
    seeds = np.random.default_rng([seed, 0x1E55]).integers(world.HELD_OUT, size=clips)
    return [WorldSpec(int(s), "turn", 8 + int(s) % 9) for s in seeds]


@torch.no_grad()
def encode_world(tae, spec, latents, device):
    """A WorldSpec's first frames -> latents (1, n, 16, 4, 8) float32, encoded in bf16 where that is fast."""
    video = torch.from_numpy(world.clip(spec, 0, frames_of(latents))[None])
    with fast_autocast(device):
        return tae.encode(video.to(device) * 2 - 1).float()


def fingerprint(net):
    return hashlib.sha256(b"".join(p.detach().cpu().float().numpy().tobytes() for p in net.parameters()))


def latent_cache(folder, tae, worlds, latents, device, rank=0):
    """
    The first `latents` latents of each world, (clips, latents, 16, 4, 8) bfloat16 on the CPU: read from `folder`, and encoded
    into it first where they are not there yet; by the first of several processes, the others wait. The folder's name carries
    a fingerprint of autoencoder and worlds: others never meet these latents.
    """
    mark = fingerprint(tae)
    mark.update(repr((worlds[0], worlds[-1], latents)).encode())
    files = [Path(folder) / f"latents_{mark.hexdigest()[:8]}" / f"{i:05d}.safetensors" for i in range(0, len(worlds), SHARD)]
    for i, file in enumerate(tqdm(files, desc="encoding clips", disable=rank > 0 or all(f.exists() for f in files))):
        if rank == 0 and not file.exists():
            batch = worlds[i * SHARD:(i + 1) * SHARD]
            write_safetensors(file, {"latents": torch.cat([encode_world(tae, w, latents, device).bfloat16() for w in batch])})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return torch.cat([load_file(f)["latents"] for f in files])


class Histories:
    """
    Which past a clip's chunks are trained with, for every clip and keep rule at once.
    Headings are closed form, so "lingering" and "a landmark comes back" are known without looking at a frame.
    """
    RULES = ("uniform2", "uniform1", "moving")                          # slow memory: a third each
    LAYOUTS = ("longlive", "longlive21", "infinity", "window")          # the ablations' layouts
    OTHER = 0.15                                                        # share of samples that use those

    def __init__(self, worlds, chunks=CHUNKS, room=CHUNK):
        """room: latents that memory makes room for before it is looked at; 0 = a teacher's context, 21 latents"""
        self.chunks, frames = chunks, np.arange(frames_of(chunks * CHUNK))
        heading = np.stack([w.motion.heading(w.start, frames) for w in map(world.make_world, worlds)])   # (b, frames)
        starts = np.maximum(0, 12 * np.arange(chunks) - 3)              # first frame of each chunk
        parts = np.split(heading, starts[1:], 1)
        self.moved = moved = np.stack([np.abs(p[:, -1] - p[:, 0]) for p in parts], 1)                   # (b, chunks)
        seen = np.stack([(np.abs(world.offsets(p)) <= world.GONE).any(1) for p in parts], 1)            # (b, chunks, 8)
        before = np.cumsum(seen, 1) - seen > 0
        ahead = np.sign(np.diff(heading, axis=1, append=heading[:, -1:]))
        back = np.stack([(p != ahead[:, i - 1, None]).any(1) for i, p in zip(starts, np.split(ahead, starts[1:], 1))], 1)
        back[:, 1:] |= (seen[:, 1:] & ~seen[:, :-1] & before[:, :-1]).any(2)
        back[:, :7] = False
        self.weight = np.where(back, float(BACK), 1.0)
        self.heading = torch.from_numpy(heading[:, ::4])                # at each latent's last frame, unwrapped
        even = np.arange(chunks) % 2 == 0
        self.keep = {"uniform2": np.broadcast_to(even, moved.shape), "uniform1": np.ones(moved.shape, bool),
                     "moving": even & (moved > LINGERS)}
        rules = [(name, "slowfast", keep) for name, keep in self.keep.items()]
        rules += [(name, name, np.zeros(moved.shape, bool)) for name in self.LAYOUTS]
        self.held = {name: np.stack([F.pad(held, (0, 21 - room - held.shape[1]), value=-1).numpy() for held in frames_in_memory(
            PRESETS[preset], torch.from_numpy(keep[:, :-1].copy()), room > 0)], 1)
            for name, preset, keep in rules}                            # (b, chunks, 18) frame numbers, -1 = nothing

    def draw(self, rng, batch, ahead=1, clips=None):
        """
        -> clip numbers (b,), target chunks (b,) >= 7 with `ahead` chunks from there on, and the frame numbers that memory
        holds then (b, 18 or 21), -1 where nothing is. clips: only the first so many, and only full memories
        """
        drawn = []
        for _ in range(batch):
            name = str(rng.choice(self.LAYOUTS if rng.random() < self.OTHER and ahead == 1 and not clips else self.RULES))
            c, last = rng.integers(clips or len(self.weight)), self.chunks - ahead + 1
            n = 7 + rng.choice(last - 7, p=self.weight[c, 7:last] / self.weight[c, 7:last].sum())
            drawn.append((c, n, self.held[name][c, n]))
        return [np.stack(x) for x in zip(*drawn)]


# ---- the full size, and folders of videos --------------------------------------------------------------------------------

@torch.no_grad()
def encode_videos(cfg, device):
    """A shard a clip: latents (n, 16, h, w), text features (m, dim), both bfloat16; the caption is in the metadata."""
    files = sorted(f for f in Path(cfg.videos).rglob("*") if f.is_file() and f.suffix != ".txt")
    captions = {f: t.read_text("utf-8", "replace").strip() for f in files if (t := f.with_suffix(".txt")).is_file()}
    if not captions:
        raise BadInput(f"--videos {cfg.videos} holds no video with a caption in a .txt of the same name")
    skipped = [f"{f}: no caption in a .txt beside it" for f in files if f not in captions]
    shards = {f: Path(cfg.out) / "clips" / f"{f.relative_to(cfg.videos)}.safetensors" for f in captions}
    new = [f for f in captions if not shards[f].exists()]
    features = wan_text(cfg, device, [captions[f] for f in new]) if cfg.wan else None
    m = wan_networks(cfg, device) if cfg.wan else load_tiny(WEIGHTS / f"{STUDENT}.safetensors", device)
    features = features or m.features
    least, most = (frames_of((past + AHEAD) * CHUNK) for past in PAST)
    for file in tqdm(new, desc="encoding clips"):
        try:
            frames, (w, h) = read_frames(file, m.width, m.height, most)
        except BadInput:
            skipped.append(f"{file}: cannot be read as a video")
            continue
        if w < m.width or h < m.height or len(frames) < least:
            skipped.append(f"{file}: {w}x{h}, {len(frames) / FPS:.1f} s; needed are {m.width}x{m.height}, "
                           f"{least / FPS:.1f} s")
            continue
        frames = frames[:(len(frames) + 3) // 12 * 12 - 3]  # whole chunks
        video = torch.from_numpy(frames).to(device).movedim(-1, 1)[None]
        with fast_autocast(device):
            made = {"latents": m.vae.encode(video / 127.5 - 1)[0], "text": features([captions[file]])[0]}
        write_safetensors(shards[file], {k: v.bfloat16() for k, v in made.items()}, {"caption": captions[file]})
    print(f"{sum(s.exists() for s in shards.values())} clips are in {cfg.out}, {len(skipped)} skipped", *skipped, sep="\n  ")


class Clips:
    """
    What encode_videos wrote, read when it is drawn: clips[which, frames], with clip numbers (b, 1) and numbers of their
    latents (b, f), is what the tensor of latent_cache would give, and draw() is that of Histories.
    """
    def __init__(self, folder, latent, room=0):
        """latent (c, h, w) that the model takes; room: latents that memory makes room for before it is looked at"""
        self.files, self.chunks, self.captions = sorted((Path(folder) / "clips").rglob("*.safetensors")), [], []
        if not self.files:
            raise BadInput(f"--data {folder} holds no encoded clips: python data.py --videos DIR --out {folder}")
        for file in self.files:
            with safe_open(file, "pt") as f:
                n, *shape = f.get_slice("latents").get_shape()
                self.captions.append(f.metadata()["caption"])
            if shape != list(latent):
                raise BadInput(f"{file} holds latents {shape}, needed are {list(latent)}: see --wan and --size of data.py")
            self.chunks.append(n // CHUNK)
        self.held = frames_in_memory(PRESETS["uniform2"], torch.arange(PAST[1])[None] % 2 == 0, room > 0)  # after each number of chunks

    def draw(self, rng, batch, ahead=1):
        which = rng.integers(len(self.files), size=batch)
        chunk = np.array([rng.integers(PAST[0], min(PAST[1], self.chunks[c] - ahead) + 1) for c in which])
        return which, chunk, np.stack([self.held[n][0].numpy() for n in chunk])

    def __getitem__(self, at):
        return torch.stack([load_file(self.files[c])["latents"][frames] for c, frames in zip(at[0][:, 0], at[1])])

    def text(self, which):
        return pad_sequence([load_file(self.files[c])["text"] for c in which], batch_first=True)


def main():
    cfg = parse(Config)
    if cfg.videos:
        return encode_videos(cfg, pick_device(cfg.device))
    worlds = training_worlds(256, 0)
    h = Histories(worlds)
    for i in range(3):
        print(world.make_world(worlds[i]).caption, "chunk 30 sees", h.held["moving"][i, 30].tolist())
    share = (h.weight[:, 7:] > 1).mean()
    drawn = share * BACK / (share * BACK + 1 - share)
    print(f"a landmark or the camera turns back in {share:.0%} of windows; those are {drawn:.0%} of draws")


if __name__ == "__main__":
    run(main)
