"""Which images a run reads: lists from files, from the folders of own data, or of the embedded set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Together, UserError
from ..schema import Config
from .catalog import catalog_of, unlabeled_beside


@dataclass(frozen=True)
class Lists:
    """Names of the images of a run."""

    labeled: list[str]
    unlabeled: list[str]  # empty for sup_only
    val: list[str]
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)  # sentence → its files
    files: Mapping[str, Any] = field(default_factory=dict, compare=False)  # how many were looked at: ``check.counted``

    def by_name(self) -> dict[str, list[str]]:
        """The lists alone."""
        return {"labeled": self.labeled, "unlabeled": self.unlabeled, "val": self.val}


def list_paths(config: Config) -> dict[str, Path | None]:
    """The list files of a configuration, by the names of ``Lists``; None where it does without. An unlabeled list that
    is beside the labeled one is used, for every data set.
    """
    train, val = config.dataset.train, config.dataset.val
    named = {"labeled": train.data_list, "unlabeled": train.unlabeled_list, "val": val.data_list}
    paths = {name: None if path is None else Path(path) for name, path in named.items()}
    if config.wants.unlabeled and paths["labeled"] is not None and paths["unlabeled"] is None:
        beside = unlabeled_beside(paths["labeled"])
        paths["unlabeled"] = beside if beside != paths["labeled"] and os.path.isfile(beside) else None
    return paths


def read_lists(config: Config, training: bool = True) -> Lists:
    """The lists that a configuration names; where it names none, those of the embedded set, or what the folders of own
    data hold.

    Args:
        training: False reads the validation list alone.

    Raises:
        UserError: folders that do not exist; every list that cannot be read; own data without a labeled, unlabeled or
            validation image.
    """
    wanted = ["labeled", "unlabeled", "val"] if training else ["val"]
    if not config.wants.unlabeled and training:
        wanted.remove("unlabeled")
    together, paths, catalog = Together(), list_paths(config), catalog_of(config.dataset)
    train, val = config.dataset.train.data_root, config.dataset.val.data_root
    for key, root in {"train": train if training or val is None else None, "val": val}.items():
        if catalog.files is not None and root is not None and not os.path.isdir(root):
            together.errors.append(f"dataset.{key}.data_root: {root}: no such folder (looked in {Path.cwd()})")
    folders = len(together.errors)
    lists = {name: together(read_list, paths[name]) for name in wanted if paths[name] is not None}
    if len(together.errors) > folders and catalog.folder_lists:
        together.errors.append(
            f"The published lists: python -m imas.data splits --dataset {config.dataset.type} --root {train}; those "
            "drawn at random need --download there, or --from FOLDER with the authors' (data/splits/README.md)"
        )
    together.finish()
    missing = [name for name in wanted if name not in lists]
    remarks: Mapping[str, tuple[str, ...]] = {}
    if catalog.find is not None:
        found, remarks = catalog.find(lists, missing)
        lists |= found
    return Lists(**({"labeled": [], "unlabeled": [], "val": []} | lists), remarks=remarks)


def read_list(path: str | Path) -> list[str]:
    """The lines of a list file, one image each; empty lines and a byte order mark are left out.

    Raises:
        UserError: a file that is missing or empty.
    """
    path = Path(path)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file; expected one name a line"
        raise UserError(f"{path}: cannot read the list: {reason} (looked in {Path.cwd()})") from None
    if not names:
        raise UserError(f"{path}: the list is empty")
    return names


def val_root(config: Config) -> str | None:
    """The folder of the validation images."""
    return config.dataset.val.data_root or config.dataset.train.data_root
