"""The figures of an evaluation as files: JSON, CSV and a picture of the confusion matrix."""

from __future__ import annotations

import csv
import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import replacing
from ..ops.metrics import ConfusionMatrix

_GAP = 10
_FULL = (8, 48, 107)  # the colour of 100 %; 0 % is white
_ABSENT = (225, 225, 225)


def need_writable(flag: str, path: Path, folder: bool = False) -> None:
    """Check that a file, or a ``folder`` that may not exist yet, can be written to the path that a flag gives.

    Raises:
        UserError: it cannot.
    """
    if not folder and path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; expected the name of a file")
    if not folder and not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")
    there = next(parent for parent in (path.absolute(), *path.absolute().parents)[not folder :] if parent.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {path}: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {there} cannot be written to")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the protocol and the figures of an evaluation."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, protocol: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write a row for each class and each mean, in percent, unrounded; what does not exist stays empty.

    Every row repeats the protocol, so that several files can be joined. ``figures``: of ``evaluate.figures``.
    """
    columns = ("iou", "accuracy", "pixels")
    rows = [[name, *(figures[column][name] for column in columns)] for name in figures["iou"]]
    rows.append(["mean", figures["miou"], figures["mean_accuracy"], None])
    rows.append(["by frequency", figures["fwiou"], figures["pixel_accuracy"], None])
    cells = [" ".join(map(str, value)) if isinstance(value, list) else value for value in protocol.values()]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*protocol, "class", *columns], *([*cells, *row] for row in rows)])


def confusion_picture(matrix: ConfusionMatrix, class_names: Sequence[str], caption: str) -> Image.Image:
    """Draw the confusion matrix: a row for each true class, with the percent of its pixels by predicted class.

    Args:
        caption: text below the matrix, wrapped.
    """
    count = len(class_names)
    cell = max(34, min(80, 960 // count))
    font, small = (ImageFont.load_default(size) for size in (max(13, cell // 4), 13))
    line, names = round(1.4 * font.size), round(max(map(font.getlength, class_names))) + _GAP
    corner, side = _GAP + line + names, count * cell
    width = max(corner + side + _GAP, 480)
    caption = f"Percent of each true class's pixels, by predicted class. {caption}"
    lines = textwrap.wrap(caption, int((width - 2 * _GAP) / small.getlength("0")))
    picture = Image.new("RGB", (width, corner + side + 2 * _GAP + 18 * len(lines)), "white")
    picture.paste(_column(["predicted"], line, side, font, "mm"), (corner, _GAP))
    picture.paste(_column(["true"], line, side, font, "mm").rotate(90, expand=True), (_GAP, corner))
    picture.paste(_column(class_names, cell, names, font, "rm"), (corner - names, corner))
    picture.paste(_column(class_names, cell, names, font, "lm").rotate(90, expand=True), (corner, corner - names))
    pen = ImageDraw.Draw(picture)
    shares = (matrix.counts.double() / matrix.target.unsqueeze(1)).tolist()
    for i, share in enumerate(share for row in shares for share in row):
        x, y = corner + i % count * cell, corner + i // count * cell
        absent = share != share
        colour = _ABSENT if absent else tuple(round(255 + share * (part - 255)) for part in _FULL)
        text = "n/a" if absent else f"{100 * share:.1f}" if 0 < share < 0.9995 else f"{100 * share:.0f}"
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
        pen.text((x + cell // 2, y + cell // 2), text, "white" if share > 0.5 else "black", font, anchor="mm")
    pen.multiline_text((_GAP, corner + side + _GAP), "\n".join(lines), "black", small, spacing=4)
    return picture


def _column(texts: Sequence[str], height: int, width: int, font: Any, anchor: str) -> Image.Image:
    """Texts below each other, each in the middle of ``height`` pixels, anchored left, right or in the middle."""
    picture = Image.new("RGB", (width, len(texts) * height), "white")
    x = {"l": _GAP // 2, "m": width // 2, "r": width - _GAP // 2}[anchor[0]]
    for i, text in enumerate(texts):
        ImageDraw.Draw(picture).text((x, i * height + height // 2), text, "black", font, anchor=anchor)
    return picture
