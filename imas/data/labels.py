"""Label maps as files: index PNGs with a palette; folders of pseudo labels, named as the images of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..files import replacing
from ..schema import Dataset
from .catalog import Colour, catalog_of
from .folder import IMAGES
from .source import FileSource, index_labels

_UNSURE = 255  # in files, whatever the configuration's ignore label is
_UNSURE_COLOUR = (224, 224, 192)


def label_path(folder: Path, name: str) -> Path:
    """The file of a list line: ``a/b.jpg`` → ``FOLDER/a/b.png``. A name outside its own folder, ``../c/d.jpg``, becomes
    ``FOLDER/c/d.png``.
    """
    path = PurePosixPath(name)
    path = path.with_suffix("") if path.suffix.lower() in IMAGES else path
    parts = [part for part in path.parts if part not in ("..", "/")]
    return Path(folder, *parts[:-1], f"{parts[-1]}.png")


def open_labels(dataset: Dataset, folder: str | Path) -> FileSource:
    """The pseudo labels in a folder: ``mask(name)`` is that of a list line, with 255 read as the ignore label."""
    classes, ignore = len(catalog_of(dataset).class_names), dataset.ignore_label

    def decode(path: Path, image: Image.Image) -> np.ndarray:
        labels = index_labels(path, image)
        return labels if ignore == _UNSURE else np.where(labels == _UNSURE, np.uint8(ignore), labels)

    return FileSource(lambda root, name: (label_path(root, name),) * 2, Path(folder), classes, ignore, decode)


def index_picture(labels: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """(H, W) uint8 class numbers, or 255, with their colours. The palette has 256 of them, since Pillow stores fewer
    bits a pixel with a shorter one, and would change 255.
    """
    colours = [*palette, *[(0, 0, 0)] * (_UNSURE - len(palette)), _UNSURE_COLOUR]
    picture = Image.fromarray(labels)
    picture.putpalette(bytes(sum(colours, ())))
    return picture


def write_labels(path: Path, labels: np.ndarray, palette: Sequence[Colour]) -> None:
    """``index_picture`` as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        index_picture(labels, palette).save(temporary, "PNG")
