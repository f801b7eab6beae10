"""
Tables and figures of the miniature, from the lines that evaluate.py left, one a video. Knows no network.

Intervals are 95 % bootstraps over videos, paired where two rows share seeds. One training seed a row: intervals do not tell
what another training would give.

References: Context Forcing, arXiv 2602.06028, figures 1 and 4-8, tables 1-3.
"""
from dataclasses import replace

import imageio.v3 as iio
import numpy as np

import judge
import world
from memory import PRESETS

ABSENCES = (1, 2, 3, 4.5, 6, 9, 12, 15, 16.5, 18, 21, 24, 30)  # seconds, each within 10 %
SECONDS = (10, 20, 30, 40, 50, 60)    # where the paper reads its scores, from 0.5 s before to 0.5 s after
SHORT = 2                             # seconds: fast memory bridges less, and a camera that wobbles makes many such returns
BROKEN = 18                           # dB: below this a picture is broken, and its consistency means nothing


# ---- numbers with intervals: pairs are (sum, count), one a video --------------------------------------------------------

def count(pairs):
    return sum(n for _, n in pairs)


def resampled(pairs):
    """(2000,) ratios of sums over resampled videos: the same draws for any two rows of as many videos, so they are paired"""
    x = np.asarray(pairs, float).reshape(-1, 2)
    total = x[np.random.default_rng(0).integers(len(x), size=(2000, len(x)))].sum(1)
    return np.divide(total[:, 0], total[:, 1], out=np.full(len(total), np.nan), where=total[:, 1] > 0)


def ratio(pairs):
    """-> sum / count over all videos, and its 95 % interval; nan if there is nothing to count"""
    mean = sum(x for x, _ in pairs) / (count(pairs) or np.nan)
    return mean, *(np.nanpercentile(resampled(pairs), (2.5, 97.5)) if count(pairs) else (np.nan, np.nan))


def better(ours, theirs):
    """Is the first ratio above the second, seed by seed? -> "yes", "no" or "not significant" (95 %, paired bootstrap)"""
    if len(ours) != len(theirs) or not count(ours) or not count(theirs):
        return "no data"
    low, high = np.nanpercentile(resampled(ours) - resampled(theirs), (2.5, 97.5))
    return "yes" if low > 0 else "no" if high < 0 else "not significant"


def recalled(rows, seconds=None, what=1, until=1e9):
    """
    Pairs (right, events). seconds: of absences within 10 % of that, None = all that are not SHORT; what: 1 as before it left, 2
    as at first, 3 the ceiling; until: due back by that second
    """
    def counts(away, due):
        return (away >= SHORT if seconds is None else abs(away - seconds) <= .1 * seconds) and due < until
    some = [[e for e in r["events"] if counts(e[0], e[4])] for r in rows]
    return [(sum(e[what] for e in found), len(found)) for found in some]


def followed(rows, twin):
    """Pairs of returns that show the landmark of the world (twin = 0) or of its twin (1), where the two differ"""
    pairs = []
    for r in rows:
        spec = r["world"]
        other = replace(spec, counterfactual=not spec.counterfactual)
        maps = [world.make_world(w).landmarks for w in (spec, other)]
        shown = [e[6] == maps[twin][e[5]] for e in r["events"] if maps[0][e[5]] != maps[1][e[5]]]
        pairs.append((sum(shown), len(shown)))
    return pairs


def chance(rows):
    """Agreement of the same sector between different videos (judge.chance)"""
    return judge.chance([r["map"] for r in rows])


def context_length(rows, what=1):
    """Seconds out of view at which recall falls from its best half-way to chance, between measured points; None: it does not"""
    curve = [(s, ratio(recalled(rows, s, what))[0]) for s in ABSENCES if count(recalled(rows, s)) >= 10]
    best = max(curve, key=lambda point: point[1], default=(0, 0))
    level, curve = (best[1] + chance(rows)) / 2, curve[curve.index(best):] if curve else []
    for (s0, r0), (s1, r1) in zip(curve, curve[1:]):
        if r1 < level <= r0:
            return round(s0 + (s1 - s0) * (r0 - level) / (r0 - r1), 2)
    return None


# ---- tables and figures: a column is a function of a row's videos -------------------------------------------------------

def show(pairs, scale=1):
    """-> "48 [33, 62]" with scale 100, "4.8 [3.3, 6.2]" with 1, "-" if there is nothing"""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*scale * np.array(ratio(pairs)), d=int(scale == 1)) if count(pairs) else "-"


def entries(name, start=0, stop=None):
    """-> function: videos to pairs of the entries [start, stop) of a list"""
    return lambda v: [(sum(x), len(x)) for x in ([x for x in r[name][start:stop] if x == x is not None] for r in v)]


def mean(name, start=0, stop=None):
    return lambda v: show(entries(name, start, stop)(v))


def recall(seconds=None, what=1):
    return lambda v: show(recalled(v, seconds, what), 100)


def turning(key="turning"):
    """Share of videos whose heading moves within 10 % of the caption's rate"""
    return lambda v: show([(abs(r[key] - 1) < .1, 1) for r in v], 100)


def entropy(key):
    """Of the 24 landmarks over all videos and sectors, 1 = all equally often"""
    def column(v):
        p = np.bincount([m for r in v for m in r[key] if m >= 0], minlength=24) + 1e-9
        return f"{-(p / p.sum() * np.log(p / p.sum())).sum() / np.log(24):.2f}"
    return column


def half_way(v):
    own, held = context_length(v), context_length(v, 3)
    same = own == held or own and held and .67 < own / held < 1.5
    return f"{own or '-'} ({held or '-'})" + ("" if same else ", not with it")


def against(base, pairs):
    """Are base, another row's videos, better than this row's, in the worlds of both? pairs: function of videos, more is better"""
    def column(v):
        both = {r["world"] for r in base} & {r["world"] for r in v}
        return "" if v == base else better(*(pairs([r for r in some if r["world"] in both]) for some in (base, v)))
    return column


END, LATE = entries("psnr", -1), entries("agreement", 5, 6)
CHECKS = {"dB at the end": lambda v: mean("psnr", -1)(v).split()[0] + " (picture broken)" * bool(ratio(END(v))[0] < BROKEN),
          "turning within 10 %": turning(), "frozen, %": lambda v: f"{100 * np.mean([r['frozen'] for r in v]):.0f}"}
JUMPS = {"jumps a minute": lambda v: show([(60 * r["jumps"], r["seconds"]) for r in v])}
RECALL = {"chance": lambda v: f"{100 * chance(v):.0f}", f"recall from {SHORT} s on": recall(), "ceiling": recall(what=3),
          "returns": lambda v: count(recalled(v))}
TARGETS = (  # at least (1) or at most (-1) how much; what; function of a row's videos and longlive's
    (1, 90, "recall after 6 s away, %", lambda v, o: recall(6)(v)),
    (1, 80, "recall after 15 s away, %", lambda v, o: recall(15)(v)),
    (1, 3, "recall after 6 s over chance", lambda v, o: over(recalled(v, 6), chance(v))),
    (1, 3, "recall after 15 s over chance", lambda v, o: over(recalled(v, 15), chance(v))),
    (1, 3, "recall after 15 s over longlive's", lambda v, o: over(recalled(v, 15), ratio(recalled(o, 15))[0])),
    (-1, 15, "chance, %", lambda v, o: RECALL["chance"](v)),
    (-1, 1, "dB lost from 5-10 s to the last 5 s", lambda v, o: show([(r["psnr"][1] - r["psnr"][-1], 1) for r in v])),
    (1, 90, "videos that turn within 10 % of their rate", lambda v, o: turning()(v)))


def over(pairs, least):
    return f"{ratio(pairs)[0] / least:.1f}" if count(pairs) and least > 0 else "-"


def tables(rows, student):
    """Markdown lines of every table whose videos are there: recall in %, pictures in dB, [95 % interval]"""
    text = []

    def table(title, some, columns, first="memory | positions"):  # some: name -> videos; columns: head -> function of them
        if some := {name: v for name, v in some.items() if v}:
            head = " | ".join([first, *columns])
            text.extend(["", f"**{title}**", "", f"| {head} |", "|---" * (head.count(" | ") + 1) + "|"])
            text.extend(" | ".join(["| " + name, *(str(f(v)) for f in columns.values())]) + " |" for name, v in some.items())

    def of(memory, worlds="text", weights=student, positions="bounded"):
        return rows.get((weights, memory, positions, worlds), [])

    def met(goal):
        cells = [goal[3](v, o).split()[0] for v, o in sides.values() if v]
        return "no data" if "-" in cells else "yes" if all(goal[0] * (float(x) - goal[1]) >= 0 for x in cells) else "no"
    policies = {f"{m} | {p}": of(m, "text", student, p) + of(m, "reach", student, p)
                for p in ("bounded", "unbounded") for m in PRESETS}
    real, swapped, from_text = {f"{m} | bounded": of(m, "real") for m in PRESETS}, of("uniform2", "swapped"), of("slowfast")
    sides = {where: [some[f"{m} | bounded"] for m in ("slowfast", "longlive")]
             for where, some in (("from text", policies), ("after 10.3 s of real video", real))}
    ours, goals = sides["from text"][0], (
        *TARGETS, (1, 70, "returns that follow exchanged memories, %", lambda v, o: show(followed(swapped, 1), 100)))
    if any(v for v, _ in sides.values()):
        table("Targets", {f"{what} | at {'least' if sign > 0 else 'most'} {bound}": (sign, bound, what, f)
                          for sign, bound, what, f in goals}, {
            m + where: lambda goal, v=pair[i], o=pair[1]: goal[3](v, o) if v else "-"
            for i, m in enumerate(("", "longlive, ")) for where, pair in sides.items()} | {"met": met}, "slowfast | target")
    table("Worlds that turn once in 8 or 9 s, 10.3 s real, then 4 s: do returns follow the memory?",
          {"its own": of("uniform2", "turns"), "exchanged with the twin's": swapped},
          RECALL | {"own": lambda v: show(followed(v, 0), 100), "twin's": lambda v: show(followed(v, 1), 100)}, "slow memory")
    for some, (where, (base, _)) in zip((policies, real), sides.items()):
        table(f"Figure 1, forgetting, {where}: recall outside the sink by seconds away (ceiling; returns). Half-way: "
              "seconds until it is half-way to chance (until the ceiling is): it should fall with what memory holds", some,
              RECALL | {f"{a:g} s": lambda v, a=a: f"{recall(a)(v)} ({recall(a, 3)(v).split()[0]}; {count(recalled(v, a))})"
                        for a in ABSENCES} | {"half-way": half_way} | CHECKS)
        table(f"Is slowfast better there, {where}? The paper: beyond the others' reach", some,
              {f"{a:g} s": against(base, lambda v, a=a: recalled(v, a)) for a in ABSENCES})
        table(f"Figure 1, drifting, {where}: validity, dB (boxes; sky, ground off, %). The paper: larger windows drift",
              some, {f"{t - 10}-{t} s": lambda v, z=(t // 5 - 2, t // 5): mean("psnr", *z)(v) + " ({}; {}, {})".format(
                  *(mean(name, *z)(v).split()[0] for name in ("box", "sky", "floor"))) for t in SECONDS}
              | {"slowfast drifts less?": against(base, lambda v: [(r["psnr"][-1] - r["psnr"][0], 1) for r in v])})
    table("Table 1: landmarks as first read, % (sky, ground off, %, in the 5 s before). The paper's context lengths: 20+ s its "
          "own, 9.2 s, LongLive 3.0 s, Infinity-RoPE 1.5 s; its other numbers are DINO and CLIP scores of real videos",
          policies | {"teacher, 5 s after Stage 1 | -": of("teacher", "stage1", "teacher", "-")},
          {f"{t} s": lambda v, i=i: show(entries("agreement", i, i + 1)(v), 100) + " ({}, {})".format(
              *(mean(name, 2 * i + 1, 2 * i + 2)(v).split()[0] for name in ("sky", "floor"))) for i, t in enumerate(SECONDS)}
          | {"context length, s": half_way} | CHECKS
          | {"slowfast better at 60 s? The paper: yes": against(ours, LATE)})
    table("Figure 8: a minute has so many. The paper: the others flash back", policies,
          {head: lambda v, k=k: show([(60 * r[k], r["seconds"]) for r in v]) for head, k in (
              ("jumps over 15 degrees", "jumps"), ("those to the first view", "snaps"), ("wrong reversals", "reversals"))}
          | {"fewer jumps with slowfast?": against(ours, lambda v: [(-r["jumps"], r["seconds"]) for r in v])})
    models = {w: of("slowfast", weights=w) for w in ("init_ar", "init_ode", "stage1", "stage2_none", "stage2", student)}
    table("Table 2: models, from text. frames/s: 16 videos at once; entropy of landmarks: 1 if all come as often. The paper: "
          "as good as short-context models",
          {"base": of("teacher", "first", "base", "-")} | models | {f"{student}, 120 s": of("slowfast", "long")},
          {"parameters": lambda v: f"{v[0]['parameters']:,}", "frames/s": lambda v: f"{np.median([r['fps'] for r in v]):.0f}",
           "5 s: dB": mean("psnr", 0, 1), "boxes": mean("box", 0, 1), "turning": turning("turning_5"),
           "entropy": entropy("map_5"), "end: dB": mean("psnr", -1), "end: boxes": mean("box", -1), "all: turning": turning(),
           "all: entropy": entropy("map"), "recall": recall(), **JUMPS, f"{student} better at the end?": against(from_text, END)}, "weights")
    table("Table 3: ablations, from text. The paper: its own method is better than each", {
        "uniform 1": of("uniform1"), "uniform 2": of("uniform2"), "Stage 1 + memory, no CDMD": models["stage1"],
        "memoryless teacher": models["stage2_none"], "unbounded positions": of("slowfast", positions="unbounded"),
        f"surprisal, {student}": from_text},
        RECALL | {"as first read at 60 s": lambda v: show(LATE(v), 100)} | CHECKS | JUMPS
        | {"ours better?": against(from_text, recalled)}, "row")
    prefix, alone = of("teacher", "prefix", "teacher", "-"), of("teacher", "text", "teacher", "-")
    table("Assumptions 1 and 2: the teacher's 5 s after 5 s that are real, and after Stage 1's. The paper: about as good",
          {"real": prefix, "Stage 1's": of("teacher", "stage1", "teacher", "-")}, RECALL | {
              "dB": mean("psnr"), "real better, recall?": against(prefix, recalled), "dB?": against(prefix, END)}, "prefix")
    table("Figure 7: 31 s of the teacher alone, dB. The paper: with error recycling it drifts less",
          {"with": alone, "without": of("teacher", "text", "teacher_plain", "-")},
          RECALL | {f"{5 * i}-{5 * i + 5} s": mean("psnr", i, i + 1) for i in range(6)}
          | {"with better at the end?": against(alone, END)}, "error recycling")
    return text


CAPTIONS = {"strips.png": "Figures 4-6: one seed, a frame every 10 s; from above: " + ", ".join(PRESETS),
            "strips/teacher_teacher_-_stage1.png": "Assumption 2: 5 s of Stage 1, then 5 s of the teacher, a frame a second",
            "forgetting.png": "Figure 1: recall by absence, shaded 95 %, dashed what memory holds, dotted chance",
            "drifting.png": "Figure 1: pictures over time"}


def figures(rows, student, out):
    """strips.png and, with matplotlib, forgetting.png and drifting.png"""
    strips = [out / "strips" / f"{student}_{m}_bounded_text.png" for m in PRESETS]
    if all(p.exists() for p in strips):
        iio.imwrite(out / "strips.png", np.concatenate([np.pad(iio.imread(p), ((0, 4), (0, 0), (0, 0))) for p in strips]))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no plots: pip install matplotlib")
    (fig, ax), (over_time, axes) = plt.subplots(figsize=(7, 4), dpi=110), plt.subplots(1, 3, figsize=(10, 3), dpi=110)
    for i, m in enumerate(PRESETS):
        text = rows.get((student, m, "bounded", "text"), [])
        some = text + rows.get((student, m, "bounded", "reach"), [])
        points = [(a, *ratio(x), ratio(recalled(some, a, 3))[0]) for a in ABSENCES if count(x := recalled(some, a)) >= 5]
        if points:
            a, right, low, high, ceiling = np.array(points).T
            ax.plot(a, 100 * right, "o-", color=f"C{i}", label=m, markersize=3)
            ax.fill_between(a, 100 * low, 100 * high, color=f"C{i}", alpha=.12)
            ax.plot(a, 100 * ceiling, "--", color=f"C{i}", linewidth=.7)
            ax.axhline(100 * chance(some), color=f"C{i}", linewidth=.5, linestyle=":")
        for each, name, what in zip(axes, ("psnr", "sky", "floor"), ("validity, dB", "sky off, %", "ground off, %")):
            each.set(xlabel="seconds", title=what)
            if text and m in ("slowfast", "longlive", "longlive21"):
                curve = [ratio(entries(name, k, k + 1)(text))[0] for k in range(len(text[0][name]))]
                each.plot(2.5 + 5 * np.arange(len(curve)), curve, color=f"C{i}", label=m)
    ax.set(xlabel="seconds out of view", ylabel="right returns, %", ylim=(0, 100))
    for name, figure, legend in (("forgetting", fig, ax), ("drifting", over_time, axes[0])):
        if legend.get_legend_handles_labels()[0]:
            legend.legend(fontsize=7)
            figure.tight_layout()
            figure.savefig(out / f"{name}.png")
