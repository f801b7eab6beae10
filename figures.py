"""
The figures of what evaluate.py measured, each to be read at a glance.

    forgetting.png    what each policy remembers, five at most in a plot; dashed what it held, dotted chance
    frontier.png      at equal slots, by the kind of motion: what is remembered, and reach against detail
    drifting.png      an hour: validity, entropy of the landmarks, landmarks as in the first minute
    strip.png         a landmark that goes out of view and comes back, a row a policy

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8.
Leaves out: all but the strip where matplotlib is not installed.
"""
import imageio.v3 as iio
import numpy as np
from einops import rearrange, repeat

from config import whole_or_absent
from memory import PRESETS
from probe import HOUR_NUMBERS, MINUTES
from report import ABSENCES, MOTIONS, counts, detail, estimate, half_way, label, luck, mean, pick, rows_of

LONGEST = 30  # seconds out of view, more than any return

# the strip
SCALE = 4    # of its frames
BORDER = 8   # around a frame
RIGHT = 40, 170, 80
WRONG = 225, 50, 50


# ---- curves: student_row is what the student's rows share -------------------------------------------------

def curve(videos, what="right"):
    """-> seconds out of view, of two videos at least; the mean and both ends of its interval: (4, n)"""
    points = []
    for absence in ABSENCES:
        found = counts(videos, what, absence)
        if np.count_nonzero(found[:, 1]) >= 2:
            points.append([absence, *estimate(found)])
    return np.reshape(points, (-1, 4)).T


def draw_forgetting(figure, videos, student_row):
    """Figure 1: slowfast in every plot, four others beside it"""
    rows = {name: pick(videos, student_row | {"worlds": "returns", "memory": name}) for name in PRESETS}
    names = [name for name in rows if rows[name] and name != "slowfast"]
    plots = figure.subplots(1, (len(names) + 3) // 4 or 1, squeeze=False)[0]
    for i, axes in enumerate(plots):
        for name in ("slowfast", *names[4 * i:4 * i + 4]):
            seconds, right, low, high = curve(rows[name])
            line, = axes.plot(seconds, right, "o-", label=name)
            axes.fill_between(seconds, low, high, color=line.get_color(), alpha=.08)
            # what memory held
            seconds, held, *_ = curve(rows[name], "held")
            axes.plot(seconds, held, "--", color=line.get_color())
        axes.axhline(100 * luck(rows["slowfast"]), color="grey", linestyle=":")
        axes.set(xlabel="seconds out of view", ylabel="right returns, %")
        axes.legend()


def draw_frontier(figure, videos, student_row):
    """Uniform rules, and dashed surprisal; a column a kind of motion"""
    rules = rows_of(pick(videos, {"weights": student_row["weights"], "worlds": "returns"}))
    for kind, (above, below) in zip(MOTIONS, figure.subplots(2, 3).T):
        for row in rules:
            memory, some = row[0]["memory"], pick(row, {"motion": kind})
            if memory.startswith(("uniform", "slowfast")):
                # above what is remembered, below a point a rule: what reaches beyond all stands at the top
                seconds, right, *_ = curve(some)
                style = "s--" if memory == "slowfast" else "o-"
                above.plot(seconds, right, style, label=label(row[0]))
                below.plot(detail(some)[0], min(half_way(some), LONGEST), style)
        above.set(title=kind, xlabel="seconds out of view", ylabel="right returns, %", xlim=(0, LONGEST))
        below.set(xlabel="detail: right after the shortest absence, %", xlim=(0, 102))
        below.set(ylabel="reach: half-way, s", ylim=(0, LONGEST + 1))
    if above.lines:
        above.legend(fontsize="small")


def draw_drifting(figure, videos, student_row):
    """Policies of the student, and dashed other students"""
    for axes, name in zip(figure.subplots(1, len(HOUR_NUMBERS)), HOUR_NUMBERS):
        for row in rows_of(pick(videos, {"worlds": "hour"})):
            weights = row[0]["weights"]
            style = "o-" if weights == student_row["weights"] else "s--"
            found = [mean(row, f"{minute} min: {name}")[0] for minute in MINUTES]
            axes.plot(MINUTES, found, style, label=f"{weights}, {label(row[0])}")
        axes.set(title=name, xscale="log", xlabel="minute", xticks=MINUTES, xticklabels=MINUTES)
    axes.legend()


def draw_all(videos, student_row, out):
    """All curves, into the folder out"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: pip install -r requirements-eval.txt")
        return
    drawn = [draw_forgetting, draw_frontier]
    if pick(videos, {"worlds": "hour"}):
        drawn.append(draw_drifting)
    for draw in drawn:
        figure = Figure(figsize=(13, 7), layout="tight")
        draw(figure, videos, student_row)
        with whole_or_absent(out / f"{draw.__name__.removeprefix('draw_')}.png") as part:
            figure.savefig(part)


# ---- one landmark, under two policies ----------------------------------------------------------------------

def draw_strip(rows, path):
    """
    rows     list of: frames (n, 3, h, w) uint8; is what came back, in the last, what it was in the first?
    """
    frames, are_right = zip(*rows)
    large = repeat([*frames], "row n c h w -> row n (h y) (w x) c", y=SCALE, x=SCALE)
    strip = np.pad(large, [[0], [0], [BORDER], [BORDER], [0]], constant_values=255)
    # the borders of the first and of the last tell what is right
    strip[:, 0] = RIGHT
    for pictures, is_right in zip(strip, are_right):
        pictures[-1] = RIGHT if is_right else WRONG
    strip[:, :, BORDER:-BORDER, BORDER:-BORDER] = large
    with whole_or_absent(path) as part:
        iio.imwrite(part, rearrange(strip, "row n h w c -> (row h) (n w) c"))
