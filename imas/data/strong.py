"""Strong augmentation: colour only, so that labels stay where they are. Each kind is a function in ``KINDS``."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import functional as TF

from ..schema import StrongAug

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]  # (image, u in [0, 1], rng) → image


def _operations(span: float, fall: float, least: int) -> dict[str, Operation]:
    """The operations by name.

    Args:
        span: what u is multiplied with.
        fall: how far below 0.95 the factors of contrast, brightness, colour and sharpness go.
        least: by how much the threshold of solarize is lowered at least.
    """

    def enhance(kind: type) -> Operation:
        return lambda image, u, rng: kind(image).enhance(0.95 - fall * span * u)

    def hue(image: Image.Image, u: float, rng: np.random.Generator) -> Image.Image:
        sign = 1 if rng.random() < 0.5 else -1
        return TF.adjust_hue(image, sign * 0.5 * span * u)

    return {
        "identity": lambda image, u, rng: image,
        "autocontrast": lambda image, u, rng: ImageOps.autocontrast(image),
        "equalize": lambda image, u, rng: ImageOps.equalize(image),
        "invert": lambda image, u, rng: ImageOps.invert(image),
        "blur": lambda image, u, rng: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * span * u)),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "colour": enhance(ImageEnhance.Color),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "posterize": lambda image, u, rng: ImageOps.posterize(image, 8 - max(1, math.ceil(4 * span * u))),
        "solarize": lambda image, u, rng: ImageOps.solarize(image, 256 - max(least, math.ceil(255 * span * u))),
        "hue": hue,
    }


OPERATIONS = _operations(0.999, 0.85, 0)  # of iMAS (spec, Strong augmentation)
NARROW_OPERATIONS = _operations(1.0, 0.9, 1)  # of AugSeg: no inversion
del NARROW_OPERATIONS["invert"]


def _drawn(
    operations: dict[str, Operation], image: Image.Image, options: StrongAug, rng: np.random.Generator
) -> Image.Image:
    """``num_augs`` operations, or 1 to ``num_augs`` with ``random_number``: drawn uniformly with replacement, one after
    the other, each of a random strength.
    """
    names = list(operations)
    number = int(rng.integers(1, options.num_augs + 1)) if options.random_number else options.num_augs
    for _ in range(number):
        name = names[rng.integers(len(names))]
        image = operations[name](image, rng.random(), rng)
    return image


# name → (image, factor) → image
_JITTERS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def _jitter(image: Image.Image, options: StrongAug, rng: np.random.Generator) -> Image.Image:
    """Jitter of the colours with probability 0.8, no colours with 0.2, blur with 0.5 (FixMatch, UniMatch, ST++)."""
    if rng.random() < 0.8:
        for name in rng.permutation(list(_JITTERS)):
            factor = rng.uniform(-0.25, 0.25) if name == "hue" else rng.uniform(0.5, 1.5)
            image = _JITTERS[name](image, factor)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return image


def cutout_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box inside an image, as (top, bottom, left, right): a share of 0.02 to 0.4 of its area and an aspect of 0.3 to
    1/0.3, uniform but for boxes that reach outside, which are drawn anew: the area, too, unlike in ``mixing.area_box``
    (ST++).
    """
    while True:
        area, aspect = rng.uniform(0.02, 0.4) * height * width, rng.uniform(0.3, 1 / 0.3)
        across, down = int(math.sqrt(area / aspect)), int(math.sqrt(area * aspect))
        left, top = int(rng.integers(width)), int(rng.integers(height))
        if left + across <= width and top + down <= height:
            return top, top + down, left, left + across


def cutout(
    image: Image.Image, label: Image.Image, ignore_index: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Copies of an RGB image with uniform noise in a box, and of its label with ``ignore_index`` there."""
    pixels, labels = np.array(image), np.array(label)
    top, bottom, left, right = cutout_box(*labels.shape, rng)
    pixels[top:bottom, left:right] = rng.uniform(0, 255, (bottom - top, right - left, 3)).astype(np.uint8)
    labels[top:bottom, left:right] = ignore_index
    return Image.fromarray(pixels), Image.fromarray(labels)


# ``dataset.train.strong_aug.type`` → (image, options, rng) → image
KINDS: dict[str, Callable[[Image.Image, StrongAug, np.random.Generator], Image.Image]] = {
    "pool": lambda image, options, rng: _drawn(OPERATIONS, image, options, rng),
    "narrow_pool": lambda image, options, rng: _drawn(NARROW_OPERATIONS, image, options, rng),
    "jitter": _jitter,
}


def strong_view(image: Image.Image, options: StrongAug, rng: np.random.Generator) -> Image.Image:
    """A strong view of an RGB image, which is left as it is."""
    return KINDS[options.type](image, options, rng)
