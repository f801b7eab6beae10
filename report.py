"""
What evaluate.py measured, one line a video in a CSV, as tables and a figure. Knows no network.

A number is a ratio of sums over a row's videos, "48.2 [33.1, 62.0]" with its 95 % bootstrap interval over
videos; rows are compared in the worlds that both have. One training seed a row: intervals do not tell what
another training would give.

    recall      share of the landmarks due back, those in the sink left out, that look as before they left
    ceiling     share of which the memory still held a latent
    chance      how often two videos of a row show the same landmark in a sector
    half-way    seconds out of view after which recall has fallen half-way from its best to chance
    steady      videos that move within 10 % of their caption's rate
    drift       validity (dB to the nearest frame of the world) of the last 5 s less that of the second 5 s

References: Context Forcing, arXiv 2602.06028, figures 1, 7 and 8, tables 1-3.
Leaves out: the paper's assumptions 1 and 2 (too little falls due in a teacher's 5 s).
"""
import csv
import json
import math
import sys
from dataclasses import dataclass, fields, replace

import numpy as np

from config import BadInput, whole_or_absent
from judge import chance
from world import WorldSpec, make_world

ABSENCES = (2, 3, 4.5, 6, 9, 12, 15, 16.5, 18, 21, 24, 30)  # seconds, each within a tenth
SHORT = 2  # seconds; fast memory bridges less, and a camera that wobbles makes many such returns


# ---- the CSV -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalSet:
    """The videos of one row: who makes them, and from where."""
    weights: str                # a file in weights/, without its ending
    memory: str = "slowfast"    # a preset of memory.py; of a teacher, what selects its context
    positions: str = "bounded"
    worlds: str = "text"        # one of evaluate.LENGTHS
    teacher: bool = False       # 21 latents at a time, no KV cache


@dataclass
class Video:
    """What is known of one video. Its fields, and those of the first two, are the columns of the CSV."""
    eval_set: EvalSet
    world: WorldSpec
    caption: str
    made_by: str          # fingerprint of the networks, and the preset in words
    psnr: list            # dB to the nearest frame that the world can draw, for every 5 s of the model's own
    landmarks: list       # by sector: what it shows most, -1 for nothing
    reappearances: list   # dicts: those of judge.Reappearance, and right, held (by the memory)
    turning: float        # columns travelled, over those of the caption
    jumps: int            # of the camera by more than 15 degrees
    minutes: float        # of the whole video


TEXT = ("weights", "memory", "positions", "worlds", "caption", "made_by")  # other columns hold JSON


def pick(cls, values):
    """The entries of values that are fields of cls"""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def read_csv(path):
    """-> list of Video; none if there is no file yet"""
    videos = []
    if path.exists():
        drop_cut_line(path)
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            try:
                videos = [read_row(row) for row in reader]
            except (ValueError, TypeError, RecursionError, csv.Error) as error:
                raise BadInput(f"{path}, line {reader.line_num}: {error}: take the line out") from None
    return videos


def read_row(row):
    values = {name: x if name in TEXT else json.loads(x) for name, x in row.items()}
    eval_set = EvalSet(**pick(EvalSet, values))
    return Video(eval_set, WorldSpec(**pick(WorldSpec, values)), **pick(Video, values))


def drop_cut_line(path):
    """What a killed run or a full disk left half is taken out of the file, so that it is made again."""
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if whole != content:
        print(f"{path}: the last line was cut short and is dropped", file=sys.stderr)
        with whole_or_absent(path) as part:
            part.write_bytes(whole)


def append_csv(path, videos):
    """Adds a line a video: all of them at once, or none."""
    rows = []
    for video in videos:
        values = vars(video.eval_set) | vars(video.world) | vars(video)
        del values["eval_set"], values["world"]
        rows.append({name: x if name in TEXT else json.dumps(x) for name, x in values.items()})
    # a buffer so large that it is written in one piece
    with open(path, "a", buffering=1 << 20, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


# ---- statistics: pairs are one (sum, number) a video -------------------------------------------------------

def number(pairs):
    return sum(n for _, n in pairs)


def resampled(pairs):
    """2,000 ratios of sums over videos that are drawn again; NaN where nothing is counted"""
    pairs = np.asarray(pairs, float).reshape(-1, 2)
    # the same draws for any two rows of as many videos, which pairs them
    draws = np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    total, n = pairs[draws].sum(1).T
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def estimate(pairs):
    """-> mean over all videos, and both ends of its 95 % interval; NaN if there is nothing to count"""
    if not number(pairs):
        return np.full(3, np.nan)
    mean = sum(x for x, _ in pairs) / number(pairs)
    return np.array([mean, *np.nanpercentile(resampled(pairs), (2.5, 97.5))])


def mean(pairs):
    return float(estimate(pairs)[0])


def better(ours, theirs, measure):
    """
    Is `measure` (videos -> pairs) higher in our videos than in theirs, world by world?
    returns  "yes" or "no" where the difference's 95 % interval says so, else "not significant" or "no data"
    """
    # the worlds of both, in one order
    ours = {video.world: video for video in ours}
    theirs = {video.world: video for video in theirs}
    both = [world for world in ours if world in theirs]
    if not both:
        return "no data"
    ours = measure([ours[world] for world in both])
    theirs = measure([theirs[world] for world in both])
    # is nought in the interval of their difference?
    low, high = np.nanpercentile(resampled(ours) - resampled(theirs), (2.5, 97.5))
    if low > 0:
        return "yes"
    return "no" if high < 0 else "not significant"


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
    """dB of the last 5 s"""
    return [(video.psnr[-1], 1) for video in videos]


def drift(videos):
    """dB of the last 5 s less those of the second"""
    return [(video.psnr[-1] - video.psnr[1], 1) for video in videos if len(video.psnr) > 2]


def steady(videos):
    return [(abs(video.turning - 1) < .1, 1) for video in videos]


def jumps(videos):
    return [(video.jumps, video.minutes) for video in videos]


# ---- ... or to a number, NaN if there is none --------------------------------------------------------------

def luck(videos):
    return chance([video.landmarks for video in videos]) if videos else math.nan


def half_way(videos, share=recall):
    """
    Seconds out of view, between measured points, at which `share` (recall or ceiling) is half-way to chance;
    points with less than ten returns do not count.
    """
    # the curve, and the level to which it falls
    points = [absence for absence in ABSENCES if number(share(videos, absence)) >= 10]
    curve = [(absence, mean(share(videos, absence))) for absence in points]
    best = max((value for _, value in curve), default=math.nan)
    level = (best + luck(videos)) / 2
    # from the best on, the first two points with that level between them
    start = [value for _, value in curve].index(best) if curve else 0
    for (before, high), (after, low) in zip(curve[start:], curve[start + 1:]):
        if low < level:
            return before + (after - before) * (high - level) / (high - low)
    return math.nan


# ---- tables: a list of rows, a row a dict of cells ---------------------------------------------------------

def single(x):
    return "-" if math.isnan(x) else f"{x:.1f}"


def interval(pairs, scale=1):
    middle, low, high = map(single, scale * estimate(pairs))
    return "-" if middle == "-" else f"{middle} [{low}, {high}]"


def table(title, rows):
    """-> lines of Markdown"""
    lines = ["", f"**{title}**", ""]
    for cells in (rows[0], ["---"] * len(rows[0]), *[row.values() for row in rows]):
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def target(what, x, at_least):
    """A row; met or not is decided by the number itself, not by how a table rounds it."""
    met = "no data"
    if not math.isnan(x):
        met = "yes" if x >= at_least else "no"
    return {"from text": what, "at least": str(at_least), "slowfast": single(x), "met": met}


def target_table(rows, student):
    """rows: EvalSet -> videos"""
    def of(memory, worlds="text"):
        return rows.get(EvalSet(student, memory, worlds=worlds), [])

    slowfast = of("slowfast")
    after_15 = mean(recall(slowfast, 15))
    longlive = mean(recall(of("longlive"), 15))
    exchanged = follows(of("uniform2", "swapped"))
    return table("Targets", [
        target("recall after 6 s, %", 100 * mean(recall(slowfast, 6)), 90),
        target("recall after 15 s, %", 100 * after_15, 80),
        target("recall after 15 s over longlive's", after_15 / longlive if longlive else math.nan, 3),
        target("steady, %", 100 * mean(steady(slowfast)), 90),
        target("drift, dB", mean(drift(slowfast)), -1),
        target("returns that follow exchanged memories, %", 100 * mean(exchanged), 70),
    ])


def summary(videos, baseline):
    return {
        "recall, %": interval(recall(videos), 100),
        "returns": str(number(recall(videos))),
        "ceiling": interval(ceiling(videos), 100),
        "chance": single(100 * luck(videos)),
        "half-way, s": single(half_way(videos)),
        "ceiling's": single(half_way(videos, ceiling)),
        "last 5 s, dB": interval(last_validity(videos)),
        "drift": interval(drift(videos)),
        "steady, %": interval(steady(videos), 100),
        "jumps a minute": interval(jumps(videos)),
        "worse recall than the first?": "" if videos is baseline else better(baseline, videos, recall),
    }


def all_tables(rows, student):
    """rows: EvalSet -> videos. -> lines of Markdown"""
    first = {}  # of each kind of worlds: what the other rows are compared with
    summaries, curves = [], []
    for eval_set, videos in rows.items():
        if not videos:
            continue
        baseline = first.setdefault(eval_set.worlds, videos)
        names = pick(EvalSet, vars(eval_set))
        del names["teacher"]
        summaries.append(names | summary(videos, baseline))
        curve = {f"{absence:g} s": interval(recall(videos, absence), 100) for absence in ABSENCES}
        curves.append(names | curve)
    lines = target_table(rows, student)
    lines += table("All rows", summaries)
    return lines + table("Recall by seconds out of view, %", curves)


# ---- the figure --------------------------------------------------------------------------------------------

def draw_forgetting(axes, rows, student):
    """Figure 1: recall by absence with its interval, the ceiling, chance; a colour a policy"""
    for eval_set, videos in rows.items():
        # five returns a point at least
        points = [absence for absence in ABSENCES if number(recall(videos, absence)) >= 5]
        if eval_set != EvalSet(student, eval_set.memory) or not points:
            continue
        right, low, high = 100 * np.array([estimate(recall(videos, absence)) for absence in points]).T
        held = [100 * mean(ceiling(videos, absence)) for absence in points]
        line, = axes.plot(points, right, "o-", label=eval_set.memory, markersize=3)
        colour = line.get_color()
        axes.fill_between(points, low, high, color=colour, alpha=.12)
        axes.plot(points, held, "--", color=colour, linewidth=.7)
        axes.axhline(100 * luck(videos), color=colour, linewidth=.5, linestyle=":")
    axes.set(xlabel="seconds out of view", ylabel="right returns, %", ylim=(0, 100))
    axes.legend(fontsize=7, loc="upper right")


def write(rows, student, out):
    """out/evaluate.md, printed too, and out/forgetting.png where matplotlib is installed"""
    lines = [f"Student {student}, one training seed, [95 % bootstrap intervals]. Words: head of report.py."]
    lines += all_tables(rows, student)
    # the figure
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4), dpi=110, layout="tight")
        draw_forgetting(figure.subplots(), rows, student)
        figure.savefig(out / "forgetting.png")
        lines += ["", "![Recall by seconds out of view](forgetting.png)"]
        lines += ["Shaded: 95 %; dashed: the ceiling; dotted: chance."]
    except ImportError:
        print("no forgetting.png: pip install matplotlib")
    # one text for the file and the screen
    text = "\n".join(lines)
    (out / "evaluate.md").write_text(text + "\n", encoding="utf-8")
    print(text)
