"""Tools for data: python -m imas.data COMMAND --help"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..config import load_config
from ..errors import UserError, run_script
from .check import SHOWN, Unhealthy, examine
from .draw import draw_splits, own_images, own_masks
from .lists import read_list, read_lists
from .splits import PUBLISHED, make_published

# Options that only one of the two uses of ``splits`` has.
_PUBLISHED = ("dataset", "root", "source", "download")
_NEW = ("images", "list", "masks", "mask_suffix", "labeled", "val", "seed", "stratify")


def main() -> None:
    """Call the command that the command line names."""
    options = parse()
    options.command(options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``command`` is what is to be called with it."""
    parser = argparse.ArgumentParser(prog="python -m imas.data", description="Tools for data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_splits(
        commands.add_parser("splits", help="complete data/splits with the published lists, or draw new ones (--new)")
    )
    add_check(commands.add_parser("check", help="look at every image and mask of an experiment, and say what is wrong"))
    return parser.parse_args(arguments)


def add_check(parser: argparse.ArgumentParser) -> None:
    """The command line of ``check``."""
    parser.description = "Look at every image and mask of an experiment. Exit status 1 if something is wrong."
    parser.set_defaults(command=check)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that read (default: one a core)")
    parser.add_argument("--verbose", action="store_true", help="name every file, not the first ten of a kind")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write what is wrong with which file to this file")


def check(options: argparse.Namespace) -> None:
    """The doctor's table and findings."""
    config = load_config(options.config, options.set)
    health = examine(config, read_lists(config), workers=options.workers)
    print("\n".join([health.table, "", *health.lines(sys.maxsize if options.verbose else SHOWN)]))
    if options.write is not None:
        files = [file for finding in health.findings for file in finding.files]
        options.write.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
        print(f"{len(files)} files: {options.write}")
    if health.wrong:
        raise Unhealthy(f"{options.config}: something is wrong with the data, see above")
    print("nothing is wrong")


def add_splits(parser: argparse.ArgumentParser) -> None:
    """The command line of ``splits``. Options left out are None, so that those of the other use are noticed."""
    parser.description = (
        "Complete data/splits with the published lists (exit status 1 if some could not be had), or draw new ones for "
        "own data (--new). See data/splits/README.md."
    )
    parser.set_defaults(command=splits)
    parser.add_argument("--out", type=Path, help="where the lists go (default data/splits; --new: needed)")
    parser.add_argument("--force", action="store_true", help="replace lists that differ, or earlier draws")
    published = parser.add_argument_group("published lists")
    published.add_argument("--dataset", choices=PUBLISHED)
    published.add_argument("--root", type=Path, help="the data set's folder: makes all lists that follow a rule")
    published.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        type=Path,
        help="a clone of the authors' repository, or any folder with the lists",
    )
    published.add_argument(
        "--download", action="store_true", default=None, help="get what is lacking from the authors' repository"
    )
    new = parser.add_argument_group("new lists")
    new.add_argument("--new", action="store_true", help="draw new lists")
    new.add_argument("--images", type=Path, help="a folder of images to draw from")
    new.add_argument("--list", type=Path, help="a list to draw from, instead")
    new.add_argument("--masks", type=Path, help="their masks: only images that have one become labeled or val")
    new.add_argument("--mask-suffix", help="a.jpg has the mask a<suffix>.png (default: none)")
    new.add_argument("--labeled", metavar="N|FRACTION", help="how many, or which fraction of all (100, 0.1, 1/16)")
    new.add_argument("--val", metavar="N|FRACTION", help="likewise, to validate on")
    new.add_argument("--seed", type=int, help="same seed, same lists (default 0)")
    new.add_argument(
        "--stratify", action="store_true", default=None, help="every class of the masks in labeled and in val"
    )


def splits(options: argparse.Namespace) -> None:
    """Published lists, or new ones."""
    foreign = [name for name in (_PUBLISHED if options.new else _NEW) if getattr(options, name) is not None]
    if foreign:
        flags = ", ".join(f"--{'from' if name == 'source' else name.replace('_', '-')}" for name in foreign)
        raise UserError(f"{flags}: only {'without' if options.new else 'with'} --new")
    if not options.new:
        if options.dataset is None:
            names = " or ".join(PUBLISHED)
            raise UserError(f"--dataset: missing; expected {names} (or --new, to draw lists for own data)")
        out = options.out or Path("data/splits")
        make_published(
            options.dataset, out, options.root, options.source, bool(options.download), options.force
        )  # fmt: skip
        return
    if (options.images is None) == (options.list is None):
        raise UserError("--new draws from a folder of images (--images) or from a list (--list): give one of them")
    if options.out is None or options.labeled is None:
        raise UserError("--new needs --out FOLDER and --labeled N|FRACTION")
    if options.masks is None and options.mask_suffix is not None:
        raise UserError("--mask-suffix: needs --masks")
    masks = None if options.masks is None else own_masks(options.images, options.masks, options.mask_suffix or "")
    draw_splits(
        options.out,
        read_list(options.list) if options.images is None else own_images(options.images, masks),
        options.labeled,
        options.val,
        seed=options.seed or 0,
        masks=masks,
        stratify=bool(options.stratify),
        force=options.force,
    )


if __name__ == "__main__":
    run_script(main)
