"""What a run did over its epochs, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from .charts import Band, Line, line_chart, number, sparkline
from .markup import label
from .records import Curve, Record

Runs = Sequence[Record]

# Title, and the columns in it: role, column. The second is dashed. What else a run logs gets a chart of its own.
_RESULTS = (
    ("Supervised loss", (("", "loss_lb"),)),
    ("Unsupervised loss", (("", "loss_ub"),)),
    ("mIoU in percent, the best marked", (("student", "miou_stu"), ("teacher", "miou_tea"))),
)
_PROCESS = (
    ("Confident pixels ρ, share of all", (("student", "pseudo"), ("teacher", "pseudo_teacher"))),
    ("Pixels where student and teacher agree, share of all", (("", "agreement"),)),
    ("Learning rates", (("encoder", "lr_encoder"), ("heads", "lr_heads"))),
    ("Decay of the teacher", (("", "decay"),)),
    ("Seconds per iteration, and of them waiting for data", (("whole", "seconds"), ("waiting", "seconds_waiting"))),
    ("Memory at its peak, MiB", (("", "memory_mib"),)),
)
_FROM_ZERO = ("loss", "lr_", "seconds", "pseudo", "memory")
_ELSEWHERE = ("best", "best-stu", "score", "score_std")  # shown by the marks and by the distribution of scores


def over_epochs(runs: Runs) -> str:
    """A chart of everything that has a figure an epoch, but for classes."""
    known = {column for _, columns in (*_RESULTS, *_PROCESS) for _, column in columns} | {*_ELSEWHERE}
    others = dict.fromkeys(name for run in runs for name in run.curves if name not in known and "/" not in name)
    charts = [_chart(runs, *chart) for chart in _RESULTS]
    charts.append(_score_chart(runs))
    charts += [_chart(runs, *chart) for chart in (*_PROCESS, *((name, (("", name),)) for name in others))]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No epoch is done yet.</p>"


def _chart(runs: Runs, title: str, columns: Sequence[tuple[str, str]]) -> str:
    """A figure of these columns of all runs that have them."""
    lines = [
        Line(*run.curves[column], run.place, run.name, role, place == 1, column.startswith("miou"))
        for run in runs
        for place, (role, column) in enumerate(columns)
        if column in run.curves
    ]
    return _figure(runs, title, lines, zero=columns[0][1].startswith(_FROM_ZERO))


def _score_chart(runs: Runs) -> str:
    """Median and spread of the scores of every epoch."""
    lines, bands = [], []
    for run in runs:
        epochs = np.unique(run.scores.epoch).tolist()
        if not epochs:
            continue
        spread = [
            np.quantile(run.scores.score[run.scores.epoch == epoch], (0.05, 0.25, 0.5, 0.75, 0.95)) for epoch in epochs
        ]
        lowest, low, middle, high, highest = np.array(spread).T.tolist()
        colour = run.place
        bands += [Band(epochs, lowest, highest, colour), Band(epochs, low, high, colour)]
        lines.append(Line(epochs, middle, colour, run.name, "median"))
    return _figure(runs, "Scores of unlabeled images: median, quartiles, 5 to 95 %", lines, bands, zero=True)


def _figure(runs: Runs, title: str, lines: Sequence[Line], bands: Sequence[Band] = (), *, zero: bool) -> str:
    if not lines:
        return ""
    shown = {line.run for line in lines}
    legend = " ".join(label(run) for run in runs if run.name in shown)
    chart = line_chart(lines, bands, title=title, epochs=_all_epochs(runs), zero=zero)
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend and f'<p>{legend}</p>'}{chart}</figure>"


def pseudo_labels(runs: Runs) -> str:
    """For each class, how much is labeled so, and how much of that is confident enough to take part."""
    names = dict.fromkeys(
        name.partition("/")[2] for run in runs for name in run.curves if name.startswith(("predicted/", "confident/"))
    )
    figures = []
    for name in names:
        lines, bands, said = [], [], []
        for run in runs:
            predicted = run.curves.get(f"predicted/{name}", Curve([], []))
            confident = run.curves.get(f"confident/{name}", Curve([], []))
            if not confident.epochs or not predicted.epochs:
                continue
            lines += [Line(*predicted, run.place, dashed=True), Line(*confident, run.place)]
            bands.append(Band(confident.epochs, [0.0] * len(confident.epochs), confident.values, run.place))
            share, passes = predicted.values[-1], confident.values[-1]
            words = f"{number(100 * share)} %"
            if f"labeled/{name}" in run.curves:
                words += f" (labeled {number(100 * float(np.mean(run.curves[f'labeled/{name}'].values)))} %)"
            words += f", {number(100 * passes / share)} % pass" if share else ""
            said.append(f'<p class="quiet">{label(run)} {words}</p>')
        if lines:
            ends = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
            high = max(max(line.y) for line in lines)
            chart = sparkline(lines, bands, title=f"pixels of {name}", epochs=ends, high=high)
            figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{chart}{''.join(said)}</figure>")
    explanation = (
        '<p class="quiet">Over the epochs; each class has a scale of its own. Thin line: share of the pixels of the '
        "unlabeled crops that have this pseudo label. Filled: those of them that pass the threshold. Figures: that "
        "share in the last epoch, the share of the class in the labeled crops, and how much passes.</p>"
    )
    return f'{explanation}<div class="small">{"".join(figures)}</div>' if figures else ""


def _all_epochs(runs: Runs) -> tuple[int, int]:
    """The first and the last epoch of the horizontal axis of every chart."""
    ends = [epochs[-1] for run in runs for epochs, _ in run.curves.values()]
    ends += [int(run.scores.epoch.max()) for run in runs if len(run.scores.epoch)]
    return 0, max(ends, default=0)
