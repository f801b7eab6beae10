"""
The figures of what evaluate.py measured, each to be read at a glance.

    forgetting.png    what each policy remembers, five at most in a plot; dashed what it held, dotted chance
    frontier.png      at equal slots, by the kind of motion: what is remembered, and reach against detail
    drifting.png      an hour: validity, entropy of the landmarks, landmarks as in the first minute
    strip.png         a landmark that goes out of view and comes back, a row a policy

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8.
Leaves out: all but the strip where matplotlib is not installed.
"""
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from memory import PRESETS
from probe import MINUTES
from report import (ABSENCES, IN_A_MINUTE, KINDS, ceiling, detail, estimate, half_way, label, luck, mean,
                    number, of_kinds, recall)

MOTIONS = {"turn": "steady turns", "linger": "lingering turns", "aside": "looks aside"}
LONGEST = 30  # seconds on the axes

# the strip
SCALE = 4    # of its frames
BORDER = 8   # around a frame
RIGHT = 40, 170, 80
WRONG = 225, 50, 50
PLAIN = 255, 255, 255


# ---- curves: rows are EvalSet -> videos, first is the EvalSet of the student -------------------------------

def draw_curve(axes, videos, name, alone=True, **style):
    """Recall by absence; alone: its interval and the ceiling too. Five returns a point at least."""
    points = [absence for absence in ABSENCES if number(recall(videos, absence)) >= 5]
    if not points:
        return
    found = [estimate(recall(videos, absence)) for absence in points]
    right, low, high = 100 * np.array(found).T
    line, = axes.plot(points, right, "o-", label=name, markersize=3, **style)
    if alone:
        colour = line.get_color()
        axes.fill_between(points, low, high, color=colour, alpha=.08, linewidth=0)
        held = [100 * mean(ceiling(videos, absence)) for absence in points]
        axes.plot(points, held, "--", color=colour, linewidth=.8)


def finish(axes, title, videos):
    """videos: whose chance is drawn"""
    axes.axhline(100 * luck(videos), color="grey", linewidth=.8, linestyle=":")
    axes.set(title=title, xlabel="seconds out of view", ylabel="right returns, %")
    axes.set(xlim=(0, LONGEST), ylim=(0, 102))


def draw_forgetting(figure, rows, first):
    """Figure 1: first's own policy in every plot, four others beside it"""
    ours = replace(first, worlds="returns")
    others = [s for s in rows if s.memory in PRESETS and s == replace(ours, memory=s.memory) != ours]
    # a plot a group
    groups = [others[i:i + 4] for i in range(0, len(others), 4)] or [[]]
    plots = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(plots, groups):
        draw_curve(axes, rows.get(ours, []), label(ours), color="black", linewidth=2)
        for s in group:
            draw_curve(axes, rows[s], label(s))
        shown = [video for s in (ours, *group) for video in rows.get(s, [])]
        finish(axes, "", shown)
        axes.legend(fontsize=7, frameon=False)


def draw_frontier(figure, rows, first):
    """Uniform rules from green to blue, surprisal from yellow to red; a column a kind of motion"""
    from matplotlib import colormaps
    # the rules, and a colour each
    ours = replace(first, worlds="returns")
    rules = {}
    uniform = [s for s in rows if "uniform" in s.memory and s == replace(ours, memory=s.memory)]
    surprisal = [s for s in rows if s == replace(ours, tau=s.tau)]
    for some, colours in (uniform, "winter_r"), (surprisal, "autumn_r"):
        rules |= zip(some, colormaps[colours](np.linspace(.2, 1, len(some))))
    for kind, (above, below) in zip(KINDS, figure.subplots(2, 3).T):
        shown = []
        for s, colour in rules.items():
            # above, what is remembered
            videos = of_kinds(rows[s], kind)
            draw_curve(above, videos, label(s), alone=False, color=colour)
            shown += videos
            # below, a point a rule: what never falls half-way stands at the top
            place = 100 * mean(detail(videos)), min(half_way(videos), LONGEST - 1)
            if not np.isnan(place).any():
                below.plot(*place, "o", color=colour)
                below.annotate(label(s), place, fontsize=6, rotation=30)
        finish(above, MOTIONS[kind], shown)
        below.set(xlabel="detail: right returns after the shortest absence, %", ylabel="reach: half-way, s")
        below.set(xlim=(0, 102), ylim=(0, LONGEST))
    above.legend(fontsize=7, frameon=False)


def draw_drifting(figure, rows, first):
    """Policies of the student, and dashed other students"""
    panels = figure.subplots(1, len(IN_A_MINUTE))
    for axes, (title, measure) in zip(panels, IN_A_MINUTE.items()):
        for s, videos in rows.items():
            if s.worlds == "hour":
                values = [mean(measure(videos, i)) for i in range(len(MINUTES))]
                is_ours = s.weights == first.weights
                name = label(s) if is_ours else f"{s.weights}, {label(s)}"
                axes.plot(MINUTES, values, "o-" if is_ours else "s--", label=name, markersize=3)
        axes.set(title=title, xscale="log", xlabel="minute")
        axes.set_xticks(MINUTES, MINUTES)
        axes.minorticks_off()
    panels[-1].legend(fontsize=6, frameon=False)


# ---- one landmark, under two policies ----------------------------------------------------------------------

def draw_strip(rows, path):
    """
    rows     list of: frames (n, 3, h, w) uint8; is what came back, in the last, what it was in the first?
    """
    strip = []
    for frames, right in rows:
        colours = [RIGHT] + [PLAIN] * (len(frames) - 2) + [RIGHT if right else WRONG]
        pictures = []
        for frame, colour in zip(frames, colours):
            picture = Image.fromarray(frame.transpose(1, 2, 0))
            large = ImageOps.scale(picture, SCALE, Image.Resampling.NEAREST)
            pictures.append(ImageOps.expand(large, BORDER, colour))
        strip.append(np.concatenate(pictures, axis=1))
    Image.fromarray(np.concatenate(strip)).save(path)


def draw_all(rows, first, out):
    """All curves, into the folder out"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: pip install -r requirements-eval.txt")
        return
    rows = {s: videos for s, videos in rows.items() if videos}
    drawn = {
        "forgetting": (draw_forgetting, 10, 4),
        "frontier": (draw_frontier, 13, 8),
        "drifting": (draw_drifting, 12, 4),
    }
    for name, (draw, width, height) in drawn.items():
        figure = Figure(figsize=(width, height), dpi=110, layout="tight")
        draw(figure, rows, first)
        figure.savefig(out / f"{name}.png")
