"""
What evaluate.py measured, one line of JSON a video, as numbers and tables. Knows no network.

A number is a ratio of sums over a row's videos, with its 95 % bootstrap interval over videos, as
"48.2 [33.1, 62.0]"; rows are compared in the worlds that both have. A table is a list of rows of numbers, and
becomes text at the very end: what is met, or better, is decided before. One training seed a row: intervals do
not tell what another training would give.

    recall      share of the landmarks due back, those in the sink left out, that look as before they left
    ceiling     share of which the memory still held a latent
    chance      how often two videos of a row show the same landmark in a sector
    detail      recall after the shortest absence after which ten or more are due back
    half-way    seconds out of view after which recall, as it can only fall, is half-way to chance: the reach;
                "beyond" where it does not fall so far within what was measured
    steady      videos that move within 10 % of their caption's rate
    drift       validity (dB to the nearest frame of the world) of the last 10 s less that of the first 10 s
    entropy     of the landmarks that a video shows in a minute: 0 where all are the same
    cost        seconds of one process to make and measure a video

References: Context Forcing, arXiv 2602.06028, figures 1, 7 and 8, assumptions 1 and 2.
Leaves out: what another training seed would give.
"""
import json
import math
import operator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np

from config import BadInput, whole_or_absent
from judge import chance
from probe import MINUTES
from world import WorldSpec, make_world

# Seconds, each within a tenth. No gaps: 2 to 12 s come from looks aside, 5 to 28 from turns, 12 to 28 from
# lingering ones.
ABSENCES = (2, 2.4, 2.9, 3.5, 4.2, 5, 6, 7.2, 8.7, 10.5, 12.5, 15, 18, 22, 26.5)
SHORT = 2  # seconds; fast memory bridges less, and a camera that wobbles makes many such returns
KINDS = ("turn", "linger", "aside")  # of motion


# ---- a line a video ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalSet:
    """The videos of one row: who makes them, and from where."""
    weights: str                # a file in weights/, without its ending
    memory: str = "slowfast"    # see evaluate.policy_of(); of a teacher, what selects its context
    positions: str = "bounded"
    worlds: str = "text"        # one of evaluate.LENGTHS
    teacher: bool = False       # 21 latents at a time, no KV cache
    tau: float = None           # surprisal threshold; None: the weights' own
    steps: int = None           # of denoising; None: the weights' own


@dataclass
class Video:
    """What is known of one video: a line of the file."""
    eval_set: EvalSet
    world: WorldSpec
    caption: str
    made_by: str          # fingerprint of networks and code, and the policy in words
    cost: float           # seconds of one process, to make and measure it
    psnr: list            # dB to the nearest frame that the world can draw, for every 5 s of the model's own;
                          # of an hour, for each of MINUTES
    landmarks: list       # by sector: what it shows most, -1 for nothing; of an hour, for each of MINUTES
    reappearances: list   # dicts: those of judge.Reappearance, and right, held (by the memory)
    turning: float        # columns travelled, over those of the caption
    jumps: int            # of the camera by more than 15 degrees
    minutes: float        # of what was measured


def read_videos(path):
    """-> list of Video; none if there is no file yet"""
    videos = []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            eval_set = EvalSet(**values.pop("eval_set"))
            world = WorldSpec(**values.pop("world"))
            videos.append(Video(eval_set, world, **values))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: {error!r}: take the line out, "
                           "or give another --out") from None
    return videos


def append_videos(path, videos):
    """Adds a line a video: all of them at once, or none."""
    before = path.read_bytes() if path.exists() else b""
    lines = [json.dumps(asdict(video)) + "\n" for video in videos]
    with whole_or_absent(path) as part:
        part.write_bytes(before + "".join(lines).encode())


# ---- statistics: pairs are one (sum, number) a video -------------------------------------------------------

def number(pairs):
    return sum(n for _, n in pairs)


@lru_cache
def draws(n):
    """2,000 times n of n videos: the same for any two rows of as many, which pairs them"""
    return np.random.default_rng(0).integers(n, size=(2000, n))


def resampled(pairs):
    """2,000 ratios of sums over videos that are drawn again; NaN where nothing is counted"""
    pairs = np.asarray(pairs, float).reshape(-1, 2)
    total, n = pairs[draws(len(pairs))].sum(1).T
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def estimate(pairs):
    """-> mean over all videos, and both ends of its 95 % interval; NaN if there is nothing to count"""
    if not number(pairs):
        return np.full(3, np.nan)
    mean = sum(x for x, _ in pairs) / number(pairs)
    return np.array([mean, *np.nanpercentile(resampled(pairs), (2.5, 97.5))])


def mean(pairs):
    return float(estimate(pairs)[0])


def compare(ours, theirs, measure):
    """
    How is `measure` (videos -> pairs) of our videos beside theirs, world by world?
    returns  "higher" or "lower" where the difference's 95 % interval says so, else "not significant"; "no
             data" from fewer than eight worlds, or where nothing counts
    """
    # the worlds of both, in one order
    ours = {video.world: video for video in ours}
    theirs = {video.world: video for video in theirs}
    both = [world for world in ours if world in theirs]
    ours = measure([ours[world] for world in both])
    theirs = measure([theirs[world] for world in both])
    if len(both) < 8 or not number(ours) or not number(theirs):
        return "no data"
    # is nought in the interval of their difference?
    low, high = np.nanpercentile(resampled(ours) - resampled(theirs), (2.5, 97.5))
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "not significant"


# ---- what is told of a row: videos -> pairs ----------------------------------------------------------------

def recall(videos, absence=None, what="right"):
    """absence: seconds, within a tenth; None: all that are not SHORT"""
    low, high = (SHORT, math.inf) if absence is None else (.9 * absence, 1.1 * absence)
    pairs = []
    for video in videos:
        due = [event[what] for event in video.reappearances if low <= event["absence"] <= high]
        pairs.append((sum(due), len(due)))
    return pairs


def ceiling(videos, absence=None):
    return recall(videos, absence, "held")


def follows(videos):
    """Returns that show the landmark of the counterfactual world, where it differs from the own"""
    pairs = []
    for video in videos:
        own = make_world(video.world).landmarks
        other = make_world(replace(video.world, counterfactual=not video.world.counterfactual)).landmarks
        events = [e for e in video.reappearances if own[e["sector"]] != other[e["sector"]]]
        pairs.append((sum(e["shown"] == other[e["sector"]] for e in events), len(events)))
    return pairs


def last_validity(videos):
    """dB of the last 5 s; of an hour, of its last minute"""
    return [(video.psnr[-1], 1) for video in videos]


def drift(videos):
    """dB of the last 10 s less those of the first 10 s"""
    long = [video.psnr for video in videos if len(video.psnr) > 3]
    return [(np.mean(psnr[-2:]) - np.mean(psnr[:2]), 1) for psnr in long]


def steady(videos):
    return [(abs(video.turning - 1) < .1, 1) for video in videos]


def jumps(videos):
    return [(video.jumps, video.minutes) for video in videos]


# ---- of an hour: minute is a place in MINUTES --------------------------------------------------------------

def validity_in(videos, minute):
    return [(video.psnr[minute], 1) for video in videos]


def entropy_in(videos, minute):
    pairs = []
    for video in videos:
        _, count = np.unique([x for x in video.landmarks[minute] if x >= 0], return_counts=True)
        share = count / count.sum()
        pairs.append((-(share * np.log2(share)).sum(), 1))
    return pairs


def agreement_in(videos, minute):
    """Of the sectors that show something now and in the first minute: how many show the same?"""
    pairs = []
    for video in videos:
        then, now = video.landmarks[0], video.landmarks[minute]
        both = [(a, b) for a, b in zip(then, now) if min(a, b) >= 0]
        pairs.append((100 * sum(a == b for a, b in both), len(both)))
    return pairs


IN_A_MINUTE = {
    "validity, dB": validity_in,
    "entropy of landmarks, bits": entropy_in,
    "landmarks as in minute 1, %": agreement_in,
}


# ---- ... or to a number, NaN if there is none --------------------------------------------------------------

def of_kinds(videos, *kinds):
    """Those with such a motion"""
    return [video for video in videos if make_world(video.world).motion.kind in kinds]


def luck(videos):
    return chance([video.landmarks for video in videos]) if videos else math.nan


def detail(videos):
    """Recall after the shortest absence after which ten or more are due back -> pairs"""
    for absence in ABSENCES:
        if number(recall(videos, absence)) >= 10:
            return recall(videos, absence)
    return []


def falling(videos, share):
    """
    The curve of `share`, recall or ceiling, over ABSENCES with ten returns or more, and of all that only fall
    the one nearest to it (isotonic regression).
    returns  list of (absence, value)
    """
    counts = {absence: np.sum(share(videos, absence), 0) for absence in ABSENCES}
    counts = {absence: count for absence, count in counts.items() if count[1] >= 10}
    right, due = np.array([(0, 0), *counts.values()]).cumsum(0).T
    curve = []
    for i, absence in enumerate(counts):
        # from each start before it, as high as any end behind it allows
        levels = []
        for start in range(i + 1):
            means = (right[i + 1:] - right[start]) / (due[i + 1:] - due[start])
            levels.append(means.max())
        curve.append((absence, min(levels)))
    return curve


def half_way(videos, share=recall):
    """
    Seconds out of view at which `share` has fallen half-way to chance; inf if it never does, NaN if there is
    nothing to fall from, less than 20 points above chance.
    """
    curve = falling(videos, share)
    best = curve[0][1] if len(curve) > 1 else math.nan
    if not best > luck(videos) + .2:
        return math.nan
    level = (best + luck(videos)) / 2
    # between the first two points that have that level between them
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low < level:
            return before + (after - before) * (high - level) / (high - low)
    return math.inf


# ---- tables: a list of rows, a row a dict of cells: words, numbers, or a mean with both ends of its interval

ALL = "All rows"
CURVES = "Recall by seconds out of view, %"
HOUR = "Drifting over an hour"
BESIDE = "recall beside the first's"  # of the same worlds

RELATIONS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


def apart(ours, theirs, measure):
    """Points between the low end of our interval and the high end of theirs; below 0 if they overlap"""
    return 100 * (estimate(measure(ours))[1] - estimate(measure(theirs))[2])


def targets(rows, first):
    """
    What the student is to reach, in videos from text and in those after real video; decided by the numbers
    themselves and not by how a table rounds them.
    rows     EvalSet -> videos; first: the EvalSet of the student
    returns  rows
    """
    def of(worlds, **other):
        return rows.get(replace(first, worlds=worlds, **other), [])

    def turns(start):
        return of_kinds(of(start), "turn", "linger")

    def gap(weights, measure):
        return lambda start: apart(of(start), of(start, weights=weights), measure)

    wanted = [
        ("recall after 6 s, %", "at least", 90, lambda start: 100 * mean(recall(of(start), 6))),
        ("recall after 15 s, %", "at least", 80, lambda start: 100 * mean(recall(of(start), 15))),
        ("steady turns, %", "at least", 90, lambda start: 100 * mean(steady(turns(start)))),
        ("steady looks aside, %", "at least", 80,
         lambda start: 100 * mean(steady(of_kinds(of(start), "aside")))),
        ("jumps a minute", "at most", 1, lambda start: mean(jumps(of(start)))),
        ("drift, dB", "at least", -1, lambda start: mean(drift(of(start)))),
        ("returns that follow exchanged memories, %", "at least", 90,
         lambda start: 100 * mean(follows(of("swapped", memory="uniform2")))),
    ]
    # Stage 2 against its own start and the causal model, by intervals that do not touch
    for weights, measure in product(("stage1", "init_ar"), (recall, steady)):
        what = f"{measure.__name__}: from the interval of {weights} up to ours, points"
        wanted.append((what, "above", 0, gap(weights, measure)))
    # and is it reached?
    table = []
    for what, relation, bound, measure in wanted:
        found = {"from text": measure("text"), "after real video": measure("real")}
        met = "no data"
        if not any(math.isnan(x) for x in found.values()):
            met = "yes" if all(RELATIONS[relation](x, bound) for x in found.values()) else "no"
        table.append({"target": what, "": f"{relation} {bound}"} | found | {"met": met})
    return table


def label(eval_set):
    """Its memory, and what else was asked for"""
    # tau and steps only where they are not the weights' own
    text = eval_set.memory
    if eval_set.tau is not None:
        text += f", tau {eval_set.tau:g}"
    return text if eval_set.steps is None else f"{text}, {eval_set.steps} steps"


def named(eval_set, motion="all"):
    """The cells that say which row it is"""
    return {"weights": eval_set.weights, "memory": label(eval_set), "positions": eval_set.positions,
            "worlds": eval_set.worlds, "motion": motion}


def summary(videos, baseline):
    """baseline: the videos that they are compared with"""
    return {
        "recall, %": 100 * estimate(recall(videos)),
        "returns": number(recall(videos)),
        "ceiling": 100 * estimate(ceiling(videos)),
        "chance": 100 * luck(videos),
        "detail, %": 100 * estimate(detail(videos)),
        "half-way, s": half_way(videos),
        "ceiling's": half_way(videos, ceiling),
        "last 5 s, dB": estimate(last_validity(videos)),
        "drift": estimate(drift(videos)),
        "steady, %": 100 * estimate(steady(videos)),
        "jumps a minute": estimate(jumps(videos)),
        BESIDE: "" if videos is baseline else compare(videos, baseline, recall),
        "videos": len(videos),
        "cost, s": sum(video.cost for video in videos) / len(videos),
    }


def curve(videos):
    return {f"{absence:g} s": 100 * estimate(recall(videos, absence)) for absence in ABSENCES}


def hour(videos):
    cells = {}
    for i, minute in enumerate(MINUTES):
        for name, measure in IN_A_MINUTE.items():
            cells[f"{minute} min: {name}"] = estimate(measure(videos, i))
    return cells


def all_tables(rows, first):
    """rows: EvalSet -> videos; first: the EvalSet of the student -> title -> rows"""
    rows = {eval_set: videos for eval_set, videos in rows.items() if videos}
    tables = {"Targets": [], ALL: [], CURVES: [], HOUR: []}
    if replace(first, worlds="text") in rows:
        tables["Targets"] = targets(rows, first)
    baseline = {}  # of each kind of worlds: what the other rows are compared with
    for s, videos in rows.items():
        if s.worlds == "hour":
            tables[HOUR].append(named(s) | hour(videos))
            continue
        # by the kind of motion too, where there are as many of each
        groups = {"all": videos}
        if s.worlds == "returns":
            groups |= {kind: of_kinds(videos, kind) for kind in KINDS}
        for motion, some in groups.items():
            if some:
                # "after real" and "after stage1" are the same worlds
                first_one = baseline.setdefault((s.worlds.split()[0], motion), some)
                tables[ALL].append(named(s, motion) | summary(some, first_one))
                tables[CURVES].append(named(s, motion) | curve(some))
    return tables


# ---- ... and as text ---------------------------------------------------------------------------------------

def formatted(cell, digits):
    """Words as they are; "-" where there is no number; an interval behind its mean"""
    if isinstance(cell, (str, int)):
        return str(cell)
    # a mean with both ends of its interval
    if np.ndim(cell):
        mean, low, high = [formatted(x, digits) for x in cell]
        return mean if mean == "-" else f"{mean} [{low}, {high}]"
    if math.isnan(cell):
        return "-"
    return "beyond" if math.isinf(cell) else f"{cell:.{digits}f}"


def markdown(title, table, digits=1):
    """-> lines"""
    lines = ["", f"**{title}**", ""]
    for cells in (table[0], ["---"] * len(table[0]), *[row.values() for row in table]):
        lines.append(f"| {' | '.join(formatted(cell, digits) for cell in cells)} |")
    return lines


def write(tables, student, path):
    """title -> table, into a file of Markdown and on the screen"""
    lines = [f"Student {student}, one training seed, [95 % bootstrap intervals]. Words: head of report.py."]
    for title, table in tables.items():
        if table:
            lines += markdown(title, table)
    text = "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
