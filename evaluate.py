"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # everything; run it again to go on after a stop
    python evaluate.py --quick                    # three policies, 32 worlds each: 4 minutes on two cores
    python evaluate.py --quick --memory NAME      # one preset of memory.py, its row and its curve: a minute

An EvalSet says which videos are made: whose weights, which memory, which worlds. Each video leaves one line
in out/evaluate.csv with all that report.py needs: it is made once, and tables and figure cost nothing after
that. A line counts as long as weights and preset are those that made it; whoever changes the code of
Policy.should_keep gives an --out of its own. Real videos: metrics.py.

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3.
Leaves out: DINO and CLIP on the small world.
"""
import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from config import STUDENT, BadInput, check_writable, fast_autocast, one_of, parse, pick_device, run  # first

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import judge
import report
import world
from data import encode_world, frames_of
from erft import TARGET, extend
from flow import Rollout, generate
from memory import CHUNK, PRESETS, frames_in_memory
from report import EvalSet, Video
from weights import WEIGHTS, load_tiny
from world import FPS, HELD_OUT, WorldSpec, make_world

GIVEN = 14          # chunks of real history: 42 latents, 165 frames, 10.3 s
BATCH = 16          # videos made together
PROBE_CHUNKS = 5    # 4 s, in which worlds that turn once in 8 or 9 s bring back what they showed
PROBED = PRESETS["uniform2"]     # the policy of probes
SPAN = 5 * FPS      # frames of an entry of Video.psnr
JUMP = 15 / 360 * world.COLUMNS  # between two frames; the fastest caption moves 2 columns


@dataclass
class Config:
    quick: bool = False  # what memory is worth, and no more: 32 worlds, three policies
    memory: str = ""     # only the rows of this preset
    worlds: int = 0      # number of held-out worlds a set (default: 64; 32 with --quick)
    ckpt: str = ""       # the student (default: config.STUDENT)
    out: str = "out"     # folder for CSV, tables, figures
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)


# ---- videos of the small world: real first chunks, then the model's own ------------------------------------

def conditions(networks, specs, given):
    """
    networks  weights.Networks of the small world
    specs     WorldSpecs, one a video
    given     chunks of real video
    returns   net.text of the captions, real latents (b, 3 given, c, h, w)
    """
    text = networks.dit.text(networks.features([make_world(spec).caption for spec in specs]))
    device = text[0][0].device
    if given == 0:
        return text, torch.zeros(len(specs), 0, *networks.latent, device=device)
    return text, torch.cat([encode_world(networks.vae, spec, given * CHUNK, device) for spec in specs])


def decode_frames(vae, latents):
    """
    Latents (b, n, 16, 4, 8) -> frames (b, f, 3, 32, 64) uint8, a chunk at a time; in bf16 where that is fast,
    which moves the validity by 0.02 dB. The models themselves run in float32, as in sample.py.
    """
    frames, past = [], None
    for chunk in latents.split(CHUNK, dim=1):
        with fast_autocast(latents.device):
            video, past = vae.decode(chunk, past)
        frames.append((video * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy())
    return np.concatenate(frames, axis=1)


@torch.no_grad()
def continue_student(networks, specs, given, chunks, policy, positions="bounded", swap=False):
    """
    given    chunks of each world's real video; then `chunks` of the student's own
    swap     each two neighbours of the batch exchange their slow memories before going on
    returns  frames (b, f, 3, 32, 64) uint8, the real part decoded too; keep (b, given + chunks) bool
    """
    sampler = networks.sampler
    seeds = [spec.seed for spec in specs]
    text, history = conditions(networks, specs, given)
    rollout = Rollout(networks.dit, text, policy, networks.grid, positions, sampler.pool)
    # the real part enters the memory, and nothing is made yet
    if given:
        list(generate(rollout, seeds, 0, sampler, networks.latent, history=history))
    if swap:
        rollout.memory.evict(CHUNK)
        rollout.memory.slow = rollout.memory.slow.apply(swap_neighbours)
    # the student's own part
    own = generate(rollout, seeds, chunks, sampler, networks.latent)
    latents = torch.cat([history, *own], dim=1)
    return decode_frames(networks.vae, latents), torch.stack(rollout.kept, dim=1).cpu()


def swap_neighbours(x):
    pairs = rearrange(x, "(pair two) ... -> pair two ...", two=2)
    return rearrange(pairs.flip(1), "pair two ... -> (pair two) ...")


@torch.no_grad()
def continue_teacher(networks, specs, given, blocks, shuffle=False):
    """
    given    chunks of each world's real video; then `blocks` times 21 latents of the teacher
    shuffle  each goes on from the next world's past, and shows it if the teacher looks there
    returns  as continue_student()
    """
    text, latents = conditions(networks, specs, given)
    seeds = [spec.seed for spec in specs]
    for _ in range(blocks):
        past = latents.roll(-1, 0) if shuffle else latents
        more = extend(networks.dit, past, text, networks.grid, networks.sampler, seeds)
        latents = torch.cat([latents, more], dim=1)
    chunk = torch.arange(latents.shape[1] // CHUNK)
    keep = chunk % PROBED.interval == 0
    return decode_frames(networks.vae, latents), keep.expand(len(specs), -1)


def first_own_frame(given):
    return frames_of(given * CHUNK) if given else 0


def own_reappearances(reading, motion, keep, policy, given):
    """
    What was due back in the model's own part; what the sink shows does not count.
    keep     (chunks,) bool of the rollout
    returns  list of (judge.Reappearance, did the memory hold a latent that shows it?)
    """
    contexts = frames_in_memory(policy, keep[None])
    found = []
    for event in judge.reappearances(reading, motion):
        if event.returned >= first_own_frame(given) and not event.in_sink:
            chunk = min(judge.chunk_of(event.returned), len(contexts) - 1)
            held = contexts[chunk][0].tolist()
            found.append((event, judge.is_in_memory(event, reading, held)))
    return found


def measure(frames, motion, keep, policy, given):
    """frames (f, 3, 32, 64) uint8 of one video -> dict, the measured fields of a report.Video"""
    reading = judge.read_video(frames)
    # pictures: what is left over behind the last 5 s does not count
    start = first_own_frame(given)
    starts = range(start, max(start + 1, len(frames) - SPAN + 1), SPAN)
    psnr = [round(float(reading.psnr[i:i + SPAN].mean()), 3) for i in starts]
    # motion
    jumps = np.abs(np.diff(reading.path)) > JUMP
    # memory
    events = []
    for event, held in own_reappearances(reading, motion, keep, policy, given):
        events.append(vars(event) | {"right": event.right, "held": held})
    return {
        "psnr": psnr,
        "landmarks": judge.landmark_map(reading.landmark),
        "reappearances": events,
        "turning": judge.turning_rate(reading.path, motion),
        "jumps": int(jumps.sum()),
        "minutes": len(frames) / FPS / 60,
    }


# ---- probes while a network is trained: does it remember, does its teacher look at the past? ---------------

def held_out(n, seed=0):
    """n worlds that turn once in 8 or 9 s: after 10 s, what was away for 5.4 or 6.1 s is due back."""
    return [WorldSpec(HELD_OUT + seed + i, "turn", 8 + i % 2) for i in range(n)]


def probe_student(networks, specs):
    """10 s of every world are given to a causal network, then it goes on -> numbers of read_probe()"""
    frames, keep = continue_student(networks, specs, GIVEN, PROBE_CHUNKS, PROBED)
    return read_probe(specs, frames, keep)


def probe_teacher(networks, specs, shuffle=False):
    """The same of a teacher; shuffle: from another world's 10 s."""
    frames, keep = continue_teacher(networks, specs, GIVEN, 1, shuffle)
    return read_probe(specs, frames, keep)


def read_probe(specs, frames, keeps):
    """
    dict: recall (share of what was due back that is right), ceiling (share that memory still held), chance,
    returns (how many were due), validity (dB to the nearest frame that the world can draw)
    """
    videos = []
    for spec, video, keep in zip(specs, frames, keeps):
        videos.append(measure(video, make_world(spec).motion, keep, PROBED, GIVEN))
    events = [event for video in videos for event in video["reappearances"]]
    returns = len(events)
    return {
        "recall": sum(event["right"] for event in events) / max(1, returns),
        "ceiling": sum(event["held"] for event in events) / max(1, returns),
        "chance": judge.chance([video["landmarks"] for video in videos]),
        "returns": returns,
        "validity": float(np.mean([video["psnr"] for video in videos])),
    }


def check_teacher_uses_context(networks, specs):
    """Recall from each world's own past and from another's: numbers for the log."""
    own = probe_teacher(networks, specs)
    shuffled = probe_teacher(networks, specs, shuffle=True)
    return {
        "teacher_recall": own["recall"],
        "teacher_shuffled_recall": shuffled["recall"],
        "teacher_chance": own["chance"],
    }


# ---- which videos are made ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Length:
    given: int   # chunks of real video
    chunks: int  # of the model's own, after it


LENGTHS = {  # by EvalSet.worlds
    "text": Length(0, 84),                   # 62.8 s from the caption alone
    "real": Length(GIVEN, 67),               # 50 s
    "swapped": Length(GIVEN, PROBE_CHUNKS),  # 4 s; a world and its counterfactual exchange slow memories
    "teacher": Length(0, 42),                # 31 s
}


def eval_sets(student, quick=False, memory=""):
    """The rows of the tables -> list of EvalSet. A new preset of memory.py gets its row by its name."""
    # what each policy remembers, and whose memory the student follows
    policies = list(PRESETS)
    if quick and not memory:
        policies = ["slowfast", "uniform2", "longlive"]
    sets = [EvalSet(student, policy) for policy in policies]
    sets.append(EvalSet(student, "uniform2", worlds="swapped"))
    if not quick:
        # after real video; positions that nobody trained
        sets += [EvalSet(student, policy, worlds="real") for policy in ("slowfast", "longlive")]
        sets += [EvalSet(student, policy, "unbounded") for policy in ("slowfast", "longlive", "infinity")]
        # models before and beside the student; the teacher alone
        sets += [EvalSet(weights) for weights in ("init_ar", "init_ode", "stage1", "stage2", "stage2_none")]
        for weights in ("teacher", "teacher_plain"):
            sets.append(EvalSet(weights, "uniform2", worlds="teacher", teacher=True))
    if memory:
        sets = [s for s in sets if s.memory == memory and s.weights == student]
    return list(dict.fromkeys(sets))


def worlds_of(name, number, seed):
    """The held-out worlds of an EvalSet.worlds -> list of WorldSpec"""
    if name == "swapped":  # pairs of neighbours: one place and motion, two sets of landmarks
        pairs = product(held_out(number // 2, seed), (False, True))
        return [replace(spec, counterfactual=other) for spec, other in pairs]
    return [WorldSpec(HELD_OUT + seed + i) for i in range(number)]


# ---- making and measuring ----------------------------------------------------------------------------------

load_once = lru_cache(load_tiny)  # in each process


@dataclass
class Batch:
    """What one process makes at a time."""
    eval_set: EvalSet
    specs: list
    weights: Path
    made_by: str
    device: torch.device


def make_videos(batch):
    """-> frames (b, f, 3, 32, 64) uint8, keep (b, chunks) bool"""
    networks = load_once(batch.weights, batch.device)
    eval_set = batch.eval_set
    length = LENGTHS[eval_set.worlds]
    if eval_set.teacher:
        return continue_teacher(networks, batch.specs, length.given, length.chunks * CHUNK // TARGET)
    policy = PRESETS[eval_set.memory].calibrated(networks.sampler.tau)
    swap = eval_set.worlds == "swapped"
    return continue_student(networks, batch.specs, length.given, length.chunks, policy,
                            eval_set.positions, swap)


def run_batch(batch):
    """Makes and measures -> list of report.Video"""
    frames, keeps = make_videos(batch)
    policy = PRESETS[batch.eval_set.memory]
    given = LENGTHS[batch.eval_set.worlds].given
    videos = []
    for spec, video, keep in zip(batch.specs, frames, keeps):
        w = make_world(spec)
        measured = measure(video, w.motion, keep, policy, given)
        videos.append(Video(batch.eval_set, spec, w.caption, batch.made_by, **measured))
    return videos


def made_by(eval_set, files):
    """What a line of the CSV rests on: a fingerprint of the networks, and the preset in words."""
    networks = b"".join(files[name].read_bytes() for name in (eval_set.weights, "text", "vae"))
    return f"{hashlib.sha256(networks).hexdigest()[:8]} {PRESETS[eval_set.memory]}"


def make_all(batches, path, device):
    """Makes all videos and adds their lines to the CSV; on a CPU, by a process of one thread a core."""
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        made = pool.map(run_batch, batches) if workers > 1 else map(run_batch, batches)
        for videos in tqdm(made, "videos, 16 at a time", len(batches)):
            report.append_csv(path, videos)


def main():
    cfg = parse(Config)
    check_writable(cfg.out)
    if cfg.memory:
        one_of("--memory", cfg.memory, PRESETS)
    if cfg.worlds < 0:
        raise BadInput(f"--worlds must be above 0, not {cfg.worlds}")
    device = pick_device(cfg.device)
    # which networks are there, and which rows can be made of them
    files = {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    student = STUDENT
    if cfg.ckpt:
        student = Path(cfg.ckpt).stem
        files[student] = Path(cfg.ckpt)
    makers = {s: made_by(s, files) for s in eval_sets(student) if s.weights in files}
    # videos that the CSV lacks
    path = Path(cfg.out, "evaluate.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = {(video.eval_set, video.world, video.made_by) for video in report.read_csv(path)}
    number = cfg.worlds or (32 if cfg.quick else 64)
    batches = []
    for s in eval_sets(student, cfg.quick, cfg.memory):
        if s in makers:
            specs = [w for w in worlds_of(s.worlds, number, cfg.seed) if (s, w, makers[s]) not in there]
            for i in range(0, len(specs), BATCH):
                batches.append(Batch(s, specs[i:i + BATCH], files[s.weights], makers[s], device))
    make_all(batches, path, device)
    # all tables of what is in the CSV now
    videos = report.read_csv(path)
    rows = {s: [v for v in videos if v.eval_set == s and v.made_by == makers[s]] for s in makers}
    report.write(rows, student, path.parent)


if __name__ == "__main__":
    run(main)
