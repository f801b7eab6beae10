"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # all tables and figures; run it again to go on after a stop
    python evaluate.py --quick                    # 16 worlds, 30 s, three policies: minutes
    python evaluate.py --quick --memory window    # one policy only: change it in memory.py and see its curve
    python evaluate.py --videos DIR --dino DIR    # the paper's and VBench's scores of real videos

Every set of videos is one job: weights, memory, positions, and which worlds. Each video leaves one line in out/evaluate.csv
with all that the tables need, so a table costs nothing once its videos were made. Intervals are 95 % bootstraps over videos,
paired where two rows share seeds. One training seed a row: intervals do not tell what another training would give.

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3. Leaves out: DINO and CLIP on the small world.
"""
import csv
import hashlib
import inspect
import json
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import judge
import world
from config import STUDENT, BadInput, fast_autocast, one_of, parse, pick_device, run
from data import encode_world, frames_of
from erft import TARGET, extend, predict_velocity
from flow import Rollout, Sampler, add_noise, draw_noise, generate
from memory import CHUNK, PRESETS, Policy, frames_in_memory
from model import DiT, DiTConfig
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig
from weights import WEIGHTS, load
from world import WorldSpec

GIVEN = 14                            # chunks of real history: 42 latents, 165 frames, 10.3 s
BATCH = 16                            # videos made together
ABSENCES = (1, 2, 3, 4.5, 6, 9, 12, 15, 16.5, 18, 21, 24, 30)  # seconds, each within 10 %
SECONDS = (10, 20, 30, 40, 50, 60)    # where the paper reads its scores, from 0.5 s before to 0.5 s after
SHORT = 2                             # seconds: fast memory bridges less, and a camera that wobbles makes many such returns
BROKEN = 18                           # dB: below this a picture is broken, and its consistency means nothing


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
    clip: str = ""       # for them: a folder with CLIP (frame to frame, frame to text; ViT-B/32: VBench's background)
    prompts: str = ""    # for them: a .json, name -> prompt, or the file of lines that sample.py took (default: the file names)
    vbench: str = ""     # for them: a new folder to lay them out in for VBench's own code


# ---- videos -------------------------------------------------------------------------------------------------------------

def conditions(dit, encoder, tae, which, given, device):
    """-> text keys and values of the captions, real first chunks as latents (b, 3 given, ...), grid"""
    ids, mask = (z.to(device) for z in bytes_to_ids([world.make_world(w).caption for w in which], dit.config.text_len))
    latent = dit.config.channels, world.HEIGHT // 8, world.WIDTH // 8
    none = torch.zeros(len(which), 0, *latent, device=device)
    real = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which]) if given else none
    return dit.text(encoder(ids, mask)), real, (latent[1] // dit.config.patch[0], latent[2] // dit.config.patch[1])


def draw(tae, z):
    """
    Latents (b, n, 16, 4, 8) -> frames (b, f, 3, 32, 64) uint8, decoded a chunk at a time; in bf16 where that is fast: validity
    moves by 0.02 dB. The models themselves run in float32, as in sample.py.
    """
    frames, past = [], None
    for chunk in z.split(CHUNK, 1):
        with fast_autocast(z.device):
            video, past = tae.decode(chunk, past)
        frames.append((video * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy())
    return np.concatenate(frames, 1)


@torch.no_grad()
def continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, noise=0, positions="bounded", swap=False):
    """
    Real first chunks of the worlds of `which`, a list of WorldSpec, then the model's own.
    swap     the first half of the worlds and the second exchange their slow memories before going on
    returns  frames (b, f, 3, 32, 64) uint8, the real part decoded too; keep (b, given + chunks) bool
    """
    text, history, grid = conditions(dit, encoder, tae, which, given, device)
    roll = Rollout(dit, text, policy, grid, positions, sampler.pool)
    seeds, latent = [noise + w.seed for w in which], history.shape[2:]
    list(generate(roll, seeds, 0, sampler, latent, history=history if given else None))
    if swap:
        roll.memory.evict(CHUNK)
        roll.memory.slow = roll.memory.slow.apply(lambda x: torch.cat(x.chunk(2)[::-1]))
    z = torch.cat([history, *generate(roll, seeds, chunks, sampler, latent)], 1)
    return draw(tae, z), torch.stack(roll.kept, 1).cpu()


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
        z = torch.cat([z, extend(dit, past, text, grid, sampler, [w.seed for w in which])], 1)
    return draw(tae, z), torch.arange(z.shape[1] // CHUNK).expand(len(z), -1) % 2 == 0


def returns(reading, caption, keep, policy, given):
    """Events that fall due in the model's own part, outside the sink -> list of (event, was it held)."""
    contexts = frames_in_memory(policy, keep[None])
    own = [e for e in judge.events(reading, caption) if e.back >= frames_of(given * CHUNK) * (given > 0) and not e.sink]
    return [(e, judge.held(e, reading, contexts[min(judge.chunk_of(e.back), len(contexts) - 1)][0].tolist())) for e in own]


# ---- while a network is trained: does it remember, does its teacher use the past? -------------------------------------------

def held_out(n):
    """n worlds that turn once in 8 or 9 s: with 10 s of each given, returns are due after 5.4 or 6.1 s."""
    return [WorldSpec(world.HELD_OUT + i, "turn", 8 + i % 2) for i in range(n)]


def probe(net, encoder, tae, which, sampler, device, shuffle=None):
    """
    10 s of every held-out world of `which` are given, then net goes on; the judge reads what it made.
    shuffle  None for a causal network; False for a teacher, True if it shall go on from another world's past
    returns  dict: recall (share of the returning landmarks that are right), ceiling (share that memory still showed), chance,
             number of returns, validity (dB to the nearest frame that the world can draw)
    """
    policy = PRESETS["uniform2"]
    if shuffle is None:
        frames, keeps = continuations(net, encoder, tae, which, GIVEN, 5, policy, sampler, device)
    else:
        frames, keeps = teacher_continuations(net, encoder, tae, which, GIVEN, 1, sampler, device, shuffle)
    readings, found, psnr = [judge.read_video(f) for f in frames], [], []
    for w, r, keep in zip(which, readings, keeps):
        found += returns(r, world.make_world(w).caption, keep, policy, GIVEN)
        psnr.append(r.psnr[frames_of(GIVEN * CHUNK):].mean())
    return {"recall": float(np.mean([e.recall for e, _ in found] or [0])),
            "ceiling": float(np.mean([h for _, h in found] or [0])), "chance": judge.chance(readings),
            "returns": len(found), "validity": float(np.mean(psnr))}


@torch.no_grad()
def gates(teacher, encoder, tae, which, sampler, device):
    """Does the teacher use its context? Recall and loss at t = 0.7, and both with another world's past beside them -> dict"""
    text, z, grid = conditions(teacher, encoder, tae, which, GIVEN + TARGET // CHUNK, device)
    src = frames_in_memory(PRESETS["uniform2"], torch.arange(GIVEN)[None] % 2 == 0, evict_first=False)[-1][0]
    context, x0, found = z[:, src], z[:, GIVEN * CHUNK:], {}
    at, eps = torch.full(x0.shape[:2], .7, device=device), draw_noise(range(len(which)), 0, 0, x0.shape[1:], device)
    for name, past, shuffle in (("", context, False), ("shuffled_", context.roll(1, 0), True)):
        v = predict_velocity(teacher, past, add_noise(x0, eps, at), at, text, grid)
        numbers = probe(teacher, encoder, tae, which, sampler, device, shuffle)
        found |= {f"teacher_{name}loss": F.mse_loss(v, eps - x0).item(), f"teacher_{name}recall": numbers["recall"]}
    return found | {"teacher_chance": numbers["chance"]}


# ---- jobs: which videos are made ----------------------------------------------------------------------------------------

def reach_worlds(number):
    """
    Held-out worlds in which something is due back after each of ABSENCES in turn: looks aside up to 6 s, steady turns from
    6 s, turns that linger from 12 s. -> list of WorldSpec
    """
    found, seed = [], world.HELD_OUT + 10_000
    while len(found) < number:
        w, seconds, seed = world.make_world(WorldSpec(seed)), ABSENCES[len(found) % len(ABSENCES)], seed + 1
        if w.motion.kind in ["aside"] * (seconds <= 6) + ["turn"] * (seconds >= 6) + ["linger"] * (seconds >= 12):
            far = np.abs(world.offsets(w.motion.heading(w.start, np.arange(frames_of(252)))))
            for sector in far.T[far[:9].min(0) > world.WHOLE]:  # those that no sink holds
                away = np.diff(np.cumsum(sector > world.GONE)[sector < world.WHOLE - 1]) / world.FPS
                if (np.abs(away - seconds) <= .1 * seconds).any():
                    found.append(WorldSpec(seed - 1))
                    break
    return found


def worlds_of(name, number, seed):
    """
    A set of held-out worlds -> list of WorldSpec. "turns", "swapped": they turn once in 8 or 9 s, and a batch holds 8
    worlds and their twins, the same places and motions with other landmarks.
    """
    first, pairs = world.HELD_OUT + seed, number // 2
    if name == "reach":
        return reach_worlds(number)
    if name in ("turns", "swapped"):
        return [WorldSpec(first + i, "turn", 8 + i % 2, twin) for start in range(0, pairs, BATCH // 2) for twin in (False, True)
                for i in range(start, min(start + BATCH // 2, pairs))]
    return [WorldSpec(first + i) for i in range(number // 4 if name == "long" else number)]


def jobs(student, quick, memory):
    """
    All sets of videos -> list of (weights, memory, positions, worlds). worlds: "text", "reach" from captions alone, "long" for
    120 s, "real" after 10.3 s of real video. Teacher: "first" 5 s, "text" 31 s, 5 s after 5 s of "prefix" (real) or "stage1"
    """
    def rows(memories, sets, positions="bounded", weights=(student,)):
        return [(w, m, positions, s) for w in weights for m in memories for s in sets]
    swaps = rows(["uniform2"], ["turns", "swapped"])
    if quick:
        return rows([memory] if memory else ["slowfast", "uniform2", "longlive"], ["reach", "real"]) + swaps * (not memory)
    found = rows(["slowfast", "longlive"], ["real", "text", "reach"]) + swaps
    found += rows(["slowfast"], ["text"], weights=["init_ar", "init_ode", "stage1", "stage2", "stage2_none"])
    found += rows(["teacher"], ["first"], "-", ["base"]) + rows(["teacher"], ["prefix", "stage1", "text"], "-", ["teacher"])
    found += rows(["teacher"], ["text"], "-", ["teacher_plain"]) + rows(["longlive21"], ["text"]) + rows(["slowfast"], ["long"])
    found += rows(["uniform2", "uniform1", "window", "infinity"], ["reach", "text"]) + rows(["slowfast"], ["text"], "unbounded")
    found += rows(["longlive", "infinity"], ["reach", "text"], "unbounded")  # a window's frames adjoin: both are the same to it
    return [j for j in dict.fromkeys(found) if not memory or j[1] == memory]


@lru_cache
def network(path, device):
    """A file of weights -> network, how it is sampled (None: text encoder, autoencoder). Read once a process."""
    kind = {"text": (TextEncoder, TextConfig), "vae": (TAE, TAEConfig)}.get(path.stem, (DiT, DiTConfig))
    net, facts = load(path, *kind)
    net = net.to(device, memory_format=torch.channels_last) if path.stem == "vae" else net.to(device)
    return net, Sampler(**facts["sampler"]) if kind[0] is DiT else None


@torch.no_grad()
def make(job, which, chunks, files, device):
    """
    The videos of one batch of a job. files: name of weights -> path
    returns  frames (b, f, 3, 32, 64) uint8, keep (b, chunks) bool, policy, number of chunks that were given
    """
    weights, memory, positions, worlds = job
    (dit, sampler), (encoder, _), (tae, _) = (network(files[w], device) for w in (weights, "text", "vae"))
    if memory == "teacher":  # 21 latents at a time, what it sees selected by the memory's own plan
        given, blocks, prefix = {"first": (0, 1, None), "text": (0, 6, None)}.get(worlds, (7, 1, None))
        if worlds == "stage1":  # the first 7 chunks are Stage 1's own
            first, own = network(files["stage1"], device)
            text, none, grid = conditions(first, encoder, tae, which, 0, device)
            roll = Rollout(first, text, PRESETS["slowfast"], grid, pool=own.pool)
            prefix = torch.cat(list(generate(roll, [w.seed for w in which], given, own, none.shape[2:])), 1)
        video, keep = teacher_continuations(dit, encoder, tae, which, given, blocks, sampler, device, prefix=prefix)
        return video, keep, PRESETS["uniform2"], given
    policy, given = replace(PRESETS[memory], tau=sampler.tau), 0 if worlds in ("text", "reach", "long") else GIVEN
    chunks = {"long": 161, "real": min(chunks, 67), "turns": 5, "swapped": 5}.get(worlds, chunks)  # 120 s, 50 s, 4 s
    return *continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, positions=positions,
                          swap=worlds == "swapped"), policy, given


def measure(frames, caption, keep, policy, given):
    """
    One video -> its line of the CSV: dict of numbers and lists. psnr, box, sky, floor: an entry for 5 s of the model's own;
    agreement: for each of SECONDS, landmarks within 0.5 s against the map as first read; *_5: of the first 5 s; events: seconds
    of absence, right, as at first sight, held, second of the model's own in which it was due, sector, what was read
    """
    r, start, step, fps = judge.read_video(frames), frames_of(given * CHUNK) if given else 0, 5 * world.FPS, world.FPS
    spans = [slice(i, i + step) for i in range(start, len(frames) - step + 1, step)] or [slice(start, len(frames))]
    sure, path, ground = r.sure, judge.track(r.heading), np.bincount(r.ground[start:start + fps]).argmax()
    drawn = world.render(world.panorama(int(ground), ()), r.heading[::8])  # sky and floor as they should look there
    off = (frames[::8] / np.float32(255) - drawn) ** 2
    sky, floor = (100 * np.sqrt(part.mean((1, 2, 3))).repeat(8) for part in (off[:, :, :world.TOP], off[:, :, world.FOOT + 1:]))
    first, same = np.where((sure >= 0).any(0), (sure >= 0).argmax(0), len(sure) - 1), []
    for t in SECONDS:  # what was first read at least a second before
        now = slice(t * fps - fps // 2, t * fps + fps // 2)
        seen = (sure[now] >= 0) & (first < now.start - fps)
        same.append((sure[now] == sure[first, range(8)])[seen].mean() if seen.any() else None)

    def shown(readings):  # what each sector shows most, -1 for nothing
        votes = [np.bincount(s[s >= 0], minlength=24) for s in readings.T]
        return [int(v.argmax()) if v.any() else -1 for v in votes]

    def flips(x):
        pace = (x[fps:] - x[:-fps])[::fps]
        side = np.sign(pace[np.abs(pace) > judge.STILL])
        return int((side[1:] != side[:-1]).sum())
    asked = world.parse_caption(caption)[1].heading(path[0], np.arange(len(path)))
    jumps = np.flatnonzero(np.abs(np.diff(path)) > 15 / 360 * world.COLUMNS)
    return {"psnr": [r.psnr[s].mean() for s in spans], "box": [np.nanmean(r.box_psnr[s]) for s in spans],
            "sky": [sky[s].mean() for s in spans], "floor": [floor[s].mean() for s in spans], "agreement": same,
            "map": shown(sure), "map_5": shown(sure[:step]), "turning": judge.turning_rate(r, caption),
            "turning_5": judge.turning_rate(SimpleNamespace(heading=r.heading[:step]), caption), "seconds": len(frames) / fps,
            "frozen": float((r.kind == "frozen").mean()), "jumps": len(jumps), "reversals": abs(flips(path) - flips(asked)),
            "snaps": int((np.abs(world.wrap(path[jumps + 1] - path[0])) < 4).sum()),
            "events": [[e.seconds, int(e.recall), int(e.drift), int(h), (e.back - start) / fps, e.sector, e.read]
                       for e, h in returns(r, caption, keep, policy, given)]}


def batch(task):
    """Makes and measures one batch, in whatever process -> its lines of the CSV, none when the time is over"""
    (mark, *job), which, chunks, files, device, strip, until = task
    if time.time() > until:
        return []
    started = time.time()
    frames, keeps, policy, given = make(job, which, chunks, files, device)
    facts = {"fps": frames.shape[0] * frames.shape[1] / (time.time() - started),
             "parameters": sum(z.numel() for z in network(files[job[0]], device)[0].parameters())}
    if strip:  # of the first video: a frame every 10 s, every second of a short one
        some = frames[0, ::160 if frames.shape[1] > 320 else 16].transpose(0, 2, 3, 1)
        iio.imwrite(strip, np.concatenate(list(some), 1).repeat(2, 0).repeat(2, 1))
    captions = [world.make_world(w).caption for w in which]
    found = [json.dumps(measure(*z, policy, given) | facts, default=float) for z in zip(frames, captions, keeps)]
    return [[mark, *job, json.dumps(astuple(w)), *line] for w, *line in zip(which, captions, found)]


def read_lines(path):
    """The CSV -> (mark, *job) -> world -> what was measured"""
    found = {}
    for *key, w, _, line in list(csv.reader(path.read_text().splitlines()))[1:]:
        w = WorldSpec(*json.loads(w))
        found.setdefault(tuple(key), {})[w] = json.loads(line) | {"world": w}
    return found


def make_rows(cfg, todo, files, device):
    """
    Makes what is not in the CSV yet; on a CPU in as many processes as torch may use threads, which beats threads
    returns  job -> its lines in the order of worlds_of(): list of dicts. Lines of other weights or of a policy that has changed
             since have another mark and do not count
    """
    number, out, sets, tasks = cfg.worlds or (16 if cfg.quick else 64), Path(cfg.out), {}, []
    path, until = out / ("evaluate_quick.csv" if cfg.quick else "evaluate.csv"), time.time() + (60 * cfg.minutes or np.inf)
    (out / "strips").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text("mark,weights,memory,positions,worlds,world,caption,found\n")
    there, sums = read_lines(path), {w: hashlib.sha256(f.read_bytes()).hexdigest() for w, f in files.items()}
    for job in todo:
        facts = [sums[w] for w in ("vae", "text", job[0], *["stage1"] * (job[3] == "stage1"))]
        facts += [PRESETS.get(job[1]), inspect.getsource(Policy.should_keep)]
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8], *job
        sets[key] = worlds_of(job[3], number, cfg.seed)
        left = [w for w in sets[key] if w not in there.get(key, {})]
        for i in range(0, len(left), BATCH):
            strip = out / "strips" / ("_".join(job) + ".png") if left[i] == sets[key][0] else None
            tasks.append((key, left[i:i + BATCH], 41 if cfg.quick else 84, files, device, strip, until))
    workers = max(1, min(torch.get_num_threads(), len(tasks))) if device.type == "cpu" else 1
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    with pool, path.open("a", 1 << 20, newline="") as f:  # so large a buffer that a batch is written whole or not at all
        made = pool.map(batch, tasks) if workers > 1 else map(batch, tasks)
        for lines in tqdm(made, "videos, 16 at a time", len(tasks), disable=not tasks):
            csv.writer(f).writerows(lines)
            f.flush()
    there = read_lines(path)
    return {key[1:]: [there[key][w] for w in which if w in there.get(key, {})] for key, which in sets.items()}


# ---- numbers with intervals: pairs are (sum, count), one a video --------------------------------------------------------

def count(pairs):
    return sum(n for _, n in pairs)


def resampled(pairs):
    """(2000,) ratios of sums over resampled videos: the same draws for any two rows of as many videos, so they are paired"""
    x = np.asarray(pairs, float).reshape(-1, 2)
    total = x[np.random.default_rng(0).integers(len(x), size=(2000, len(x)))].sum(1)
    return np.divide(total[:, 0], total[:, 1], out=np.full(len(total), np.nan), where=total[:, 1] > 0)


def ratio(pairs):
    """-> sum / count over all videos, and its 95 % interval; nan if there is nothing to count"""
    mean = sum(x for x, _ in pairs) / (count(pairs) or np.nan)
    return mean, *(np.nanpercentile(resampled(pairs), (2.5, 97.5)) if count(pairs) else (np.nan, np.nan))


def better(ours, theirs):
    """Is the first ratio above the second, seed by seed? -> "yes", "no" or "not significant" (95 %, paired bootstrap)"""
    if len(ours) != len(theirs) or not count(ours) or not count(theirs):
        return "no data"
    low, high = np.nanpercentile(resampled(ours) - resampled(theirs), (2.5, 97.5))
    return "yes" if low > 0 else "no" if high < 0 else "not significant"


def recalled(rows, seconds=None, what=1, until=1e9):
    """
    Pairs (right, events). seconds: of absences within 10 % of that, None = all that are not SHORT; what: 1 as before it left, 2
    as at first, 3 the ceiling; until: due back by that second
    """
    def counts(away, due):
        return (away >= SHORT if seconds is None else abs(away - seconds) <= .1 * seconds) and due < until
    some = [[e for e in r["events"] if counts(e[0], e[4])] for r in rows]
    return [(sum(e[what] for e in found), len(found)) for found in some]


def followed(rows, twin):
    """Pairs of returns that show the landmark of the world (twin = 0) or of its twin (1), where the two differ"""
    pairs = []
    for r in rows:
        spec = r["world"]
        other = replace(spec, counterfactual=not spec.counterfactual)
        maps = [world.make_world(w).landmarks for w in (spec, other)]
        shown = [e[6] == maps[twin][e[5]] for e in r["events"] if maps[0][e[5]] != maps[1][e[5]]]
        pairs.append((sum(shown), len(shown)))
    return pairs


def chance(rows):
    """Agreement of the same sector between different videos (judge.chance)"""
    return judge.chance([SimpleNamespace(sure=np.array([r["map"]])) for r in rows])


def context_length(rows, what=1):
    """Seconds out of view at which recall falls from its best half-way to chance, between measured points; None: it does not"""
    curve = [(s, ratio(recalled(rows, s, what))[0]) for s in ABSENCES if count(recalled(rows, s)) >= 10]
    best = max(curve, key=lambda point: point[1], default=(0, 0))
    level, curve = (best[1] + chance(rows)) / 2, curve[curve.index(best):] if curve else []
    for (s0, r0), (s1, r1) in zip(curve, curve[1:]):
        if r1 < level <= r0:
            return round(s0 + (s1 - s0) * (r0 - level) / (r0 - r1), 2)
    return None


# ---- tables and figures: a column is a function of a row's videos -------------------------------------------------------

def show(pairs, scale=1):
    """-> "48 [33, 62]" with scale 100, "4.8 [3.3, 6.2]" with 1, "-" if there is nothing"""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*scale * np.array(ratio(pairs)), d=int(scale == 1)) if count(pairs) else "-"


def entries(name, start=0, stop=None):
    """-> function: videos to pairs of the entries [start, stop) of a list"""
    return lambda v: [(sum(x), len(x)) for x in ([x for x in r[name][start:stop] if x == x is not None] for r in v)]


def mean(name, start=0, stop=None):
    return lambda v: show(entries(name, start, stop)(v))


def recall(seconds=None, what=1):
    return lambda v: show(recalled(v, seconds, what), 100)


def turning(key="turning"):
    """Share of videos whose heading moves within 10 % of the caption's rate"""
    return lambda v: show([(abs(r[key] - 1) < .1, 1) for r in v], 100)


def entropy(key):
    """Of the 24 landmarks over all videos and sectors, 1 = all equally often"""
    def column(v):
        p = np.bincount([m for r in v for m in r[key] if m >= 0], minlength=24) + 1e-9
        return f"{-(p / p.sum() * np.log(p / p.sum())).sum() / np.log(24):.2f}"
    return column


def half_way(v):
    own, held = context_length(v), context_length(v, 3)
    same = own == held or own and held and .67 < own / held < 1.5
    return f"{own or '-'} ({held or '-'})" + ("" if same else ", not with it")


def against(base, pairs):
    """Are base, another row's videos, better than this row's, in the worlds of both? pairs: function of videos, more is better"""
    def column(v):
        both = {r["world"] for r in base} & {r["world"] for r in v}
        return "" if v == base else better(*(pairs([r for r in some if r["world"] in both]) for some in (base, v)))
    return column


END, LATE = entries("psnr", -1), entries("agreement", 5, 6)
CHECKS = {"dB at the end": lambda v: mean("psnr", -1)(v).split()[0] + " (picture broken)" * bool(ratio(END(v))[0] < BROKEN),
          "turning within 10 %": turning(), "frozen, %": lambda v: f"{100 * np.mean([r['frozen'] for r in v]):.0f}"}
JUMPS = {"jumps a minute": lambda v: show([(60 * r["jumps"], r["seconds"]) for r in v])}
RECALL = {"chance": lambda v: f"{100 * chance(v):.0f}", f"recall from {SHORT} s on": recall(), "ceiling": recall(what=3),
          "returns": lambda v: count(recalled(v))}
TARGETS = (  # at least (1) or at most (-1) how much; what; function of a row's videos and longlive's
    (1, 90, "recall after 6 s away, %", lambda v, o: recall(6)(v)),
    (1, 80, "recall after 15 s away, %", lambda v, o: recall(15)(v)),
    (1, 3, "recall after 6 s over chance", lambda v, o: over(recalled(v, 6), chance(v))),
    (1, 3, "recall after 15 s over chance", lambda v, o: over(recalled(v, 15), chance(v))),
    (1, 3, "recall after 15 s over longlive's", lambda v, o: over(recalled(v, 15), ratio(recalled(o, 15))[0])),
    (-1, 15, "chance, %", lambda v, o: RECALL["chance"](v)),
    (-1, 1, "dB lost from 5-10 s to the last 5 s", lambda v, o: show([(r["psnr"][1] - r["psnr"][-1], 1) for r in v])),
    (1, 90, "videos that turn within 10 % of their rate", lambda v, o: turning()(v)))


def over(pairs, least):
    return f"{ratio(pairs)[0] / least:.1f}" if count(pairs) and least > 0 else "-"


def tables(rows, student):
    """Markdown lines of every table whose videos are there: recall in %, pictures in dB, [95 % interval]"""
    text = []

    def table(title, some, columns, first="memory | positions"):  # some: name -> videos; columns: head -> function of them
        if some := {name: v for name, v in some.items() if v}:
            head = " | ".join([first, *columns])
            text.extend(["", f"**{title}**", "", f"| {head} |", "|---" * (head.count(" | ") + 1) + "|"])
            text.extend(" | ".join(["| " + name, *(str(f(v)) for f in columns.values())]) + " |" for name, v in some.items())

    def of(memory, worlds="text", weights=student, positions="bounded"):
        return rows.get((weights, memory, positions, worlds), [])

    def met(goal):
        cells = [goal[3](v, o).split()[0] for v, o in sides.values() if v]
        return "no data" if "-" in cells else "yes" if all(goal[0] * (float(x) - goal[1]) >= 0 for x in cells) else "no"
    policies = {f"{m} | {p}": of(m, "text", student, p) + of(m, "reach", student, p)
                for p in ("bounded", "unbounded") for m in PRESETS}
    real, swapped, from_text = {f"{m} | bounded": of(m, "real") for m in PRESETS}, of("uniform2", "swapped"), of("slowfast")
    sides = {where: [some[f"{m} | bounded"] for m in ("slowfast", "longlive")]
             for where, some in (("from text", policies), ("after 10.3 s of real video", real))}
    ours, goals = sides["from text"][0], (
        *TARGETS, (1, 70, "returns that follow exchanged memories, %", lambda v, o: show(followed(swapped, 1), 100)))
    if any(v for v, _ in sides.values()):
        table("Targets", {f"{what} | at {'least' if sign > 0 else 'most'} {bound}": (sign, bound, what, f)
                          for sign, bound, what, f in goals}, {
            m + where: lambda goal, v=pair[i], o=pair[1]: goal[3](v, o) if v else "-"
            for i, m in enumerate(("", "longlive, ")) for where, pair in sides.items()} | {"met": met}, "slowfast | target")
    table("Worlds that turn once in 8 or 9 s, 10.3 s real, then 4 s: do returns follow the memory?",
          {"its own": of("uniform2", "turns"), "exchanged with the twin's": swapped},
          RECALL | {"own": lambda v: show(followed(v, 0), 100), "twin's": lambda v: show(followed(v, 1), 100)}, "slow memory")
    for some, (where, (base, _)) in zip((policies, real), sides.items()):
        table(f"Figure 1, forgetting, {where}: recall outside the sink by seconds away (ceiling; returns). Half-way: "
              "seconds until it is half-way to chance (until the ceiling is): it should fall with what memory holds", some,
              RECALL | {f"{a:g} s": lambda v, a=a: f"{recall(a)(v)} ({recall(a, 3)(v).split()[0]}; {count(recalled(v, a))})"
                        for a in ABSENCES} | {"half-way": half_way} | CHECKS)
        table(f"Is slowfast better there, {where}? The paper: beyond the others' reach", some,
              {f"{a:g} s": against(base, lambda v, a=a: recalled(v, a)) for a in ABSENCES})
        table(f"Figure 1, drifting, {where}: validity, dB (boxes; sky, ground off, %). The paper: larger windows drift",
              some, {f"{t - 10}-{t} s": lambda v, z=(t // 5 - 2, t // 5): mean("psnr", *z)(v) + " ({}; {}, {})".format(
                  *(mean(name, *z)(v).split()[0] for name in ("box", "sky", "floor"))) for t in SECONDS}
              | {"slowfast drifts less?": against(base, lambda v: [(r["psnr"][-1] - r["psnr"][0], 1) for r in v])})
    table("Table 1: landmarks as first read, % (sky, ground off, %, in the 5 s before). The paper's context lengths: 20+ s its "
          "own, 9.2 s, LongLive 3.0 s, Infinity-RoPE 1.5 s; its other numbers are DINO and CLIP scores of real videos",
          policies | {"teacher, 5 s after Stage 1 | -": of("teacher", "stage1", "teacher", "-")},
          {f"{t} s": lambda v, i=i: show(entries("agreement", i, i + 1)(v), 100) + " ({}, {})".format(
              *(mean(name, 2 * i + 1, 2 * i + 2)(v).split()[0] for name in ("sky", "floor"))) for i, t in enumerate(SECONDS)}
          | {"context length, s": half_way} | CHECKS
          | {"slowfast better at 60 s? The paper: yes": against(ours, LATE)})
    table("Figure 8: a minute has so many. The paper: the others flash back", policies,
          {head: lambda v, k=k: show([(60 * r[k], r["seconds"]) for r in v]) for head, k in (
              ("jumps over 15 degrees", "jumps"), ("those to the first view", "snaps"), ("wrong reversals", "reversals"))}
          | {"fewer jumps with slowfast?": against(ours, lambda v: [(-r["jumps"], r["seconds"]) for r in v])})
    models = {w: of("slowfast", weights=w) for w in ("init_ar", "init_ode", "stage1", "stage2_none", "stage2", student)}
    table("Table 2: models, from text. frames/s: 16 videos at once; entropy of landmarks: 1 if all come as often. The paper: "
          "as good as short-context models",
          {"base": of("teacher", "first", "base", "-")} | models | {f"{student}, 120 s": of("slowfast", "long")},
          {"parameters": lambda v: f"{v[0]['parameters']:,}", "frames/s": lambda v: f"{np.median([r['fps'] for r in v]):.0f}",
           "5 s: dB": mean("psnr", 0, 1), "boxes": mean("box", 0, 1), "turning": turning("turning_5"),
           "entropy": entropy("map_5"), "end: dB": mean("psnr", -1), "end: boxes": mean("box", -1), "all: turning": turning(),
           "all: entropy": entropy("map"), "recall": recall(), **JUMPS, f"{student} better at the end?": against(from_text, END)}, "weights")
    table("Table 3: ablations, from text. The paper: its own method is better than each", {
        "uniform 1": of("uniform1"), "uniform 2": of("uniform2"), "Stage 1 + memory, no CDMD": models["stage1"],
        "memoryless teacher": models["stage2_none"], "unbounded positions": of("slowfast", positions="unbounded"),
        f"surprisal, {student}": from_text},
        RECALL | {"as first read at 60 s": lambda v: show(LATE(v), 100)} | CHECKS | JUMPS
        | {"ours better?": against(from_text, recalled)}, "row")
    prefix, alone = of("teacher", "prefix", "teacher", "-"), of("teacher", "text", "teacher", "-")
    table("Assumptions 1 and 2: the teacher's 5 s after 5 s that are real, and after Stage 1's. The paper: about as good",
          {"real": prefix, "Stage 1's": of("teacher", "stage1", "teacher", "-")}, RECALL | {
              "dB": mean("psnr"), "real better, recall?": against(prefix, recalled), "dB?": against(prefix, END)}, "prefix")
    table("Figure 7: 31 s of the teacher alone, dB. The paper: with error recycling it drifts less",
          {"with": alone, "without": of("teacher", "text", "teacher_plain", "-")},
          RECALL | {f"{5 * i}-{5 * i + 5} s": mean("psnr", i, i + 1) for i in range(6)}
          | {"with better at the end?": against(alone, END)}, "error recycling")
    return text


CAPTIONS = {"strips.png": "Figures 4-6: one seed, a frame every 10 s; from above: " + ", ".join(PRESETS),
            "strips/teacher_teacher_-_stage1.png": "Assumption 2: 5 s of Stage 1, then 5 s of the teacher, a frame a second",
            "forgetting.png": "Figure 1: recall by absence, shaded 95 %, dashed what memory holds, dotted chance",
            "drifting.png": "Figure 1: pictures over time"}


def figures(rows, student, out):
    """strips.png and, with matplotlib, forgetting.png and drifting.png"""
    strips = [out / "strips" / f"{student}_{m}_bounded_text.png" for m in PRESETS]
    if all(p.exists() for p in strips):
        iio.imwrite(out / "strips.png", np.concatenate([np.pad(iio.imread(p), ((0, 4), (0, 0), (0, 0))) for p in strips]))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no plots: pip install matplotlib")
    (fig, ax), (over_time, axes) = plt.subplots(figsize=(7, 4), dpi=110), plt.subplots(1, 3, figsize=(10, 3), dpi=110)
    for i, m in enumerate(PRESETS):
        text = rows.get((student, m, "bounded", "text"), [])
        some = text + rows.get((student, m, "bounded", "reach"), [])
        points = [(a, *ratio(x), ratio(recalled(some, a, 3))[0]) for a in ABSENCES if count(x := recalled(some, a)) >= 5]
        if points:
            a, right, low, high, ceiling = np.array(points).T
            ax.plot(a, 100 * right, "o-", color=f"C{i}", label=m, markersize=3)
            ax.fill_between(a, 100 * low, 100 * high, color=f"C{i}", alpha=.12)
            ax.plot(a, 100 * ceiling, "--", color=f"C{i}", linewidth=.7)
            ax.axhline(100 * chance(some), color=f"C{i}", linewidth=.5, linestyle=":")
        for each, name, what in zip(axes, ("psnr", "sky", "floor"), ("validity, dB", "sky off, %", "ground off, %")):
            each.set(xlabel="seconds", title=what)
            if text and m in ("slowfast", "longlive", "longlive21"):
                curve = [ratio(entries(name, k, k + 1)(text))[0] for k in range(len(text[0][name]))]
                each.plot(2.5 + 5 * np.arange(len(curve)), curve, color=f"C{i}", label=m)
    ax.set(xlabel="seconds out of view", ylabel="right returns, %", ylim=(0, 100))
    for name, figure, legend in (("forgetting", fig, ax), ("drifting", over_time, axes[0])):
        if legend.get_legend_handles_labels()[0]:
            legend.legend(fontsize=7)
            figure.tight_layout()
            figure.savefig(out / f"{name}.png")


# ---- real metrics on real videos ---------------------------------------------------------------------------------------

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
    """(n, d) of norm 1 -> mean over i > 0 of [max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))] / 2: VBench, arXiv 2311.17982"""
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
    images = {"grey": lambda z: F.interpolate(z.float(),
                                              scale_factor=64 / min(z.shape[2:]), mode="area").mean(1).byte()} | images
    parts = [(fps, {name: f(frames) for name, f in images.items()}) for fps, frames in read_batches(path)]
    fps, got = parts[0][0], {name: torch.cat([part[name] for _, part in parts]) for name in images}  # some kB a frame
    row = {"video": path.name, "frames": len(got["grey"]), "fps": fps, "dynamic_approx": int(dynamic(got["grey"], fps))}
    if "dino" in got:
        row |= {"subject": consistency(f := got["dino"])} | windows("dino", f @ f[0], fps)
    if "clip" in got:
        row |= {"background": consistency(f := got["clip"])}
        row |= windows("clip_f", f @ f[0], fps) | windows("clip_t", f @ text, fps)
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
        raise BadInput(f"give --dino, --clip DIR: pip install -r requirements-eval.txt; hf download {NETWORKS['--dino'][0]}")
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
    files, student = {f.stem: f for f in WEIGHTS.glob("*.safetensors")}, STUDENT
    if cfg.ckpt:
        student, files = Path(cfg.ckpt).stem, files | {Path(cfg.ckpt).stem: Path(cfg.ckpt)}
    wanted = jobs(student, cfg.quick, cfg.memory)
    todo = [j for j in wanted if j[0] in files and (j[3] != "stage1" or "stage1" in files)]
    if lacking := sorted({j[0] for j in wanted} - set(files)):
        print("no weights, so no rows for: " + ", ".join(lacking))
    rows = make_rows(cfg, todo, files, device)
    command = "python evaluate.py" + " --quick" * cfg.quick
    figures(rows, student, out)
    lines = [f"`{command}`: {student}, one training seed, {max(map(len, rows.values()))} held-out worlds a set, 95 % bootstrap "
             "intervals over videos", *tables(rows, student), ""]
    lines += [f"![{text}]({name}) {text}. `{command}`" for name, text in CAPTIONS.items() if (out / name).exists()]
    lines += ["", f"{time.time() - started:.0f} s"]
    (out / ("evaluate_quick.md" if cfg.quick else "evaluate.md")).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
