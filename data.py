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
LATENTS = CHUNKS * CHUNK
LINGERS = 3.5                   # columns: a chunk that moves less lingers; the slowest turn moves 4.4
SHARD = 64                      # clips a file


def frames_of(latents):
    """Video frames of n latents: the first latent is one frame, each later one is four."""
    return 1 + 4 * (latents - 1)


def seeds_of(clips, seed):
    """World seeds of a training run's clips; never held-out ones."""
    return [int(s) for s in np.random.default_rng([seed, 0xDA7A]).integers(world.HELD_OUT, size=clips)]


@torch.no_grad()
def encode_world(tae, seeds, latents, device, kind=None):
    """Clips of the small world from their first frame -> latents (b, n, 16, 4, 8) float32, encoded in bf16 autocast."""
    video = np.stack([world.clip(s, 0, frames_of(latents), kind) for s in seeds])
    with torch.autocast(device.type, torch.bfloat16):
        return tae.encode(torch.from_numpy(video).to(device) * 2 - 1).float()


def latent_cache(folder, tae, clips, seed, device):
    """
    Encodes the clips of a training run into `folder` unless they lie there already, and reads them.
    returns  latents (clips, 123, 16, 4, 8) bfloat16 on the CPU, world seeds
    The folder's name carries the autoencoder's fingerprint: another autoencoder never meets these latents.
    """
    print_of = hashlib.sha256(b"".join(p.detach().cpu().float().numpy().tobytes() for p in tae.parameters())).hexdigest()[:8]
    folder, seeds = Path(folder) / f"latents_{print_of}_{seed}", seeds_of(clips, seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:05d}.safetensors" for i in range(0, clips, SHARD)]
    for i, file in enumerate(tqdm(files, desc="encoding clips", disable=all(f.exists() for f in files))):
        if not file.exists():
            batch = seeds[i * SHARD:(i + 1) * SHARD]
            z = torch.cat([encode_world(tae, batch[j:j + 1], LATENTS, device).bfloat16().cpu() for j in range(len(batch))])
            save_file({"latents": z}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    return torch.cat([load_file(f)["latents"] for f in files])[:clips], seeds


class Histories:
    """
    Which past a clip's chunks are trained with, for every clip and keep rule at once.
    headings are closed form, so "lingering" and "a landmark comes back" are known without looking at a frame.
    """
    RULES = ("uniform2", "uniform1", "moving")                          # slow memory: a third each
    LAYOUTS = ("longlive", "longlive21", "infinity", "window")          # the ablations' layouts
    OTHER = 0.15                                                        # share of samples that use those

    def __init__(self, seeds):
        frames = np.arange(frames_of(LATENTS))
        heading = np.stack([w.motion.heading(w.start, frames) for w in map(world.world, seeds)])   # (b, frames)
        chunk = ((frames + 3) // 4) // CHUNK
        self.moved = moved = np.stack([np.abs(heading[:, chunk == i][:, -1] - heading[:, chunk == i][:, 0]) for i in range(CHUNKS)], 1)
        middle = np.arange(world.SECTORS) * world.SECTOR + world.SECTOR // 2
        away = np.abs((middle - heading[..., None] + world.COLUMNS / 2) % world.COLUMNS - world.COLUMNS / 2)
        seen = np.stack([(away[:, chunk == i] < world.WIDTH / 2 + world.HALF).any(1) for i in range(CHUNKS)], 1)  # (b, chunks, 8)
        before = np.cumsum(seen, 1) - seen > 0
        back = np.zeros(seen.shape[:2], bool)
        back[:, 1:] = (seen[:, 1:] & ~seen[:, :-1] & before[:, :-1]).any(2)
        back[:, :7] = False
        self.weight = np.where(back, 5.0, 1.0)                          # windows in which a landmark comes back: 5 times
        even = np.arange(CHUNKS) % 2 == 0
        self.keep = {"uniform2": np.broadcast_to(even, moved.shape), "uniform1": np.ones(moved.shape, bool),
                     "moving": even & (moved > LINGERS)}
        plans = {rule: plan(PRESETS["slowfast"], torch.from_numpy(keep[:, :-1].copy())) for rule, keep in self.keep.items()}
        plans |= {name: plan(PRESETS[name], torch.zeros(len(seeds), CHUNKS - 1, dtype=torch.bool)) for name in self.LAYOUTS}
        self.held = {name: np.stack([np.pad(p.numpy(), ((0, 0), (0, 18 - p.shape[1])), constant_values=-1) for p in contexts], 1)
                     for name, contexts in plans.items()}               # (b, chunks, 18) frame numbers, -1 = nothing

    def draw(self, rng, batch):
        """-> clip numbers (b,), target chunks (b,) >= 7, frame numbers held (b, 18), -1 where nothing is"""
        clips = rng.integers(len(self.weight), size=batch)
        p = self.weight[clips, 7:] / self.weight[clips, 7:].sum(1, keepdims=True)
        target = np.array([7 + rng.choice(CHUNKS - 7, p=row) for row in p])
        names = [str(rng.choice(self.LAYOUTS if rng.random() < self.OTHER else self.RULES)) for _ in clips]
        return clips, target, np.stack([self.held[name][c, n] for name, c, n in zip(names, clips, target)])


if __name__ == "__main__":
    seeds = seeds_of(256, 0)
    h = Histories(seeds)
    for i in range(3):
        print(world.world(seeds[i]).caption, "chunk 30 sees", h.held["moving"][i, 30].tolist())
    share = (h.weight[:, 7:] > 1).mean()
    print(f"a landmark comes back in {share:.0%} of windows; those are {share * 5 / (share * 5 + 1 - share):.0%} of draws")
