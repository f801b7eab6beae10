"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # all tables and figures; run it again to go on after a stop
    python evaluate.py --quick                    # 16 worlds, 30 s, three policies: minutes
    python evaluate.py --quick --memory window    # one policy only: change it in memory.py and see its curve

Every set of videos is one job: weights, memory, positions, and which worlds. Each video leaves one line in out/evaluate.csv
with all that the tables need, so a table costs nothing once its videos were made. Intervals are 95 % bootstraps over videos,
paired where two rows share seeds. One training seed a row: intervals do not tell what another training would give.

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3. Leaves out: DINO and CLIP on the small world.
"""
import csv
import hashlib
import inspect
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

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
from report import ABSENCES, CAPTIONS, SECONDS, figures, tables
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig
from weights import WEIGHTS, load
from world import WorldSpec

GIVEN = 14                            # chunks of real history: 42 latents, 165 frames, 10.3 s
BATCH = 16                            # videos made together


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
    videos: str = ""     # moved: python metrics.py --videos DIR scores real videos


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
    own = [e for e in judge.reappearances(reading, caption)
           if e.returned >= frames_of(given * CHUNK) * (given > 0) and not e.in_sink]
    return [(e, judge.is_in_memory(e, reading, contexts[min(judge.chunk_of(e.returned), len(contexts) - 1)][0].tolist()))
            for e in own]


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
    return {"recall": float(np.mean([e.right for e, _ in found] or [0])),
            "ceiling": float(np.mean([h for _, h in found] or [0])), "chance": judge.chance([judge.landmark_map(r.sure) for r in readings]),
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

    def flips(x):
        pace = (x[fps:] - x[:-fps])[::fps]
        side = np.sign(pace[np.abs(pace) > judge.STILL])
        return int((side[1:] != side[:-1]).sum())
    asked = world.parse_caption(caption)[1].heading(path[0], np.arange(len(path)))
    jumps = np.flatnonzero(np.abs(np.diff(path)) > 15 / 360 * world.COLUMNS)
    return {"psnr": [r.psnr[s].mean() for s in spans], "box": [np.nanmean(r.box_psnr[s]) for s in spans],
            "sky": [sky[s].mean() for s in spans], "floor": [floor[s].mean() for s in spans], "agreement": same,
            "map": judge.landmark_map(sure), "map_5": judge.landmark_map(sure[:step]), "turning": judge.turning_rate(r.heading, caption),
            "turning_5": judge.turning_rate(r.heading[:step], caption), "seconds": len(frames) / fps,
            "frozen": float(r.frozen.mean()), "jumps": len(jumps), "reversals": abs(flips(path) - flips(asked)),
            "snaps": int((np.abs(world.wrap(path[jumps + 1] - path[0])) < 4).sum()),
            "events": [[e.absence, int(e.right), int(e.as_first), int(h), (e.returned - start) / fps, e.sector, e.shown]
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


def main():
    cfg = parse(Config)
    if cfg.videos:
        raise BadInput(f"real videos are scored by another script: python metrics.py --videos {cfg.videos} --dino DIR")
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
