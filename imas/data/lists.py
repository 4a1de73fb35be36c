"""Which images a run reads: lists from files, from the folders of own data, or of the embedded set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import Together, UserError
from ..schema import Config
from . import folder
from .source import shapes_names

_SHAPES_VAL = 1_000_000  # validation images of the embedded set are numbered from here


@dataclass(frozen=True)
class Lists:
    """Names of the images of a run."""

    labeled: list[str]
    unlabeled: list[str]  # empty for a method that wants none
    val: list[str]


def list_paths(config: Config) -> dict[str, Path | None]:
    """The list files of a configuration, named as the fields of ``Lists``; None where it does without."""
    train, val = config.dataset.train, config.dataset.val
    paths = {"labeled": train.data_list, "unlabeled": train.unlabeled_list, "val": val.data_list}
    return {name: None if path is None else Path(path) for name, path in paths.items()}


def read_lists(config: Config, training: bool = True) -> Lists:
    """The lists that a configuration names; where it names none, those of the embedded set, or what lies in the folders
    of own data.

    Args:
        training: False reads the validation list alone.

    Raises:
        UserError: every list that cannot be read; own data without a labeled, unlabeled or validation image.
    """
    wanted = ["labeled", "unlabeled", "val"] if training else ["val"]
    if training and not config.wants.unlabeled:
        wanted.remove("unlabeled")
    together = Together()
    paths = list_paths(config)
    lists = {name: together(read_list, paths[name]) for name in wanted if paths[name] is not None}
    if together.errors and config.dataset.type in ("pascal", "cityscapes"):
        root = config.dataset.train.data_root
        together.errors.append(
            f"The published lists: python -m imas.data splits --dataset {config.dataset.type} --root {root} "
            "(data/splits/README.md)"
        )
    together.finish()
    missing = [name for name in wanted if name not in lists]
    if missing:
        lists |= _found(config, lists, missing) if config.dataset.type == "folder" else _embedded(config, missing)
    return Lists(**({"labeled": [], "unlabeled": [], "val": []} | lists))


def read_list(path: str | Path) -> list[str]:
    """The lines of a list file, one image each; empty lines are left out.

    Raises:
        UserError: a file that is missing or empty.
    """
    path = Path(path)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path}: cannot read the list: {reason} (looked in {Path.cwd()})") from None
    if not names:
        raise UserError(f"{path}: the list is empty")
    return names


def val_root(config: Config) -> str | None:
    """The folder of the validation images."""
    return config.dataset.val.data_root or config.dataset.train.data_root


def _embedded(config: Config, wanted: list[str]) -> dict[str, list[str]]:
    shapes = config.dataset.shapes
    ranges = {
        "labeled": (0, shapes.labeled),
        "unlabeled": (shapes.labeled, shapes.unlabeled),
        "val": (_SHAPES_VAL, shapes.val),
    }
    return {name: shapes_names(*ranges[name]) for name in wanted}


def _found(config: Config, given: dict[str, list[str]], wanted: list[str]) -> dict[str, list[str]]:
    """Own data: images with a mask are labeled, all others unlabeled; none is in two lists."""
    options, found = config.dataset.folder, dict(given)
    if "val" in wanted:
        found["val"] = folder.find(options, Path(val_root(config)), masked=True)[0]
    if wanted != ["val"]:
        with_mask, without = folder.find(options, Path(config.dataset.train.data_root))
        same_root = val_root(config) == config.dataset.train.data_root
        taken = set(found["val"]) if same_root else set()
        if "labeled" in wanted:
            found["labeled"] = [name for name in with_mask if name not in taken]
        if "unlabeled" in wanted:
            taken |= set(found["labeled"])
            found["unlabeled"] = [name for name in (*with_mask, *without) if name not in taken]
    together = Together()
    for name in wanted:
        if not found[name]:
            together(_refuse, name, options.images, options.masks)
    together.finish()
    return found


def _refuse(name: str, images: str, masks: str) -> None:
    kind = "without a mask" if name == "unlabeled" else "with a mask"
    raise UserError(f"dataset.folder: no {name} image: none {kind} was found below the folders {images} and {masks}")
