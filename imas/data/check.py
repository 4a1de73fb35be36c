"""Looking at the data of a run before anything starts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..schema import Config
from .dataset import read_pair
from .labels import label_path, open_labels
from .lists import Lists, read_lists, val_root
from .source import DataError, Source, open_source

log = logging.getLogger("imas")
_SHOWN = 10


def check_data(config: Config, training: bool = True) -> Lists:
    """Before every run: read the lists, find every file, and read every mask once. Unlabeled images need no mask.

    Args:
        training: False looks at the validation images alone.

    Raises:
        UserError: lists or files that are missing, masks with values that are no class. With ``dataset.on_error: skip``
            files of training images are warned of instead.
    """
    lists = read_lists(config, training)
    if config.dataset.n_sup not in (None, len(lists.labeled)) and training:
        log.warning(
            "dataset.n_sup is %d, but the labeled list has %d lines; the list counts",
            config.dataset.n_sup, len(lists.labeled),
        )  # fmt: skip
    wrong = _unfit_lists(config, lists) if training and config.wants.pseudo_label else []
    if training and config.wants.pseudo_label and config.dataset.train.pseudo_labels is not None:
        wrong += check_labels(config, lists.unlabeled)
    for list_name, names in vars(lists).items():
        source = source_of(config, list_name)
        masked = list_name != "unlabeled"
        problems = [f"{path}: no such file" for path in source.missing(names, masked)]
        if masked and not problems and config.dataset.type != "shapes":
            with ThreadPoolExecutor(8) as pool:
                problems = list(filter(None, pool.map(partial(_mask_problem, source), names)))
        if problems:
            text = "\n".join([f"{len(problems)} files of the {list_name} images cannot be used:", *some(problems)])
            if list_name == "val" or config.dataset.on_error == "stop":
                wrong.append(text)
                continue
            log.warning("%s\nOther samples will take their place (dataset.on_error: skip)", text)
    if wrong:
        raise UserError("\n".join(wrong))
    return lists


def check_labels(config: Config, names: Sequence[str]) -> list[str]:
    """What is wrong with the pseudo labels of unlabeled images: nothing, or one sentence, which is a warning with
    ``dataset.on_error: skip``.
    """
    folder = config.dataset.train.pseudo_labels
    source, labels = source_of(config, "unlabeled"), open_labels(config.dataset, folder)

    def problem(name: str) -> str | None:
        try:
            read_pair(source, name, labels)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(8) as pool:
        problems = list(filter(None, pool.map(problem, names)))
    if not problems:
        return []
    text = f"{len(problems)} of {len(names)} pseudo labels in {folder} cannot be used:\n" + "\n".join(some(problems))
    if config.dataset.on_error == "stop":
        return [text]
    log.warning("%s\nOther samples will take their place (dataset.on_error: skip)", text)
    return []


def _unfit_lists(config: Config, lists: Lists) -> list[str]:
    """What is wrong with lists whose unlabeled images get labels: each image needs its own, and no true one."""
    paths = [label_path(Path(), name) for name in lists.unlabeled]
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    wrong = [("more than once in the unlabeled list, or with names of one label file", twice)]
    labeled, val = set(lists.labeled), set(lists.val)
    wrong.append(("both labeled and unlabeled", [name for name in lists.unlabeled if name in labeled]))
    if val_root(config) == config.dataset.train.data_root:
        wrong.append(("both unlabeled and in the validation list", [name for name in lists.unlabeled if name in val]))
    return [
        "\n".join([f"{len(names)} images are {what}; unlabeled images get pseudo labels:", *some(names)])
        for what, names in wrong
        if names
    ]


def source_of(config: Config, list_name: str) -> Source:
    """Where the images of a list of ``Lists`` come from."""
    return open_source(config.dataset, val_root(config) if list_name == "val" else config.dataset.train.data_root)


def _mask_problem(source: Source, name: str) -> str | None:
    try:
        source.mask(name)
    except DataError as error:
        return str(error)
    return None


def some(items: Sequence[str]) -> list[str]:
    """The first items as indented lines, and how many more there are."""
    more = [f"  ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [*(f"  {item}" for item in items[:_SHOWN]), *more]
