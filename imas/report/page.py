"""What the page of a run shows, section by section; a section without anything to show is not there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import UserError
from ..files import replacing
from .charts import Line, number, sparkline
from .curves import Runs, over_epochs, pseudo_labels
from .markup import Markup, document, folded, heading, label, picture, table
from .records import Curve, Record, Scores, read_records

_EXTREMES = 8  # of the hardest and of the easiest images
_WORDS = {"iou": "IoU", "accuracy": "accuracy"}
_NETWORKS = (("teacher", "miou_tea"), ("student", "miou_stu"))  # the first that a run has selects its best checkpoint


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        runs: folders that hold ``log/``, or log folders.
        out: the file to write; by default ``log/report.html`` of one run, ``report.html`` here for several.

    Returns:
        The file that was written.

    Raises:
        UserError: a folder that holds no run, a file in it that is none of ours, or nowhere to write to.
    """
    records = read_records(runs)
    if out is None:
        out = records[0].folder / "report.html" if len(records) == 1 else Path("report.html")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: expected a file to write, in a folder that exists")
    with replacing(out) as temporary:
        temporary.write_text(page(records), encoding="utf-8")
    return out


def page(runs: Runs) -> str:
    """The page as text; the same runs give the same text."""
    sections: tuple[tuple[str, Callable[[Runs], str]], ...] = (
        ("", _head),
        ("", _warnings),
        ("Summary", _summary),
        ("What differs between the recipes", _differences),
        ("Curves", over_epochs),
        ("Pseudo labels of each class", pseudo_labels),
        ("Evaluation of each class, in percent", _evaluation),
        ("The hardest and the easiest unlabeled images", _images),
        ("Validation images", lambda runs: _pictures(runs, "predictions.png", "image, truth and predictions")),
        ("Recipe", _recipes),
        ("Environment", _environment),
        ("TensorBoard", _tensorboard),
    )
    parts = []
    for title, section in sections:
        if content := section(runs):
            parts.append(f"<section>{title and f'<h2>{title}</h2>'}{content}</section>")
    return document(f"{', '.join(run.name for run in runs)} – iMAS", "\n".join(parts))


def _head(runs: Runs) -> str:
    if len(runs) == 1:
        return f"<h1>{escape(runs[0].name)}</h1><p>{_in_words(runs[0])}</p>"
    lines = (f"<p>{label(run)} · {_in_words(run)}</p>" for run in runs)
    return f"<h1>{len(runs)} runs side by side</h1>{''.join(lines)}"


def _in_words(run: Record) -> str:
    """Method, date, and the best mIoU with its protocol."""
    known = [_get(run.recipe, "method"), f"started {_started(run)}", f"{run.epochs} epochs done"]
    text = " · ".join(escape(str(part)) for part in known if part)
    for network, column in _NETWORKS:
        if column in run.curves:
            best, epoch = _best(run.curves[column])
            said = "; ".join(filter(None, (f"{network}, epoch {epoch}", _protocol(run))))
            return f"{text} · <strong>best mIoU {best:.2f} %</strong> ({escape(said)})"
    return f"{text} · not evaluated yet"


def _warnings(runs: Runs) -> str:
    lines = [(run, epoch, text) for run in runs for epoch, text in run.warnings]
    items = (f"<li>{label(run)} epoch {escape(epoch)}: {escape(text)}</li>" for run, epoch, text in lines)
    return f'<ul class="warnings">{"".join(items)}</ul>' if lines else ""


def _summary(runs: Runs) -> str:
    questions: dict[str, Callable[[Record], Any]] = {
        "method": lambda run: _get(run.recipe, "method"),
        "data set": lambda run: _get(run.recipe, "dataset.type"),
        "encoder": lambda run: _get(run.recipe, "net.encoder.type"),
        "images": lambda run: ", ".join(f"{count} {name}" for name, count in _lists(run).items()) or None,
        "epochs": lambda run: f"{run.epochs} of {_get(run.recipe, 'trainer.epochs') or '?'}",
        "best mIoU, teacher": lambda run: _in_figures(run, "miou_tea"),
        "best mIoU, student": lambda run: _in_figures(run, "miou_stu"),
        "mIoU measured on": _protocol,
        "seconds per iteration": _speed,
        "memory at its peak": _memory,
        "seed": lambda run: _start(run, "seed"),
        "total batch": lambda run: _start(run, "total_batch"),
        "processes": lambda run: _start(run, "processes"),
        "devices": lambda run: ", ".join(dict.fromkeys(map(str, _start(run, "devices") or []))) or None,
        "commit": lambda run: re.sub(r"([0-9a-f]{12})[0-9a-f]*", r"\1", str(_start(run, "git") or "")),
        "started": _started,
        "starts": lambda run: len(run.starts) or None,
    }
    answers = [(question, [answer(run) for run in runs]) for question, answer in questions.items()]
    rows = [(question, *values) for question, values in answers if any(value not in (None, "") for value in values)]
    return table(_header(runs), rows)


def _differences(runs: Runs) -> str:
    if len(runs) == 1 or not any(run.recipe for run in runs):
        return ""
    recipes = [_flat(run.recipe) for run in runs]
    keys = sorted(dict.fromkeys(key for recipe in recipes for key in recipe), key=lambda key: "." in key)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    differing = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
    rows = [(Markup(escape(key).replace(".", ".<wbr/>")), *row) for key, row in differing.items()]
    return table(_header(runs), rows) if rows else "<p>Nothing: the recipes are equal.</p>"


def _evaluation(runs: Runs) -> str:
    """IoU and, of a single run, accuracy of each network, and each class's share of the true pixels."""
    columns = [(run, name, figures) for run in runs for name, figures in run.evaluation.get("networks", {}).items()]
    if not columns:
        return ""
    kinds = ("iou", "accuracy") if len(runs) == 1 else ("iou",)
    header, shares = ["class"], []
    for run, name, figures in columns:
        whose = f"{label(run)}<br/>" if label(run) else ""
        header += [Markup(f"{whose}{escape(name)} {_WORDS[kind]}") for kind in kinds]
        if figures.get("pixels") not in (None, *shares):  # the same for all networks, and for all runs on one list
            shares.append(figures["pixels"])
    header += ["pixels"] * len(shares)
    rows: list[list[Any]] = []
    for name in dict.fromkeys(name for _, _, figures in columns for name in figures.get("iou", {})):
        cells = [_percent(figures.get(kind, {}).get(name)) for _, _, figures in columns for kind in kinds]
        rows.append([name, *cells, *(_percent(share.get(name)) for share in shares)])
    for title, means in (("mean", ("miou", "mean_accuracy")), ("by frequency", ("fwiou", "pixel_accuracy"))):
        cells = [_percent(figures.get(mean)) for _, _, figures in columns for mean in means[: len(kinds)]]
        rows.append([title, *cells, *[Markup("")] * len(shares)])
    note = '<p class="quiet">After the last epoch. By frequency: a class weighs as much as it has pixels.</p>'
    return note + table(header, rows, numbers=True)


def _images(runs: Runs) -> str:
    parts = []
    for run in runs:
        ranked = _ranked(run.scores)
        count = min(_EXTREMES, (len(ranked) + 1) // 2)
        groups = {"hardest": ranked[:count], "easiest": ranked[count:][-count:][::-1]}
        tables = [
            f"<div>{_image_table(run, images, f'{title} first')}</div>"
            for title, images in groups.items()
            if len(images)
        ]
        if tables:
            parts.append(f'{heading(run)}<div class="pair">{"".join(tables)}</div>')
    views = _pictures(runs, "views.png", "hardest and easiest unlabeled images, with their views")
    note = '<p class="quiet">The first three of each, as a step would have treated them at the end:</p>'
    return "".join(parts) + (views and note + views)


def _image_table(run: Record, images: Sequence[int], caption: str) -> str:
    rows, scores = [], run.scores
    ends = int(scores.epoch.min()), int(scores.epoch.max())
    for image in images:
        mine = run.scores.image == image
        epochs, values = scores.epoch[mine].tolist(), scores.score[mine].tolist()
        title = f"scores of {scores.names[image]}"
        trend = sparkline([Line(epochs, values, run.place)], title=title, epochs=ends, high=1.0)
        change = f"{values[-1] - values[0]:+.2f}" if len(values) > 1 else None
        rows.append((scores.names[image], f"{values[-1]:.3f}", epochs[-1], change, trend))
    return table(["image", "last score", "epoch", "since first", "trend, 0 to 1"], rows, caption=caption, numbers=True)


def _ranked(scores: Scores) -> Sequence[int]:
    """Images by their last score, the hardest first."""
    last = np.full(len(scores.names), np.nan)
    last[scores.image] = scores.score  # of several rows the last one stays
    order = np.argsort(last, kind="stable")
    return order[np.isfinite(last[order])].tolist()


def _pictures(runs: Runs, name: str, what: str) -> str:
    shown = [run for run in runs if (run.folder / name).is_file()]
    return "".join(heading(run) + picture(run.folder / name, f"{run.name}: {what}") for run in shown)


def _recipes(runs: Runs) -> str:
    texts = ((run, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)) for run in runs if run.recipe)
    return "".join(folded(f"{run.name}: config.yaml", f"<pre>{escape(text)}</pre>") for run, text in texts)


def _environment(runs: Runs) -> str:
    return "".join(
        folded(f"{run.name}: started {start.get('started')}", table((), _flat(start).items()))
        for run in runs
        for start in run.starts
    )


def _tensorboard(runs: Runs) -> str:
    folders = [run.folder / "tensorboard" for run in runs if (run.folder / "tensorboard").is_dir()]
    lines = (f"<p><code>tensorboard --logdir {escape(shlex.quote(str(folder)))}</code></p>" for folder in folders)
    return "".join(lines)


def _header(runs: Runs) -> list[Markup]:
    return [Markup(""), *(label(run) for run in runs)]


def _started(run: Record) -> str:
    """The day and minute; where nothing tells, a time that is not before the last row."""
    if run.starts:
        return str(_start(run, "started", 0))[:16].replace("T", " ")
    return datetime.fromtimestamp((run.folder / "metrics.csv").stat().st_mtime).strftime("before %Y-%m-%d %H:%M")


def _best(curve: Curve) -> tuple[float, int]:
    """The highest value, and the first epoch that has it."""
    return max(zip(curve.values, curve.epochs), key=lambda pair: (pair[0], -pair[1]))


def _in_figures(run: Record, column: str) -> str | None:
    if column not in run.curves:
        return None
    best, epoch = _best(run.curves[column])
    return f"{best:.2f} % in epoch {epoch} (last {run.curves[column].values[-1]:.2f} %)"


def _speed(run: Record) -> str | None:
    """Seconds, and how much of them went into waiting, as means over the epochs."""
    if "seconds" not in run.curves:
        return None
    seconds = float(np.mean(run.curves["seconds"].values))
    waiting = float(np.mean(run.curves["seconds_waiting"].values)) if "seconds_waiting" in run.curves else 0.0
    return f"{number(seconds)} ({100 * waiting / seconds:.0f} % waiting for data)" if seconds else None


def _memory(run: Record) -> str | None:
    return f"{max(run.curves['memory_mib'].values):,.0f} MiB" if "memory_mib" in run.curves else None


def _protocol(run: Record) -> str:
    """How the mIoU was measured, as far as the folder tells."""
    protocol = {name: value for name, value in run.evaluation.get("protocol", {}).items() if name != "epoch"}
    if not protocol:
        protocol = {"images": _lists(run).get("val"), "window": _get(run.recipe, "dataset.val.crop.size")}
    return ", ".join(f"{name} {value}" for name, value in protocol.items() if value not in (None, False, [1.0]))


def _lists(run: Record) -> dict[str, int]:
    """How many images each list had in the last start."""
    return {name: entry["images"] for name, entry in (_start(run, "lists") or {}).items()}


def _start(run: Record, key: str, which: int = -1) -> Any:
    return run.starts[which].get(key) if run.starts else None


def _get(recipe: dict, key: str) -> Any:
    return _flat(recipe).get(key)


def _flat(section: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
