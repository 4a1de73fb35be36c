"""What the page of a run shows, section by section. A section with nothing to show is left out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ..errors import UserError
from ..files import replacing
from ..strict import dotted
from .markup import Line, Markup, chart, document, picture, table
from .records import NETWORK_NAMES, Record, read_records

Runs = Sequence[Record]

_GENERAL = ("dataset", "trainer", "net", "criterion", "saver")  # sections of a recipe; the other one names the method
# Titles of charts, in their order. NAME and the columns NAME_... share a chart; any other column has its own.
_CHARTS = {
    "loss_lb": "Supervised loss",
    "loss_ub": "Unsupervised loss",
    "miou": "mIoU in percent, the best marked",
    "score": "Scores of unlabeled images: mean and standard deviation",
    "pseudo": "Confident pixels ρ, share of all",
    "agreement": "Pixels on which the networks agree, share of all",
    "lr": "Learning rates",
    "seconds": "Seconds per iteration, and of them waiting for data",
}
_ASIDE = ("best", "decay", "memory_mib")  # columns without a chart, up to the first hyphen
_SHARES = {"predicted": "pseudo labels", "confident": "those that pass the threshold", "labeled": "labeled crops"}
_OF_CLASSES = {"iou": "IoU in percent", "predicted": "Pseudo labels, share of all pixels"}
_MEANS = ("miou", "fwiou", "mean_accuracy", "pixel_accuracy")
_PICTURES = {"views.png": "Unlabeled images, as a step would have treated them", "predictions.png": "Validation images"}


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, and the pages of their stages.

    ``runs`` are folders that contain ``log/``, or log folders. Without ``out`` the page is ``log/report.html`` of one
    run, ``report.html`` here for several. It is returned. A folder without a run, or a file in it of another format,
    is a UserError, and so is an ``out`` that cannot be a file.
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
    names, recipes = [_label(run) for run in runs], [dotted(run.recipe) for run in runs]
    warnings = [(run, f"epoch {epoch}: {text}") for run in runs for epoch, text in run.warnings]
    sections = {
        "Warnings": "".join(f'<p class="warning">{_label(run)} {escape(text)}</p>' for run, text in warnings),
        "Summary": _side_by_side(names, [_facts(run) for run in runs]),
        "Stages": "".join(_stages(run, out) for run in runs if run.stages),
        "What differs between the recipes": _side_by_side(names, _differences(recipes)),
        "Curves": _curves(runs),
        "Classes, in percent": _classes(runs),
        **_pictures(runs),
        "Recipe": "".join(_folded(f"{run.name}: config.yaml", run.recipe) for run in runs if run.recipe),
        "Environment": "".join(_folded(f"{run.name}: run.yaml", run.starts) for run in runs if run.starts),
    }
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    with replacing(out) as temporary:
        temporary.write_text(document(title, sections), encoding="utf-8")


def _side_by_side(names: Sequence[str], facts: Sequence[dict[str, Any]]) -> str:
    """A table with a column a run, and a row for each fact that is known of any of them."""
    keys = dict.fromkeys(key for each in facts for key in each)
    return table(["", *names], [(key, *(each.get(key) for each in facts)) for key in keys]) if keys else ""


def _differences(recipes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = sorted({key for recipe in recipes for key in recipe if any(r.get(key) != recipe[key] for r in recipes)})
    return [{key: recipe.get(key) for key in keys} for recipe in recipes]


def _facts(run: Record) -> dict[str, Any]:
    """The rows of the summary."""
    start, recipe = run.starts[-1] if run.starts else {}, dotted(run.recipe)
    lists = {name: entry["images"] for name, entry in (start.get("lists") or {}).items()}
    protocol = run.evaluation.get("protocol", {}).items()
    facts = {
        "method": run.recipe.get("method") or ", ".join(key for key in run.recipe if key not in _GENERAL),
        "epochs": f"{run.epochs} of {recipe.get('trainer.epochs', '?')}" if not run.stages else "",
    }
    for network, (x, y) in run.mious.items():
        best = f"{max(y):.2f} % in epoch {x[y.index(max(y))]}; last {y[-1]:.2f} %, {max(y) - y[-1]:.2f} points lost"
        facts[f"best mIoU, {network}"] = best
    facts |= {
        "measured on": ", ".join(f"{key} {value}" for key, value in protocol if value not in (None, False, [1.0])),
        "data set": recipe.get("dataset.type"),
        "encoder": recipe.get("net.encoder.type"),
        "images": ", ".join(f"{count} {name}" for name, count in lists.items()),
        **{key.replace("_", " "): str(start.get(key, "")) for key in ("seed", "total_batch", "processes", "git")},
        "devices": ", ".join(dict.fromkeys(map(str, start.get("devices") or []))),
        "started": str(run.starts[0].get("started", ""))[:16].replace("T", " ") if run.starts else "",
        "starts": len(run.starts),
    }
    return {key: value for key, value in facts.items() if value}


def _stages(run: Record, out: Path) -> str:
    """A column a stage, whose name leads to its page."""
    pages = [os.path.relpath(stage.folder / "report.html", out.parent.resolve()) for stage in run.stages]
    links = [f'<a href="{quote(Path(page).as_posix())}">{escape(Path(page).parent.name)}</a>' for page in pages]
    return _label(run) + _side_by_side([*map(Markup, links)], [_facts(stage) for stage in run.stages])


def _curves(runs: Runs) -> str:
    """A chart of most columns of the CSV files; those of single classes are with the classes."""
    groups: dict[str, list[str]] = {group: [] for group in _CHARTS}  # columns by chart
    for column in dict.fromkeys(column for run in runs for column in run.curves):
        if "/" not in column and column.partition("-")[0] not in _ASIDE:
            group = next((group for group in _CHARTS if f"{column}_".startswith(f"{group}_")), column)
            groups.setdefault(group, []).append(column)
    figures = ""
    for group, columns in groups.items():
        lines = []
        for run, (dash, column) in product(runs, enumerate(columns)):
            if column in run.curves:
                role = column.removeprefix(group).strip("_")
                name = f"{run.label} {NETWORK_NAMES.get(role, role)}".strip()
                lines.append(Line(*run.curves[column], run.colour, dash, name, group == "miou"))
        figures += chart(_CHARTS.get(group, group.replace("_", " ")), lines) if lines else ""
    return _grid(figures)


def _classes(runs: Runs) -> str:
    """IoU of each network, the share of each class in true pixels, pseudo labels and labeled crops, also by epoch."""
    columns, charts = [], ""
    for run in runs:
        of_run: dict[str, dict[str, float | None]] = {}
        for network, figures in run.evaluation.get("networks", {}).items():
            means = {key: figures.get(key) for key in _MEANS}
            of_run |= {f"IoU, {network}": figures.get("iou", {}) | means, "pixels": figures.get("pixels", {})}
        lines: dict[str, list[Line]] = {kind: [] for kind in _OF_CLASSES}
        for column, curve in run.curves.items():
            kind, _, name = column.partition("/")
            if kind in _SHARES:
                of_run.setdefault(_SHARES[kind], {})[name] = 100 * curve.values[-1]
            if kind in lines:
                lines[kind].append(Line(*curve, f"c{len(lines[kind]) % 6}", len(lines[kind]) // 6, name))
        columns += [(Markup(f"{_label(run)} {escape(title)}".strip()), values) for title, values in of_run.items()]
        charts += "".join(
            chart(f"{run.label} {_OF_CLASSES[kind]}".strip(), lines[kind]) for kind in lines if lines[kind]
        )
    columns.sort(key=lambda column: "IoU, " not in column[0])
    rows = []
    for name in sorted({name: None for _, values in columns for name in values}, key=lambda name: name in _MEANS):
        cells = [values.get(name) for _, values in columns]
        rows.append((name, *(cell if cell is None else f"{cell:.2f}" for cell in cells)))
    return (table(["class", *(title for title, _ in columns)], rows, True) if rows else "") + _grid(charts)


def _pictures(runs: Runs) -> dict[str, str]:
    """The pictures of the log folders by section: those that every run leaves, then any other."""
    sections: dict[str, str] = defaultdict(str, dict.fromkeys(_PICTURES.values(), ""))
    for run in runs:
        for path in sorted(run.folder.glob("*.png")):
            title = _PICTURES.get(path.name, "Further pictures")
            sections[title] += f"<p>{_label(run)} {escape(path.stem)}</p>" + picture(path, f"{run.name}: {path.stem}")
    return sections


def _folded(title: str, content: dict | list) -> str:
    """Text that opens with a click."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _grid(figures: str) -> str:
    return figures and f'<div class="charts">{figures}</div>'


def _label(run: Record) -> Markup:
    """The run's name in its colour, if there are several runs; otherwise nothing."""
    return Markup(run.label and f'<span class="run {run.colour}">{escape(run.label)}</span>')
