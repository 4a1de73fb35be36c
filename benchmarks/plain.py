"""The plain twin of the loading: straightforward code in the order of the spec, to measure and to check ours against.

Whole images are decoded, resized and flipped before a window of them is cut, and every view leaves as float32, as the
authors do it. Draws are made as ours are, so that one seed gives both the same sizes, flips, windows and colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from imas.data import catalog
from imas.data.strong import strong_view
from imas.data.weak import PAD_COLOUR, Geometry, resized_size
from imas.schema import StrongAug

_FILES = {"pascal": catalog.pascal_files, "cityscapes": catalog.cityscapes_files}
_TENSOR = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)


class PlainSource:
    """Images and masks of a folder, taken as they are."""

    def __init__(self, layout: str, root: Path) -> None:
        self.layout, self.root = layout, root

    def paths(self, name: str) -> tuple[Path, Path]:
        """Image and mask."""
        return _FILES[self.layout](self.root, name)

    def image(self, name: str) -> Image.Image:
        """RGB."""
        with Image.open(self.paths(name)[0]) as image:
            return image.convert("RGB")

    def mask(self, name: str) -> Image.Image:
        """Class numbers, mode L."""
        with Image.open(self.paths(name)[1]) as mask:
            return Image.fromarray(np.asarray(mask))


def labeled(source: PlainSource, name: str, geometry: Geometry, rng: np.random.Generator) -> dict[str, Tensor]:
    """A labeled sample: ``images`` (3, H, W) float32 and ``labels`` (H, W) int64."""
    image, mask = weak_view(source.image(name), source.mask(name), rng, **geometry._asdict())
    return {"images": _TENSOR(image), "labels": torch.from_numpy(np.array(mask, dtype=np.int64))}


def unlabeled(
    source: PlainSource, name: str, geometry: Geometry, strong_aug: StrongAug, rng: np.random.Generator
) -> dict[str, Tensor]:
    """An unlabeled sample: ``weak`` and ``strong``, (3, H, W) float32."""
    image, _ = weak_view(source.image(name), None, rng, **geometry._asdict())
    return {"weak": _TENSOR(image), "strong": _TENSOR(strong_view(image, strong_aug, rng))}


def weak_view(
    image: Image.Image,
    mask: Image.Image | None,
    rng: np.random.Generator,
    *,
    base: int | tuple[int, int] | None = None,
    scale: tuple[float, float] | None = None,
    flip: bool = False,
    crop: tuple[int, int] | None = None,
    crop_type: str = "rand",
    ignore_index: int = 255,
) -> tuple[Image.Image, Image.Image | None]:
    """As ``imas.data.weak.weak_view``, one whole step after the other."""
    if scale is not None:
        size = resized_size(*image.size, base, scale, rng)
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask and mask.resize(size, Image.Resampling.NEAREST)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
        mask = mask and ImageOps.mirror(mask)
    if crop is not None:
        height, width = crop
        padded = (max(image.width, width), max(image.height, height))
        if crop_type == "rand":
            left = int(rng.integers(padded[0] - width + 1))
            top = int(rng.integers(padded[1] - height + 1))
        else:
            left, top = (padded[0] - width) // 2, (padded[1] - height) // 2
        box = (left, top, left + width, top + height)
        image = _padded(image, padded, PAD_COLOUR).crop(box)
        mask = mask and _padded(mask, padded, ignore_index).crop(box)
    return image, mask


def _padded(image: Image.Image, size: tuple[int, int], fill: int | tuple[int, int, int]) -> Image.Image:
    if image.size == size:
        return image
    canvas = Image.new(image.mode, size, fill)
    canvas.paste(image, (0, 0))
    return canvas
