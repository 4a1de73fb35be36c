"""New split lists for own data, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..schema import Folder
from . import folder
from .splits import digest, need_folder, write_list


def own_masks(images: Path | None, masks: Path, suffix: str = "") -> Callable[[str], Path]:
    """From an image's name to where its mask is, or would be (``folder.files``); ``images`` is None for a list alone.

    Raises:
        UserError: a folder that does not exist.
    """
    options = Folder(("0", "1"), str(images or ""), str(need_folder(masks)), suffix)
    return lambda name: folder.files(options, Path(), name)[1]


def own_images(images: Path, masks: Callable[[str], Path] | None) -> list[str]:
    """Paths below the folder of all its images, sorted. Masks among them are left out.

    Raises:
        UserError: a folder that does not exist, or has no image.
    """
    names = folder.images_below(need_folder(images))
    if masks is not None:
        used = set(map(masks, names))
        names = [name for name in names if images / name not in used]
    if not names:
        raise UserError(f"{images}: no image in it; expected files {', '.join(folder.IMAGES)}")
    return names


def draw_splits(
    out: Path,
    names: list[str],
    labeled: str,
    val: str | None = None,
    *,
    seed: int = 0,
    masks: Callable[[str], Path] | None = None,
    force: bool = False,
) -> None:
    """Draw ``labeled.txt``, ``unlabeled.txt`` and, with ``val``, ``val.txt`` into a folder; print what they are.

    Val does not depend on the number of labeled images, and a smaller labeled list of a seed is part of a larger one.

    Args:
        labeled, val: how many images, as a count or as a fraction of all names: "100", "0.1", "1/16".
        seed: same seed, same lists; at least 0.
        masks: of ``own_masks``: only images that have one become labeled or val. None: every image may.

    Raises:
        UserError: counts that cannot be had; existing lists, without ``force``.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    names = sorted(set(names))
    usable = names if masks is None else [name for name in names if masks(name).is_file()]
    if not usable:
        raise UserError(f"none of the {len(names)} images has a mask; that of {names[0]} would be {masks(names[0])}")
    count = _amount("--labeled", labeled, len(names))
    held_out = 0 if val is None else _amount("--val", val, len(names))
    if count + held_out > len(usable):
        have = "" if masks is None else f" that have a mask, of {len(names)} in all"
        raise UserError(f"{count} labeled and {held_out} val images are more than the {len(usable)} images{have}")
    order = np.random.default_rng(seed).permutation(usable).tolist()
    lists = {"labeled": sorted(order[held_out : held_out + count]), "val": sorted(order[:held_out])}
    lists["unlabeled"] = sorted(set(names).difference(*lists.values()))
    existing = [kind for kind in ("labeled", "unlabeled", "val") if (out / f"{kind}.txt").exists()]
    if existing and not force:
        raise UserError(f"{out}: has {', '.join(existing)} lists already; --force replaces them")
    if stale := [kind for kind in existing if not lists[kind]]:
        raise UserError(
            f"{out}: has {' and '.join(stale)} lists from before that would stay, and could share images with "
            "the new ones: remove them, or choose another folder"
        )

    with_mask = "" if masks is None else f", {len(usable)} with a mask"
    print(f"{len(names)} images{with_mask}; seed {seed}")
    for kind, part in lists.items():
        if part:
            write_list(out / f"{kind}.txt", part)
            print(f"{out / f'{kind}.txt'}  {len(part)} images, sha256 {digest(part)}")
    if not lists["unlabeled"]:
        print("no image is left to be unlabeled: the lists are for methods that need none")


def _amount(flag: str, text: str, total: int) -> int:
    try:
        value = Fraction(text) * (1 if text.isdecimal() else total)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{flag} {text}: expected a count or a fraction, such as 100, 0.1 or 1/16") from None
    if not 0 < value <= total:
        raise UserError(f"{flag} {text}: expected at least 1 and at most all of the {total} images")
    return max(1, round(value))
