"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # all tables and figures; run it again to go on after a stop
    python evaluate.py --quick                    # 16 worlds, 30 s, three policies: minutes
    python evaluate.py --quick --memory window    # one policy only: change it in memory.py and see its curve
    python evaluate.py --videos DIR --dino DIR    # the paper's and VBench's scores of real videos

Every set of videos is one JOB: weights, memory, positions, and which worlds. Each video leaves one line in out/evaluate.csv
with all that the tables need, so a table costs nothing once its videos were made. Intervals are 95 % bootstraps over videos,
paired where two rows share seeds. One training seed a row: intervals do not tell what another training would give.

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3. Leaves out: DINO and CLIP on the small world.
"""
import csv
import hashlib
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from config import STUDENT, BadInput, one_of, parse, pick_device, run
from data import encode_world, frames_of
from erft import extend
from flow import Rollout, Sampler, generate
from memory import CHUNK, PRESETS, plan
from model import DiT, DiTConfig, load
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig

WEIGHTS = Path(__file__).parent / "weights"
GIVEN = 14                            # chunks of real history: 42 latents, 165 frames, 10.3 s
BATCH = 16                            # videos made together
ABSENCES = (1, 2, 3, 4.5, 6, 9, 12, 15, 16.5, 18, 21, 24, 30)  # seconds, each within 10 %
TIMES = (10, 20, 30, 40, 50, 60)
BROKEN = 18                           # dB: below this a picture is broken, and its consistency means nothing
CONTEXT = {"slowfast": "20+ s", "longlive": "3.0 s", "infinity": "1.5 s"}  # the paper's context lengths, table 1


@dataclass
class Config:
    quick: bool = False  # 16 worlds and 30 s instead of 64 and 62.8 s, and the main rows only
    memory: str = ""     # only the rows of this preset
    worlds: int = 0      # number of held-out worlds a set (default: 64; 16 with --quick)
    minutes: float = 0.  # make videos for so long, then tables of what is there; run again to go on (default: to the end)
    ckpt: str = ""       # the student (default: config.STUDENT)
    out: str = "out"     # folder for CSV, tables, figures
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)
    videos: str = ""     # instead of all that: a folder of real videos (mp4, gif) to score
    dino: str = ""       # for them: a folder with DINOv2 (its score), or DINO ViT-B/16 (VBench's subject consistency)
    clip: str = ""       # for them: a folder with CLIP (frame to frame, frame to text; ViT-B/32: VBench's background consistency)
    prompts: str = ""    # for them: a .json, name -> prompt, or the file of lines that sample.py took (default: the file names)
    vbench: str = ""     # for them: a new folder to lay them out in for VBench's own code


# ---- videos -------------------------------------------------------------------------------------------------------------

def conditions(dit, encoder, tae, which, given, device):
    """-> text keys and values of the captions, real first chunks as latents (b, 3 given, ...), grid"""
    ids, mask = (z.to(device) for z in bytes_to_ids([world.world(*w).caption for w in which], dit.config.text_len))
    latent = dit.config.channels, world.HEIGHT // 8, world.WIDTH // 8
    none = torch.zeros(len(which), 0, *latent, device=device)
    real = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which]) if given else none
    return dit.text(encoder(ids, mask)), real, (latent[1] // dit.config.patch[0], latent[2] // dit.config.patch[1])


def pixels(video):
    """(b, f, 3, 32, 64) in [-1, 1] -> uint8 array"""
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()


@torch.no_grad()
def continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, noise=0, positions="bounded", test=""):
    """
    Real first chunks of the worlds of `which`, a list of what world() takes, then the model's own.
    test     "swap": the first half and the second exchange their slow memories before going on; "pack": what memory holds is
             encoded anew before every chunk, as in packed training
    returns  frames (b, f, 3, 32, 64) uint8, the real part decoded too; keep (b, given + chunks) bool
    """
    text, history, grid = conditions(dit, encoder, tae, which, given, device)
    roll = Rollout(dit, text, policy, grid, positions, sampler.pool)
    video, past = tae.decode(history) if given else (None, None)
    frames, seeds, latent = [video] if given else [], [noise + w[0] for w in which], history.shape[2:]
    list(generate(roll, seeds, 0, sampler, latent, history=history if given else None))
    if test == "swap":
        roll.memory.make_room(CHUNK)
        roll.memory.slow = [torch.cat(c.chunk(2)[::-1]) for c in roll.memory.slow]
    again = {n: roll.text for n in range(given, given + chunks)} if test == "pack" else None
    for z in generate(roll, seeds, chunks, sampler, latent, texts=again):
        video, past = tae.decode(z, past)
        frames.append(video)
    return pixels(torch.cat(frames, 1)), torch.stack(roll.keeps, 1).cpu()


@torch.no_grad()
def teacher_continuations(dit, encoder, tae, which, given, blocks, sampler, device, shuffle=False, prefix=None):
    """
    Real first chunks of the worlds of `which`, then 21 latents at a time from the teacher, as continuations().
    shuffle: each world goes on from the next one's past, which the teacher should show; prefix (b, n, ...): latents that take
    the place of the real ones
    """
    text, z, grid = conditions(dit, encoder, tae, which, given, device)
    z = z if prefix is None else prefix
    for _ in range(blocks):
        past = torch.cat([z[1:], z[:1]]) if shuffle else z
        z = torch.cat([z, extend(dit, past, text, grid, sampler, [w[0] for w in which])], 1)
    return pixels(tae.decode(z)[0]), torch.arange(z.shape[1] // CHUNK).expand(len(z), -1) % 2 == 0


def returns(reading, caption, keep, policy, given):
    """Events that fall due in the model's own part, outside the sink -> list of (event, was it held)."""
    contexts = plan(policy, keep[None])
    own = [e for e in world.events(reading, caption) if e.back >= frames_of(given * CHUNK) * (given > 0) and not e.sink]
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


# ---- jobs: which videos are made -----------------------------------------------------------------------------------------

def reach_worlds(number):
    """
    Held-out worlds in which something is due back after each of ABSENCES in turn: looks aside up to 6 s, steady turns from
    6 s, turns that linger from 12 s. -> list of what world() takes
    """
    found, seed = [], world.HELD_OUT + 10_000
    while len(found) < number:
        w, seconds, seed = world.world(seed), ABSENCES[len(found) % len(ABSENCES)], seed + 1
        if w.motion.kind not in ["aside"] * (seconds <= 6) + ["turn"] * (seconds >= 6) + ["linger"] * (seconds >= 12):
            continue
        far = np.abs(world.offsets(w.motion.heading(w.start, np.arange(frames_of(252)))))
        for sector in far.T[far[:9].min(0) > world.WHOLE]:
            parts = np.split(sector, np.flatnonzero(np.diff(sector > world.GONE)) + 1)  # in view, away, in view, ...
            if any(away[0] > world.GONE and max(before.min(), after.min()) < world.WHOLE - 1
                   and abs(len(away) / world.FPS - seconds) <= .1 * seconds
                   for before, away, after in zip(parts, parts[1:], parts[2:])):
                found.append((seed - 1, None, None))
                break
    return found


def jobs(student, quick, memory):
    """All sets of videos -> list of (weights, memory, positions, worlds)"""
    if quick:
        rows = (memory,) if memory else ("slowfast", "uniform2", "longlive")
        return [(student, m, "bounded", worlds) for m in rows for worlds in ("reach", "real")]
    ours = [(student, m, "bounded", worlds) for worlds in ("real", "text", "reach") for m in ("slowfast", "longlive")]
    ours.insert(2, ("vae", "copy", "own", "few"))
    models = [(w, "slowfast", "bounded", "text") for w in ("init_ar", "init_ode", "stage1", "stage2", "stage2_none")]
    models += [(w, "teacher", "own", worlds) for w, worlds in (("base", "first"), ("teacher", "prefix"), ("teacher", "student's"),
                                                               ("teacher", "text"), ("teacher_plain", "text"))]
    others = [(student, m, "bounded", worlds) for m in ("uniform2", "uniform1", "window", "infinity")
              for worlds in ("reach", "text")]
    others += [(student, "longlive21", "bounded", "text"), (student, "slowfast", "unbounded", "text"),
               (student, "slowfast", "bounded", "long")]
    unbounded = [(student, m, "unbounded", worlds) for m in ("window", "longlive", "infinity") for worlds in ("reach", "text")]
    return [j for j in dict.fromkeys(ours + models + others + unbounded) if not memory or j[1] == memory]


@torch.no_grad()
def make(job, nets, which, chunks, device):
    """
    The videos of one batch of a job. nets: name of weights -> (dit, sampler), and "text", "vae"
    returns  frames (b, f, 3, 32, 64) uint8, keep (b, chunks) bool, policy, number of chunks that were given
    """
    weights, memory, positions, worlds = job
    if weights == "vae":  # true worlds, encoded and decoded: the ceiling of validity
        z = torch.cat([encode_world(nets["vae"], w, chunks * CHUNK, device) for w in which])
        return pixels(nets["vae"].decode(z)[0]), torch.ones(len(which), chunks, dtype=torch.bool), PRESETS["uniform2"], 0
    (dit, sampler), encoder, tae = nets[weights], nets["text"], nets["vae"]
    if memory == "teacher":  # 21 latents at a time, what it sees selected by the memory's own plan
        given, blocks = {"first": (0, 1), "text": (0, 6)}.get(worlds, (7, 1))
        prefix = None
        if worlds == "student's":  # the first 7 chunks are Stage 1's own
            first, own = nets["stage1"]
            text, none, grid = conditions(first, encoder, tae, which, 0, device)
            roll = Rollout(first, text, PRESETS["slowfast"], grid, pool=own.pool)
            prefix, given = torch.cat(list(generate(roll, [w[0] for w in which], 7, own, none.shape[2:])), 1), 0
        video, keep = teacher_continuations(dit, encoder, tae, which, given, blocks, sampler, device, prefix=prefix)
        return video, keep, PRESETS["uniform2"], 7 if worlds in ("prefix", "student's") else 0
    policy = replace(PRESETS[memory], tau=sampler.tau)
    given = GIVEN if worlds == "real" else 0
    chunks = 161 if worlds == "long" else chunks - 17 * (given > 0 and chunks > 60)  # 120 s; 50 s behind 10 s that are real
    return *continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, positions=positions), policy, given


def measure(frames, caption, keep, policy, given):
    """
    One video -> its line of the CSV: dict of numbers and lists. Lists are by 10 s (psnr, box, sky, floor), by TIMES
    (agreement), or one entry an event: seconds of absence, right, as at first sight, held, second in which it was due back.
    """
    r, start = world.judge(frames), frames_of(given * CHUNK) if given else 0
    spans = [slice(i, i + 160) for i in range(start, len(frames) - 159, 160)] or [slice(start, len(frames))]
    here = range(start, len(frames), 8)
    ground = np.bincount(r.ground[start:start + 16]).argmax()
    drawn = world.render(world.panorama(int(ground), ()), r.heading[here])  # sky and floor as they should look there
    off = (frames[here] / np.float32(255) - drawn) ** 2
    sky, floor = (100 * np.sqrt(part.mean((1, 2, 3))) for part in (off[:, :, :world.TOP], off[:, :, world.FOOT + 1:]))
    sure, path = r.sure, world.track(r.heading)
    first = np.where((sure >= 0).any(0), (sure >= 0).argmax(0), len(sure))
    same = []  # landmarks now against the first reading of their sector, if that is a second old
    for t in TIMES:
        now = slice(max(0, t * world.FPS - 8), t * world.FPS + 8)
        seen = (sure[now] >= 0) & (first < now.start - world.FPS)
        same.append(float((sure[now] == sure[np.minimum(first, len(sure) - 1), range(8)])[seen].mean()) if seen.any() else None)
    asked = world.parse_caption(caption)[1].heading(path[0], np.arange(len(path)))

    def flips(x):
        pace = (x[world.FPS:] - x[:-world.FPS])[::world.FPS]
        side = np.sign(pace[np.abs(pace) > world.STILL])
        return int((side[1:] != side[:-1]).sum())
    jumps = np.flatnonzero(np.abs(np.diff(path)) > 15 / 360 * world.COLUMNS)
    votes = [np.bincount(s[s >= 0], minlength=24) for s in sure.T]
    return {"psnr": [r.psnr[s].mean() for s in spans], "box": [np.nanmean(r.box_psnr[s]) for s in spans],
            "sky": [sky[(s.start - start) // 8:(s.stop - start) // 8].mean() for s in spans],
            "floor": [floor[(s.start - start) // 8:(s.stop - start) // 8].mean() for s in spans], "agreement": same,
            "map": [int(v.argmax()) if v.any() else -1 for v in votes], "turning": world.turning_rate(r, caption),
            "frozen": float((r.kind == "frozen").mean()), "jumps": len(jumps), "reversals": abs(flips(path) - flips(asked)),
            "snaps": int((np.abs(world.wrap(path[jumps + 1] - path[0])) < 4).sum()), "seconds": len(frames) / world.FPS,
            "events": [[e.seconds, int(e.recall), int(e.drift), int(h), (e.back - start) / world.FPS]
                       for e, h in returns(r, caption, keep, policy, given)]}


def make_rows(cfg, todo, nets, marks, device):
    """Makes what is not in the CSV yet, 16 videos at a time -> all lines, by job: list of dicts in the order of seeds"""
    number, chunks = cfg.worlds or (16 if cfg.quick else 64), 41 if cfg.quick else 84
    out, rows, started = Path(cfg.out), {}, time.time()
    path = out / ("evaluate_quick.csv" if cfg.quick else "evaluate.csv")
    (out / "strips").mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    for line in csv.DictReader(open(path)) if not fresh else ():
        if line["mark"] == marks.get(line["weights"]):
            job = tuple(line[k] for k in ("weights", "memory", "positions", "worlds"))
            rows.setdefault(job, {})[int(line["seed"])] = json.loads(line["found"])
    heldout = [(world.HELD_OUT + cfg.seed + i, None, None) for i in range(number)]
    batches = []
    for job in todo:
        which = reach_worlds(number) if job[3] == "reach" else heldout[:number // 4] if job[3] in ("long", "few") else heldout
        which = [w for w in which if w[0] not in rows.get(job, {})]
        batches += [(job, which[i:i + BATCH]) for i in range(0, len(which), BATCH)]
    with open(path, "a", newline="") as f:
        writer = csv.writer(f)
        if fresh:
            writer.writerow(["mark", "weights", "memory", "positions", "worlds", "seed", "caption", "found"])
        for job, which in tqdm(batches, desc="videos, 16 at a time", disable=not batches):
            if 0 < cfg.minutes < (time.time() - started) / 60:
                print("stopped by --minutes: run again for the other videos")
                break
            frames, keeps, policy, given = make(job, nets, which, chunks, device)
            for w, video, keep in zip(which, frames, keeps):
                caption = world.world(*w).caption
                found = measure(video, caption, keep, policy, given)
                rows.setdefault(job, {})[w[0]] = found
                writer.writerow([marks[job[0]], *job, w[0], caption, json.dumps(found, default=float)])
            f.flush()
            strip = out / "strips" / ("_".join(job).replace("'", "") + ".png")
            if which[0] == heldout[0]:
                iio.imwrite(strip, np.concatenate([x for x in frames[0][::160].transpose(0, 2, 3, 1)], 1))
    return {job: [lines[s] for s in sorted(lines)] for job, lines in rows.items()}


# ---- numbers with intervals -----------------------------------------------------------------------------------------------

def ratio(pairs, draws=2000):
    """pairs: one (sum, count) a video -> sum / count over all videos, and its 95 % interval over resampled videos"""
    x = np.asarray(pairs, float).reshape(-1, 2)
    if not x[:, 1].sum():
        return np.nan, np.nan, np.nan
    total = x[np.random.default_rng(0).integers(len(x), size=(draws, len(x)))].sum(1)
    low, high = np.percentile((total[:, 0] / np.maximum(total[:, 1], 1e-9))[total[:, 1] > 0], (2.5, 97.5))
    return x[:, 0].sum() / x[:, 1].sum(), low, high


def better(ours, theirs, draws=2000):
    """Is the first ratio above the second, seed by seed? -> "yes", "no" or "not significant" (95 %, paired bootstrap)"""
    a, b = (np.asarray(p, float).reshape(-1, 2) for p in (ours, theirs))
    if len(a) != len(b) or not a[:, 1].sum() or not b[:, 1].sum():
        return "no data"
    i = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    x, y = a[i].sum(1), b[i].sum(1)
    low, high = np.nanpercentile(x[:, 0] / np.maximum(x[:, 1], 1e-9) - y[:, 0] / np.maximum(y[:, 1], 1e-9), (2.5, 97.5))
    return "yes" if low > 0 else "no" if high < 0 else "not significant"


def recalled(rows, seconds=None, what=1, until=1e9):
    """
    Per video (right, events). seconds: of absences within 10 % of that, None = all; what: 1 as before it left, 2 as at first,
    3 the ceiling; until: due back by that second
    """
    some = [[e for e in r["events"] if (seconds is None or abs(e[0] - seconds) <= .1 * seconds) and e[4] < until] for r in rows]
    return [(sum(e[what] for e in found), len(found)) for found in some]


def count(pairs):
    return sum(n for _, n in pairs)


def mean_of(rows, name, i=None):
    """Per video (value, 1) of a column, or of entry i of a list; missing ones (0, 0)"""
    values = [r[name] if i is None else r[name][i] if i < len(r[name]) else None for r in rows]
    return [(0, 0) if v is None or v != v else (v, 1) for v in values]


def chance(rows):
    """Agreement of the same sector between different videos (world.chance)"""
    return world.chance([SimpleNamespace(sure=np.array([r["map"]])) for r in rows])


def percent(pairs):
    """-> "48 [33, 62]" """
    mean, low, high = (100 * x for x in ratio(pairs))
    return "-" if mean != mean else f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def plain(pairs, digits=1):
    mean, low, high = ratio(pairs)
    return "-" if mean != mean else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def context_length(rows):
    """The absence at which recall falls half-way to chance, in seconds, between measured points; None: not within 30 s"""
    curve = [(s, ratio(recalled(rows, s))[0]) for s in ABSENCES if count(recalled(rows, s)) >= 10]
    level = (curve[0][1] + chance(rows)) / 2 if curve else 0
    for (s0, r0), (s1, r1) in zip(curve, curve[1:]):
        if r1 < level <= r0:
            return s0 + (s1 - s0) * (r0 - level) / (r0 - r1)
    return None


# ---- tables and figures ---------------------------------------------------------------------------------------------------

def tables(rows, student, nets, device):
    """Markdown lines of every table whose videos are there. Recall in %, pictures in dB, [95 % interval]."""
    lines = []

    def table(title, head, body):
        if body:
            lines.extend(["", f"**{title}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"])
            lines.extend("| " + " | ".join(str(c) for c in b) + " |" for b in body)

    def of(memory, worlds, weights=student, positions="bounded"):
        return rows.get((weights, memory, positions, worlds), [])

    def both(memory, positions="bounded"):
        return of(memory, "text", positions=positions) + of(memory, "reach", positions=positions)

    def state(some):
        """Validity at the end and motion beside every consistency number: a frozen or broken video must not win."""
        last = ratio(mean_of(some, "psnr", len(some[0]["psnr"]) - 1))[0]
        return [f"{last:.1f}" + " (picture broken)" * int(last < BROKEN),
                percent([(abs(r["turning"] - 1) < .1, 1) for r in some]), f"{100 * np.mean([r['frozen'] for r in some]):.0f}"]

    def luck(some):
        return f"{100 * chance(some):.0f}"

    def by_time(some, name, cell=plain):
        return [cell(mean_of(some, name, i)) for i in range(len(TIMES))]

    checks = ["dB at the end", "turning within 10 %", "frozen, %"]
    table("After 10.3 s of real video: recall of landmarks outside the sink, %",
          ["memory", "chance", "6 s, due in 20 s", "6 s", "15 s", "all", "ceiling of all", "returns", *checks],
          [(m, luck(s), percent(recalled(s, 6, until=20)), percent(recalled(s, 6)), percent(recalled(s, 15)),
            percent(recalled(s)), percent(recalled(s, what=3)), count(recalled(s)), *state(s))
           for m in PRESETS if (s := of(m, "real"))])
    table("Validity by 10 s after that, dB (landmark boxes); copy: true worlds through the autoencoder alone",
          ["memory", *(f"{t - 10}-{t} s" for t in TIMES[:-1])],
          [(m, *(f"{ratio(mean_of(s, 'psnr', i))[0]:.1f} ({ratio(mean_of(s, 'box', i))[0]:.1f})"
                 for i in range(min(5, len(s[0]["psnr"]))))) for m in (*PRESETS, "copy")
           if (s := of(m, "real") or of("copy", "few", "vae", "own") * (m == "copy"))])
    curves = [(m, p, s) for p in ("bounded", "unbounded") for m in PRESETS if of(m, "reach", positions=p) and (s := both(m, p))]
    table("Figure 1, forgetting: recall in % by seconds of absence (ceiling; returns)",
          ["memory", "positions", "chance", *(f"{s:g} s" for s in ABSENCES), *checks],
          [(m, p, luck(s), *(f"{100 * ratio(x)[0]:.0f} ({100 * ratio(recalled(s, a, 3))[0]:.0f}; {count(x)})"
                             if count(x := recalled(s, a)) else "-" for a in ABSENCES), *state(s)) for m, p, s in curves])
    table("Is slowfast better there? (paired over videos)", ["than", *(f"{s:g} s" for s in ABSENCES)],
          [(m, *(better(recalled(both("slowfast"), a), recalled(s, a)) for a in ABSENCES))
           for m, p, s in curves if p == "bounded" and m != "slowfast"])
    for name, what in (("psnr", "validity, dB"), ("sky", "sky off its colour, %"), ("floor", "ground off its colour")):
        table(f"Figure 1, drifting: {what}", ["memory", *(f"{t - 10}-{t} s" for t in TIMES)],
              [(m, *by_time(s, name)) for m in ("longlive", "longlive21", "slowfast") if (s := of(m, "text"))])
    lengths = {m: f"{c:.1f} s" if (c := context_length(both(m))) else "-" for m in PRESETS if of(m, "text")}
    table("Table 1: landmarks as first read, %; context length (absence at which recall is half-way to chance; - if it never is)",
          ["memory", *(f"{t} s" for t in TIMES), "context length", "paper", *checks],
          [(m, *by_time(s, "agreement", percent), lengths[m], CONTEXT.get(m, "-"), *state(s))
           for m in PRESETS if (s := of(m, "text"))])
    models = [(w, s) for w in ("base", "init_ar", "init_ode", "stage1", "stage2_none", "stage2")
              if (s := of("teacher", "first", w, "own") if w == "base" else of("slowfast", "text", w))]
    models += [(student, s) for s in [of("slowfast", "long")] if s]
    table("Table 2: models, from text; base makes 5 s",
          ["weights", "seconds", "M parameters", "frames/s", "first 10 s, dB", "boxes", "last 10 s, dB", "boxes", *checks[1:],
           "landmarks' entropy (1: all as often)"],
          [(w, f"{s[0]['seconds']:.0f}", f"{sum(p.numel() for p in nets[w][0].parameters()) / 1e6:.2f}",
            "-" if w == "base" else speed(*nets[w], nets, device),
            *(plain(mean_of(s, k, i)) for i in (0, len(s[0]["psnr"]) - 1) for k in ("psnr", "box")), *state(s)[1:],
            f"{balance(s):.2f}") for w, s in models])
    ours = of("slowfast", "text")
    ablations = [("uniform 1", of("uniform1", "text")), ("uniform 2", of("uniform2", "text")),
                 ("Stage 1 + memory, no CDMD", of("slowfast", "text", "stage1")),
                 ("memoryless teacher", of("slowfast", "text", "stage2_none")),
                 ("unbounded positions", of("slowfast", "text", positions="unbounded")), (f"surprisal, {student}", ours)]
    table("Table 3: ablations, from text", ["row", "recall, all", "as first read at 60 s", *checks, "is ours better?"],
          [(name, percent(recalled(s)), percent(mean_of(s, "agreement", 5)), *state(s),
            "" if s is ours else better(recalled(ours), recalled(s))) for name, s in ablations if s])
    table("The teacher: 5 s after a real prefix and after Stage 1's own; 31 s from text, with ERFT and without (figure 7)",
          ["weights", "prefix", "recall, all", "returns", "dB by 10 s"],
          [(w, k, percent(recalled(s)), count(recalled(s)),
            ", ".join(plain(mean_of(s, "psnr", i)) for i in range(len(s[0]["psnr"]))))
           for w in ("teacher", "teacher_plain") for k in ("prefix", "student's", "text") if (s := of("teacher", k, w, "own"))])
    table("Figure 8: a minute has so many", ["memory", "positions", "jumps over 15 degrees", "of those, to the first view",
                                             "reversals too many or too few"],
          [(m, p, *(plain([(60 * r[k], r["seconds"]) for r in s], 2) for k in ("jumps", "snaps", "reversals")))
           for p in ("bounded", "unbounded") for m in PRESETS if (s := of(m, "text", positions=p))])
    return lines


def speed(dit, sampler, nets, device, chunks=24):
    """Frames a second of one video, 24 chunks, decoding included"""
    started = time.time()
    continuations(dit, nets["text"], nets["vae"], [(world.HELD_OUT, None, None)], 0, chunks, PRESETS["slowfast"], sampler, device)
    return f"{frames_of(chunks * CHUNK) / (time.time() - started):.0f}"


def balance(rows):
    """Entropy of the 24 landmarks over all videos and sectors, 1 = all equally often"""
    p = np.bincount([m for r in rows for m in r["map"] if m >= 0], minlength=24) + 1e-9
    p = p / p.sum()
    return -(p * np.log(p)).sum() / np.log(24)


def figures(rows, student, out):
    """forgetting.png, drifting.png (matplotlib), strips.png: PNGs of at most 200 KB -> names of those written"""
    strips = [(m, out / "strips" / f"{student}_{m}_bounded_text.png") for m in PRESETS]
    pictures = [iio.imread(p) for _, p in strips if p.exists()]
    if pictures:
        wide = min(p.shape[1] for p in pictures)
        iio.imwrite(out / "strips.png", np.concatenate([np.pad(p[:, :wide], ((0, 2), (0, 0), (0, 0))) for p in pictures]))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures: pip install matplotlib")
        return
    fig, ax = plt.subplots(figsize=(7, 4), dpi=110)
    for i, m in enumerate(PRESETS):
        some = rows.get((student, m, "bounded", "text"), []) + rows.get((student, m, "bounded", "reach"), [])
        points = [(a, *ratio(x), ratio(recalled(some, a, 3))[0]) for a in ABSENCES if count(x := recalled(some, a)) >= 5]
        if points:
            a, mean, low, high, ceiling = 100 * np.array(points).T
            ax.plot(a / 100, mean, "o-", color=f"C{i}", label=m, markersize=3)
            ax.fill_between(a / 100, low, high, color=f"C{i}", alpha=.12)
            ax.plot(a / 100, ceiling, "--", color=f"C{i}", linewidth=.7)
            ax.axhline(100 * chance(some), color=f"C{i}", linewidth=.5, linestyle=":")
    ax.set(xlabel="seconds out of view", ylabel="right returns, %", ylim=(0, 100), title="dashed: still held; dotted: chance")
    drift, axes = plt.subplots(1, 3, figsize=(10, 3), dpi=110)
    for each, name, what in zip(axes, ("psnr", "sky", "floor"), ("validity, dB", "sky off, %", "ground off, %")):
        for m in ("longlive", "longlive21", "slowfast"):
            if some := rows.get((student, m, "bounded", "text")):
                curve = [ratio(mean_of(some, name, i))[0] for i in range(len(some[0][name]))]
                each.plot(TIMES[:len(curve)], curve, label=m)
        each.set(xlabel="seconds", title=what)
    for name, figure, legend in (("forgetting", fig, ax), ("drifting", drift, axes[0])):
        if legend.get_legend_handles_labels()[0]:
            legend.legend(fontsize=7)
            figure.tight_layout()
            figure.savefig(out / f"{name}.png")


# ---- real metrics on real videos ---------------------------------------------------------------------------------------

SECONDS = (10, 20, 30, 40, 50, 60)  # where the paper reads its scores, from 0.5 s before to 0.5 s after
NETWORKS = {  # where to get one; its kinds; resizing, mean and deviation of red, green, blue as in VBench
    "--dino": ("facebook/dinov2-base", ("vit", "dinov2"), "bilinear", (.485, .456, .406), (.229, .224, .225)),
    "--clip": ("openai/clip-vit-large-patch14", ("clip",), "bicubic",
               (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))}


def read_batches(path):
    """Yields (frames a second, (b, 3, h, w) uint8), 16 frames at a time. Raises OSError that says why it cannot."""
    import imageio_ffmpeg
    try:
        facts = next(source := imageio_ffmpeg.read_frames(str(path.resolve())))
        while batch := [np.frombuffer(f, np.uint8).reshape(*facts["size"][::-1], 3) for _, f in zip(range(16), source)]:
            yield facts["fps"], torch.from_numpy(np.stack(batch)).movedim(-1, 1)  # (b, 3, h, w)
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise OSError((str(error).strip() or "no video").splitlines()[-1][:100]) from None


def encoders(option, folder, device):
    """
    A network of transformers, from a local folder -> two functions to features of norm 1, a name. Raises BadInput
    images  (b, 3, h, w) uint8 -> (b, d), the CLS token at 224 pixels' shorter side or CLIP of the middle square; text -> (d,)
    """
    get, kinds, mode, *colours = NETWORKS[option]
    try:
        import transformers
        path, clip = Path(folder).resolve(strict=True), option == "--clip"
        model, facts = transformers.AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        one_of("network", model.config.model_type, kinds)
        words = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if clip else None
        if lost := [k for k in facts["missing_keys"] if not k.startswith("pooler.")]:  # DINO's has none, none is used
            raise OSError(f"{len(lost)} weights are missing, as {lost[0]}")  # transformers would go on with random ones
    except Exception as error:  # whatever the damage makes it meet
        raise BadInput(f"cannot use {option} {folder} ({(str(error).strip() or repr(error)).splitlines()[0][:150]}): "
                       f"pip install -r requirements-eval.txt, hf download {get} --local-dir {folder}") from None
    model, c = model.to(device).eval(), model.config.vision_config if clip else model.config
    mean, std = (torch.tensor(z, device=device)[:, None, None] for z in colours)
    side, more = c.image_size if clip else 224, {"interpolate_pos_encoding": True} if c.model_type == "vit" else {}

    def images(frames):
        size = [int(side * n / min(frames.shape[-2:])) for n in frames.shape[-2:]]
        x = (F.interpolate(frames.to(device).float(), size, mode=mode) / 255 - mean) / std  # not antialiased, as VBench's
        if not clip:
            return F.normalize(model(x, **more).last_hidden_state[:, 0]).cpu()
        top, left = (round((n - side) / 2) for n in size)
        x = model.vision_model(x[..., top:top + side, left:left + side]).pooler_output
        return F.normalize(model.visual_projection(x)).cpu()

    def text(string):
        ids = words(string, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt")
        return F.normalize(model.text_projection(model.text_model(**ids.to(device)).pooler_output))[0].cpu()
    return images, text, f"{c.model_type}, width {c.hidden_size}, {c.num_hidden_layers} layers, patch {c.patch_size}"


def consistency(features):
    """(n, d) of norm 1 -> mean over i >= 1 of [max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))] / 2: VBench, arXiv 2311.17982"""
    near, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return ((near.clip(0) + first.clip(0)) / 2).mean().item()  # one frame has no pair: nan


def windows(name, cosines, fps):
    """(n,), of every frame -> {name_t: mean from t - 0.5 s to t + 0.5 s or the end; nan after it}: arXiv 2602.06028, table 1"""
    return {f"{name}_{t}": cosines[(torch.arange(len(cosines)) / fps - t).abs() <= .5 + 1e-5].mean().item() for t in SECONDS}


def dynamic(small, fps):
    """
    Dynamic degree, APPROXIMATE: VBench's rule with block matching at 64 pixels for its network RAFT -> bool. A pair 1/8 s apart
    moves if its fastest 5 % do more than 6/256 of the shorter side; a video, if pairs as many as a quarter of its samples do.
    small: (n, 64, w) grey, 0..255. A pixel moves by the shift of up to 4 at which its 7 x 7 fits best
    """
    lengths, small, moving = torch.cartesian_prod(*[torch.arange(-4., 5)] * 2).norm(dim=1), small[::max(1, round(fps / 8))], 0
    for a, b in zip(small.float(), small[1:].float()):
        shifted = F.pad(b[None], (4, 4, 4, 4), mode="replicate")[0].unfold(0, len(b), 1).unfold(1, b.shape[1], 1)
        costs = F.avg_pool2d((shifted - a).abs().flatten(0, 1), 7, 4, 3)  # (81, h/4, w/4)
        costs[40] -= 2  # for staying: noise stands still
        moving += int(lengths[costs.argmin(0)].flatten().topk(costs[0].numel() // 20 + 1).values.mean() > 1.5 * max(1, 8 / fps))
    return moving >= max(1, round(len(small) / 4))


def score_video(path, images, text):
    """A row of the CSV, with plain cosines. images: dino, clip -> encoder, either may be absent; text (d,). Raises OSError"""
    images = {"grey": lambda z: F.interpolate(z.float(), scale_factor=64 / min(z.shape[2:]), mode="area").mean(1).byte()} | images
    parts = [(fps, {name: f(frames) for name, f in images.items()}) for fps, frames in read_batches(path)]
    fps, got = parts[0][0], {name: torch.cat([part[name] for _, part in parts]) for name in images}  # some kB a frame
    row = {"video": path.name, "frames": len(got["grey"]), "fps": fps, "dynamic_approx": int(dynamic(got["grey"], fps))}
    if "dino" in got:
        row |= {"subject": consistency(f := got["dino"])} | windows("dino", f @ f[0], fps)
    if "clip" in got:
        row |= {"background": consistency(f := got["clip"])} | windows("clip_f", f @ f[0], fps) | windows("clip_t", f @ text, fps)
    return row


def lay_out(prompts, to):
    """Links videos, path -> text, as to/videos/TEXT-0.mp4, .. and writes to/prompts.json -> VBench's command"""
    names = {}
    (to / "videos").mkdir(parents=True)
    for path, text in prompts.items():
        stem = re.sub(r"[/\s]+", " ", text).encode()[:200].decode(errors="ignore")  # file systems take 255 bytes
        names[name := next(z for i in range(len(prompts)) if (z := f"{stem}-{i}{path.suffix}") not in names)] = text
        (to / "videos" / name).symlink_to(path.resolve())
    (to / "prompts.json").write_text(json.dumps(names, indent=1))
    return (f"python evaluate.py --mode custom_input --videos_path '{to}/videos' --prompt_file '{to}/prompts.json' --dimension"
            " subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality")


@torch.no_grad()
def real_videos(cfg):
    """python evaluate.py --videos DIR: every mp4 and gif there -> out/videos.csv, a table, VBench's layout"""
    paths = sorted(p for p in Path(cfg.videos or ".none").glob("*") if p.suffix in (".mp4", ".gif") and p.name[0] != ".")
    if not paths:
        raise BadInput(f"no mp4 or gif in --videos {cfg.videos or 'DIR'}: python sample.py --prompts FILE --seeds 5 makes some")
    if not cfg.dino + cfg.clip + cfg.vbench:
        raise BadInput(f"give --dino DIR, --clip DIR: pip install -r requirements-eval.txt; hf download {NETWORKS['--dino'][0]}")
    if cfg.vbench and Path(cfg.vbench, "videos").exists():
        raise BadInput(f"--vbench {cfg.vbench} holds videos already: give a new folder")
    try:  # a JSON, name with or without -N.mp4 -> text; or the lines that sample.py took, which names its files so
        told = Path(cfg.prompts).read_text(encoding="utf-8") if cfg.prompts else ""
        given = json.loads(told) if cfg.prompts.endswith(".json") else {
            re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")[:120]: line.strip() for line in told.splitlines()}
        stems = {p: re.sub(r"-\d+$", "", p.stem) for p in paths}
        prompts = {p: str(given[p.name if p.name in given else s]) for p, s in stems.items()} if cfg.prompts else stems
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"--prompts {cfg.prompts} must hold a text for every video: {error!r}") from None
    images, texts, rows = {}, {}, []
    for option, folder in [z for z in (("--dino", cfg.dino), ("--clip", cfg.clip)) if z[1]]:
        images[option[2:]], text, name = encoders(option, folder, pick_device(cfg.device))
        texts = {t: text(t) for t in set(prompts.values())} if option == "--clip" else {}
        print(f"{option} {folder}: {name}")
    for path in tqdm(paths, desc="videos"):
        try:
            rows.append(score_video(path, images, texts.get(prompts[path])) | {"prompt": prompts[path]})
        except OSError as error:
            tqdm.write(f"skipped {path.name}: {error}")
            del prompts[path]
    if not rows:
        raise BadInput(f"none of the {len(paths)} files in {cfg.videos} can be read")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out) / "videos.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *(r.values() for r in rows)])
    print(f"\n{len(rows)} of {len(paths)} videos: mean times 100 [95 % bootstrap interval over videos] (videos so long)")
    for name in list(rows[0])[3:-1]:  # without video, frames, fps; prompt
        weights = [r["frames"] - 1 if name in ("subject", "background") else 1 for r in rows]  # as in VBench's totals
        there = np.array([(r[name], w) for r, w in zip(rows, weights) if r[name] == r[name]], float)
        mean, low, high = 100 * np.array(ratio(there * there[:, 1:] ** [1, 0])) if len(there) else [np.nan] * 3
        print(f"  {name:14} {mean:6.2f} [{low:.2f}, {high:.2f}] ({len(there)})")
    if cfg.vbench:
        print(f"\nin VBench's repository (github.com/Vchitect/VBench):\n{lay_out(prompts, Path(cfg.vbench).resolve())}")


def main():
    cfg = parse(Config)
    if cfg.videos or cfg.dino or cfg.clip or cfg.prompts or cfg.vbench:
        return real_videos(cfg)
    device, started, out = pick_device(cfg.device), time.time(), Path(cfg.out)
    if cfg.memory:
        one_of("--memory", cfg.memory, PRESETS)
    if cfg.worlds < 0 or not 0 <= cfg.minutes < 1e6:
        raise BadInput(f"--worlds and --minutes must be above 0, not {cfg.worlds}, {cfg.minutes}")
    files = {w: WEIGHTS / f"{w}.safetensors" for w in ("vae", "base", "teacher", "teacher_plain", "init_ar", "init_ode", "stage1",
                                                       "stage2_none", "stage2")}
    files = {w: f for w, f in files.items() if f.exists()}
    student = STUDENT
    if cfg.ckpt:
        student, files = Path(cfg.ckpt).stem, files | {Path(cfg.ckpt).stem: Path(cfg.ckpt)}
    nets = {"text": load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)[0].to(device),
            "vae": load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)[0].to(device, memory_format=torch.channels_last)}
    marks = {w: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:8] for w, f in files.items()}
    for w, f in files.items():
        if w == "vae":
            continue
        dit, facts = load(f, DiT, DiTConfig)
        nets[w] = dit.to(device), Sampler(**facts["sampler"])
    todo = jobs(student, cfg.quick, cfg.memory)
    lacking = sorted({j[0] for j in todo} - set(files)) + ["stage1"] * ("stage1" not in files)
    if lacking:
        print("no weights, so no rows for: " + ", ".join(dict.fromkeys(lacking)))
    todo = [j for j in todo if j[0] in files and (j[3] != "student's" or "stage1" in files)]
    rows = make_rows(cfg, todo, nets, marks, device)
    lines = tables({j: s for j, s in rows.items() if j in todo}, student, nets, device)
    if not cfg.memory:
        dit, sampler = nets[student]
        g = gates(dit, nets["text"], nets["vae"], sampler, device, 8 if cfg.quick else 24)
        lines += ["", f"Worlds that turn once in 8 or 9 s, 10.3 s real, {g['n']} returns in 4 s: recall {g['recall']:.0%}, "
                  f"chance {g['chance']:.0%}; memory encoded as one pack {g['packed']:.0%}; slow memories exchanged: "
                  f"{g['follows']:.0%} follow the memory, {g['stays']:.0%} stay"]
    lines += ["", f"{student}; {time.time() - started:.0f} s"]
    (out / ("evaluate_quick.md" if cfg.quick else "evaluate.md")).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figures(rows, student, out)


if __name__ == "__main__":
    run(main)
