"""Weak augmentation: geometry, jointly on image and mask (spec, Weak augmentation)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

PAD_COLOUR = (123, 116, 103)  # the mean colour of ImageNet


def resized_size(
    width: int, height: int, base: int | tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """A random (width, height).

    Args:
        base: an integer: the longer side becomes a uniform integer in [int(base·lo), int(base·hi)], the other keeps
            the aspect. A pair (h, w): both times one uniform factor in [lo, hi].
    """
    low, high = scale
    if isinstance(base, int):
        longer = int(rng.integers(int(base * low), int(base * high) + 1))
        if height > width:
            return max(1, round(longer * width / height)), longer
        return longer, max(1, round(longer * height / width))
    factor = low + (high - low) * rng.random()
    return int(base[1] * factor), int(base[0] * factor)


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
    """Random resize, flip with probability 0.5, crop; image and mask alike. Without a mask the same draws are made.

    Args:
        image, mask: RGB and L of one size.
        base, scale: see ``resized_size``; no resize without a scale.
        crop: (height, width); smaller images are padded bottom and right first.
        crop_type: ``rand``, a uniform window, or ``center``.
    """
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
