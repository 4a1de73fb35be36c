"""Weak augmentation: geometry, jointly on image and mask (spec, Weak augmentation)."""

from __future__ import annotations

from typing import NamedTuple

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


class Geometry(NamedTuple):
    """Options of ``weak_view``."""

    base: int | tuple[int, int] | None = None  # see ``resized_size``
    scale: tuple[float, float] | None = None  # likewise; None: no resize
    flip: bool = False  # with probability 0.5
    crop: tuple[int, int] | None = None  # (height, width); smaller images are padded bottom and right first
    crop_type: str = "rand"  # a uniform window; or ``center``
    ignore_index: int = 255  # of padding


def weak_view(
    image: Image.Image, mask: Image.Image | None, rng: np.random.Generator, geometry: Geometry
) -> tuple[Image.Image, Image.Image | None, tuple[int, int]]:
    """Random resize, flip and crop of an RGB image and its mask, alike. Without a mask the same draws are made.

    The third value is the (height, width) at top left that is no padding. Only what the crop needs is resized: up to
    two grey levels of rounding apart from the crop of a whole resized image.
    """
    base, scale, flip, crop, crop_type, ignore_index = geometry
    size = image.size if scale is None else resized_size(*image.size, base, scale, rng)
    mirrored = flip and rng.random() < 0.5
    (width, height), left, top = size, 0, 0
    if crop is not None:
        height, width = crop
        spare = (max(size[0] - width, 0), max(size[1] - height, 0))
        if crop_type == "rand":
            left, top = int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))
        else:
            left, top = spare[0] // 2, spare[1] // 2
    right, bottom = min(left + width, size[0]), min(top + height, size[1])
    if mirrored:  # the window is one of the mirrored image, of which only the window itself gets mirrored
        left, right = size[0] - right, size[0] - left

    def view(whole: Image.Image, resample: Image.Resampling, fill: int | tuple[int, int, int]) -> Image.Image:
        part = _resized_part(whole, size, (left, top, right, bottom), resample)
        part = ImageOps.mirror(part) if mirrored else part
        return ImageOps.expand(part, (0, 0, width - part.width, height - part.height), fill)

    view_of_mask = mask and view(mask, Image.Resampling.NEAREST, ignore_index)
    return view(image, Image.Resampling.BILINEAR, PAD_COLOUR), view_of_mask, (bottom - top, right - left)


def _resized_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """The part ``box`` (left, top, right, bottom) of the image resized to ``size``."""
    if image.size == size:
        return image.crop(box)
    left, top, right, bottom = box
    across, down = image.width / size[0], image.height / size[1]
    source = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((right - left, bottom - top), resample, source)
