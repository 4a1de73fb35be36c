"""Pictures of what networks predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from ..data.normalise import Normalise
from ..methods.base import Method
from .evaluate import evaluating
from .sliding import Predictor

_TILE = 256  # longest side of a tile, in pixels
_NO_CLASS = 255
_GAP = 4
_LINE = 16
_IGNORED = 224  # grey
_DIFFER = (200, 30, 30)  # where two networks disagree


@torch.no_grad()
def prediction_sheet(
    networks: dict[str, nn.Module],
    dataset: Dataset,
    normalise: Callable[[Tensor], Tensor],
    *,
    predictor: Predictor,
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    count: int = 6,
) -> Image.Image:
    """A row for each of the first validation images: image, truth, every network; classes named below.

    Args:
        dataset: an ``EvaluationSet``.
    """
    rows = []
    with evaluating(networks):
        for index in range(min(count, len(dataset))):
            image, label = dataset[index]
            tiles = [TF.to_pil_image(image), coloured(label, palette)]
            batch = normalise(image.unsqueeze(0).to(predictor.device))
            for network in networks.values():
                tiles.append(coloured(predictor(network, batch)[0].cpu().long(), palette))
            rows.append([_fitted(tile) for tile in tiles])
    return _sheet(["image", "truth", *networks], rows, class_names, palette)


@torch.no_grad()
def views_sheet(
    method: Method,
    weak: Tensor,
    strong: Tensor | None,
    captions: Sequence[str],
    normalise: Normalise,
    *,
    threshold: float,
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    generator: torch.Generator,
) -> Image.Image | None:
    """A row for each unlabeled image, as a step would treat it now: the views, pseudo label, student, agreement.

    Pixels of the pseudo label that are not confident are grey. None of a method that makes no such views.

    Args:
        weak, strong: (B, 3, H, W) uint8, on the method's device.
        captions: one an image; its score is added.
        threshold: of the confidence.
    """
    weak, strong = normalise(weak), None if strong is None else normalise(strong)
    views = method.views(weak, strong, generator, always_mix=True)
    if views is None:
        return None
    confident = views.pseudo.label.masked_fill(views.pseudo.confidence < threshold, _NO_CLASS)
    columns = {
        "weak view": _pictures(normalise.inverse(weak)),
        "strong view": None if views.strong is None else _pictures(normalise.inverse(views.strong)),
        "CutMix view": None if views.mixed is None else _pictures(normalise.inverse(views.mixed.images)),
        "pseudo label (grey: unsure)": [coloured(label, palette) for label in confident.cpu()],
        "student": [coloured(label, palette) for label in views.student.label.cpu()],
    }
    if views.teacher is not None:
        differ = (views.student.label != views.teacher.label).cpu()
        columns["agreement (red: they differ)"] = [
            coloured(where.long(), [(_IGNORED,) * 3, _DIFFER]) for where in differ
        ]
    columns = {title: tiles for title, tiles in columns.items() if tiles is not None}
    if views.hardness is not None:
        scores = views.hardness.score.tolist()
        captions = [f"{caption}: score {score:.2f}" for caption, score in zip(captions, scores, strict=True)]
    rows = [[_fitted(tile) for tile in tiles] for tiles in zip(*columns.values(), strict=True)]
    return _sheet(list(columns), rows, class_names, palette, captions)


def _pictures(images: Tensor) -> list[Image.Image]:
    return [TF.to_pil_image(image) for image in images.cpu()]


def coloured(label: Tensor, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """(H, W) integer class numbers → an RGB picture; everything that is no class in grey."""
    colours = torch.full((256, 3), _IGNORED, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return Image.fromarray(colours[label].numpy())


def _fitted(tile: Image.Image) -> Image.Image:
    """Enlarged or reduced, without smoothing, to the size of a tile."""
    scale = _TILE / max(tile.size)
    size = (max(1, round(side * scale)) for side in tile.size)
    return tile.resize(tuple(size), Image.Resampling.NEAREST)


def _sheet(
    titles: list[str],
    rows: list[list[Image.Image]],
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    captions: Sequence[str] = (),
) -> Image.Image:
    """Titles, rows of tiles, each below its caption if there are such, and the classes with their colours."""
    columns, caption_height = len(titles), _LINE if captions else 0
    width = columns * (_TILE + _GAP) + _GAP
    heights = [caption_height + max(tile.height for tile in row) + _GAP for row in rows]
    legend_columns = max(1, min(len(class_names), width // 128))
    legend_lines = math.ceil(len(class_names) / legend_columns)
    sheet = Image.new("RGB", (width, _LINE + _GAP + sum(heights) + legend_lines * _LINE + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((_GAP + column * (_TILE + _GAP), 3), title, fill="black")
    top = _LINE + _GAP
    for number, (row, height) in enumerate(zip(rows, heights)):
        if captions:
            pen.text((_GAP, top + 2), captions[number], fill="black")
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * (_TILE + _GAP), top + caption_height))
        top += height
    for number, (name, colour) in enumerate(zip(class_names, palette)):
        left = _GAP + number % legend_columns * 128
        line = top + number // legend_columns * _LINE
        pen.rectangle((left, line + 2, left + 11, line + 13), fill=tuple(colour), outline="grey")
        pen.text((left + 16, line + 2), name, fill="black")
    return sheet
