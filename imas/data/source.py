"""Where images and masks come from: files in a known layout, or the generator of the embedded set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..strict import UserError
from . import shapes
from .catalog import CITYSCAPES_IDS, Catalog, cityscapes_files, pascal_files

FILES = {"pascal": pascal_files, "cityscapes": cityscapes_files}


class FileSource:
    """Images and masks of a folder.

    Args:
        layout: a key of ``FILES``.
        root: the data set's folder.
        catalog: its classes, to check masks against.
        ignore_index: the mask value to leave out.
    """

    def __init__(self, layout: str, root: Path, catalog: Catalog, ignore_index: int) -> None:
        self.files = FILES[layout]
        self.root = root
        self.num_classes = len(catalog.class_names)
        self.ignore_index = ignore_index
        ids = np.full(256, ignore_index, dtype=np.uint8)
        ids[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
        self._train_ids = ids

    def image(self, name: str) -> Image.Image:
        """The RGB image of a list line."""
        path = self.files(self.root, name)[0]
        return _opened(path).convert("RGB")

    def mask(self, name: str) -> Image.Image:
        """The mask of a list line, mode L. UserError if it has values that are neither classes nor ignored."""
        path = self.files(self.root, name)[1]
        mask = _opened(path)
        if mask.mode not in ("L", "P"):
            raise UserError(f"{path}: expected a mask of one 8-bit channel (class numbers), got mode {mask.mode}")
        labels = np.asarray(mask)
        if path.stem.endswith("_labelIds"):
            labels = self._train_ids[labels]
        foreign = (labels >= self.num_classes) & (labels != self.ignore_index)
        if foreign.any():
            values = ", ".join(map(str, np.unique(labels[foreign])))
            raise UserError(
                f"{path}: {int(foreign.sum())} pixels have the values {values}; expected classes "
                f"0..{self.num_classes - 1} or {self.ignore_index} (ignored)"
            )
        return Image.fromarray(labels)

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        """Files of these list lines that do not exist."""
        paths = [path for name in names for path in self.files(self.root, name)[: 2 if masks else 1]]
        return [path for path in paths if not path.is_file()]


class ShapesSource:
    """The embedded set: names are ``shapes/NUMBER``, images are drawn when first asked for and kept in memory."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self._drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def image(self, name: str) -> Image.Image:
        """The RGB image of a name."""
        return Image.fromarray(self._draw(name)[0])

    def mask(self, name: str) -> Image.Image:
        """The mask of a name, mode L, with 255 at the borders of objects."""
        return Image.fromarray(self._draw(name)[1])

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        """No files are needed."""
        return []

    def _draw(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._drawn:
            self._drawn[name] = shapes.draw(self.seed, _number(name), self.size)
        return self._drawn[name]


def shapes_names(first: int, count: int) -> list[str]:
    """Names of consecutive images of the embedded set."""
    return [f"shapes/{number:05d}" for number in range(first, first + count)]


def _number(name: str) -> int:
    head, _, number = name.partition("/")
    if head != "shapes" or not number.isdigit():
        raise UserError(f"{name!r} is not an image of the embedded set; expected shapes/NUMBER")
    return int(number)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as an image ({error})"
        raise UserError(f"{path}: {reason}") from None
