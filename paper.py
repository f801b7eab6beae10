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
from itertools import product
from pathlib import Path

from report import difference, markdown, mean, pick

FILE = Path(__file__).parent / "assets" / "paper_tables.json"

# a system of the paper -> how its row here differs from the student's
SYSTEMS = {
    "LongLive": {"memory": "longlive", "worlds": "returns"},
    "Infinity-RoPE": {"memory": "infinity", "worlds": "returns"},
    "uniform, interval 1": {"memory": "uniform1", "worlds": "returns"},
    "uniform, interval 2": {"memory": "uniform2", "worlds": "returns"},
    "without contextual distillation": {"weights": "stage1", "worlds": "text"},
    "without bounded positional encoding": {"positions": "unbounded", "worlds": "text"},
}
# a score of the paper -> what is nearest to it here: recall, and validity of the last 5 s in dB
SCORES = {
    "dino_60": "right",
    "subject": "right",
    "60s_subject": "right",
    "quality": "last",
    "60s_quality": "last",
}


def tables():
    """-> name of a table -> its rows, of which the last is the paper's own method"""
    paper = json.loads(FILE.read_text("utf-8"))
    return {name: paper[name] for name in ("table1", "table2", "table3")}


def orderings(videos, student_row):
    """
    Is the paper's method better here than what it is better than there?
    student_row  what the student's rows share
    returns  rows of a table
    """
    found = []
    for (name, rows), score in product(tables().items(), SCORES):
        for row in rows:
            if row["system"] not in SYSTEMS or score not in row:
                continue
            # the two rows here, of the same worlds
            other = SYSTEMS[row["system"]]
            ours = pick(videos, student_row | {"worlds": other["worlds"]})
            theirs = pick(videos, student_row | other)
            if not ours or not theirs:
                continue
            # the same as in the paper? Where nought is in the interval, nobody knows
            gap, low, high = difference(ours, theirs, SCORES[score])
            is_better = rows[-1][score] > row[score]
            verdict = "agrees" if is_better == (gap > 0) else "does not"
            if not (low > 0 or high < 0):
                verdict = "no data" if math.isnan(gap) else "not significant"
            found.append({
                "paper": name,
                "against": row["system"],
                "score": score,
                "its own there": rows[-1][score],
                "theirs there": row[score],
                "ours here": mean(ours, SCORES[score]),
                "theirs here": mean(theirs, SCORES[score]),
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
    found = tables()
    for rows in found.values():
        cells = {column: ours.get(column) for column in rows[0]}
        rows.append(cells | {"system": "these videos"})
    return found


if __name__ == "__main__":
    print(markdown(tables(), 2))
