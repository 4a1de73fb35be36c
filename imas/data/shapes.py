"""The embedded data set: hatched outlines on paper, drawn from a seed. Needs no download.

Only the texture that fills an outline tells its class. Outline, place, overlap, ink, paper and light tell nothing,
and a texture comes in many modes: period, tilt, duty cycle and warp vary, more than a few labeled images can show.
Labeled, unlabeled and validation images are disjoint ranges of the index, all of one distribution.
"""

from __future__ import annotations

import numpy as np

CLASS_NAMES = ("background", "upright stripes", "level stripes", "dots")

_PERIOD = (5.0, 10.0)  # pixels
_TILT = np.deg2rad(25.0)  # either way
_DUTY = (0.35, 0.65)  # share of the ink across one period
_WARP = 1.5  # pixels
_RADIUS = (0.18, 0.32)  # of the side
_PAPER, _INK, _TINT = (150.0, 225.0), (20.0, 95.0), 25.0


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One image of side ``size``, a pure function of the arguments: (size, size, 3) uint8 RGB, and (size, size) uint8
    labels, which are indices into ``CLASS_NAMES``, and 255 within one pixel of an object's border.

    Every image holds one object of each texture, drawn in random order; a later one covers an earlier one.
    """
    rng = np.random.default_rng((seed, index))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    share = np.clip(0.5 + _slope(x, y, rng) * rng.uniform(0.5, 1), 0, 1)[..., None]
    image = _mixed(_shades(rng, _PAPER), _shades(rng, _PAPER), share)
    labels = np.zeros((size, size), np.uint8)
    border = np.zeros((size, size), bool)

    for label in 1 + rng.permutation(len(CLASS_NAMES) - 1):
        centre_x, centre_y = rng.uniform(0.12, 0.88, 2) * size
        dx, dy = x - np.float32(centre_x), y - np.float32(centre_y)
        outside = _outline(dx, dy, rng.uniform(*_RADIUS) * size, rng)
        fill = _mixed(_shades(rng, _INK), _shades(rng, _PAPER), _texture(CLASS_NAMES[label], dx, dy, rng)[..., None])
        image = _mixed(image, fill, np.clip(0.5 - outside, 0, 1)[..., None])
        inside = outside <= 0
        labels[inside] = label
        border = (border & ~inside) | (np.abs(outside) < 1)

    labels[border] = 255
    image = image * (1 + 0.6 * rng.uniform(-1, 1) * _slope(x, y, rng))[..., None]
    image = image + rng.uniform(2, 8) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def _mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """``second`` to the extent of ``share``, ``first`` elsewhere."""
    return first + (second - first) * share


def _shades(rng: np.random.Generator, brightness: tuple[float, float]) -> np.ndarray:
    """A random colour, nearly grey."""
    return (rng.uniform(*brightness) + rng.uniform(-_TINT, _TINT, 3)).astype(np.float32)


def _slope(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A ramp in a random direction, about -0.5 to 0.5 across the image."""
    angle, side = rng.uniform(0, 2 * np.pi), len(x)
    return ((x - side / 2) * np.float32(np.cos(angle)) + (y - side / 2) * np.float32(np.sin(angle))) / side


def _outline(x: np.ndarray, y: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Pixels from the outline of a disc, square, triangle, star or cross at any rotation; negative inside."""
    kind = rng.choice(("disc", "square", "triangle", "star", "cross"))
    distance = np.hypot(x, y)
    if kind == "disc":
        return distance - radius
    angle = np.arctan2(y, x) + np.float32(rng.uniform(0, 2 * np.pi))
    if kind in ("star", "cross"):
        return distance - radius * (0.86 + 0.22 * np.cos((5 if kind == "star" else 4) * angle))
    corners, apothem = (4, 0.86) if kind == "square" else (3, 0.72)
    sector = np.float32(2 * np.pi / corners)
    return distance * np.cos(angle % sector - sector / 2) - radius * apothem


def _texture(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel is paper, 0 to 1."""
    period = np.exp(rng.uniform(*np.log(_PERIOD)))
    tilt, warp = rng.uniform(-_TILT, _TILT), rng.uniform(0, _WARP)
    bent_x, bent_y = x + warp * _wave(y, rng), y + warp * _wave(x, rng)
    across = (np.cos(tilt) * bent_x + np.sin(tilt) * bent_y) / period + rng.random()
    along = (np.cos(tilt) * bent_y - np.sin(tilt) * bent_x) / period + rng.random()
    duty = rng.uniform(*_DUTY)
    if name == "dots":
        gap = 0.42 * np.sqrt(2 * duty - 0.24) - np.hypot(across % 1 - 0.5, along % 1 - 0.5)
    else:
        stripe = across if name == "upright stripes" else along
        gap = duty / 2 - np.abs(stripe % 1 - 0.5)
    return np.clip(gap * period + 0.5, 0, 1)


def _wave(position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(position * np.float32(2 * np.pi / rng.uniform(16, 32)) + np.float32(rng.uniform(0, 2 * np.pi)))
