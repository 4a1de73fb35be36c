"""Looking at the data of a run before anything starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..errors import UserError
from ..schema import Config
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
    wrong = []
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
