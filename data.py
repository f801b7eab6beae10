"""
Training clips as latents, encoded once and kept on disk.

The autoencoder is frozen after its own stage, so every later stage trains on latents: a folder of safetensors shards, each
written whole, so that a stopped run goes on with the shard it stopped at. Batches of clips with a past are drawn here too:
which latents a memory policy would hold (memory.plan), and how often windows in which a landmark comes back are drawn.

    python data.py             # prints what the policies hold for one clip, and how windows are weighted

References: Context Forcing, arXiv 2602.06028, section 3.3 (histories of 5-20 s, selected by the memory's own policy).
Leaves out so far: folders of real videos.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import world
from memory import CHUNK, PRESETS, plan

CHUNKS = 41                     # of a training clip: histories of up to 40 chunks (30 s) and a target
LINGERS = 3.5                   # columns: a chunk that moves less lingers; the slowest turn moves 4.4
BACK = 12                       # windows in which a landmark comes back, or the camera turns back, are drawn so many times as often
LESSON_CHUNKS = 27              # of a lesson clip
SHARD = 64                      # clips a file


def frames_of(latents):
    """Video frames of n latents: the first latent is one frame, each later one is four."""
    return 1 + 4 * (latents - 1)


def training_worlds(clips, seed):
    """The worlds of a training run's clips as (seed, kind, seconds); never held-out ones."""
    return [(int(s), None, None) for s in np.random.default_rng([seed, 0xDA7A]).integers(world.HELD_OUT, size=clips)]


def lesson_worlds(clips, seed):
    """Worlds for the first lessons in remembering: steady turns of 8 to 16 s, so all comes back within 12 keyframes."""
    seeds = np.random.default_rng([seed, 0x1E55]).integers(world.HELD_OUT, size=clips)
    return [(int(s), "turn", 8 + int(s) % 9) for s in seeds]


@torch.no_grad()
def encode_world(tae, which, latents, device):
    """which, what world() takes: a world's first frames -> latents (1, n, 16, 4, 8) float32, encoded in bf16 autocast."""
    video = torch.from_numpy(world.clip(which[0], 0, frames_of(latents), *which[1:])[None])
    with torch.autocast(device.type, torch.bfloat16):
        return tae.encode(video.to(device) * 2 - 1).float()


def latent_cache(folder, tae, worlds, latents, device, rank=0):
    """
    Encodes the first `latents` latents of each world into `folder` unless they lie there already, and reads them. With
    several processes the first encodes, the others wait.
    returns  (clips, latents, 16, 4, 8) bfloat16 on the CPU
    The folder's name carries a fingerprint of autoencoder and worlds: others never meet these latents.
    """
    mark = hashlib.sha256(b"".join(p.detach().cpu().float().numpy().tobytes() for p in tae.parameters()))
    mark.update(repr((worlds[0], worlds[-1], latents)).encode())
    folder = Path(folder) / f"latents_{mark.hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:05d}.safetensors" for i in range(0, len(worlds), SHARD)]
    for i, file in enumerate(tqdm(files, desc="encoding clips", disable=rank > 0 or all(f.exists() for f in files))):
        if rank == 0 and not file.exists():
            batch = worlds[i * SHARD:(i + 1) * SHARD]
            z = torch.cat([encode_world(tae, w, latents, device).bfloat16().cpu() for w in batch])
            save_file({"latents": z}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
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
        heading = np.stack([w.motion.heading(w.start, frames) for w in (world.world(*x) for x in worlds)])   # (b, frames)
        chunk = ((frames + 3) // 4) // CHUNK
        parts = [heading[:, chunk == i] for i in range(chunks)]
        self.moved = moved = np.stack([np.abs(p[:, -1] - p[:, 0]) for p in parts], 1)                   # (b, chunks)
        middle = np.arange(world.SECTORS) * world.SECTOR + world.SECTOR // 2
        seen = np.stack([(np.abs(world.wrap(middle - p[..., None])) <= world.GONE).any(1) for p in parts], 1)  # (b, chunks, 8)
        before = np.cumsum(seen, 1) - seen > 0
        back = np.zeros(seen.shape[:2], bool)
        back[:, 1:] = (seen[:, 1:] & ~seen[:, :-1] & before[:, :-1]).any(2)
        ahead = np.sign(np.diff(heading, axis=1, append=heading[:, -1:]))
        back |= np.stack([(ahead[:, chunk == i] != ahead[:, np.argmax(chunk == i) - 1, None]).any(1) for i in range(chunks)], 1)
        back[:, :7] = False
        self.weight = np.where(back, float(BACK), 1.0)
        self.heading = torch.from_numpy(heading[:, ::4])                # at each latent's last frame, unwrapped
        even = np.arange(chunks) % 2 == 0
        self.keep = {"uniform2": np.broadcast_to(even, moved.shape), "uniform1": np.ones(moved.shape, bool),
                     "moving": even & (moved > LINGERS)}
        plans = {rule: plan(PRESETS["slowfast"], torch.from_numpy(keep[:, :-1].copy()), room) for rule, keep in self.keep.items()}
        never = torch.zeros(len(worlds), chunks - 1, dtype=torch.bool)
        plans |= {name: plan(PRESETS[name], never, room) for name in self.LAYOUTS}

        def padded(held):
            return np.pad(held.numpy(), ((0, 0), (0, 21 - room - held.shape[1])), constant_values=-1)
        self.held = {name: np.stack([padded(held) for held in contexts], 1)
                     for name, contexts in plans.items()}               # (b, chunks, 18) frame numbers, -1 = nothing

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


if __name__ == "__main__":
    worlds = training_worlds(256, 0)
    h = Histories(worlds)
    for i in range(3):
        print(world.world(*worlds[i]).caption, "chunk 30 sees", h.held["moving"][i, 30].tolist())
    share = (h.weight[:, 7:] > 1).mean()
    drawn = share * BACK / (share * BACK + 1 - share)
    print(f"a landmark comes back in {share:.0%} of windows; those are {drawn:.0%} of draws")
