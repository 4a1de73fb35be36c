"""Looking at the data of a run before anything starts."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from ..schema import Config
from ..strict import UserError
from .loaders import Lists, open_source, read_lists, val_root

log = logging.getLogger("imas")
_SHOWN = 10


def check_data(config: Config, training: bool = True) -> Lists:
    """Read the lists, find every file, and read every mask once. Unlabeled images need no mask.

    Args:
        training: False looks at the validation images alone.

    Raises:
        UserError: lists or files that are missing, masks with values that are no class.
    """
    lists = read_lists(config, training)
    wanted = [(val_root(config), lists.val, True)]
    if training:
        root = config.dataset.train.data_root
        wanted += [(root, lists.labeled, True), (root, lists.unlabeled, False)]
        if config.dataset.n_sup not in (None, len(lists.labeled)):
            log.warning(
                "dataset.n_sup is %d, but the labeled list has %d lines; the list counts",
                config.dataset.n_sup, len(lists.labeled),
            )  # fmt: skip
    for root, names, masks in wanted:
        source = open_source(config, root)
        if missing := source.missing(names, masks):
            shown = "\n".join(f"  {path}" for path in missing[:_SHOWN])
            more = f"\n  ... and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise UserError(f"{len(missing)} files that the lists name are missing:\n{shown}{more}")
    if config.dataset.type != "shapes":
        for root, names, masks in wanted:
            source = open_source(config, root)
            with ThreadPoolExecutor(8) as pool:
                for _ in pool.map(source.mask, names if masks else []):
                    pass
    return lists
