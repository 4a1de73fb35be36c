"""Where images and masks come from: files in a known layout, or the generator of the embedded set."""

from __future__ import annotations

import functools
import os
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import UserError
from ..schema import Shapes
from . import shapes

_ALPHA = {1, 2}  # kinds of extra bands of a TIFF (ExtraSamples)
_ORIENTATION = ExifTags.Base.Orientation


class Source(Protocol):
    """Images and masks by name."""

    def image(self, name: str) -> Image.Image:
        """RGB."""

    def mask(self, name: str) -> Image.Image:
        """Mode L, of the same size: class numbers and the ignore label."""

    def missing(self, name: str, mask: bool) -> list[Path]:
        """Which files of this name do not exist: the image, and with ``mask`` its mask."""


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
        return read_image(self.paths(name)[0])

    def mask(self, name: str) -> Image.Image:
        """DataError for a JPEG, and for values that are neither classes nor ignored."""
        path = self.paths(name)[1]
        stored = _opened(path)
        if stored.format == "JPEG":
            raise DataError(f"{path}: a JPEG cannot be a mask, since it changes values; save masks as PNG")
        labels = self.decode(path, stored)
        foreign = (labels >= self.num_classes) & (labels != self.ignore_index)
        if foreign.any():
            values = np.unique(labels[foreign]).tolist()
            left_out = f"; if {values[0]} means 'leave out', set dataset.ignore_label: {values[0]}"
            raise DataError(
                f"{path}: {int(foreign.sum())} pixels have the values {_first(values)}; expected classes "
                f"0..{self.num_classes - 1} or {self.ignore_index} (ignored){left_out if len(values) == 1 else ''}"
            )
        mask = Image.fromarray(labels)
        mask.info["stored"] = stored  # for the doctor
        return mask

    def paths(self, name: str) -> tuple[Path, Path]:
        """Image and mask of a list line, as their names are on the disk (see ``existing``)."""
        image, mask = self.files(self.root, name)
        return existing(image) or image, existing(mask) or mask

    def missing(self, name: str, mask: bool) -> list[Path]:
        return [path for path in self.files(self.root, name)[: 2 if mask else 1] if existing(path) is None]


class Listing(NamedTuple):
    """What a folder holds, sorted."""

    files: list[str]
    folders: list[str]
    names: dict[str, str]  # by themselves, and by ``plain`` of them


def listing(folder: Path) -> Listing:
    """The entries of a folder; links are followed. A folder that does not change is read once.

    Raises:
        DataError: it cannot be read. FileNotFoundError, NotADirectoryError: there is none.
    """
    try:
        changed = os.stat(folder).st_mtime_ns
        settled = abs(time.time_ns() - changed) > 1_000_000_000  # a change within one tick of the clock is not seen
        return (_listed if settled else _listed.__wrapped__)(str(folder), changed)
    except PermissionError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


@functools.cache
def _listed(folder: str, changed: int) -> Listing:
    with os.scandir(folder) as entries:
        kinds = dict(sorted((entry.name, entry.is_dir()) for entry in entries))
    names = {plain(name): name for name in kinds} | {name: name for name in kinds}
    return Listing([name for name in kinds if not kinds[name]], [name for name in kinds if kinds[name]], names)


def plain(name: str) -> str:
    """A name as names are compared: letters composed in one way (macOS has another), the suffix in small letters."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + suffix.lower()


def existing(*paths: Path) -> Path | None:
    """The first of some files or folders of one folder that exists, as its name is on the disk: as it is given, or one
    that is ``plain`` the same. DataError for a folder that may not be read.
    """
    folder: Path | None = paths[0].parent
    try:
        names = listing(folder).names
    except (FileNotFoundError, NotADirectoryError):
        folder = None if folder == paths[0] else existing(folder)
        if folder is None or not folder.is_dir():
            return None
        names = listing(folder).names
    found = (names.get(path.name) or names.get(plain(path.name)) for path in paths)
    return next((folder / name for name in found if name), None)


def read_image(path: Path) -> Image.Image:
    """A file as an RGB image, upright: see ``as_rgb``.

    Raises:
        DataError: no image, or one with values beyond 16 bits.
    """
    return as_rgb(_opened(path), path)


def as_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    """An image as RGB. Alpha is dropped, 16-bit grey is scaled to 8 bits.

    Args:
        path: for the message.

    Raises:
        DataError: values beyond 16 bits.
    """
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
    values = np.unique(labels).tolist()
    if {1, 255}.issubset(values) or not {0, 1, 255}.issuperset(values):
        raise DataError(
            f"{path}: dataset.folder.binary expects masks of 0 and 255, or of 0 and 1, got {_first(values)}. Where 255 "
            "means 'leave out' beside the classes 0 and 1, set it to false"
        )
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

    def missing(self, name: str, mask: bool) -> list[Path]:
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


def shapes_lists(
    options: Shapes, given: Mapping[str, list[str]], wanted: list[str]
) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """The lists ``wanted`` of the embedded set, which share no image; ``given`` ones change nothing. And no remark."""
    lists = {
        "labeled": shapes_names(0, options.labeled),
        "unlabeled": shapes_names(options.labeled, options.unlabeled),
        "val": shapes_names(1_000_000, options.val),
    }
    return {name: lists[name] for name in wanted}, {}


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) that an image has when it is read, by its header alone. DataError if it cannot be opened."""
    return _opened(path, lambda image: image.size[:: -1 if image.getexif().get(_ORIENTATION, 1) >= 5 else 1])


def _opened(path: Path, use: Callable[[Image.Image], Any] | None = None) -> Any:
    """What ``use`` makes of an image, by default the image as it is stored, turned upright by its EXIF orientation."""
    try:
        with Image.open(path) as image:
            return (use or upright)(image)
    except Exception as error:  # a broken file makes Pillow raise almost anything
        reason = f"cannot be read as an image ({error or type(error).__name__})"
        if isinstance(error, OSError) and error.errno is not None:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        elif not path.stat().st_size:
            reason = "cannot be read as an image (the file is empty)"
        raise DataError(f"{path}: {reason}") from None


def upright(image: Image.Image) -> Image.Image:
    """The same image, turned by its EXIF orientation.

    Raises:
        ValueError: a TIFF with bands that are neither colour nor alpha.
    """
    image.load()
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if set(tags.get(ExifTags.Base.ExtraSamples, ())) - _ALPHA:
        count = tags.get(ExifTags.Base.SamplesPerPixel)
        raise ValueError(f"some of its {count} bands are neither colour nor alpha; save those you mean as grey or RGB")
    exif = image.getexif()
    for tag in set(exif) - {_ORIENTATION}:  # Pillow writes all of them anew, and fails where one is broken
        del exif[tag]
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _first(values: list, shown: int = 8) -> str:
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return ", ".join(map(str, values[:shown])) + more
