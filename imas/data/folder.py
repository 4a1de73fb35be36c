"""Own data: an image folder and a mask folder; lists are optional."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..schema import Folder

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
