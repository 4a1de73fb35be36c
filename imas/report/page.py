"""What the page of a run shows, section by section. A section with nothing to show is left out."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from ..files import replacing
from ..strict import UserError
from .charts import Band, Line, chart, figure, number
from .markup import Markup, document, folded, picture, table
from .records import NETWORK_NAMES, Curve, Record, read_records

Runs = Sequence[Record]

_EXTREMES = 8  # of the hardest and of the easiest images
_GENERAL = ("dataset", "trainer", "net", "criterion", "saver")  # sections of a recipe; the other one names the method
# Charts, in this order; others follow. Columns with the same first word share one, if it is listed here.
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
_FROM_ZERO = ("loss", "lr", "seconds", "pseudo", "memory")


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side; and before it, those of the runs' stages.

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
    _save(records, out)
    return out


def _save(runs: Runs, out: Path) -> None:
    for stage in (stage for run in runs for stage in run.stages):
        _save([stage], stage.folder / "report.html")
    sections: dict[str, Callable[[Runs], str]] = {
        "Summary": _summary,
        "Stages": lambda runs: "".join(_stages(run, out.parent) for run in runs),
        "What differs between the recipes": _differences,
        "Curves": _curves,
        "Pseudo labels of each class": _pseudo_labels,
        "Evaluation of each class, in percent": _evaluation,
        "The hardest and the easiest unlabeled images": _images,
        "Validation images": lambda runs: _pictures(runs, "predictions.png", "image, truth and predictions"),
        "Recipe": _recipes,
        "Environment": _environment,
        "TensorBoard": _tensorboard,
    }
    contents = {title: section(runs) for title, section in sections.items()}
    body = [f"<section><h2>{title}</h2>{content}</section>" for title, content in contents.items() if content]
    text = document(f"{', '.join(run.name for run in runs)} – iMAS", "\n".join([_head(runs), *body]))
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _head(runs: Runs) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    lines = "".join(f"<p>{_label(run)} {_in_words(run)}</p>" for run in runs)
    items = (
        f"<li>{_label(run)} epoch {escape(f'{epoch}: {text}')}</li>" for run in runs for epoch, text in run.warnings
    )
    warnings = "".join(items)
    return f"<h1>{escape(title)}</h1>{lines}" + (warnings and f'<ul class="warnings">{warnings}</ul>')


def _in_words(run: Record) -> str:
    """Method, date, progress, and the best mIoU with its protocol."""
    done = f"{run.epochs} epochs done" if run.epochs or not run.stages else f"{len(run.stages)} stages"
    started = _started(run)
    text = " · ".join(escape(part) for part in (_method(run), started and f"started {started}", done) if part)
    for network in run.miou:
        best, epoch = _best(run, network)
        source = "; ".join(filter(None, (f"{network}, epoch {epoch}", _protocol(run))))
        return f"{text} · <strong>best mIoU {best:.2f} %</strong> ({escape(source)})"
    return text if run.stages else f"{text} · not evaluated yet"


def _summary(runs: Runs) -> str:
    answers = [_answers(run) for run in runs]
    questions = dict.fromkeys(question for each in answers for question, answer in each.items() if answer)
    return table(_header(runs), [(question, *(each.get(question) for each in answers)) for question in questions])


def _answers(run: Record) -> dict[str, Any]:
    recipe, start = _flat(run.recipe), run.starts[-1] if run.starts else {}
    answers = {
        "method": _method(run),
        "data set": recipe.get("dataset.type"),
        "encoder": recipe.get("net.encoder.type"),
        "images": ", ".join(f"{count} {name}" for name, count in _lists(run).items()),
        "epochs": f"{run.epochs} of {recipe.get('trainer.epochs', '?')}",
    }
    for network, curve in run.miou.items():
        best, epoch = _best(run, network)
        answers[f"best mIoU, {network}"] = f"{best:.2f} % in epoch {epoch} (last {curve.values[-1]:.2f} %)"
    answers["mIoU measured on"] = _protocol(run)
    if "seconds" in run.curves:
        seconds = float(np.mean(run.curves["seconds"].values)) or 1e-9
        waiting = float(np.mean(run.curves.get("seconds_waiting", Curve([], [0.0])).values))
        answers["seconds per iteration"] = f"{number(seconds)} ({100 * waiting / seconds:.0f} % waiting for data)"
    if "memory_mib" in run.curves:
        answers["memory at its peak"] = f"{max(run.curves['memory_mib'].values):,.0f} MiB"
    answers |= {key.replace("_", " "): str(start[key]) for key in ("seed", "total_batch", "processes") if key in start}
    answers["devices"] = ", ".join(dict.fromkeys(map(str, start.get("devices") or [])))
    answers["commit"] = start.get("git")
    answers["started"] = _started(run)
    answers["starts"] = len(run.starts)
    return answers


def _stages(run: Record, page_folder: Path) -> str:
    items = []
    for stage in run.stages:
        page = Path(os.path.relpath(stage.folder / "report.html", page_folder.resolve())).as_posix()
        items.append(f'<li><a href="{escape(quote(page))}">{escape(stage.name)}</a>: {_in_words(stage)}</li>')
    return f"{_heading(run)}<ul>{''.join(items)}</ul>" if items else ""


def _differences(runs: Runs) -> str:
    if len(runs) == 1 or not any(run.recipe for run in runs):
        return ""
    recipes = [_flat(run.recipe) for run in runs]
    keys = sorted(dict.fromkeys(key for recipe in recipes for key in recipe), key=lambda key: "." in key)
    rows = [(key, *(recipe.get(key) for recipe in recipes)) for key in keys]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(_header(runs), rows) if rows else "<p>Nothing: the recipes are equal.</p>"


def _curves(runs: Runs) -> str:
    """A chart of every column of the CSV files, but of those of classes."""
    groups: dict[str, list[str]] = {"score": []}
    for column in dict.fromkeys(column for run in runs for column in run.curves):
        word = column.partition("_")[0]
        if "/" not in column and word != "score" and column.partition("-")[0] != "best":
            groups.setdefault(word if word in _CHARTS else column, []).append(column)
    words = [group.partition("_")[0] for group in _CHARTS]
    order = {group: words.index(word) if (word := group.partition("_")[0]) in words else len(words) for group in groups}
    figures = []
    for group in sorted(groups, key=order.__getitem__):
        lines, bands = _distributions(runs) if group == "score" else (_lines(runs, group, groups[group]), [])
        if lines:
            title, zero = _CHARTS.get(group, group.replace("_", " ")), group.startswith((*_FROM_ZERO, "score"))
            figures.append(figure(title, lines, bands, epochs=_epochs(runs), zero=zero))
    if not figures:
        return "" if any(run.stages for run in runs) else "<p>No epoch is done yet.</p>"
    return f'<div class="charts">{"".join(figures)}</div>'


def _lines(runs: Runs, group: str, columns: Sequence[str]) -> list[Line]:
    """The columns of a group, named by what follows the group's name."""
    lines = []
    for run in runs:
        for i, column in enumerate(columns):
            if column in run.curves:
                role = column[len(group) :].strip("_")
                name = _line_name(run, NETWORK_NAMES.get(role, role))
                lines.append(Line(*run.curves[column], run.place, i, name, group == "miou"))
    return lines


def _distributions(runs: Runs) -> tuple[list[Line], list[Band]]:
    """Median and spread of the scores of every epoch."""
    lines, bands = [], []
    for run in runs:
        scores = defaultdict(list)
        for curve in run.scores.values():
            for epoch, value in zip(*curve):
                scores[epoch].append(value)
        if epochs := sorted(scores):
            spread = [np.quantile(scores[epoch], (0.05, 0.25, 0.5, 0.75, 0.95)) for epoch in epochs]
            lowest, low, middle, high, highest = np.array(spread).T.tolist()
            bands += [Band(epochs, lowest, highest, run.place), Band(epochs, low, high, run.place)]
            lines.append(Line(epochs, middle, run.place, 0, _line_name(run, "median")))
    return lines, bands


def _pseudo_labels(runs: Runs) -> str:
    """For each class, its share of the pseudo labels, and how much of it is confident enough to be trained on."""
    columns = dict.fromkeys(column for run in runs for column in run.curves)
    figures = []
    for name in (column.partition("/")[2] for column in columns if column.startswith("predicted/")):
        lines, bands, texts = [], [], []
        for run in runs:
            kinds = ("predicted", "confident", "labeled")
            predicted, confident, labeled = (run.curves.get(f"{kind}/{name}") for kind in kinds)
            if not predicted:
                continue
            lines.append(Line(*predicted, run.place, 1))
            share = predicted.values[-1]
            text = f"{number(100 * share)} %"
            if labeled:
                text += f" (labeled {number(100 * float(np.mean(labeled.values)))} %)"
            if confident:
                lines.append(Line(*confident, run.place))
                bands.append(Band(confident.epochs, [0.0] * len(confident.epochs), confident.values, run.place))
                text += f", {number(100 * confident.values[-1] / share)} % pass" if share else ""
            texts.append(f'<p class="quiet">{_label(run)} {text}</p>')
        svg = chart(lines, bands, title=f"pixels of {name}", epochs=_epochs(runs), zero=True, small=True)
        figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{svg}{''.join(texts)}</figure>")
    explanation = (
        '<p class="quiet">Over the epochs; each class has its own scale. Dashed: share of the pixels of the unlabeled '
        "crops with this pseudo label. Filled: those of them that pass the threshold. Figures: that share in the last "
        "epoch, the share of the class in the labeled crops, and how much passes.</p>"
    )
    return f'{explanation}<div class="small">{"".join(figures)}</div>' if figures else ""


def _evaluation(runs: Runs) -> str:
    """IoU and, of a single run, accuracy of each network, and each class's share of the true pixels."""
    columns = [(run, name, figures) for run in runs for name, figures in run.evaluation.get("networks", {}).items()]
    if not columns:
        return ""
    kinds = {"iou": "IoU", "accuracy": "accuracy"} if len(runs) == 1 else {"iou": "IoU"}
    header, shares = ["class"], []
    for run, name, figures in columns:
        header += [Markup(f"{_label(run)} {escape(name)} {kind}") for kind in kinds.values()]
        if figures.get("pixels") not in (None, *shares):  # equal for all networks, and for all runs on one list
            shares.append(figures["pixels"])
    rows: list[list[Any]] = []
    for name in dict.fromkeys(name for _, _, figures in columns for name in figures.get("iou", {})):
        cells = [figures.get(kind, {}).get(name) for _, _, figures in columns for kind in kinds]
        rows.append([name, *map(_percent, [*cells, *(share.get(name) for share in shares)])])
    for title, means in (("mean", ("miou", "mean_accuracy")), ("by frequency", ("fwiou", "pixel_accuracy"))):
        cells = [_percent(figures.get(mean)) for _, _, figures in columns for mean in means[: len(kinds)]]
        rows.append([title, *cells, *[""] * len(shares)])
    note = '<p class="quiet">After the last epoch. By frequency: a class weighs as much as it has pixels.</p>'
    return note + table([*header, *["pixels"] * len(shares)], rows, numbers=True)


def _images(runs: Runs) -> str:
    parts = []
    for run in runs:
        ranked = sorted(run.scores, key=lambda image: run.scores[image].values[-1])
        count = min(_EXTREMES, (len(ranked) + 1) // 2)
        groups = {"hardest first": ranked[:count], "easiest first": ranked[count:][-count:][::-1]}
        tables = [f"<div>{_image_table(run, images, title)}</div>" for title, images in groups.items() if images]
        if tables:
            parts.append(f'{_heading(run)}<div class="pair">{"".join(tables)}</div>')
    views = _pictures(runs, "views.png", "hardest and easiest unlabeled images, with their views")
    note = '<p class="quiet">The first three of each, as a step would have treated them at the end:</p>'
    return "".join(parts) + (views and note + views)


def _image_table(run: Record, images: Sequence[str], caption: str) -> str:
    rows = []
    for image in images:
        epochs, values = run.scores[image]
        change = f"{values[-1] - values[0]:+.2f}" if len(values) > 1 else None
        trend = chart([Line(epochs, values, run.place)], title=f"scores of {image}", epochs=_epochs([run]), small=True)
        rows.append((image, f"{values[-1]:.3f}", epochs[-1], change, Markup(trend)))
    return table(["image", "last score", "epoch", "since first", "trend"], rows, caption=caption, numbers=True)


def _pictures(runs: Runs, name: str, what: str) -> str:
    shown = [run for run in runs if (run.folder / name).is_file()]
    return "".join(_heading(run) + picture(run.folder / name, f"{run.name}: {what}") for run in shown)


def _recipes(runs: Runs) -> str:
    texts = ((run, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)) for run in runs if run.recipe)
    return "".join(folded(f"{run.name}: config.yaml", f"<pre>{escape(text)}</pre>") for run, text in texts)


def _environment(runs: Runs) -> str:
    starts = ((f"{run.name}: started {start.get('started')}", start) for run in runs for start in run.starts)
    return "".join(folded(title, table((), _flat(start).items())) for title, start in starts)


def _tensorboard(runs: Runs) -> str:
    folders = (run.folder / "tensorboard" for run in runs)
    commands = (f"tensorboard --logdir {shlex.quote(str(folder))}" for folder in folders if folder.is_dir())
    return "".join(f"<p><code>{escape(command)}</code></p>" for command in commands)


def _label(run: Record) -> Markup:
    """The run's name in its colour, if there are several runs; otherwise nothing."""
    return Markup("" if run.alone else f'<span class="run c{run.place % 6}">{escape(run.name)}</span>')


def _heading(run: Record) -> str:
    return "" if run.alone else f"<h3>{_label(run)}</h3>"


def _header(runs: Runs) -> list[Markup]:
    return [Markup(""), *(_label(run) for run in runs)]


def _line_name(run: Record, role: str) -> str:
    return role if run.alone else f"{run.name} {role}".strip()


def _epochs(runs: Runs) -> tuple[int, int]:
    """The first and the last epoch of the horizontal axis of every chart."""
    epochs = [epoch for run in runs for curve in [*run.curves.values(), *run.scores.values()] for epoch in curve.epochs]
    return min(epochs), max(epochs)


def _method(run: Record) -> str:
    return run.recipe.get("method") or ", ".join(key for key in run.recipe if key not in _GENERAL)


def _started(run: Record) -> str:
    """Day and minute of the first start."""
    return str(run.starts[0].get("started", ""))[:16].replace("T", " ") if run.starts else ""


def _best(run: Record, network: str) -> tuple[float, int]:
    """The highest mIoU, and the first epoch with it."""
    return max(zip(run.miou[network].values, run.miou[network].epochs), key=lambda pair: (pair[0], -pair[1]))


def _protocol(run: Record) -> str:
    """How the mIoU was measured, as far as the folder tells."""
    protocol = {name: value for name, value in run.evaluation.get("protocol", {}).items() if name != "epoch"}
    protocol = protocol or {"images": _lists(run).get("val"), "window": _flat(run.recipe).get("dataset.val.crop.size")}
    return ", ".join(f"{name} {value}" for name, value in protocol.items() if value not in (None, False, [1.0]))


def _lists(run: Record) -> dict[str, int]:
    """How many images each list had at the last start."""
    return {name: entry["images"] for name, entry in (run.starts[-1].get("lists") or {}).items()} if run.starts else {}


def _flat(section: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
