"""
What evaluate.py measured, one line a video, as tables and figures. Knows no network.

    python report.py --csv out/evaluate.csv    # out/evaluate.md and out/forgetting.png

A number is a ratio of sums over a row's videos, "48 [33, 62]" with its 95 % bootstrap interval over videos;
rows are compared in the worlds that both have. One training seed a row: intervals do not tell what another
training would give.

    recall      share of the landmarks due back, those in the sink left out, that look as before they left
    ceiling     share of which the memory still held a latent
    chance      how often two videos of a row show the same landmark in a sector
    half-way    seconds out of view after which recall has fallen half-way from its best to chance
    steady      videos that move within 10 % of their caption's rate

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3.
Leaves out: the paper's assumptions 1 and 2 (too little falls due in a teacher's 5 s).
"""
import csv
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from config import STUDENT, BadInput, parse, run
from judge import chance
from memory import PRESETS
from world import WorldSpec, make_world

ABSENCES = (1, 2, 3, 4.5, 6, 9, 12, 15, 16.5, 18, 21, 24, 30)  # seconds, each within a tenth
SHORT = 2  # seconds; fast memory bridges less, and a camera that wobbles makes many such returns


SECTIONS = {  # title -> the EvalSet.worlds it tells of
    "62.8 s from text (figures 1 and 8, tables 1-3)": ("text",),
    "50 s after 10.3 s of real video (figure 1)": ("real",),
    "120 s from text": ("long",),
    "4 s after 10.3 s of real video: whose slow memory is read?": ("turns", "swapped"),
    "31 s of the teacher alone, with and without error recycling (figure 7)": ("teacher",),
}


@dataclass
class Config:
    csv: str = "out/evaluate.csv"  # what evaluate.py wrote
    out: str = "out"               # folder for tables and figures
    student: str = STUDENT         # the network whose memories are compared


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
    reappearances: list   # dicts: absence (seconds), right, held (by the memory), sector, shown
    turning: float        # columns travelled, over those of the caption
    jumps: int            # of the camera by more than 15 degrees
    minutes: float        # of the whole video


def from_cells(cls, row):
    """A row of the CSV -> those fields of cls that are columns: text as it is, everything else in JSON"""
    values = {}
    for field in fields(cls):
        if field.name in row:
            cell = row[field.name]
            is_text = field.type is str and cell != "null"
            values[field.name] = cell if is_text else json.loads(cell)
    return values


def read_csv(path):
    """-> list of Video; none if there is no file yet"""
    videos = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                eval_set = EvalSet(**from_cells(EvalSet, row))
                world = WorldSpec(**from_cells(WorldSpec, row))
                videos.append(Video(eval_set, world, **from_cells(Video, row)))
    return videos


def append_csv(path, videos):
    """Adds a line a video: all of them at once, or none."""
    # one flat row: which set, which world, what was measured
    rows = []
    for video in videos:
        values = vars(video.eval_set) | vars(video.world) | vars(video)
        del values["eval_set"], values["world"]
        rows.append({name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()})
    # a buffer so large that it is written in one piece
    is_new = not path.exists()
    with open(path, "a", buffering=1 << 20, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


# ---- statistics: pairs are one (sum, number) a video -------------------------------------------------------

def number(pairs):
    return sum(n for _, n in pairs)


def resampled(pairs):
    """2,000 ratios of sums over videos that are drawn again."""
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
    our_pairs = measure([ours[world] for world in both])
    their_pairs = measure([theirs[world] for world in both])
    if not number(our_pairs) or not number(their_pairs):
        return "no data"
    # is nought in the interval of their difference?
    low, high = np.nanpercentile(resampled(our_pairs) - resampled(their_pairs), (2.5, 97.5))
    if low > 0:
        return "yes"
    return "no" if high < 0 else "not significant"


# ---- what is told of a row: videos -> pairs ----------------------------------------------------------------

def due_back(video, absence):
    """The reappearances after so many seconds, within a tenth; None: after all that are not SHORT"""
    if absence is None:
        return [e for e in video.reappearances if e["absence"] >= SHORT]
    return [e for e in video.reappearances if abs(e["absence"] - absence) <= .1 * absence]


def recall(videos, absence=None, what="right"):
    events = [due_back(video, absence) for video in videos]
    return [(sum(e[what] for e in some), len(some)) for some in events]


def ceiling(videos, absence=None):
    return recall(videos, absence, "held")


def follows(videos, counterfactual):
    """Returns that show the landmark of their own world, or of its counterfactual, where these differ"""
    pairs = []
    for video in videos:
        own = make_world(video.world).landmarks
        other = make_world(replace(video.world, counterfactual=not video.world.counterfactual)).landmarks
        wanted = other if counterfactual else own
        events = [e for e in video.reappearances if own[e["sector"]] != other[e["sector"]]]
        pairs.append((sum(e["shown"] == wanted[e["sector"]] for e in events), len(events)))
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

def percent(pairs):
    middle, low, high = 100 * estimate(pairs)
    return "-" if math.isnan(middle) else f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def decimal(pairs):
    middle, low, high = estimate(pairs)
    return "-" if math.isnan(middle) else f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def single(x):
    return "-" if math.isnan(x) else f"{x:.1f}"


def table(title, rows):
    """-> lines of Markdown, none without rows"""
    if not rows:
        return []
    head = " | ".join(rows[0])
    lines = ["", f"**{title}**", "", f"| {head} |", "|---" * len(rows[0]) + "|"]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in rows]


@dataclass
class Target:
    what: str
    bound: float
    at_least: bool = True

    def is_met(self, numbers):
        """Decided by the numbers themselves, not by how a table rounds them."""
        if any(math.isnan(x) for x in numbers):
            return "no data"
        reached = min(numbers) >= self.bound if self.at_least else max(numbers) <= self.bound
        return "yes" if reached else "no"


TARGETS = [
    Target("recall after 6 s away, %", 90),
    Target("recall after 15 s away, %", 80),
    Target("recall after 15 s over longlive's", 3),
    Target("chance, %", 15, at_least=False),
    Target("drift, dB", -1),
    Target("steady, %", 90),
    Target("returns that follow exchanged memories, %", 70),
]


def target_numbers(slowfast, longlive, swapped):
    """Videos of two presets and of exchanged memories -> the numbers of TARGETS, in their order"""
    after_15 = mean(recall(slowfast, 15))
    theirs = mean(recall(longlive, 15))
    return [
        100 * mean(recall(slowfast, 6)),
        100 * after_15,
        after_15 / theirs if theirs else math.nan,
        100 * luck(slowfast),
        mean(drift(slowfast)),
        100 * mean(steady(slowfast)),
        100 * mean(follows(swapped, counterfactual=True)),
    ]


def target_table(rows, student):
    """rows: EvalSet -> videos"""
    def of(worlds, memory="slowfast"):
        return rows.get(EvalSet(student, memory, worlds=worlds), [])

    # each number twice: a target is met if both starts meet it
    swapped = of("swapped", "uniform2")
    from_text = target_numbers(of("text"), of("text", "longlive"), swapped)
    from_real = target_numbers(of("real"), of("real", "longlive"), swapped)
    lines = []
    for target, *numbers in zip(TARGETS, from_text, from_real):
        bound = f"at {'least' if target.at_least else 'most'} {target.bound}"
        text, real = map(single, numbers)
        lines.append({"slowfast": target.what, "target": bound, "from text": text, "after real video": real,
                      "met": target.is_met(numbers)})
    return table("Targets", lines)


def summary(videos, first_row):
    # in percent: memory; then pictures and motion
    cells = {
        "chance": single(100 * luck(videos)),
        "recall, %": percent(recall(videos)),
        "ceiling": percent(ceiling(videos)),
        "returns": str(number(recall(videos))),
        "half-way, s": single(half_way(videos)),
        "ceiling's": single(half_way(videos, ceiling)),
        "last 5 s, dB": decimal(last_validity(videos)),
        "drift, dB": decimal(drift(videos)),
        "steady, %": percent(steady(videos)),
        "jumps a minute": decimal(jumps(videos)),
    }
    # whose memory is it?
    if videos[0].eval_set.worlds in ("turns", "swapped"):
        cells["returns like its own world"] = percent(follows(videos, counterfactual=False))
        cells["like the counterfactual"] = percent(follows(videos, counterfactual=True))
    # beside the first row
    is_first = videos is first_row
    cells["first row: better recall?"] = "" if is_first else better(first_row, videos, recall)
    cells["better last dB?"] = "" if is_first else better(first_row, videos, last_validity)
    return cells


def by_absence(videos):
    return {f"{absence:g} s": percent(recall(videos, absence)) for absence in ABSENCES}


def group(videos, student):
    """-> EvalSet -> videos; the student's first, bounded positions before unbounded, in the presets' order"""
    rows = {}
    for video in videos:
        rows.setdefault(video.eval_set, []).append(video)
    # whose row comes first is what the others are compared with
    presets = list(PRESETS)
    in_order = sorted(rows, key=lambda s: (s.weights != student, s.positions, presets.index(s.memory)))
    return {eval_set: rows[eval_set] for eval_set in in_order}


def all_tables(rows, student):
    """rows: EvalSet -> videos. -> lines of Markdown"""
    lines = target_table(rows, student)
    # a section: a row of each set in one table, and its forgetting curve in another
    for title, worlds in SECTIONS.items():
        some = [eval_set for eval_set in rows if eval_set.worlds in worlds]
        names = {s: {"weights": s.weights, "memory": s.memory, "positions": s.positions} for s in some}
        lines += table(title, [names[s] | summary(rows[s], rows[some[0]]) for s in some])
        lines += table("... recall by seconds out of view", [names[s] | by_absence(rows[s]) for s in some])
    return lines


# ---- figures -----------------------------------------------------------------------------------------------

def draw_forgetting(axes, rows, student):
    """Figure 1: recall by absence with its interval, the ceiling, chance; a colour a policy"""
    for eval_set, videos in rows.items():
        if eval_set != EvalSet(student, eval_set.memory):
            continue
        # five returns a point at least
        points = [absence for absence in ABSENCES if number(recall(videos, absence)) >= 5]
        if points:
            right, low, high = 100 * np.array([estimate(recall(videos, absence)) for absence in points]).T
            held = [100 * mean(ceiling(videos, absence)) for absence in points]
            line, = axes.plot(points, right, "o-", label=eval_set.memory, markersize=3)
            colour = line.get_color()
            axes.fill_between(points, low, high, color=colour, alpha=.12)
            axes.plot(points, held, "--", color=colour, linewidth=.7)
            axes.axhline(100 * luck(videos), color=colour, linewidth=.5, linestyle=":")
    axes.set(xlabel="seconds out of view", ylabel="right returns, %", ylim=(0, 100))
    if axes.lines:
        axes.legend(fontsize=7, loc="upper right")


def write(videos, student, out):
    """out/evaluate.md, printed too, and out/forgetting.png where matplotlib is installed"""
    rows = group(videos, student)
    lines = [f"Student {student}, one training seed, [95 % bootstrap intervals]. Words: head of report.py."]
    lines += all_tables(rows, student)
    # the figure
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110, layout="tight")
        draw_forgetting(axes, rows, student)
        figure.savefig(out / "forgetting.png")
        pyplot.close(figure)
        lines += ["", "![Recall by seconds out of view](forgetting.png)"]
        lines += ["Shaded: 95 %; dashed: the ceiling; dotted: chance."]
    except ImportError:
        print("no forgetting.png: pip install matplotlib")
    text = "\n".join(lines)
    (out / "evaluate.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main():
    cfg = parse(Config)
    videos = read_csv(Path(cfg.csv))
    if not videos:
        raise BadInput(f"no videos in --csv {cfg.csv}: python evaluate.py makes them")
    # of each row, what was made last: older lines are of other weights, or of a preset that was edited since
    newest = {video.eval_set: video.made_by for video in videos}
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write([video for video in videos if video.made_by == newest[video.eval_set]], cfg.student, out)


if __name__ == "__main__":
    run(main)
