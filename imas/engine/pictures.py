"""Pictures of what networks predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from .evaluate import evaluating, predict_sliding

_TILE = 256  # longest side of a tile, in pixels
_GAP = 4
_LINE = 16
_IGNORED = 224  # grey


@torch.no_grad()
def prediction_sheet(
    networks: dict[str, nn.Module],
    dataset: Dataset,
    normalise: Callable[[Tensor], Tensor],
    *,
    crop: int,
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    device: torch.device,
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
            batch = normalise(image.unsqueeze(0).to(device))
            for network in networks.values():
                tiles.append(coloured(predict_sliding(network, batch, crop).argmax(dim=1)[0].cpu(), palette))
            rows.append([_fitted(tile) for tile in tiles])
    return _sheet(["image", "truth", *networks], rows, class_names, palette)


def coloured(label: Tensor, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """(H, W) integer class numbers → an RGB picture; everything that is no class in grey."""
    colours = torch.full((256, 3), _IGNORED, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return Image.fromarray(colours[label].numpy())


def _fitted(tile: Image.Image) -> Image.Image:
    """Enlarged or reduced, without smoothing, to the size of a tile."""
    scale = _TILE / max(tile.size)
    return tile.resize((round(tile.width * scale), round(tile.height * scale)), Image.Resampling.NEAREST)


def _sheet(
    titles: list[str],
    rows: list[list[Image.Image]],
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    columns = len(titles)
    width = columns * (_TILE + _GAP) + _GAP
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    legend_columns = max(1, min(len(class_names), width // 128))
    legend_lines = math.ceil(len(class_names) / legend_columns)
    sheet = Image.new("RGB", (width, _LINE + _GAP + sum(heights) + legend_lines * _LINE + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((_GAP + column * (_TILE + _GAP), 3), title, fill="black")
    top = _LINE + _GAP
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * (_TILE + _GAP), top))
        top += height
    for number, (name, colour) in enumerate(zip(class_names, palette)):
        left = _GAP + number % legend_columns * 128
        line = top + number // legend_columns * _LINE
        pen.rectangle((left, line + 2, left + 11, line + 13), fill=tuple(colour), outline="grey")
        pen.text((left + 16, line + 2), name, fill="black")
    return sheet
