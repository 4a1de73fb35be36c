"""Where images and masks come from: files in a known layout, or the generator of the embedded set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..schema import Shapes
from . import shapes

BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's, for files it cannot read


class Source(Protocol):
    """Images and masks by name."""

    def image(self, name: str) -> Image.Image:
        """RGB."""

    def mask(self, name: str) -> Image.Image:
        """Mode L, of the same size: class numbers and the ignore label."""

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        """Files of these names that do not exist."""


class DataError(UserError):
    """A file that cannot be used, by name."""


class FileSource:
    """Images and masks of a folder.

    Args:
        files: (root, name) → (image, mask), the paths of a list line.
        root: the data set's folder.
        num_classes, ignore_index: what a mask may hold.
        decode: (path, image as stored) → (H, W) uint8 labels.
    """

    def __init__(
        self,
        files: Callable[[Path, str], tuple[Path, Path]],
        root: Path,
        num_classes: int,
        ignore_index: int,
        decode: Callable[[Path, Image.Image], np.ndarray] | None = None,
    ) -> None:
        self.files, self.root = files, root
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.decode = decode or index_labels

    def image(self, name: str) -> Image.Image:
        return read_image(self.files(self.root, name)[0])

    def mask(self, name: str) -> Image.Image:
        """DataError for a JPEG, and for values that are neither classes nor ignored."""
        path = self.files(self.root, name)[1]
        stored = _opened(path)
        if stored.format == "JPEG":
            raise DataError(f"{path}: a JPEG cannot be a mask, since it changes values; save masks as PNG")
        labels = self.decode(path, stored)
        foreign = (labels >= self.num_classes) & (labels != self.ignore_index)
        if foreign.any():
            raise DataError(
                f"{path}: {int(foreign.sum())} pixels have the values {_first(np.unique(labels[foreign]).tolist())}; "
                f"expected classes 0..{self.num_classes - 1} or {self.ignore_index} (ignored)"
            )
        return Image.fromarray(labels)

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        paths = [path for name in names for path in self.files(self.root, name)[: 2 if masks else 1]]
        return [path for path in paths if not path.is_file()]


def read_image(path: Path) -> Image.Image:
    """A file as an RGB image, upright. Alpha is dropped, 16-bit grey is scaled to 8 bits.

    Raises:
        DataError: no image, or one with values beyond 16 bits.
    """
    image = _opened(path)
    if image.mode in ("F", "I", "I;16", "I;16B", "I;16L"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.max(initial=0) > 65535 or grey.min(initial=0) < 0:
            got = "floating-point values" if image.mode == "F" else f"values up to {grey.max()}"
            raise DataError(f"{path}: expected an image of 8 or 16 bits a channel, got {got}")
        image = Image.fromarray((grey // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def index_labels(path: Path, image: Image.Image) -> np.ndarray:
    """A mask whose pixel values are class numbers → (H, W) uint8. Palette PNGs count by index, not by colour; a grey
    mask saved with three equal channels counts as grey.

    Raises:
        DataError: a colour picture, or values above 255.
    """
    if image.mode in ("L", "P", "1"):
        return np.asarray(image, dtype=np.uint8)
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[..., : 1 if image.mode == "LA" else 3]
        if (colours != colours[..., :1]).any():
            raise DataError(
                f"{path}: expected a mask of one channel (class numbers), got a colour picture of mode {image.mode}; "
                "of own data, dataset.folder.palette says which colour is which class"
            )
        return colours[..., 0].astype(np.uint8)
    if values.dtype.kind == "f" or values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise DataError(f"{path}: expected class numbers in 0..255, got mode {image.mode}, values up to {values.max()}")
    return values.astype(np.uint8)


def binary_labels(path: Path, image: Image.Image) -> np.ndarray:
    """A mask of 0 and 255 (or 0 and 1): (H, W) uint8 of 0 and 1.

    Raises:
        DataError: other values.
    """
    labels = index_labels(path, image)
    values = np.unique(labels)
    if not {0, 1, 255}.issuperset(values.tolist()):
        raise DataError(f"{path}: dataset.folder.binary expects masks of 0 and 255, got {_first(values.tolist())}")
    return (labels > 0).astype(np.uint8)


def labels_of_colours(palette: dict[tuple[int, int, int], int], path: Path, image: Image.Image) -> np.ndarray:
    """A colour mask → (H, W) uint8 class numbers.

    Raises:
        DataError: a colour that ``palette`` lacks.
    """
    colours, weights = sorted(palette), np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    keys, codes = np.array(colours, dtype=np.int32) @ weights, np.asarray(image.convert("RGB")) @ weights
    nearest = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    foreign = codes[keys[nearest] != codes]
    if foreign.size:
        seen = [(code >> 16, code >> 8 & 255, code & 255) for code in np.unique(foreign).tolist()]
        raise DataError(f"{path}: {foreign.size} pixels have colours that dataset.folder.palette lacks: {_first(seen)}")
    return np.array([palette[colour] for colour in colours], dtype=np.uint8)[nearest]


class ShapesSource:
    """The embedded set: names are ``shapes/NUMBER``, images are drawn when first asked for and kept in memory."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self._drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def image(self, name: str) -> Image.Image:
        return Image.fromarray(self._draw(name)[0])

    def mask(self, name: str) -> Image.Image:
        return Image.fromarray(self._draw(name)[1])

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        return []

    def _draw(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        number = name.removeprefix("shapes/")
        if number == name or not number.isdigit():
            raise DataError(f"{name!r} is not an image of the embedded set; expected shapes/NUMBER")
        if name not in self._drawn:
            self._drawn[name] = shapes.draw(self.seed, int(number), self.size)
        return self._drawn[name]


def shapes_names(first: int, count: int) -> list[str]:
    """Names of consecutive images of the embedded set."""
    return [f"shapes/{number:05d}" for number in range(first, first + count)]


def shapes_lists(options: Shapes, given: Mapping[str, list[str]], wanted: list[str]) -> dict[str, list[str]]:
    """The lists ``wanted`` of the embedded set, which share no image; ``given`` ones change nothing."""
    lists = {
        "labeled": shapes_names(0, options.labeled),
        "unlabeled": shapes_names(options.labeled, options.unlabeled),
        "val": shapes_names(1_000_000, options.val),
    }
    return {name: lists[name] for name in wanted}


def _opened(path: Path) -> Image.Image:
    """An image as it is stored, turned upright by its EXIF orientation."""
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except BROKEN as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as an image ({error})"
        raise DataError(f"{path}: {reason}") from None


def _first(values: list, shown: int = 8) -> str:
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return ", ".join(map(str, values[:shown])) + more
