"""An evaluation's figures as files: JSON, CSV, and a picture of the confusion matrix."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import replacing
from ..ops.metrics import ConfusionMatrix

_COLUMNS = ("iou", "accuracy", "pixels", "boundary_iou")  # of ``figures``, by class
_MEANS = {  # rows below the classes: their figures in the same columns
    "mean": ("miou", "mean_accuracy", None, "mean_boundary_iou"),
    "by frequency": ("fwiou", "pixel_accuracy", None, None),
}
_GAP = 10
_FULL = (8, 48, 107)  # the colour of 100 %; 0 % is white
_ABSENT = (225, 225, 225)


def need_file(flag: str, path: Path) -> None:
    """See that a file can be written where a flag asks for it.

    Raises:
        UserError: no such folder, a folder of that name, no right to write.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {path.parent} cannot be written to")


def need_folder(flag: str, path: Path) -> None:
    """See that a folder is there or can be made.

    Raises:
        UserError: it cannot, or not be written to.
    """
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {path}: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {there} cannot be written to")


def write_json(path: Path, protocol: dict[str, Any], figures: dict[str, Any]) -> None:
    """Protocol and figures (of ``evaluate.figures``) side by side."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(protocol | figures, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, protocol: dict[str, Any], figures: dict[str, Any]) -> None:
    """A row for each class and each mean, with the protocol in every row, so that files can be put together. Percent,
    unrounded; what does not exist stays empty.
    """
    columns = [column for column in _COLUMNS if column in figures]
    rows = [[name, *(figures[column][name] for column in columns)] for name in figures["iou"]]
    for name, keys in _MEANS.items():
        rows.append([name, *(figures[key] if key else None for key in keys[: len(columns)])])
    words = [" ".join(map(str, value)) if isinstance(value, list) else value for value in protocol.values()]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*protocol, "class", *columns], *([*words, *row] for row in rows)])


def confusion_picture(matrix: ConfusionMatrix, class_names: tuple[str, ...], caption: str) -> Image.Image:
    """The confusion matrix, a row for each true class: percent of its pixels by predicted class.

    Args:
        caption: stands below, in as many lines as it needs.
    """
    count = len(class_names)
    cell = max(34, min(80, 960 // count))
    font, small = (ImageFont.load_default(size) for size in (max(13, cell // 4), 13))
    name_width = round(max(font.getlength(name) for name in class_names)) + _GAP
    line = round(1.4 * font.size)
    left, top = _GAP + line + name_width, _GAP + line + name_width
    width = max(left + count * cell + _GAP, 480)
    words = _lines(f"Percent of each true class's pixels, by predicted class. {caption}", small, width - 2 * _GAP)
    height = top + count * cell + 2 * _GAP + 18 * len(words)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    middle = count * cell // 2
    pen.text((left + middle, _GAP), "predicted", "black", font, anchor="mt")
    _upright(picture, "true", font, _GAP + line // 2, top + middle, "mm")
    shares = (matrix.counts.double() / matrix.target.unsqueeze(1)).tolist()
    for number, (name, row) in enumerate(zip(class_names, shares)):
        near, middle = top + number * cell, top + number * cell + cell // 2
        pen.text((left - _GAP // 2, middle), name, "black", font, anchor="rm")
        _upright(picture, name, font, left + number * cell + cell // 2, top - _GAP // 2, "lm")
        for column, share in enumerate(row):
            far = left + column * cell
            colour = _ABSENT if share != share else tuple(round(255 + share * (part - 255)) for part in _FULL)
            pen.rectangle((far, near, far + cell - 2, near + cell - 2), fill=colour)
            text = "n/a" if share != share else f"{100 * share:.1f}" if 0 < share < 0.9995 else f"{100 * share:.0f}"
            pen.text((far + cell // 2, middle), text, "white" if share > 0.5 else "black", font, anchor="mm")
    pen.multiline_text((_GAP, top + count * cell + _GAP), "\n".join(words), "black", small, spacing=4)
    return picture


def _upright(picture: Image.Image, text: str, font: Any, x: int, y: int, anchor: str) -> None:
    """Text that reads upwards, centred on x; it begins at y (``lm``) or is centred there (``mm``)."""
    length, height = round(font.getlength(text)) + 2, round(1.4 * font.size)
    strip = Image.new("RGB", (length, height), "white")
    ImageDraw.Draw(strip).text((1, height // 2), text, "black", font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (x - height // 2, y - (length if anchor == "lm" else length // 2)))


def _lines(text: str, font: Any, width: int) -> list[str]:
    """Text broken between words, and within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while font.getlength(lines[-1]) > width:
            fits = next(end for end in range(len(lines[-1]), 0, -1) if font.getlength(lines[-1][:end]) <= width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines
