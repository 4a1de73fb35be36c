"""Strong augmentation: colour only, so that labels stay where they are. Each kind is a function in ``KINDS``."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import functional as TF

from ..schema import StrongAug

_SPAN = 0.999  # the authors' factor


def _enhance(kind: type) -> Callable[[Image.Image, float, np.random.Generator], Image.Image]:
    return lambda image, u, rng: kind(image).enhance(0.95 - 0.85 * _SPAN * u)


def _blur(image: Image.Image, u: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * _SPAN * u))


def _posterize(image: Image.Image, u: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(image, 8 - max(1, math.ceil(4 * _SPAN * u)))


def _solarize(image: Image.Image, u: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(image, min(max(256 - math.ceil(255 * _SPAN * u), 1), 256))


def _hue(image: Image.Image, u: float, rng: np.random.Generator) -> Image.Image:
    sign = 1 if rng.random() < 0.5 else -1
    return TF.adjust_hue(image, sign * 0.5 * _SPAN * u)


# name → (image, u, rng) → image
OPERATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "identity": lambda image, u, rng: image,
    "autocontrast": lambda image, u, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, u, rng: ImageOps.equalize(image),
    "invert": lambda image, u, rng: ImageOps.invert(image),
    "blur": _blur,
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "colour": _enhance(ImageEnhance.Color),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": _posterize,
    "solarize": _solarize,
    "hue": _hue,
}


def _pool(image: Image.Image, options: StrongAug, rng: np.random.Generator) -> Image.Image:
    """``num_augs`` operations, drawn uniformly with replacement, one after the other, each of a random strength
    (iMAS; spec, Strong augmentation).
    """
    names = list(OPERATIONS)
    for _ in range(options.num_augs):
        name = names[rng.integers(len(names))]
        image = OPERATIONS[name](image, rng.random(), rng)
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


# ``dataset.train.strong_aug.type`` → (image, options, rng) → image
KINDS: dict[str, Callable[[Image.Image, StrongAug, np.random.Generator], Image.Image]] = {
    "pool": _pool,
    "jitter": _jitter,
}


def strong_view(image: Image.Image, options: StrongAug, rng: np.random.Generator) -> Image.Image:
    """A strong view of an RGB image, which is left as it is."""
    return KINDS[options.type](image, options, rng)
