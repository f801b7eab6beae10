"""
Measures what a trained model remembers and how its picture holds, by the small world's judge.

    python evaluate.py             # 64 held-out worlds: 10 s of each are given, 50 s are the model's own
    python evaluate.py --quick     # 16 worlds, 20 s of the model's own

Each world's first 10 s are rendered and encoded, so there is a truth: what stood where. The model goes on with memory
slowfast, and again with longlive (no slow memory). Recall, chance, ceiling and validity are the judge's (world.py). Writes
out/evaluate.csv, one line a video, and prints the tables from it.

References: Context Forcing, arXiv 2602.06028, figure 1. Leaves out so far: the paper's other tables, real metrics.
"""
import csv
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world
from config import parse, pick_device, run
from data import encode_world, frames_of
from erft import extend
from flow import Rollout, Sampler, generate
from memory import CHUNK, PRESETS, plan
from model import DiT, DiTConfig, load
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig

WEIGHTS = Path(__file__).parent / "weights"
GIVEN = 14                            # chunks of real history: 42 latents, 165 frames, 10.3 s
ABSENCES = (0, 2, 4, 6, 9, 12, 16, 21, 31)  # seconds: edges of the forgetting curve


@dataclass
class Config:
    quick: bool = False  # 16 worlds and 20 s, instead of 64 and 50 s
    ckpt: str = ""       # weights to measure
    out: str = "out"     # folder for the CSV
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)


@torch.no_grad()
def continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, noise=0, positions="bounded", test=""):
    """
    Real first chunks of the worlds of `which`, a list of what world() takes, then the model's own.
    test     "swap": the first half and the second exchange their slow memories before going on; "pack": what memory holds is
             encoded anew before every chunk, as in packed training
    returns  frames (b, f, 3, 32, 64) uint8, the real part decoded too; keep (b, given + chunks) bool
    """
    worlds = [world.world(*w) for w in which]
    history = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which]) if given else None
    ids, mask = (z.to(device) for z in bytes_to_ids([w.caption for w in worlds], dit.config.text_len))
    latent = (dit.config.channels, world.HEIGHT // 8, world.WIDTH // 8)
    grid = latent[1] // dit.config.patch[0], latent[2] // dit.config.patch[1]
    roll = Rollout(dit, dit.text(encoder(ids, mask)), policy, grid, positions, sampler.pool)
    video, past = tae.decode(history) if given else (None, None)
    frames = [video] if given else []
    seeds = [noise + w[0] for w in which]
    list(generate(roll, seeds, 0, sampler, latent, history=history))
    if test == "swap":
        roll.memory.make_room(CHUNK)
        roll.memory.slow = [torch.cat(c.chunk(2)[::-1]) for c in roll.memory.slow]
    again = {n: roll.text for n in range(given, given + chunks)} if test == "pack" else None
    for z in generate(roll, seeds, chunks, sampler, latent, texts=again):
        video, past = tae.decode(z, past)
        frames.append(video)
    frames = (torch.cat(frames, 1) * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    return frames, torch.stack(roll.keeps, 1).cpu()


@torch.no_grad()
def teacher_continuations(dit, encoder, tae, which, given, blocks, sampler, device, shuffle=False):
    """
    Real first chunks of the worlds of `which`, then 21 latents at a time from the teacher, as continuations().
    shuffle: each world goes on from the next one's past, which the teacher should show
    """
    worlds = [world.world(*w) for w in which]
    z = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which])
    ids, mask = (x.to(device) for x in bytes_to_ids([w.caption for w in worlds], dit.config.text_len))
    grid, text = (z.shape[3] // dit.config.patch[0], z.shape[4] // dit.config.patch[1]), dit.text(encoder(ids, mask))
    for _ in range(blocks):
        past = torch.cat([z[1:], z[:1]]) if shuffle else z
        z = torch.cat([z, extend(dit, past, text, grid, sampler, [w[0] for w in which])], 1)
    frames = (tae.decode(z)[0] * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    return frames, torch.arange(z.shape[1] // CHUNK).expand(len(z), -1) % 2 == 0


def returns(reading, caption, keep, policy, given):
    """Events that fall due in the model's own part, outside the sink -> list of (event, was it held)."""
    contexts = plan(policy, keep[None])
    own = [e for e in world.events(reading, caption) if e.back >= frames_of(given * CHUNK) and not e.sink]
    return [(e, world.held(e, reading, contexts[min(world.chunk_of(e.back), len(contexts) - 1)][0].tolist())) for e in own]


def gates(dit, encoder, tae, sampler, device, pairs=24):
    """
    Held-out worlds that turn once in 8 or 9 s, and their twins with other landmarks: 10 s are given, 4 s are the model's own.
    returns  dict: recall as it is, and with what memory holds encoded in one pack; share of returns that follow the other
             world's memory when slow memories were exchanged, and that stay with their own; chance; number of returns
    """
    which = [(world.HELD_OUT + i, "turn", 8 + i % 2, twin) for twin in (0, 1) for i in range(pairs)]
    found = {}
    for test in ("", "pack", "swap"):
        frames, keeps = continuations(dit, encoder, tae, which, GIVEN, 5, PRESETS["uniform2"], sampler, device, test=test)
        readings = [world.judge(f) for f in frames]
        found[test] = [(e, w) for w, r, k in zip(which, readings, keeps)
                       for e, _ in returns(r, world.world(*w).caption, k, PRESETS["uniform2"], GIVEN)]
        found.setdefault("chance", world.chance(readings))

    def follows(other):
        return [e.read == world.world(*w[:3], 1 - w[3] if other else w[3]).landmarks[e.sector] for e, w in found["swap"]
                if world.world(*w[:3], 0).landmarks[e.sector] != world.world(*w[:3], 1).landmarks[e.sector]]
    return {"recall": np.mean([e.recall for e, _ in found[""]]), "packed": np.mean([e.recall for e, _ in found["pack"]]),
            "follows": np.mean(follows(True)), "stays": np.mean(follows(False)), "chance": found["chance"], "n": len(found[""])}


def main():
    cfg = parse(Config)
    device = pick_device(cfg.device)
    dit, facts = load(cfg.ckpt or WEIGHTS / "init_ar.safetensors", DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    dit, encoder, tae = dit.to(device), encoder.to(device), tae.to(device, memory_format=torch.channels_last)
    sampler = Sampler(**facts["sampler"])
    videos, chunks = (16, 27) if cfg.quick else (64, 67)
    seeds = [world.HELD_OUT + cfg.seed + i for i in range(videos)]
    started, rows, events, readings = time.time(), [], {}, {}

    g = gates(dit, encoder, tae, sampler, device)
    print(f"48 worlds that turn once in 8 or 9 s, {g['n']} returns: recall {g['recall']:.0%}, chance {g['chance']:.0%}; memory "
          f"encoded as one pack {g['packed']:.0%}; slow memories exchanged: {g['follows']:.0%} follow the memory, {g['stays']:.0%} do not")

    best = {}  # the autoencoder's own picture of the true worlds: the ceiling of validity
    for s in tqdm(seeds, desc="autoencoder"):
        with torch.no_grad():
            frames = tae.decode(encode_world(tae, (s, None, None), 2 * GIVEN * CHUNK, device))[0][0]
        r = world.judge((frames * .5 + .5).clamp(0, 1).cpu().numpy())
        best[s] = r.psnr.mean(), np.nanmean(r.box_psnr)
    for name in ("slowfast", "longlive"):
        policy, events[name], readings[name] = replace(PRESETS[name], tau=sampler.tau), [], []
        for at in tqdm(range(0, videos, 16), desc=name):
            part = seeds[at:at + 16]
            which = [(s, None, None) for s in part]
            frames, keeps = continuations(dit, encoder, tae, which, GIVEN, chunks, policy, sampler, device)
            for s, video, keep in zip(part, frames, keeps):
                caption, r = world.world(s).caption, world.judge(video)
                found = returns(r, caption, keep, policy, GIVEN)
                events[name] += [(e, h, (e.back - frames_of(GIVEN * CHUNK)) / world.FPS) for e, h in found]
                readings[name].append(r)
                start = frames_of(GIVEN * CHUNK)
                psnr = [r.psnr[start + 160 * i:start + 160 * (i + 1)].mean() for i in range((len(video) - start) // 160)]
                box = [np.nanmean(r.box_psnr[start + 160 * i:start + 160 * (i + 1)]) for i in range(len(psnr))]
                rows.append({"policy": name, "seed": s, "caption": caption, "events": len(found),
                             "recalled": sum(e.recall for e, _ in found), "held": sum(h for _, h in found),
                             "turning": world.turning_rate(r, caption), "ceiling": best[s][0], "box_ceiling": best[s][1],
                             **{f"psnr_{10 * i}": p for i, p in enumerate(psnr)},
                             **{f"box_{10 * i}": p for i, p in enumerate(box)}})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out) / "evaluate.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)

    own = list(range(len([k for k in rows[0] if k.startswith("psnr")])))
    print(f"\n{videos} held-out worlds, {frames_of(GIVEN * CHUNK) / world.FPS:.1f} s real, then {chunks * .75:.1f} s of the model's own; "
          f"took {time.time() - started:.0f} s")
    print("\nrecall of landmarks outside the sink, by seconds of absence (right / events; ceiling: the policy still held it)")
    for name in events:
        print(f"  {name:9} chance {world.chance(readings[name]):.0%}")
        for until in (20, 999):
            some = [(e, h) for e, h, when in events[name] if when < until]
            six = [(e.recall, h) for e, h in some if 5.4 <= e.seconds <= 6.6]
            print(f"    due in the first {until} s:" if until < 999 else "    all:",
                  *(f"{lo}-{hi} s {np.mean([e.recall for e, _ in b]):.0%} ({len(b)}; {np.mean([h for _, h in b]):.0%})"
                    for lo, hi in zip(ABSENCES, ABSENCES[1:]) if (b := [(e, h) for e, h in some if lo <= e.seconds < hi])),
                  f"| at 6 s {np.mean([r for r, _ in six]):.0%} ({len(six)}; {np.mean([h for _, h in six]):.0%})" if six else "")
    print("\nvalidity (dB against the nearest renderable frame), autoencoder's ceiling "
          f"{np.mean([r['ceiling'] for r in rows]):.1f}, landmark boxes {np.mean([r['box_ceiling'] for r in rows]):.1f}")
    for name in events:
        mine = [r for r in rows if r["policy"] == name]
        print(f"  {name:9} " + ", ".join(f"{10 * i}-{10 * i + 10} s {np.mean([r[f'psnr_{10 * i}'] for r in mine]):.1f} "
                                         f"(boxes {np.nanmean([r[f'box_{10 * i}'] for r in mine]):.1f})" for i in own)
              + f"; turning rate within 10 %: {np.mean([abs(r['turning'] - 1) < .1 for r in mine]):.0%}")


if __name__ == "__main__":
    run(main)
