"""
The paper in miniature: what trained models remember and how their pictures hold, by the small world's judge.

    python evaluate.py                            # everything; run it again to go on after a stop
    python evaluate.py --no-hours                 # without the videos of an hour
    python evaluate.py --quick                    # what every preset of memory.py remembers
    python evaluate.py --quick --memory NAME      # one preset, its row and its curve
    python evaluate.py --quick --tau X --steps N  # other than the weights' own, beside what is there
    python evaluate.py --others out/1,out/2       # and those of train.py --stage 2 --seed 1 --out out/1, ...

A row of the tables is a dict, report.ROW: whose weights, which memory, which worlds. Its videos are made 16
at a time, and leave a line in out/evaluate.jsonl with all that report.py needs: they are made once, and
tables and figures cost nothing after that. A line counts as long as the worlds, the networks, the policy and
the code that made it are what they were: its key is a hash of all of them. Networks that were trained again,
from the shipped start, count in the rows `text` and `teacher`. Real videos: metrics.py.

    text       captions drawn at random; 62.8 s from nothing, as all that follows unless it says otherwise
    real       the same, 50 s after 10.3 s of real video
    returns    as many captions of each kind of motion, turns from the fastest to the slowest
    swapped    a world and its counterfactual exchange slow memories, 4 s after real video
    teacher    31 s of a teacher alone
    after_real 5 s of a teacher, after 10.3 s that are real
    hour       an hour, of which minutes 1, 5, 15 and 60 are looked at

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3.
Leaves out: a teacher after a student's video.
"""
import ast
import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path

from config import (STUDENT, BadInput, check_writable, one_of, parse, pick_device, run, within,  # first
                    write_text)

import numpy as np
import torch
from tqdm import tqdm

import figures
from data import frames_of
from erft import TARGET
from memory import CHUNK, PRESETS, Policy
from paper import orderings
from probe import (GIVEN, MINUTE_CHUNKS, MINUTES, PROBE_CHUNKS, continue_student, continue_teacher,
                   decode_frames, decode_minutes, held_out, measure, measure_minutes)
from records import append_line
from report import MOTIONS, ROW, all_tables, hash_videos, markdown, pick, read_videos
from weights import WEIGHTS, find_partner, load_tiny
from world import FPS, HELD_OUT, PERIODS, WorldSpec, make_world

BATCH = 16     # videos made together
UNIFORM = {f"uniform{n}": replace(PRESETS["uniform1"], interval=n) for n in range(1, 7)}  # of the frontier


@dataclass
class Config:
    quick: bool = False  # what memory is worth, and no more
    memory: str = ""     # only the rows of this preset
    tau: float = None    # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None    # denoising steps of the students (default: the weights' own)
    no_hours: bool = False  # without the videos of an hour, which take longest
    worlds: int = 0      # number of held-out worlds a set (default: 64; 24 with --quick)
    ckpt: str = ""       # the student (default: weights/stage2.safetensors)
    others: str = ""     # folders of stages that were trained again with another --seed, a comma between
    out: str = "out"     # folder for lines, tables, figures
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)


# ---- which videos are made ---------------------------------------------------------------------------------

LENGTHS = {  # worlds of a row -> chunks of real video, and of the model's own after them
    "text": (0, 84),
    "real": (GIVEN, 67),
    "returns": (0, 84),
    "swapped": (GIVEN, PROBE_CHUNKS),
    "hour": (0, MINUTE_CHUNKS * MINUTES[-1] + 1),
    "teacher": (0, 42),
    "after_real": (GIVEN, 7),
}
TEACHERS = ("teacher", "after_real")  # made 21 latents at a time
EVERY_TRAINING = ("text", "teacher")   # by networks of other trainings, too


TABLE = """
student        presets     returns
student        uniform2    swapped
student        uniforms    returns
student        presets     hour
student        slowfast    text
stage1         slowfast    text
init_ar        slowfast    text
init_ode       slowfast    text
stage2_none    slowfast    text
student        slowfast    real
stage1         slowfast    real
init_ar        slowfast    real
student        longlive    real
stage1         slowfast    hour
stage2_none    slowfast    hour
teacher        uniform2    teacher
teacher_plain  uniform2    teacher
teacher        uniform2    after_real
""".strip().splitlines()  # of rows: weights, memory or several, worlds; the first two are those of --quick
SEVERAL = {"presets": PRESETS, "uniforms": UNIFORM}


def all_rows(student_row, taus=(), quick=False, no_hours=False):
    """
    student_row  what its rows share
    taus     surprisal thresholds of the frontier beside that of the weights
    returns  the rows of the tables; a new preset of memory.py gets its own by its name
    """
    # what each policy remembers, and whose memory the student follows; an hour; what it comes from, from both
    # starts, and its teachers
    rows = []
    for line in TABLE[:2] if quick else TABLE:
        weights, memory, worlds = line.split()
        if no_hours and worlds == "hour":
            continue
        row = student_row | {"worlds": worlds}
        if weights != "student":
            row["weights"] = weights
        if worlds in TEACHERS:
            row |= {"tau": None, "steps": None}
        rows += [row | {"memory": policy} for policy in SEVERAL.get(memory, [memory])]
    if not quick:
        # the frontier, at equal slots; positions that nobody trained
        rows += [student_row | {"worlds": "returns", "tau": tau} for tau in taus]
        rows.append(student_row | {"positions": "unbounded"})
    return rows


def policy_of(row, tau=Policy.tau):
    """A preset of memory.py, or uniformN: every N-th chunk; tau: that of the weights -> Policy"""
    policy = (UNIFORM | PRESETS)[row["memory"]].calibrated(tau)
    return policy if row["tau"] is None else replace(policy, tau=row["tau"])


def worlds_of(name, number, seed):
    """The held-out worlds of a row -> list of WorldSpec"""
    first_seed = HELD_OUT + seed
    if name == "returns":
        # As many of each kind. Turns bring back what was away for 5 to 28 s, looks aside for 1 to 6; more are
        # slow, as these show fewer returns.
        specs = []
        for i in range(number):
            kind = MOTIONS[i % 3]
            place = (i // 3 / max(1, (number - 1) // 3)) ** .7
            seconds = round(np.interp(place, (0, 1), PERIODS[kind]))
            specs.append(WorldSpec(first_seed + i, kind, seconds))
        return specs
    if name == "swapped":  # pairs of neighbours: one place and motion, two sets of landmarks
        return [replace(spec, counterfactual=other) for spec in held_out(number // 2, seed)
                for other in (False, True)]
    if name == "after_real":
        return held_out(number, seed)
    if name == "hour":  # few, as they are long; the motion of sample.py's default video
        return [WorldSpec(first_seed + i, "turn", 12) for i in range((number + 3) // 4)]
    return [WorldSpec(first_seed + i) for i in range(number)]


# ---- making and measuring ----------------------------------------------------------------------------------

load_once = lru_cache(load_tiny)  # in each process


def make_videos(row, specs, files, device):
    """files: name of weights -> path; returns frames (b, f, 3, 32, 64) uint8, keep (b, chunks) bool"""
    worlds = row["worlds"]
    given, chunks = LENGTHS[worlds]
    networks = load_once(files[row["weights"]], device)
    if worlds in TEACHERS:
        latents, keep = continue_teacher(networks, specs, given, chunks * CHUNK // TARGET)
    else:
        policy = policy_of(row, networks.sampler.tau)
        if row["steps"] is not None:
            networks = replace(networks, sampler=replace(networks.sampler, steps=row["steps"]))
        latents, keep = continue_student(networks, specs, given, chunks, policy, row["positions"],
                                         worlds == "swapped")
    decode = decode_minutes if worlds == "hour" else decode_frames
    return decode(networks.vae, latents), keep


def run_batch(batch):
    """(row, list of WorldSpec, files, device) -> videos, as report.py has them"""
    row, specs, *_ = batch
    videos = []
    for frames, keep, spec in zip(*make_videos(*batch), specs):
        if row["worlds"] == "hour":
            measured = measure_minutes(frames)
        else:
            measured = measure(frames, spec, keep, policy_of(row), LENGTHS[row["worlds"]][0])
        videos.append(row | {"seed": spec.seed, "motion": make_world(spec).motion.kind} | measured)
    return videos


# the files by which a video is made and measured
CODE = ("config records rope memory world video judge flow model vae wan_vae tensors text weights erft "
        "checkpoint data histories probe evaluate").split()


@lru_cache
def hash_of_file(path):
    """Of what a file holds; in code, comments and layout do not count, docstrings do"""
    content = path.read_bytes()
    if path.suffix == ".py":
        content = ast.dump(ast.parse(content)).encode()
    return hashlib.sha256(content).hexdigest()


def key_of(row, specs, files, device):
    """Of videos: a hash of their row, policy, worlds, networks and code"""
    ckpt = files[row["weights"]]
    paths = [ckpt, find_partner(ckpt, "text"), find_partner(ckpt, "vae")]
    paths += [Path(__file__).with_name(f"{name}.py") for name in CODE]
    made_by = repr([row, policy_of(row), specs, *map(hash_of_file, paths)])
    return hashlib.sha256(made_by.encode()).hexdigest()[:16]


def make_batches(rows, trainings, number, seed, device):
    """
    All that is to be made for some rows.
    trainings  of each: name of weights -> file; what it lacks is of the first
    returns    key -> arguments of run_batch()
    """
    batches = {}
    for row, (training, own) in product(rows, enumerate(trainings)):
        is_asked = training == 0 or row["worlds"] in EVERY_TRAINING
        specs = worlds_of(row["worlds"], number, seed) if is_asked and row["weights"] in own else []
        for i in range(0, len(specs), BATCH):
            batch = row | {"training": training}, specs[i:i + BATCH], trainings[0] | own, device
            batches[key_of(*batch)] = batch
    return batches


def make_all(batches, path, device):
    """Key -> batch: makes all videos and adds a line a batch; on a CPU, by a process of one thread a core."""
    # Windows can wait for 61 at most
    workers = min(61, torch.get_num_threads()) if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        run_each = pool.map if workers > 1 else map
        try:
            made = tqdm(run_each(run_batch, batches.values()), "videos, 16 at a time", len(batches))
            for videos, key in zip(made, batches):
                append_line(path, {"key": key, "videos": videos, "sha256": hash_videos(videos)})
        finally:  # a signal does not wait for videos that are under way
            for worker in active_children():
                worker.terminate()


# ---- one landmark, under two policies ----------------------------------------------------------------------

def forgotten(videos, student_row):
    """
    The first landmark that a steady turn leaves in the real part, and that comes back right under slowfast
    and wrong under longlive.
    returns  both videos, each with its event; nothing if there is none
    """
    found = {}
    for memory in ("slowfast", "longlive"):
        for video in pick(videos, student_row | {"worlds": "real", "motion": "turn", "memory": memory}):
            for event in video["returns"]:
                if event["left"] < frames_of(GIVEN * CHUNK) and event["shown"] >= 0:
                    place = video["seed"], event["sector"], event["left"]
                    found.setdefault(place, []).append((video, event))
    for both in found.values():
        if [event["right"] for _, event in both] == [True, False]:
            return both
    return []


def moments(event):
    """Seven frame numbers: from the middle of the view, out of it, to the middle"""
    # a turn goes by 46 columns until it is out, by 164 until it is back
    away = event["absence"] * FPS * np.linspace(-46 / 164, 1 + 46 / 164, 7)
    return (event["left"] + away).round().astype(int)


def make_strip(both, files, device, path):
    """both: of forgotten(); their videos are made once more"""
    rows = []
    for video, event in both:
        (frames,), _ = make_videos(video, [WorldSpec(video["seed"])], files, device)
        rows.append((frames.take(moments(event), 0, mode="clip"), event["right"]))
    if rows:
        figures.draw_strip(rows, path)


def main():
    # what can be refused is refused before anything is made
    cfg = parse(Config)
    if cfg.memory:
        one_of("--memory", cfg.memory, PRESETS)
    within("--worlds", cfg.worlds, 0, 1_000_000)
    within("--tau", cfg.tau, -1, 1)
    within("--steps", cfg.steps, 1, 1000)
    within("--seed", cfg.seed, 0, 10 ** 9)
    check_writable(cfg.out)
    device = pick_device(cfg.device)
    # which networks are there: those that ship, and of other trainings
    folders = [WEIGHTS, *filter(None, cfg.others.split(","))]
    trainings = [{path.stem: path for path in Path(folder).rglob("*.safetensors")} for folder in folders]
    if not all(trainings):
        raise BadInput(f"--others {cfg.others}: one of them holds no networks that train.py wrote")
    files = trainings[0]
    ckpt = Path(cfg.ckpt or WEIGHTS / f"{STUDENT}.safetensors")
    student = ckpt.stem
    files[student] = ckpt
    # the frontier's taus: similarities twice, and half as far below 1 as for the weights' own
    tau = load_tiny(ckpt, device).sampler.tau
    taus = [round(1 - apart * (1 - tau), 4) for apart in (2, .5)]
    # the rows that are asked for, and before them the student's own, where their lines are there
    plain = dict(zip(ROW, (student, "slowfast", "bounded", "text", None, None)))
    student_row = plain | {"tau": cfg.tau, "steps": cfg.steps}
    asked = all_rows(student_row, taus, cfg.quick, cfg.no_hours)
    if cfg.memory:
        asked = pick(asked, {"memory": cfg.memory, "weights": student})
    number = cfg.worlds or (24 if cfg.quick else 64)
    wanted = make_batches(asked, trainings, number, cfg.seed, device)
    batches = make_batches(all_rows(plain, taus), trainings, number, cfg.seed, device) | wanted
    # videos that were not made yet, then all that are there
    path = Path(cfg.out, "evaluate.jsonl")
    made = read_videos(path)
    make_all({key: batch for key, batch in wanted.items() if key not in made}, path, device)
    made = read_videos(path)
    videos = [video for key in batches for video in made.get(key, [])]
    if not any(video.get("returns") for video in videos):
        raise BadInput("no landmark is due back in any of these videos: ask for more --worlds, or longer "
                       "videos (LENGTHS in evaluate.py)")
    tables = all_tables(videos, student_row) | {"The paper's orderings": orderings(videos, student_row)}
    text = f"Student {student}, {len(trainings)} training(s), [95 % bootstrap intervals]. Words: report.py.\n"
    text += markdown(tables)
    write_text(path.with_suffix(".md"), text)
    print(text)
    figures.draw_all(videos, student_row, path.parent)
    make_strip(forgotten(videos, student_row), files, device, path.with_name("strip.png"))


if __name__ == "__main__":
    run(main)
