"""Own data: an image folder and a mask folder; lists are optional."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Together, UserError
from ..schema import Dataset, Folder
from .source import binary_labels, index_labels, labels_of_colours

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif")


def files(options: Folder, root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a name, the image's path below the image folder: ``a/b.jpg`` → ``images/a/b.jpg`` and
    ``masks/a/b<mask_suffix>.png``, or what other kind of mask file there is.
    """
    stem = root / options.masks / Path(name).with_suffix("")
    candidates = [stem.with_name(f"{stem.name}{options.mask_suffix}{kind}") for kind in MASKS]
    mask = next((path for path in candidates if path.is_file()), candidates[0])
    return root / options.images / name, mask


def labels(options: Folder, path: Path, image: Image.Image, ignore_index: int) -> np.ndarray:
    """A mask as class numbers, class colours or two values → (H, W) uint8 class numbers.

    Raises:
        DataError: a mask of another kind than the options tell.
    """
    if options.palette is not None:
        classes = dict(zip(options.palette, range(len(options.palette))))
        classes |= {} if options.ignore_colour is None else {options.ignore_colour: ignore_index}
        return labels_of_colours(classes, path, image)
    return binary_labels(path, image) if options.binary else index_labels(path, image)


def lists(dataset: Dataset, given: Mapping[str, list[str]], wanted: list[str]) -> dict[str, list[str]]:
    """The lists ``wanted``: images with a mask are labeled, all others unlabeled; none is in two lists.

    Raises:
        UserError: a folder that does not exist; no image for one of the lists.
    """
    options, found, root = dataset.folder, dict(given), dataset.train.data_root
    val_root = dataset.val.data_root or root
    if "val" in wanted:
        found["val"] = find(options, Path(val_root), masked=True)[0]
    if wanted != ["val"]:
        with_mask, without = find(options, Path(root))
        taken = set(found["val"]) if val_root == root else set()
        if "labeled" in wanted:
            found["labeled"] = [name for name in with_mask if name not in taken]
        if "unlabeled" in wanted:
            taken |= set(found["labeled"])
            found["unlabeled"] = [name for name in (*with_mask, *without) if name not in taken]
    together = Together()
    for name in wanted:
        if not found[name]:
            kind = "without a mask" if name == "unlabeled" else "with a mask"
            together.errors.append(
                f"dataset.folder: no {name} image: none {kind} was found below the folders {options.images} and "
                f"{options.masks}"
            )
    together.finish()
    return {name: found[name] for name in wanted}


def problems(dataset: Dataset) -> dict[str, str]:
    """Dotted key → what is wrong with it."""
    options, wrong = dataset.folder, {}
    if dataset.val.data_list is None and dataset.val.data_root in (None, dataset.train.data_root):
        wrong["dataset.val.data_list"] = (
            "missing; validation images must not be training images: name a list here, or another data_root "
            "(python -m imas.data splits --new draws lists)"
        )
    count, palette = len(options.class_names), options.palette
    if palette is not None and len(palette) != count:
        wrong["dataset.folder.palette"] = f"expected a colour a class, {count} in all, got {len(palette)}"
    if options.images == options.masks and not options.mask_suffix:
        wrong["dataset.folder.mask_suffix"] = "missing; it tells masks from images where both are in one folder"
    if options.binary and (count != 2 or palette is not None):
        wrong["dataset.folder.binary"] = "masks of 0 and 255 have two classes and no palette"
    if options.ignore_colour is not None and palette is None:
        wrong["dataset.folder.ignore_colour"] = "needs dataset.folder.palette: only colour masks have colours"
    return wrong


def find(options: Folder, root: Path, masked: bool = False) -> tuple[list[str], list[str]]:
    """Names of all images with a mask, and of all without, sorted. Images below ``options.unlabeled`` have none.

    Args:
        masked: look for images with a mask alone.

    Raises:
        UserError: a folder that does not exist.
    """
    found = _found(root / options.images)
    if options.images == options.masks:
        beside = {files(options, root, name)[1] for name in found}
        found = [name for name in found if root / options.images / name not in beside]
    masks = [files(options, root, name)[1].is_file() for name in found]
    without = [name for name, has_mask in zip(found, masks) if not has_mask]
    if options.unlabeled is not None and not masked:
        base = Path(os.path.relpath(root / options.unlabeled, root / options.images))
        without += [(base / name).as_posix() for name in _found(root / options.unlabeled)]
    return [name for name, has_mask in zip(found, masks) if has_mask], without


def images_below(folder: Path) -> list[str]:
    """Paths of all image files in a folder and its sub-folders, relative to it, sorted."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _found(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (looked in {Path.cwd()}); dataset.folder says where the images lie")
    return images_below(folder)
