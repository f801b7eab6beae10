"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # everything; run it again to go on after a stop
    python evaluate.py --quick                    # what every preset of memory.py remembers
    python evaluate.py --quick --memory NAME      # one preset, its row and its curve
    python evaluate.py --quick --tau X --steps N  # other than the weights' own, beside what is there

An EvalSet says which videos are made: whose weights, which memory, which worlds. Each video leaves one line
in out/evaluate.jsonl with all that report.py needs: it is made once, and tables and figures cost nothing
after that. A line counts as long as the networks, the policy and the code that made it are what they were.
Real videos: metrics.py.

    text       captions drawn at random; 62.8 s from nothing, as all that follows unless it says otherwise
    real       the same, 50 s after 10.3 s of real video
    returns    as many captions of each kind of motion, turns from the fastest to the slowest
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
from multiprocessing import get_context
from pathlib import Path

from config import STUDENT, BadInput, check_writable, one_of, parse, pick_device, run, within  # first

import numpy as np
import torch
from tqdm import tqdm

import figures
import paper
import report
from erft import TARGET
from memory import CHUNK, PRESETS, Policy
from probe import (CHUNKS, GIVEN, MINUTES, PROBE_CHUNKS, continue_student, continue_teacher, decode_frames,
                   decode_minutes, first_own_frame, held_out, measure, measure_minutes)
from report import KINDS, EvalSet, Video
from weights import WEIGHTS, load_tiny
from world import FPS, HELD_OUT, WorldSpec, make_world

BATCH = 16     # videos made together
INTERVALS = range(1, 7)  # of the uniform rules of the frontier
SECONDS = {"turn": (8, 44), "linger": (18, 44)}  # of the fastest and of the slowest turn in captions


@dataclass
class Config:
    quick: bool = False  # what memory is worth, and no more
    memory: str = ""     # only the rows of this preset
    tau: float = None    # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None    # denoising steps of the students (default: the weights' own)
    worlds: int = 0      # number of held-out worlds a set (default: 64; 24 with --quick)
    ckpt: str = ""       # the student (default: config.STUDENT)
    out: str = "out"     # folder for lines, tables, figures
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


def worlds_with_returns(number, seed):
    """
    As many of each kind of motion. Turns go from the fastest to the slowest: what they bring back was away
    for 5 to 28 s. More are slow, as these show fewer returns. Looks aside, 2 to 12 s, are as they are drawn.
    """
    specs = []
    for i, kind in enumerate(KINDS):
        seeds = range(HELD_OUT + seed + i, HELD_OUT + seed + number, len(KINDS))
        for place, world_seed in zip(np.linspace(0, 1, len(seeds)), seeds):
            seconds = None
            if kind in SECONDS:
                fastest, slowest = SECONDS[kind]
                seconds = round(fastest + place ** .7 * (slowest - fastest))
            specs.append(WorldSpec(world_seed, kind, seconds))
    return specs


def worlds_of(name, number, seed):
    """The held-out worlds of an EvalSet.worlds -> list of WorldSpec"""
    if name == "returns":
        return worlds_with_returns(number, seed)
    if name == "swapped":  # pairs of neighbours: one place and motion, two sets of landmarks
        specs = held_out(number // 2, seed)
        return [replace(spec, counterfactual=other) for spec in specs for other in (False, True)]
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
        latents, keep = continue_teacher(networks, batch.specs, length.given, blocks, student=student)
    else:
        if eval_set.steps is not None:
            networks = replace(networks, sampler=replace(networks.sampler, steps=eval_set.steps))
        policy = policy_of(eval_set, networks.sampler.tau)
        swap = eval_set.worlds == "swapped"
        latents, keep = continue_student(networks, batch.specs, length.given, length.chunks, policy,
                                         eval_set.positions, swap)
    decode = decode_minutes if eval_set.worlds == "hour" else decode_frames
    return decode(networks.vae, latents), keep


def run_batch(batch):
    """Makes and measures -> list of report.Video"""
    started = time.perf_counter()
    eval_set = batch.eval_set
    policy = policy_of(eval_set)
    frames, keeps = make_videos(batch)
    videos = []
    for spec, video, keep in zip(batch.specs, frames, keeps):
        world = make_world(spec)
        if eval_set.worlds == "hour":
            measured = measure_minutes(video, world.motion, keep, policy)
        else:
            measured = measure(video, world.motion, keep, policy, LENGTHS[eval_set.worlds].given)
        videos.append(Video(eval_set, spec, world.caption, batch.made_by, 0, **measured))
    # each with its share of the time
    cost = (time.perf_counter() - started) / len(videos)
    return [replace(video, cost=cost) for video in videos]


# the files by which a video is made and measured
CODE = ("config rope memory world video judge flow model vae wan_vae tensors text weights erft checkpoint "
        "data probe evaluate").split()


@lru_cache
def fingerprint(path):
    """Of what a file holds; in code, comments and layout do not count"""
    content = path.read_bytes()
    if path.suffix == ".py":
        content = ast.dump(ast.parse(content)).encode()
    return hashlib.sha256(content).hexdigest()


def networks_of(eval_set):
    """The names of their files"""
    names = eval_set.weights, LENGTHS[eval_set.worlds].student, "text", "vae"
    return [name for name in names if name]


def made_by(eval_set, files):
    """What a line rests on: eight letters for networks and code, and the policy in words"""
    paths = [files[name] for name in networks_of(eval_set)]
    paths += [Path(__file__).with_name(f"{name}.py") for name in CODE]
    total = hashlib.sha256("".join(map(fingerprint, paths)).encode())
    return f"{total.hexdigest()[:8]} {policy_of(eval_set)}"


def make_all(batches, path, device):
    """Makes all videos and adds their lines; on a CPU, by a process of one thread a core."""
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        made = pool.map(run_batch, batches) if workers > 1 else map(run_batch, batches)
        for videos in tqdm(made, "videos, 16 at a time", len(batches)):
            report.append_videos(path, videos)


def read_made(path):
    """What makes a video -> the video, each once"""
    return {(video.eval_set, video.world, video.made_by): video for video in report.read_videos(path)}


# ---- one landmark, under two policies ----------------------------------------------------------------------

def forgotten(rows, first):
    """
    The first landmark that a steady turn leaves in the real part, and that comes back after 6 s or more,
    right under slowfast and wrong under longlive.
    returns  its WorldSpec, and memory -> what report.Video tells of it; None if there is none
    """
    found = {}
    for memory in ("slowfast", "longlive"):
        for video in rows.get(replace(first, worlds="real", memory=memory), []):
            is_turn = make_world(video.world).motion.kind == "turn"
            for event in video.reappearances:
                is_real = event["left"] < first_own_frame(GIVEN)
                if is_turn and is_real and event["absence"] >= 6 and event["shown"] >= 0:
                    place = video.world, event["sector"], event["left"]
                    found.setdefault(place, {})[memory] = event
    for place, events in found.items():
        if [event["right"] for event in events.values()] == [True, False]:
            return place[0], events
    return None


def make_strip(spec, events, files, first, device, path):
    """Makes the two videos once more, and draws seven frames of each."""
    rows = []
    for memory, event in events.items():
        batch = Batch(replace(first, worlds="real", memory=memory), [spec], files, "", device)
        frames, _ = make_videos(batch)
        # from the middle of the view a turn goes by 46 columns until it is out, by 164 until it is back
        away = event["absence"] * FPS
        ends = event["left"] - 46 / 164 * away, event["left"] + (1 + 46 / 164) * away
        moments = np.linspace(*ends, 7).round().astype(int).clip(0, len(frames[0]) - 1)
        rows.append((frames[0][moments], event["right"]))
    figures.draw_strip(rows, path)


def main():
    # what can be refused is refused before anything is made
    cfg = parse(Config)
    if cfg.memory:
        one_of("--memory", cfg.memory, PRESETS)
    within("--worlds", cfg.worlds, 0, 10 ** 6)
    within("--tau", cfg.tau, -1, 1)
    within("--steps", cfg.steps, 1, 1000)
    check_writable(cfg.out)
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
    # the rows that are asked for, and beside them the student as it is, where its lines are there
    first = EvalSet(student, tau=cfg.tau, steps=cfg.steps)
    asked = eval_sets(first, taus, cfg.quick, cfg.memory)
    number = cfg.worlds or (24 if cfg.quick else 64)
    wanted = {}
    for s in dict.fromkeys(eval_sets(EvalSet(student), taus) + asked):
        if set(networks_of(s)) <= set(files):
            maker = made_by(s, files)
            wanted[s] = [(s, spec, maker) for spec in worlds_of(s.worlds, number, cfg.seed)]
    # videos that were not made yet
    path = Path(cfg.out, "evaluate.jsonl")
    made = read_made(path)
    batches = []
    for s in asked:
        missing = [key for key in wanted.get(s, []) if key not in made]
        for i in range(0, len(missing), BATCH):
            _, specs, makers = zip(*missing[i:i + BATCH])
            batches.append(Batch(s, specs, files, makers[0], device))
    make_all(batches, path, device)
    # all tables and figures of what is there now
    made = read_made(path)
    rows = {s: [made[key] for key in keys if key in made] for s, keys in wanted.items()}
    if not any(video.reappearances for videos in rows.values() for video in videos):
        raise BadInput("no landmark is due back in any of these videos: ask for more --worlds, or longer "
                       "videos (LENGTHS in evaluate.py)")
    tables = report.all_tables(rows, first)
    tables["The paper's orderings"] = paper.orderings(rows, first)
    report.write(tables, student, path.with_suffix(".md"))
    figures.draw_all(rows, first, path.parent)
    found = forgotten(rows, first)
    if found:
        make_strip(*found, files, first, device, path.with_name("strip.png"))


if __name__ == "__main__":
    run(main)
