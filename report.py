"""
What evaluate.py measured, as numbers and tables. Knows no network.

A video is a dict in a line of out/evaluate.jsonl: what its row asked for (ROW), its world, which training
its network comes from, and what probe.measure() tells of it. A number is a ratio of sums over a row's videos,
with its 95 % bootstrap interval over trainings and worlds, as "48.2 [33.1, 62.0]": where there is one
training, the interval does not tell what another would give. Rows are compared in the worlds and trainings
that both have. A table is a list of dicts of numbers, and becomes text at the very end: what is met, or
better, is decided before.

    recall      share of the landmarks due back, those in the sink left out, that look as before they left
    ceiling     share of which the memory still held a latent; luck may exceed it
    chance      how often two videos of a row show the same landmark in a sector
    detail      recall at the shortest absence with ten returns or more
    half-way    seconds out of view up to which returns are right more often than half-way from always to
                chance, and after which less often: the reach; "beyond" where that is longer than any return
    steady      videos that move within 10 % of their caption's rate, and look back where it says
    starts      videos that begin within a quarter of a sector of the point that their caption names
    drift       validity (dB to the nearest frame of the world) of the last 10 s less that of the first 10 s
    entropy     of the landmarks that a video shows in a minute: 0 where all are the same

References: Context Forcing, arXiv 2602.06028, figures 1, 7 and 8.
Leaves out: tests of the paper's assumptions 1 and 2.
"""
import hashlib
import json
import math

import numpy as np

from config import warn
from judge import chance
from probe import HOUR_NUMBERS, MINUTES
from records import read_lines

# Seconds, each within a tenth. No gaps: 1 to 6 s come from looks aside, 5 to 28 from turns, 12 to 28 from
# lingering ones.
ABSENCES = (2, 2.4, 2.9, 3.5, 4.2, 5, 6, 7.2, 8.7, 10.5, 12.5, 15, 18, 22, 26.5)
SHORT = 2  # seconds; fast memory bridges less, and a camera that wobbles makes many such returns
MOTIONS = ("turn", "linger", "aside")  # of motion
ROW = ("weights", "memory", "positions", "worlds", "tau", "steps")  # of a video: which row it is in
# networks whose training differs in one thing -> the rows in which they are compared
ABLATIONS = {
    ("stage2", "stage2_none"): {"worlds": "text"},
    ("teacher", "teacher_plain"): {"worlds": "teacher", "memory": "uniform2", "tau": None, "steps": None},
}


# ---- a line 16 videos --------------------------------------------------------------------------------------

def read_videos(path):
    """-> key -> list of videos; none if there is no file yet"""
    videos = {}
    for line in read_lines(path, {"key": str, "videos": [dict], "sha256": str}):
        if line["sha256"] == hash_videos(line["videos"]):
            videos[line["key"]] = line["videos"]
        else:
            warn(f"passed over: {path}, key {line['key']}: its videos are not what their sha256 says")
    return videos


def hash_videos(videos):
    """sha256 of what a line holds"""
    return hashlib.sha256(json.dumps(videos).encode()).hexdigest()


def pick(videos, wanted):
    """Those of which all that `wanted` (a dict) says is true"""
    return [video for video in videos if wanted.items() <= video.items()]


def rows_of(videos):
    """-> lists of videos, one a row, in the order in which they come"""
    rows = {}
    for video in videos:
        rows.setdefault(tuple(video.get(name) for name in ROW), []).append(video)
    return list(rows.values())


# ---- statistics: counts are an array (videos, 4): sum, number, which training, which world -----------------

def counts(videos, what, absence=None):
    """
    what     "right" (recall, %), "held" (its ceiling) or "follows", of returns; or a number of each video
    absence  of returns: seconds, within a tenth; None: all that are not SHORT
    """
    low, high = (.9 * absence, 1.1 * absence) if absence else (SHORT, math.inf)
    found = np.zeros((len(videos), 4))
    for i, video in enumerate(videos):
        values = [video.get(what, math.nan)]
        if what in ("right", "held", "follows"):
            values = [100 * event[what] for event in video["returns"] if low <= event["absence"] <= high]
        values = [x for x in values if not math.isnan(x)]
        found[i] = sum(values), len(values), video.get("training", 0), video.get("seed", i)
    return found


def estimate(counts):
    """-> mean over all videos, and both ends of its 95 % interval; NaN if there is nothing to count"""
    total, n, *_ = counts.sum(0)
    if n == 0:
        return np.full(3, math.nan)
    # 2,000 resamples of trainings, and of worlds, with replacement; a world counts alike in all trainings
    rng = np.random.default_rng(0)
    weight = 1
    for drawn in counts[:, 2:].T:
        names, which = np.unique(drawn, return_inverse=True)
        times = rng.multinomial(len(names), np.ones(len(names)) / len(names), 2000)
        weight = weight * times[:, which]
    totals, ns = (weight @ counts[:, :2]).T
    means = totals[ns > 0] / ns[ns > 0]
    return np.array([total / n, *np.percentile(means, (2.5, 97.5))])


def mean(videos, what, absence=None):
    """Of what counts() takes -> what estimate() gives"""
    return estimate(counts(videos, what, absence))


def difference(ours, theirs, what):
    """`what` of our videos less theirs, in the worlds of a training that both have -> as estimate()"""
    means = {tuple(one): total / n for total, n, *one in counts(theirs, what) if n}
    gaps = []
    for total, n, *one in counts(ours, what):
        if n and tuple(one) in means:
            gaps.append((total / n - means[tuple(one)], 1, *one))
    # of fewer than eight nothing can be said
    return estimate(np.array(gaps)) if len(gaps) >= 8 else np.full(3, math.nan)


def detail(videos):
    """Recall after the shortest absence after which ten or more are due back -> what estimate() gives"""
    for absence in ABSENCES:
        found = counts(videos, "right", absence)
        if found.sum(0)[1] >= 10:
            return estimate(found)
    return np.full(3, math.nan)


def half_way(videos, what="right"):
    """
    The seconds out of view that best part returns that are mostly `what` (the shorter) from those that mostly
    are not; the bar is half-way between 100 % and chance. inf if that is beyond the last, NaN if fewer than
    ten come before it.
    """
    events = sorted((e["absence"], e[what]) for video in videos for e in video["returns"])
    bar = (1 + luck(videos)) / 2
    gain = np.cumsum([right - bar for _, right in events])
    last = gain.argmax() if len(events) else 0
    if last < 9:
        return math.nan
    return math.inf if last + 1 == len(events) else events[last][0]


def luck(videos):
    """Chance, of one training: others draw the same worlds, from the same noise, and much alike"""
    return chance([video["landmarks"] for video in videos if not video.get("training")])


# ---- tables: lists of dicts of words, numbers, or means with both ends of their intervals ------------------

def targets(videos, student_row):
    """
    What the student is to reach from text and after real video. Decided by the numbers themselves and not by
    how a table rounds them.
    student_row  what the student's rows share
    """
    table = []
    for start in ("text", "real"):
        ours = pick(videos, student_row | {"worlds": start})
        aside = pick(ours, {"motion": "aside"})
        turns = [video for video in ours if video not in aside]
        wanted = [
            ("recall after 6 s, %", "at least", 90, mean(ours, "right", 6)),
            ("recall after 15 s, %", "at least", 80, mean(ours, "right", 15)),
            ("steady turns, %", "at least", 90, mean(turns, "steady")),
            ("steady looks aside, %", "at least", 80, mean(aside, "steady")),
            ("starts, %", "at least", 90, mean(ours, "starts")),
            ("jumps a minute", "at most", 1, mean(ours, "jumps")),
            ("last 5 s, dB", "at least", 27.4, mean(ours, "last")),
        ]
        if start == "real":
            swapped = pick(videos, student_row | {"worlds": "swapped", "memory": "uniform2"})
            wanted.append(("follow exchanged memories, %", "at least", 90, mean(swapped, "follows")))
        # better than its own start and than the causal model, by intervals that do not touch
        for weights in ("stage1", "init_ar"):
            theirs = pick(videos, student_row | {"worlds": start, "weights": weights})
            for name, what in {"recall": "right", "steady": "steady"}.items():
                gap = mean(ours, what)[1] - mean(theirs, what)[2]
                wanted.append((f"{name}, gap to {weights}'s interval", "above", 0, [gap]))
        # and is it reached?
        for what, relation, bound, (found, *_) in wanted:
            is_met = {"at least": found >= bound, "at most": found <= bound, "above": found > bound}[relation]
            met = "no data" if math.isnan(found) else "yes" if is_met else "no"
            table.append({"videos": start, "target": what, "": f"{relation} {bound}", "found": found,
                          "met": met})
    return table


def label(video):
    """Its memory, and what else was asked for"""
    # tau and steps only where they are not the weights' own
    text = video["memory"]
    if video["tau"] is not None:
        text += f", tau {video['tau']:g}"
    return text if video["steps"] is None else f"{text}, {video['steps']} steps"


def summary(videos):
    return {
        "recall, %": mean(videos, "right"),
        "returns": int(counts(videos, "right").sum(0)[1]),
        "ceiling": mean(videos, "held"),
        "chance": 100 * luck(videos),
        "detail, %": detail(videos),
        "half-way, s": half_way(videos),
        "ceiling's": half_way(videos, "held"),
        "last 5 s, dB": mean(videos, "last"),
        "drift": mean(videos, "drift"),
        "steady, %": mean(videos, "steady"),
        "starts, %": mean(videos, "starts"),
        "jumps a minute": mean(videos, "jumps"),
        "videos": len(videos),
    }


def ablations(videos, student_row):
    """What it is worth, the one thing that differs in two trainings -> rows of a table"""
    table = []
    for names, row in ABLATIONS.items():
        both = [pick(videos, student_row | row | {"weights": name}) for name in names]
        for name, what in {"recall, %": "right", "last 5 s, dB": "last"}.items():
            if all(both):
                table.append({"of": " - ".join(names), "in": name, "difference": difference(*both, what)})
    return table


def all_tables(videos, student_row):
    """-> title -> table"""
    rows, curves, hours = [], [], []
    for row in rows_of(videos):
        named = {name: row[0][name] for name in ROW[:4]}
        named["memory"] = label(row[0])
        if named["worlds"] == "hour":
            names = [f"{minute} min: {name}" for minute in MINUTES for name in HOUR_NUMBERS]
            hours.append(named | {name: mean(row, name) for name in names})
            continue
        # by the kind of motion too
        for motion in ("all", *MOTIONS):
            some = row if motion == "all" else pick(row, {"motion": motion})
            named["motion"] = motion
            rows.append(named | summary(some))
            curves.append(named | {f"{x:g} s": mean(some, "right", x) for x in ABSENCES})
    return {"Targets": targets(videos, student_row), "All rows": rows,
            "Recall by seconds out of view, %": curves,
            "Differences in training": ablations(videos, student_row), "Drifting over an hour": hours}


# ---- ... and as text ---------------------------------------------------------------------------------------

def formatted(cell, digits):
    """Words as they are; "-" where there is no number; an interval behind its mean"""
    if isinstance(cell, (str, int)):
        return str(cell)
    if cell is None or np.isnan(cell).any():
        return "-"
    # a mean with both ends of its interval
    if np.ndim(cell):
        mean, low, high = [formatted(x, digits) for x in cell]
        return f"{mean} [{low}, {high}]"
    return "beyond" if math.isinf(cell) else f"{cell:.{digits}f}"


def markdown(tables, digits=1):
    """title -> table, as text"""
    lines = []
    for title, table in tables.items():
        if table:
            lines += ["", f"**{title}**", ""]
            for cells in (table[0], ["---"] * len(table[0]), *[row.values() for row in table]):
                lines.append(f"| {' | '.join(formatted(cell, digits) for cell in cells)} |")
    return "\n".join(lines) + "\n"
