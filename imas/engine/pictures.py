"""Pictures: what networks predict, what a method makes of a batch, and which classes are taken for which."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from ..data.catalog import Catalog
from ..data.normalise import Normalise
from ..models.modes import evaluating
from ..ops.metrics import ConfusionMatrix
from .sliding import Predictor

_TILE = 256  # longest side of a tile, in pixels
_GAP = 4
_LINE = 16
_LEGEND = 128  # width of a class name
_GREY, _RED, _BLUE = (224, 224, 224), (200, 30, 30), (8, 48, 107)


@torch.no_grad()
def prediction_sheet(
    networks: dict[str, nn.Module],
    dataset: Dataset,
    normalise: Callable[[Tensor], Tensor],
    predictor: Predictor,
    catalog: Catalog,
    count: int = 6,
) -> Image.Image:
    """A row for each of ``count`` images spread over an ``EvaluationSet``: image, truth, every network's prediction."""
    columns: dict[str, list[Image.Image]] = {title: [] for title in ("image", "truth", *networks)}
    with evaluating(*networks.values()):
        for index in spread(len(dataset), count):
            image, label = dataset[index]
            columns["image"].append(TF.to_pil_image(image))
            columns["truth"].append(coloured(label, catalog.palette))
            batch = normalise(image.unsqueeze(0).to(predictor.device))
            for name, network in networks.items():
                columns[name].append(coloured(predictor(network, batch)[0], catalog.palette))
    return sheet(columns, [], catalog)


def look_sheet(
    look: dict[str, Tensor], captions: Sequence[str], normalise: Normalise, catalog: Catalog
) -> Image.Image | None:
    """A row for each image of a batch, below its caption, and a column for each title of ``Method.look``.

    Args:
        look: (B, 3, H, W) float, normalised images; (B, H, W) integers, classes, where all else is grey; (B, H, W)
            bool, red where True; (B,) numbers, which are added to the captions.

    Returns:
        None if there are no pictures.
    """
    columns, numbers = {}, [[] for _ in captions]
    for title, values in look.items():
        if values.dim() == 1:
            for texts, value in zip(numbers, values.tolist()):
                texts.append(f"{title} {value:.2f}")
        elif values.dim() == 4:
            columns[title] = [TF.to_pil_image(image) for image in normalise.inverse(values).cpu()]
        else:
            palette = (_GREY, _RED) if values.dtype == torch.bool else catalog.palette
            columns[title] = [coloured(label, palette) for label in values]
    captions = [": ".join(filter(None, (caption, ", ".join(texts)))) for caption, texts in zip(captions, numbers)]
    return sheet(columns, captions, catalog) if columns else None


def confusion_picture(matrix: ConfusionMatrix, class_names: Sequence[str], caption: str) -> Image.Image:
    """Draw the confusion matrix: a row for each true class, with the percent of its pixels by predicted class."""
    count, font = len(class_names), ImageFont.load_default(13)
    cell = max(34, min(80, 960 // count))
    side, left = count * cell, round(max(map(font.getlength, class_names))) + 2 * _GAP
    width = max(left + side, 480)
    caption = f"Percent of each true class's pixels (rows), by predicted class (columns). {caption}"
    lines = textwrap.wrap(caption, width // 8)
    picture = Image.new("RGB", (width, side + left + 18 * len(lines)), "white")
    names = Image.new("RGB", (left, side), "white")
    for i, name in enumerate(class_names):
        ImageDraw.Draw(names).text((left - _GAP, (i + 0.5) * cell), name, "black", font, anchor="rm")
    picture.paste(names, (0, 0))
    picture.paste(names.rotate(90, expand=True), (left, side))
    pen = ImageDraw.Draw(picture)
    pen.multiline_text((_GAP, side + left), "\n".join(lines), "black", font, spacing=4)
    for i, row in enumerate((matrix.counts.double() / matrix.target.unsqueeze(1)).tolist()):
        for j, share in enumerate(row):
            x, y, absent = left + j * cell, i * cell, share != share
            colour = _GREY if absent else tuple(round(255 + share * (part - 255)) for part in _BLUE)
            text = "n/a" if absent else f"{100 * share:.1f}"
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            pen.text((x + cell / 2, y + cell / 2), text, "white" if share > 0.5 else "black", font, anchor="mm")
    return picture


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``, evenly spread from 0 on."""
    return sorted({i * total // count for i in range(count)}) if total else []


def coloured(label: Tensor, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """(H, W) class numbers, integer or bool → an RGB picture; every number without a colour in grey."""
    colours = torch.tensor(_GREY, dtype=torch.uint8).repeat(256, 1)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return Image.fromarray(colours[label.long().cpu()].numpy())


def _fitted(tile: Image.Image) -> Image.Image:
    """Enlarged or reduced, without smoothing, to the size of a tile."""
    width, height = (max(1, round(side * _TILE / max(tile.size))) for side in tile.size)
    return tile.resize((width, height), Image.Resampling.NEAREST)


def sheet(columns: dict[str, list[Image.Image]], captions: Sequence[str], catalog: Catalog) -> Image.Image:
    """Titles, rows of tiles, each below its caption if there are captions, and the classes with their colours."""
    rows = [[_fitted(tile) for tile in row] for row in zip(*columns.values(), strict=True)]
    width, above = len(columns) * (_TILE + _GAP) + _GAP, _LINE if captions else 0
    tops = [_LINE + _GAP]  # of the rows, and of the legend
    for row in rows:
        tops.append(tops[-1] + above + max(tile.height for tile in row) + _GAP)
    per_line = max(1, min(len(catalog.class_names), width // _LEGEND))
    lines = -(-len(catalog.class_names) // per_line)
    sheet = Image.new("RGB", (width, tops[-1] + lines * _LINE + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    lefts = [_GAP + i * (_TILE + _GAP) for i in range(len(columns))]
    for left, title in zip(lefts, columns):
        pen.text((left, 3), title, fill="black")
    for i, (top, row) in enumerate(zip(tops, rows)):
        if captions:
            pen.text((_GAP, top + 2), captions[i], fill="black")
        for left, tile in zip(lefts, row):
            sheet.paste(tile, (left, top + above))
    for i, (name, colour) in enumerate(zip(catalog.class_names, catalog.palette)):
        left, top = _GAP + i % per_line * _LEGEND, tops[-1] + i // per_line * _LINE
        pen.rectangle((left, top + 2, left + 11, top + 13), fill=tuple(colour), outline="grey")
        pen.text((left + 16, top + 2), name, fill="black")
    return sheet
