"""
The paper's tables 1 to 3 (assets/paper_tables.json) beside ours.

Scores of the small world are not scores of real videos, so there only the ordering is compared: by its scores
the paper's own method is better than another, or worse; is it so here, by recall and validity? Scores of real
videos, those of metrics.py, are the paper's own kind and stand under its rows, column by column.

    python paper.py            # prints the paper's tables

References: Context Forcing, arXiv 2602.06028, tables 1-3.
Leaves out: VBench's total, quality, semantic and dynamic degree of our videos: see the head of metrics.py.
"""
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

from report import compare, estimate, last_validity, markdown, recall

FILE = Path(__file__).parent / "assets" / "paper_tables.json"
SECONDS = (10, 20, 30, 40, 50, 60)  # where the paper reads the scores of table 1

# a system of the paper -> how its row here differs from the student's
SYSTEMS = {
    "LongLive": {"memory": "longlive", "worlds": "returns"},
    "Infinity-RoPE": {"memory": "infinity", "worlds": "returns"},
    "uniform, interval 1": {"memory": "uniform1", "worlds": "returns"},
    "uniform, interval 2": {"memory": "uniform2", "worlds": "returns"},
    "without contextual distillation": {"weights": "stage1"},
    "without bounded positional encoding": {"positions": "unbounded"},
}
# a score of the paper, as a column of flat() -> what is nearest to it here, its name and unit
MEASURES = {
    "dino_60": (recall, "recall, %", 100),
    "subject": (recall, "recall, %", 100),
    "60s_subject": (recall, "recall, %", 100),
    "quality": (last_validity, "last 5 s, dB", 1),
    "60s_quality": (last_validity, "last 5 s, dB", 1),
}


def flat(row):
    """A row of the file with a cell a number; what is not given is left out."""
    cells = {}
    # table 1 has a list by seconds, table 2 a group of cells for each length
    for name, x in row.items():
        if isinstance(x, list):
            x = dict(zip(SECONDS, x))
        inner = {f"{name}_{key}": y for key, y in x.items()} if isinstance(x, dict) else {name: x}
        cells |= {key: y for key, y in inner.items() if y is not None}
    return cells


def tables():
    """-> name of a table -> system -> flat row"""
    paper = json.loads(FILE.read_text("utf-8"))
    names = "table1", "table2", "table3"
    return {name: {system: flat(row) for system, row in paper[name].items()} for name in names}


def orderings(rows, first):
    """
    Is the paper's method better here than what it is better than there?
    rows     report.EvalSet -> videos; first: the EvalSet of the student
    returns  rows of a table
    """
    found = []
    for name, systems in tables().items():
        best = systems.get("ours, student") or systems["ours"]
        for system, score in product(SYSTEMS, MEASURES):
            if score not in systems.get(system, ()):
                continue
            # the two rows here, of the same worlds
            theirs = replace(first, **SYSTEMS[system])
            ours = rows.get(replace(first, worlds=theirs.worlds), [])
            theirs = rows.get(theirs, [])
            if not ours or not theirs:
                continue
            measure, name_here, scale = MEASURES[score]
            # the same as in the paper?
            verdict = compare(ours, theirs, measure)
            if verdict in ("higher", "lower"):
                is_better = best[score] > systems[system][score]
                verdict = "agrees" if is_better == (verdict == "higher") else "does not"
            found.append({
                "paper": name,
                "against": system,
                "score": score,
                "its own there": best[score],
                "theirs there": systems[system][score],
                "here": name_here,
                "ours here": scale * estimate(measure(ours)),
                "theirs here": scale * estimate(measure(theirs)),
                "the ordering": verdict,
            })
    return found


def beside(scores):
    """
    The paper's tables with our videos as the last row.
    scores   name of metrics.py -> mean times 100, NaN where the videos are too short
    returns  title -> rows of a table
    """
    # table 2 has columns of 5 s and of 60 s; videos between them have no place there
    length = "5s" if math.isnan(scores["dino_10"]) else "none"
    if not math.isnan(scores["dino_60"]):
        length = "60s"
    ours = scores | {f"{length}_{name}": scores[name] for name in ("background", "subject")}
    found = {}
    for name, systems in tables().items():
        columns = dict.fromkeys(column for row in systems.values() for column in row)
        found[name] = []
        for system, row in (systems | {"these videos": ours}).items():
            cells = {column: row.get(column, math.nan) for column in columns}
            found[name].append({"system": system} | cells)
    return found


if __name__ == "__main__":
    none = dict.fromkeys(["dino_10", "dino_60", "background", "subject"], math.nan)
    for title, table in beside(none).items():
        print("\n".join(markdown(title, table, 2)))
