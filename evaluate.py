"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # everything; run it again to go on after a stop
    python evaluate.py --quick                    # what every preset of memory.py remembers
    python evaluate.py --quick --memory NAME      # one preset, its row and its curve
    python evaluate.py --quick --tau X --steps N  # other than the weights' own, beside what is there

An EvalSet says which videos are made: whose weights, which memory, which worlds. Each video leaves one line
in out/evaluate.csv with all that report.py needs: it is made once, and tables and figures cost nothing after
that. A line counts as long as the networks, the policy and the code that made it are what they were. Real
videos: metrics.py.

    text       captions drawn at random; 62.8 s from nothing, as all that follows unless it says otherwise
    real       the same, 50 s after 10.3 s of real video
    returns    as many captions of each kind of motion, that bring landmarks back soon, late and last of all
    swapped    a world and its counterfactual exchange slow memories, 4 s after real video
    teacher    31 s of a teacher alone
    after ..   5 s of the teacher, after 10.3 s that are real, or by Stage 1
    hour       an hour, of which minutes 1, 5, 15 and 60 are looked at

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3.
Leaves out: more than one training seed.
"""
import ast
import hashlib
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from config import STUDENT, BadInput, check_writable, one_of, parse, pick_device, run, within  # first

import numpy as np
import torch
from tqdm import tqdm

import figures
import judge
import paper
import report
from data import frames_of
from erft import TARGET
from memory import CHUNK, PRESETS, Policy
from probe import (CHUNKS, GIVEN, MINUTES, PROBE_CHUNKS, continue_student, continue_teacher, decode_frames,
                   decode_minutes, first_own_frame, held_out, measure, measure_minutes)
from report import KINDS, EvalSet, Video
from weights import WEIGHTS, load_tiny
from world import FPS, HELD_OUT, WorldSpec, make_world

BATCH = 16     # videos made together
TRIES = 64     # held-out worlds of each kind of motion, among which "returns" chooses
INTERVALS = range(1, 7)  # of the uniform rules of the frontier


@dataclass
class Config:
    quick: bool = False  # what memory is worth, and no more
    memory: str = ""     # only the rows of this preset
    tau: float = None    # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None    # denoising steps of the students (default: the weights' own)
    worlds: int = 0      # number of held-out worlds a set (default: 64; 24 with --quick)
    ckpt: str = ""       # the student (default: config.STUDENT)
    out: str = "out"     # folder for CSV, tables, figures
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)


# ---- which videos are made ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Length:
    given: int        # chunks that are there
    chunks: int       # of the model's own, after them
    student: str = ""  # the weights that make those chunks, if they are not real video


LENGTHS = {  # by EvalSet.worlds
    "text": Length(0, 84),
    "real": Length(GIVEN, 67),
    "returns": Length(0, 84),
    "swapped": Length(GIVEN, PROBE_CHUNKS),
    "teacher": Length(0, 42),
    "after real": Length(GIVEN, 7),
    "after stage1": Length(GIVEN, 7, "stage1"),
    "hour": Length(0, CHUNKS * MINUTES[-1] + 1),
}


def eval_sets(first, taus=(), quick=False, memory=""):
    """
    The rows of the tables.
    first    the EvalSet of the student
    taus     surprisal thresholds of the frontier beside that of the weights
    returns  list of EvalSet; a new preset of memory.py gets its rows by its name
    """
    def of(worlds, memory="slowfast", **other):
        return replace(first, worlds=worlds, memory=memory, **other)

    # what each policy remembers, and whose memory the student follows
    sets = [of("returns", policy) for policy in PRESETS]
    sets.append(of("swapped", "uniform2"))
    if not quick:
        # the frontier, at equal slots
        sets += [of("returns", f"uniform{interval}") for interval in INTERVALS]
        sets += [of("returns", tau=tau) for tau in taus]
        # the student and what it comes from, from both starts; positions that nobody trained
        weights = [first.weights, "stage1", "init_ar"]
        sets += [of(start, weights=name) for start in ("text", "real") for name in weights]
        sets += [of("text", weights=name) for name in ("init_ode", "stage2", "stage2_none")]
        sets += [of("real", "longlive"), of("text", positions="unbounded")]
        # the teacher alone, and after real video or a student's
        for name in ("teacher", "teacher_plain"):
            sets.append(EvalSet(name, "uniform2", worlds="teacher", teacher=True))
        for worlds in ("after real", "after stage1"):
            sets.append(EvalSet("teacher", "uniform2", worlds=worlds, teacher=True))
        # an hour under each policy, and of the students without the context's teacher
        sets += [of("hour", policy) for policy in PRESETS]
        sets += [of("hour", weights=name) for name in ("stage1", "stage2_none")]
    if memory:
        sets = [s for s in sets if s.memory == memory and s.weights == first.weights]
    return list(dict.fromkeys(sets))


def policy_of(eval_set, tau=Policy.tau):
    """A preset of memory.py, or uniformN: every N-th chunk; tau: that of the weights -> Policy"""
    uniform = {f"uniform{n}": replace(PRESETS["uniform1"], interval=n) for n in INTERVALS}
    policy = (uniform | PRESETS)[eval_set.memory].calibrated(tau)
    return policy if eval_set.tau is None else replace(policy, tau=eval_set.tau)


def longest_absence(spec, frames):
    """Seconds out of view, outside the sink, after which its motion brings two landmarks or more back; NaN"""
    w = make_world(spec)
    path = w.motion.heading(w.start, np.arange(frames))
    # as of a video without a fault
    seen = np.zeros((frames, len(w.landmarks)), int)
    events = judge.reappearances(judge.Reading(path, None, seen, None), w.motion)
    absences = sorted(event.absence for event in events if not event.in_sink)
    return absences[-2] if len(absences) > 1 else np.nan


@lru_cache
def candidates(kind, seed):
    """Held-out worlds of one kind of motion -> list of (longest absence, WorldSpec), shortest first"""
    frames = frames_of(LENGTHS["returns"].chunks * CHUNK)
    specs = [WorldSpec(HELD_OUT + seed + i, kind) for i in range(TRIES)]
    found = [(longest_absence(spec, frames), spec) for spec in specs]
    return sorted([pair for pair in found if pair[0] > 0], key=lambda pair: pair[0])


def worlds_with_returns(number, seed):
    """
    As many of each kind of motion, from those in which landmarks are soon back to those in which they stay
    away the longest, more of these, as they show fewer returns -> WorldSpecs
    """
    specs = []
    for i, kind in enumerate(KINDS):
        left = list(candidates(kind, seed))
        count = len(range(i, number, len(KINDS)))
        if len(left) < count:
            raise BadInput(f"landmarks come back in {len(left)} of {TRIES} worlds of the motion {kind!r}, "
                           f"and {count} are needed: change KINDS in report.py, or --worlds")
        low, high = left[0][0], left[-1][0]
        for share in np.linspace(0, 1, count) ** .7:
            nearest = min(left, key=lambda pair: abs(pair[0] - low - share * (high - low)))
            left.remove(nearest)
            specs.append(nearest[1])
    return specs


def worlds_of(name, number, seed):
    """The held-out worlds of an EvalSet.worlds -> list of WorldSpec"""
    if name == "returns":
        return worlds_with_returns(number, seed)
    if name == "swapped":  # pairs of neighbours: one place and motion, two sets of landmarks
        pairs = product(held_out(number // 2, seed), (False, True))
        return [replace(spec, counterfactual=other) for spec, other in pairs]
    if name.startswith("after"):
        return held_out(number, seed)
    if name == "hour":  # few, as they are long; the motion of sample.py's default video
        return [WorldSpec(HELD_OUT + seed + i, "turn", 12) for i in range((number + 31) // 32)]
    return [WorldSpec(HELD_OUT + seed + i) for i in range(number)]


# ---- making and measuring ----------------------------------------------------------------------------------

load_once = lru_cache(load_tiny)  # in each process


@dataclass
class Batch:
    """What one process makes at a time."""
    eval_set: EvalSet
    specs: list
    files: dict    # name of weights -> path
    made_by: str
    device: torch.device


def make_videos(batch):
    """-> frames (b, f, 3, 32, 64) uint8, keep (b, chunks) bool"""
    eval_set = batch.eval_set
    length = LENGTHS[eval_set.worlds]
    networks = load_once(batch.files[eval_set.weights], batch.device)
    if eval_set.teacher:
        student = load_once(batch.files[length.student], batch.device) if length.student else None
        blocks = length.chunks * CHUNK // TARGET
        return continue_teacher(networks, batch.specs, length.given, blocks, student=student)
    policy = policy_of(eval_set, networks.sampler.tau)
    if eval_set.steps is not None:
        networks = replace(networks, sampler=replace(networks.sampler, steps=eval_set.steps))
    swap = eval_set.worlds == "swapped"
    decode = decode_minutes if eval_set.worlds == "hour" else decode_frames
    return continue_student(networks, batch.specs, length.given, length.chunks, policy,
                            eval_set.positions, swap, decode)


def run_batch(batch):
    """Makes and measures -> list of report.Video"""
    started = time.perf_counter()
    frames, keeps = make_videos(batch)
    given = LENGTHS[batch.eval_set.worlds].given
    found = []
    for spec, video, keep in zip(batch.specs, frames, keeps):
        motion = make_world(spec).motion
        if batch.eval_set.worlds == "hour":
            found.append(measure_minutes(video, motion))
        else:
            found.append(measure(video, motion, keep, policy_of(batch.eval_set), given))
    # each with its share of the time
    cost = (time.perf_counter() - started) / len(found)
    videos = []
    for spec, measured in zip(batch.specs, found):
        caption = make_world(spec).caption
        videos.append(Video(batch.eval_set, spec, caption, batch.made_by, cost, **measured))
    return videos


# the files by which a video is made and measured
CODE = ("config rope memory world video judge flow model vae wan_vae tensors text weights erft checkpoint "
        "data probe evaluate").split()


def fingerprint(paths):
    """Eight letters that change with what the files hold; in code, comments and layout do not count"""
    total = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        total.update(ast.dump(ast.parse(content)).encode() if path.suffix == ".py" else content)
    return total.hexdigest()[:8]


@lru_cache
def code_fingerprint():
    return fingerprint([Path(__file__).with_name(f"{name}.py") for name in CODE])


def networks_of(eval_set):
    """The names of their files"""
    names = eval_set.weights, LENGTHS[eval_set.worlds].student, "text", "vae"
    return [name for name in names if name]


def made_by(eval_set, files):
    """What a line of the CSV rests on: fingerprints of networks and code, and the policy in words."""
    networks = fingerprint([files[name] for name in networks_of(eval_set)])
    return f"{networks} {code_fingerprint()} {policy_of(eval_set)}"


def make_all(batches, path, device):
    """Makes all videos and adds their lines to the CSV; on a CPU, by a process of one thread a core."""
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        made = pool.map(run_batch, batches) if workers > 1 else map(run_batch, batches)
        for videos in tqdm(made, "videos, 16 at a time", len(batches)):
            report.append_csv(path, videos)


# ---- one landmark, under two policies ----------------------------------------------------------------------

def forgotten(rows, first):
    """
    The first landmark, world by world, that leaves in the real part and comes back after 6 s or more, right
    under slowfast and wrong under longlive -> WorldSpec, sector, first frame without it; None if none does
    """
    found = {}
    for memory in ("slowfast", "longlive"):
        for video in rows.get(replace(first, worlds="real", memory=memory), []):
            for event in video.reappearances:
                place = video.world, event["sector"], event["left"]
                is_real = event["left"] < first_own_frame(GIVEN)
                if is_real and event["absence"] >= 6 and event["shown"] >= 0:
                    found.setdefault(place, {})[memory] = event["right"]
    places = [place for place, right in found.items() if right == {"slowfast": True, "longlive": False}]
    return places[0] if places else None


def middles(whole, left):
    """
    The middles of the last visit before frame `left`, and of the first one after it.
    whole  (f,) bool: is the landmark wholly in view?
    """
    frames = np.flatnonzero(whole)
    visits = np.split(frames, np.flatnonzero(np.diff(frames) > FPS) + 1)
    before = [visit for visit in visits if visit[0] < left][-1]
    after = [visit for visit in visits if visit[0] >= left][0]
    return int(np.median(before)), int(np.median(after))


def make_strip(spec, sector, left, files, first, device, path):
    """Makes the two videos once more, and draws seven frames of each."""
    videos, moments = [], []
    for memory in ("slowfast", "longlive"):
        batch = Batch(replace(first, worlds="real", memory=memory), [spec], files, "", device)
        frames, _ = make_videos(batch)
        seen = judge.read_video(frames[0]).landmark[:, sector] >= 0
        videos.append(frames[0])
        moments.append(np.linspace(*middles(seen, left), 7).round().astype(int))
    figures.draw_strip(videos, moments, (True, False), path)


def check(cfg):
    """Refuses what can be refused before anything is made."""
    if cfg.memory:
        one_of("--memory", cfg.memory, PRESETS)
    within("--worlds", cfg.worlds, 0, 10 ** 6)
    within("--tau", cfg.tau, -1, 1)
    within("--steps", cfg.steps, 1, 1000)
    check_writable(cfg.out)


def rows_of(videos, makers, worlds):
    """What the CSV knows of each EvalSet, as it would be made now, each world once -> EvalSet -> videos"""
    rows = {s: {} for s in makers}
    for video in videos:
        s = video.eval_set
        if s in makers and video.made_by == makers[s] and video.world in worlds[s.worlds]:
            rows[s][video.world] = video
    return {s: list(found.values()) for s, found in rows.items()}


def main():
    cfg = parse(Config)
    check(cfg)
    device = pick_device(cfg.device)
    # which networks are there
    files = {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    student = STUDENT
    if cfg.ckpt:
        student = Path(cfg.ckpt).stem
        files[student] = Path(cfg.ckpt)
    # the frontier's taus: similarities twice, and half as far below 1 as for the weights' own
    apart = 1 - load_tiny(files[student], device).sampler.tau
    taus = round(1 - 2 * apart, 4), round(1 - apart / 2, 4)
    # the rows that are asked for, and beside them the student as it is, where the CSV has it
    first = EvalSet(student, tau=cfg.tau, steps=cfg.steps)
    asked = eval_sets(first, taus, cfg.quick, cfg.memory)
    makers = {}
    for s in dict.fromkeys(eval_sets(EvalSet(student), taus) + asked):
        if set(networks_of(s)) <= set(files):
            makers[s] = made_by(s, files)
    number = cfg.worlds or (24 if cfg.quick else 64)
    worlds = {name: worlds_of(name, number, cfg.seed) for name in LENGTHS}
    # videos that the CSV lacks
    path = Path(cfg.out, "evaluate.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = {(video.eval_set, video.world, video.made_by) for video in report.read_csv(path)}
    batches = []
    for s in asked:
        if s in makers:
            specs = [w for w in worlds[s.worlds] if (s, w, makers[s]) not in there]
            for i in range(0, len(specs), BATCH):
                batches.append(Batch(s, specs[i:i + BATCH], files, makers[s], device))
    make_all(batches, path, device)
    # all tables and figures of what is in the CSV now
    rows = rows_of(report.read_csv(path), makers, worlds)
    tables = report.all_tables(rows, first)
    tables["The paper's orderings"] = paper.orderings(rows, first)
    report.write(tables, student, path.parent / "evaluate.md")
    figures.draw_all(rows, first, path.parent)
    place = forgotten(rows, first)
    if place:
        make_strip(*place, files, first, device, path.parent / "strip.png")


if __name__ == "__main__":
    run(main)
