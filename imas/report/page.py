"""What the page of a run shows, section by section. A section with nothing to show is left out."""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from ..errors import UserError
from ..files import replacing
from .markup import Line, Markup, chart, document, legend, number, picture, table
from .records import NETWORK_NAMES, Curve, Record, read_records

Runs = Sequence[Record]

_NONE = Curve([], [])
_EXTREMES = 8  # of the hardest and of the easiest images
_GENERAL = ("dataset", "trainer", "net", "criterion", "saver")  # sections of a recipe; the other one names the method
# Titles of charts, in their order. Columns whose first word is listed here share a chart; others get their own.
_CHARTS = {
    "loss_lb": "Supervised loss",
    "loss_ub": "Unsupervised loss",
    "miou": "mIoU in percent, the best marked",
    "score": "Scores of unlabeled images: median, quartiles, 5 to 95 %",
    "pseudo": "Confident pixels ρ, share of all",
    "agreement": "Pixels on which the networks agree, share of all",
    "lr": "Learning rates",
    "decay": "Decay of the moving average",
    "seconds": "Seconds per iteration, and of them waiting for data",
    "memory_mib": "Memory at its peak, MiB",
}
_FROM_ZERO = ("loss", "lr", "seconds", "pseudo", "memory", "score")


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, and the pages of their stages.

    Args:
        runs: folders that contain ``log/``, or log folders.
        out: the file to write; by default ``log/report.html`` of one run, ``report.html`` here for several.

    Returns:
        The file that was written.

    Raises:
        UserError: a folder without a run, a file of another format in it, or ``out`` cannot be a file.
    """
    records = read_records(runs)
    out = out or (records[0].folder / "report.html" if len(records) == 1 else Path("report.html"))
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: expected a file to write, in a folder that exists")
    _write(records, out)
    return out


def _write(runs: Runs, out: Path) -> None:
    for stage in (stage for run in runs for stage in run.stages):
        _write([stage], stage.folder / "report.html")
    recipes = [(f"{run.name}: config.yaml", run.recipe) for run in runs if run.recipe]
    starts = [(f"{run.name}: started {start.get('started')}", start) for run in runs for start in run.starts]
    boards = [shlex.quote(str(run.folder / "tensorboard")) for run in runs if (run.folder / "tensorboard").is_dir()]
    sections = {
        "Summary": _summary(runs),
        "Stages": "".join(_stages(run, out) for run in runs),
        "What differs between the recipes": _differences(runs),
        "Curves": _curves(runs),
        "Pseudo labels of each class": _pseudo_labels(runs),
        "Evaluation of each class, in percent": _evaluation(runs),
        "The hardest and the easiest unlabeled images": _images(runs),
        "Validation images": _pictures(runs, "predictions.png", "image, truth and predictions"),
        "Further pictures": "".join(_pictures(runs, name, Path(name).stem) for name in _further(runs)),
        "Recipe": "".join(_folded(*recipe) for recipe in recipes),
        "Environment": "".join(_folded(*start) for start in starts),
        "TensorBoard": "".join(f"<pre>tensorboard --logdir {escape(board)}</pre>" for board in boards),
    }
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    body = f"<h1>{escape(title)}</h1>" + "".join(f"<p>{_label(run)} {_in_words(run)}</p>" for run in runs)
    warnings = [(run, f"epoch {epoch}: {text}") for run in runs for epoch, text in run.warnings]
    items = "".join(f"<li>{_label(run)} {escape(text)}</li>" for run, text in warnings)
    body += items and f'<ul class="warnings">{items}</ul>'
    body += "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    with replacing(out) as temporary:
        temporary.write_text(document(f"{', '.join(run.name for run in runs)} – iMAS", body), encoding="utf-8")


def _in_words(run: Record) -> str:
    """Method, date, progress, and the best mIoU with its protocol."""
    facts = _facts(run)
    started = facts["started"] and f"started {facts['started']}"
    done = f"{run.epochs} epochs done" if run.epochs or not run.stages else f"{len(run.stages)} stages"
    text = " · ".join(escape(part) for part in (facts["method"], started, done) if part)
    for network, curve in run.miou.items():
        source = "; ".join(filter(None, (f"{network}, epoch {curve.best[1]}", facts["mIoU measured on"])))
        return f"{text} · <strong>best mIoU {curve.best[0]:.2f} %</strong> ({escape(source)})"
    return text if run.stages else f"{text} · not evaluated yet"


def _summary(runs: Runs) -> str:
    facts = [_facts(run) for run in runs]
    questions = dict.fromkeys(question for each in facts for question, answer in each.items() if answer)
    rows = [(question, *(each.get(question) or None for each in facts)) for question in questions]
    return table(["", *map(_label, runs)], rows) if rows else ""


def _facts(run: Record) -> dict[str, Any]:
    """The rows of the summary; empty or None where nothing is known."""
    start, recipe = run.starts[-1] if run.starts else {}, _flat(run.recipe)
    lists = {name: entry["images"] for name, entry in (start.get("lists") or {}).items()}
    protocol = {name: value for name, value in run.evaluation.get("protocol", {}).items() if name != "epoch"}
    protocol = protocol or {"images": lists.get("val"), "window": recipe.get("dataset.val.crop.size")}
    facts = {
        "method": run.recipe.get("method") or ", ".join(key for key in run.recipe if key not in _GENERAL),
        "data set": recipe.get("dataset.type"),
        "encoder": recipe.get("net.encoder.type"),
        "images": ", ".join(f"{count} {name}" for name, count in lists.items()),
        "epochs": f"{run.epochs} of {recipe.get('trainer.epochs', '?')}" if run.epochs or not run.stages else "",
        **{key.replace("_", " "): str(start.get(key, "")) for key in ("seed", "total_batch", "processes")},
        "devices": ", ".join(dict.fromkeys(map(str, start.get("devices") or []))),
        "commit": re.sub("([0-9a-f]{12})[0-9a-f]*", r"\1", str(start.get("git") or "")),
        "started": str(run.starts[0].get("started", ""))[:16].replace("T", " ") if run.starts else "",
        "starts": len(run.starts),
        "mIoU measured on": ", ".join(f"{k} {v}" for k, v in protocol.items() if v not in (None, False, [1.0])),
    }
    if seconds := sum(run.curves.get("seconds", _NONE).values):
        waiting = sum(run.curves.get("seconds_waiting", _NONE).values) / seconds
        mean = number(seconds / len(run.curves["seconds"].values))
        facts["seconds per iteration"] = f"{mean} ({100 * waiting:.0f} % waiting for data)"
    if "memory_mib" in run.curves:
        facts["memory at its peak"] = f"{run.curves['memory_mib'].best[0]:,.0f} MiB"
    for network, curve in run.miou.items():
        best, epoch = curve.best
        facts[f"best mIoU, {network}"] = f"{best:.2f} % in epoch {epoch} (last {curve.values[-1]:.2f} %)"
    return facts


def _stages(run: Record, out: Path) -> str:
    items = ""
    for stage in run.stages:
        page = Path(os.path.relpath(stage.folder / "report.html", out.parent.resolve())).as_posix()
        items += f'<li><a href="{quote(page)}">{escape(stage.name)}</a>: {_in_words(stage)}</li>'
    return items and f"<h3>{_label(run)}</h3><ul>{items}</ul>"


def _differences(runs: Runs) -> str:
    if len(runs) == 1 or not any(run.recipe for run in runs):
        return ""
    recipes = [_flat(run.recipe) for run in runs]
    keys = sorted(dict.fromkeys(key for recipe in recipes for key in recipe), key=lambda key: "." in key)
    rows = [(key, *(recipe.get(key) for recipe in recipes)) for key in keys]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(["", *map(_label, runs)], rows) if rows else "<p>Nothing: the recipes are equal.</p>"


def _curves(runs: Runs) -> str:
    """A chart of every column of the CSV files, except those of single classes."""
    groups: dict[str, list[Line]] = {"score": [line for run in runs for line in _distribution(run)]}
    dashes: dict[str, dict[str, int]] = defaultdict(dict)  # of the columns of a group, equal in all runs
    for run in runs:
        for column, curve in run.curves.items():
            word = column.partition("_")[0]
            if "/" in column or word == "score" or column.partition("-")[0] == "best":
                continue
            group = word if word in _CHARTS else column
            role = column.removeprefix(group).strip("_")
            dash = dashes[group].setdefault(column, len(dashes[group]))
            name = _line_name(run, NETWORK_NAMES.get(role, role))
            groups.setdefault(group, []).append(Line(*curve, run.colour, dash, name, group == "miou"))
    figures, words = "", [group.partition("_")[0] for group in _CHARTS]
    for group in sorted(groups, key=lambda group: [*words, group.partition("_")[0]].index(group.partition("_")[0])):
        if lines := groups[group]:
            title, zero = _CHARTS.get(group, group.replace("_", " ")), [0.0] * group.startswith(_FROM_ZERO)
            svg = chart(lines, title=title, epochs=_epochs(runs), include=zero)
            figures += f"<figure><figcaption>{escape(title)}</figcaption>{legend(lines)}{svg}</figure>"
    nothing = "" if any(run.stages for run in runs) else "<p>No epoch is done yet.</p>"
    return f'<div class="charts">{figures}</div>' if figures else nothing


def _distribution(run: Record) -> list[Line]:
    """Median and spread of the scores in every epoch."""
    scores = defaultdict(list)
    for curve in run.scores.values():
        for epoch, value in zip(*curve):
            scores[epoch].append(value)
    if not scores:
        return []
    spread = [np.quantile(scores[epoch], (0.05, 0.25, 0.5, 0.75, 0.95)) for epoch in sorted(scores)]
    lowest, low, middle, high, highest = np.array(spread).T.tolist()
    areas = ((lowest, highest), (low, high))
    return [Line(sorted(scores), middle, run.colour, 0, _line_name(run, "median"), areas=areas)]


def _pseudo_labels(runs: Runs) -> str:
    """For each class, its share of the pseudo labels, and how much of it is confident enough to be trained on."""
    figures = ""
    for column in dict.fromkeys(column for run in runs for column in run.curves if column.startswith("predicted/")):
        name = column.partition("/")[2]
        lines, texts = [], ""
        for run in (run for run in runs if column in run.curves):
            predicted, share = run.curves[column], run.curves[column].values[-1]
            lines.append(Line(*predicted, run.colour, 1))
            texts += f'<p class="quiet">{_label(run)} {number(100 * share)} %'
            if labeled := run.curves.get(f"labeled/{name}"):
                texts += f" (labeled {number(100 * float(np.mean(labeled.values)))} %)"
            if confident := run.curves.get(f"confident/{name}"):
                area = ([0.0] * len(confident.epochs), confident.values)
                lines.append(Line(*confident, run.colour, areas=[area]))
                texts += f", {number(100 * confident.values[-1] / share)} % pass" if share else ""
            texts += "</p>"
        svg = chart(lines, title=f"pixels of {name}", epochs=_epochs(runs), include=[0.0], small=True)
        figures += f"<figure><figcaption>{escape(name)}</figcaption>{svg}{texts}</figure>"
    note = (
        "Each class has its own scale. Dashed: share of the pixels of the unlabeled crops with this pseudo label. "
        "Filled: those that pass the threshold. Figures: of the last epoch; the class's share of the labeled crops."
    )
    return figures and f'<p class="quiet">{note}</p><div class="small">{figures}</div>'


def _evaluation(runs: Runs) -> str:
    """IoU and, of a single run, accuracy of each network, and each class's share of the true pixels."""
    networks = [(run, name, figures) for run in runs for name, figures in run.evaluation.get("networks", {}).items()]
    kinds = {"iou": "IoU", "accuracy": "accuracy"} if len(runs) == 1 else {"iou": "IoU"}
    header = [f"{_label(run)} {escape(name)} {word}".strip() for run, name, _ in networks for word in kinds.values()]
    rows: list[list[Any]] = []
    for name in dict.fromkeys(name for _, _, figures in networks for name in figures.get("iou", {})):
        cells = [figures.get(kind, {}).get(name) for _, _, figures in networks for kind in kinds]
        rows.append([name, *map(_percent, [*cells, networks[0][2].get("pixels", {}).get(name)])])
    for title, means in {"mean": ("miou", "mean_accuracy"), "by frequency": ("fwiou", "pixel_accuracy")}.items():
        cells = [figures.get(mean) for _, _, figures in networks for mean in means[: len(kinds)]]
        rows.append([title, *map(_percent, cells), ""])
    note = '<p class="quiet">After the last epoch. By frequency: a class weighs as much as it has pixels.</p>'
    return note + table(["class", *map(Markup, header), "pixels"], rows, numbers=True) if networks else ""


def _images(runs: Runs) -> str:
    parts = ""
    for run in (run for run in runs if run.scores):
        ranked = sorted(run.scores, key=lambda image: run.scores[image].values[-1])
        count = min(_EXTREMES, (len(ranked) + 1) // 2)
        parts += f'<h3>{_label(run)}</h3><div class="pair">'
        for title, images in (("hardest first", ranked[:count]), ("easiest first", ranked[count:][-count:][::-1])):
            header = ["image", "last score", "epoch", "since first", "trend, 0 to 1"]
            rows = [_image(run, image) for image in images]
            parts += table(header, rows, caption=title, numbers=True) if rows else ""
        parts += "</div>"
    views = _pictures(runs, "views.png", "hardest and easiest unlabeled images, with their views")
    note = '<p class="quiet">The first three of each, as a step would have treated them at the end:</p>'
    return parts + (views and note + views)


def _image(run: Record, image: str) -> tuple[Any, ...]:
    """Its row in the table of scores."""
    epochs, values = run.scores[image]
    line, title = Line(epochs, values, run.colour), f"scores of {image}"
    trend = Markup(chart([line], title=title, epochs=_epochs([run]), include=(0.0, 1.0), small=True))
    return image, f"{values[-1]:.3f}", epochs[-1], f"{values[-1] - values[0]:+.2f}" if len(values) > 1 else None, trend


def _further(runs: Runs) -> list[str]:
    """Pictures in the log folders that have no place of their own, such as those of a method's stages."""
    found = {path.name for run in runs for path in run.folder.glob("*.png")}
    return sorted(found - {"predictions.png", "views.png"})


def _pictures(runs: Runs, name: str, what: str) -> str:
    pictures = (
        (run, picture(run.folder / name, f"{run.name}: {what}")) for run in runs if (run.folder / name).is_file()
    )
    return "".join(f"<h3>{_label(run)}</h3>{image}" for run, image in pictures)


def _folded(title: str, content: dict) -> str:
    """Text that opens with a click."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _label(run: Record) -> Markup:
    """The run's name in its colour, if there are several runs; otherwise nothing."""
    return Markup("" if run.alone else f'<span class="run {run.colour}">{escape(run.name)}</span>')


def _line_name(run: Record, role: str) -> str:
    return role if run.alone else f"{run.name} {role}".strip()


def _epochs(runs: Runs) -> tuple[int, int]:
    """The first and the last epoch of the horizontal axis of every chart."""
    curves = [curve.epochs for run in runs for curve in (*run.curves.values(), *run.scores.values())]
    return min(epochs[0] for epochs in curves), max(epochs[-1] for epochs in curves)


def _flat(section: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
