"""What the choice of the best or the last epoch is worth, in the runs that others published.

    python -m benchmarks.published

Reads ``docs/published_runs.csv`` (mIoU in percent, epochs counted from 0) and prints the tables of ``docs/results.md``.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from imas.compare.table import Section, markdown

RUNS = Path(__file__).parents[1] / "docs" / "published_runs.csv"
_SETTING = ("data", "labeled", "encoder")
_EPOCHS = ("best", "last")


def tables() -> str:
    """The loss from best to last by method, the pairs that the two order differently, and all runs. A run that was not
    logged to its end has no last epoch.
    """
    with open(RUNS, newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    lost: dict[tuple[str, str], list[float]] = defaultdict(list)
    rows: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)  # of each log by network
    for run in runs:
        gap = float(run["best"]) - float(run["last"]) if run["last"] else None
        lost[run["method"], run["network"]] += [] if gap is None else [gap]
        best = run["best"] + (f" ({run['best_epoch']})" if run["best_epoch"] else "")
        log = tuple(run[key] for key in (*_SETTING, "stride", "method", "log"))
        rows[log][run["network"]] = [best, run["last"], "" if gap is None else f"{gap:.2f}"]
    turned = []
    for one, other in combinations([run for run in runs if run["last"]], 2):
        same = all(one[key] == other[key] for key in _SETTING) and one["method"] != other["method"]
        best, last = (float(one[epoch]) - float(other[epoch]) for epoch in _EPOCHS)
        if same and best * last < 0:
            names = " / ".join(f"{run['method']}, stride {run['stride']}, {run['network']}" for run in (one, other))
            figures = (f"{one[epoch]} / {other[epoch]}" for epoch in _EPOCHS)
            turned.append([*(one[key] for key in _SETTING), names, *figures])
    means = [[*key, str(len(gaps)), f"{statistics.mean(gaps):.2f}", f"{max(gaps):.2f}"] for key, gaps in lost.items()]
    everything = []
    for (*setting, log), networks in rows.items():
        everything.append([*setting, *networks.get("student", [""] * 3), *networks.get("teacher", [""] * 3), log])
    what = ["data", "labels", "encoder"]
    columns = [f"{name}{word}" for name in ("student", "teacher") for word in (", best (epoch)", ", last", ", lost")]
    parts = [
        Section("", ["method", "network", "runs", "best minus last, mean", "at most"], means),
        Section("", [*what, "runs", *_EPOCHS], turned),
        Section("", [*what, "stride", "method", *columns, "log"], everything),
    ]
    return "\n\n".join(map(markdown, parts))


if __name__ == "__main__":
    print(tables())
