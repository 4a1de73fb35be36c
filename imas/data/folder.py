"""Own data: an image folder and a mask folder; lists are optional."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Together, UserError
from ..schema import Dataset, Folder
from .source import binary_labels, existing, index_labels, labels_of_colours, listing, plain

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp")
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif")


def files(options: Folder, root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a name, the image's path below the image folder: ``a/b.jpg`` → ``images/a/b.jpg`` and
    ``masks/a/b<mask_suffix>.png``, or what other kind of mask file there is.
    """
    stem = root / options.masks / Path(name).with_suffix("")
    candidates = [stem.with_name(f"{stem.name}{options.mask_suffix}{kind}") for kind in MASKS]
    return root / options.images / name, existing(*candidates) or candidates[0]


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


def lists(
    dataset: Dataset, given: Mapping[str, list[str]], wanted: list[str]
) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """The lists ``wanted``: images with a mask are labeled, all others unlabeled; none is in two lists.

    Returns:
        The lists; and remarks: sentence → the files that no list names, or that are not used.

    Raises:
        UserError: a folder that does not exist or may not be read; no image for one of the lists.
    """
    options, found, remarks = dataset.folder, dict(given), {}
    root = Path(dataset.train.data_root)
    val_root = Path(dataset.val.data_root or root)
    trains = "labeled" in (*given, *wanted)
    roots = ([root] if trains else []) + ([val_root] if "val" in wanted else [])
    in_folders = {place: find(options, place) for place in roots}
    if "val" in wanted:
        found["val"] = in_folders[val_root][0]
    if trains:
        with_mask, without = in_folders[root]
        taken = {plain(name) for name in found["val"]} if val_root == root else set()
        if "labeled" in wanted:
            found["labeled"] = [name for name in with_mask if plain(name) not in taken]
        taken |= {plain(name) for name in (*found["labeled"], *found.get("unlabeled", ()))}
        everything = [*with_mask, *without, *_further(options, root)]
        rest = [name for name in everything if plain(name) not in taken]
        if "unlabeled" in wanted:
            found["unlabeled"] = rest
        takes_part = "they are unlabeled" if "unlabeled" in wanted else "they take no part"
        remarks[f"images below {root / options.images} are on no list: {takes_part}"] = rest
    for place, (masked, _) in in_folders.items():
        remarks |= _not_used(options, place, masked)
    together = Together()
    for name in wanted:
        if not found[name]:
            kind, example = "without a mask", ""
            if name != "unlabeled":
                kind, example = "with a mask", _expected(options, val_root if name == "val" else root)
            together.errors.append(
                f"dataset.folder: no {name} image: none {kind} was found below the folders {options.images} and "
                f"{options.masks}{example}"
            )
    together.finish()
    return {name: found[name] for name in wanted}, {text: tuple(names) for text, names in remarks.items() if names}


def _not_used(options: Folder, root: Path, masked: list[str]) -> dict[str, list[str]]:
    """Files of the two folders that are not used, by the reason; and images, of those with a mask, that share one."""
    images, masks, hidden = root / options.images, root / options.masks, []
    pictures = below(images, hidden)
    by_mask: dict[Path, list[str]] = {}
    for name in masked:
        by_mask.setdefault(files(options, root, name)[1], []).append(name)
    strangers = [name for name in below(masks, hidden) if masks / name not in by_mask] if masks.is_dir() else []
    if images == masks:
        strangers = [name for name in strangers if Path(name).stem.endswith(options.mask_suffix)]
    shared = [name for names in by_mask.values() if len(names) > 1 for name in names]
    return {
        f"masks in {masks} belong to no image": strangers,
        f"images below {images} share a mask with another one": shared,
        f"files below {images} are no images by their suffix": [name for name in pictures if not is_image(name)],
        f"names below {root} start with a dot: left out": list(dict.fromkeys(hidden)),
    }


def _expected(options: Folder, root: Path) -> str:
    """An example of the mask that was looked for, and what there is instead."""
    masks, name = root / options.masks, next(iter(_found(root / options.images)), None)
    if name is None:
        return f"; {root / options.images} has no image ({', '.join(IMAGES)})"
    there = ", ".join((below(masks) if masks.is_dir() else [])[:3]) or "nothing"
    looked = files(options, root, name)[1]
    return f"; the mask of {name} would be {looked} (or {', '.join(MASKS[1:])}), and {masks} has {there} ..."


def problems(dataset: Dataset) -> dict[str, str]:
    """Dotted key → what is wrong with it."""
    options, wrong = dataset.folder, {}
    if dataset.val.data_list is None and dataset.val.data_root in (None, dataset.train.data_root):
        wrong["dataset.val.data_list"] = (
            "missing; validation images must not be training images: name a list here, or another data_root "
            "(python -m imas.data splits --new draws lists)"
        )
    count, palette = len(options.class_names), options.palette
    for key, colours in (("palette", palette), ("colours", options.colours)):
        if colours is not None and len(colours) != count:
            wrong[f"dataset.folder.{key}"] = f"expected a colour a class, {count} in all, got {len(colours)}"
    if palette is not None and options.colours is not None:
        wrong["dataset.folder.colours"] = "leave it out: dataset.folder.palette has the colours already"
    if palette is not None:
        colours = [*palette, *([] if options.ignore_colour is None else [options.ignore_colour])]
        if twice := [list(colour) for colour, times in Counter(colours).items() if times > 1]:
            wrong["dataset.folder.palette"] = (
                f"{twice} stands for two classes, or for a class and dataset.folder.ignore_colour; each needs a colour "
                "of its own"
            )
    if options.images == options.masks and not options.mask_suffix:
        wrong["dataset.folder.mask_suffix"] = "missing; it tells masks from images where both are in one folder"
    if options.binary and (count != 2 or palette is not None):
        wrong["dataset.folder.binary"] = "masks of 0 and 255 have two classes and no palette"
    if options.ignore_colour is not None and palette is None:
        wrong["dataset.folder.ignore_colour"] = "needs dataset.folder.palette: only colour masks have colours"
    return wrong


def find(options: Folder, root: Path) -> tuple[list[str], list[str]]:
    """Names of the images below ``options.images`` with a mask, and of those without, each sorted.

    Raises:
        UserError: a folder that does not exist or may not be read.
    """
    found = _found(root / options.images)
    masks = {name: existing(files(options, root, name)[1]) for name in found}
    used = set(masks.values())
    found = [name for name in found if root / options.images / name not in used]  # a mask is no image
    return [name for name in found if masks[name] is not None], [name for name in found if masks[name] is None]


def _further(options: Folder, root: Path) -> list[str]:
    """Names of the images below ``options.unlabeled``: their paths from the image folder on."""
    if options.unlabeled is None:
        return []
    base = Path(os.path.relpath(root / options.unlabeled, root / options.images))
    return [(base / name).as_posix() for name in _found(root / options.unlabeled)]


def images_below(folder: Path) -> list[str]:
    """The files of ``below`` that are images by their suffix."""
    return list(filter(is_image, below(folder)))


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return name.lower().endswith(IMAGES)


def below(folder: Path, hidden: list[str] | None = None) -> list[str]:
    """Paths of all files in a folder and its sub-folders, relative to it, sorted. Links are followed. Files and folders
    whose names start with a dot are left out, and added to ``hidden``.
    """
    found, left_out, seen, waiting = [], [] if hidden is None else hidden, set(), [""]
    for base in waiting:  # which grows
        status = os.stat(folder / base)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link that leads back
        seen.add((status.st_dev, status.st_ino))
        here = listing(folder / base)
        for name in (*here.files, *(f"{name}/" for name in here.folders)):
            kind = left_out if name.startswith(".") else waiting if name.endswith("/") else found
            kind.append(base + name)
    return sorted(found)


def _found(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (looked in {Path.cwd()}); dataset.folder says where the images lie")
    return images_below(folder)
