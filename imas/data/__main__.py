"""Tools for data: python -m imas.data COMMAND --help"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..config import load_config
from ..errors import UserError, run_script
from .check import SHOWN, examine
from .draw import draw_splits, own_images, own_masks
from .lists import read_list, read_lists
from .splits import PUBLISHED, make_published

# flag → argparse's settings. The default is always None, so that options of the other use are noticed.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "--dataset": {"choices": PUBLISHED},
    "--root": {"type": Path, "help": "the data set's folder: makes all lists that follow a rule"},
    "--from": {
        "metavar": "FOLDER",
        "type": Path,
        "help": "a clone of the authors' repository, or any folder with the lists",
    },
    "--download": {"action": "store_true", "help": "get what is lacking from the authors' repository"},
}
_NEW: dict[str, dict[str, Any]] = {
    "--images": {"type": Path, "help": "a folder of images to draw from"},
    "--list": {"type": Path, "help": "a list to draw from, instead"},
    "--masks": {"type": Path, "help": "their masks: only images that have one become labeled or val"},
    "--mask-suffix": {"help": "a.jpg has the mask a<suffix>.png (default: none)"},
    "--labeled": {"metavar": "N|FRACTION", "help": "how many, or which fraction of all (100, 0.1, 1/16)"},
    "--val": {"metavar": "N|FRACTION", "help": "likewise, to validate on"},
    "--seed": {"type": int, "help": "same seed, same lists (default 0)"},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``command`` is the function to call with it."""
    parser = argparse.ArgumentParser(prog="python -m imas.data", description="Tools for data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "complete data/splits with the published lists, or draw new ones (--new): see data/splits/README.md"
    command = commands.add_parser("splits", help=text, description=text)
    command.set_defaults(command=splits)
    command.add_argument("--out", type=Path, help="where the lists go (default data/splits; --new: needed)")
    command.add_argument("--force", action="store_true", help="replace lists that differ, or earlier draws")
    command.add_argument("--new", action="store_true", help="draw new lists")
    for title, options in (("published lists", _PUBLISHED), ("new lists", _NEW)):
        group = command.add_argument_group(title)
        for flag, settings in options.items():
            group.add_argument(flag, default=None, **settings)

    text = "look at every image and mask of an experiment; exit status 1 if something is wrong"
    command = commands.add_parser("check", help=text, description=text)
    command.set_defaults(command=check)
    command.add_argument("--config", required=True, type=Path, help="the experiment's YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that read (default: one a core)")
    command.add_argument("--verbose", action="store_true", help="name every file, not the first ten of a kind")
    command.add_argument("--write", type=Path, metavar="FILE", help="write what is wrong with which file to this file")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """The doctor's table and findings."""
    config = load_config(options.config, options.set)
    found = examine(config, read_lists(config), workers=options.workers)
    print("\n".join([found.table, "", *found.lines(sys.maxsize if options.verbose else SHOWN)]))
    if options.write is not None:
        files = [file for finding in found.findings for file in finding.files]
        options.write.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
        print(f"{len(files)} files: {options.write}")
    if found.wrong:
        raise UserError(f"{options.config}: something is wrong with the data, see above", 1)
    print("nothing is wrong")


def splits(options: argparse.Namespace) -> None:
    """Published lists, or new ones."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    foreign = [flag for flag in (_PUBLISHED if options.new else _NEW) if flag[2:].replace("-", "_") in given]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: only {'without' if options.new else 'with'} --new")
    if not options.new:
        if options.dataset is None:
            names = " or ".join(PUBLISHED)
            raise UserError(f"--dataset: missing; expected {names} (or --new, to draw lists for own data)")
        out, source = options.out or Path("data/splits"), given.get("from")
        make_published(options.dataset, out, options.root, source, bool(options.download), options.force)
        return
    if (options.images is None) == (options.list is None):
        raise UserError("--new draws from a folder of images (--images) or from a list (--list): give one of them")
    if options.out is None or options.labeled is None:
        raise UserError("--new needs --out FOLDER and --labeled N|FRACTION")
    if options.masks is None and options.mask_suffix is not None:
        raise UserError("--mask-suffix: needs --masks")
    masks = None if options.masks is None else own_masks(options.images, options.masks, options.mask_suffix or "")
    names = read_list(options.list) if options.images is None else own_images(options.images, masks)
    draw_splits(
        options.out, names, options.labeled, options.val,
        seed=options.seed or 0, masks=masks, force=options.force,
    )  # fmt: skip


def main() -> None:
    """Call the command that the command line names."""
    options = parse()
    options.command(options)


if __name__ == "__main__":
    run_script(main)
