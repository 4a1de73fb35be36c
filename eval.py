"""Evaluate a network of a checkpoint, or predict images with it, on a CPU, a GPU, or several by torchrun.

As training does after each epoch, on the validation list of the configuration that the checkpoint carries:

    python eval.py --checkpoint exps/shapes_imas/checkpoints/ckpt_best.pth
    torchrun --standalone --nproc_per_node=4 eval.py --checkpoint FILE --network student --json out.json

Another list, other views, all that can be written; checkpoints of the authors' code need a configuration beside them:

    python eval.py --config CONFIG --checkpoint FILE --list test.txt --root DATA --flip --scales 0.75 1 1.25 \\
        --json out.json --csv out.csv --confusion confusion.png

Images without ground truth, each at its own size; OUT gets the folders index (class numbers as PNGs with the palette),
overlay (the image, half covered by the colours) and confidence (the class's mean probability, grey 0..255 for 0..1):

    python eval.py --checkpoint FILE --images photos --save-dir OUT

With --min-confidence 0.9 less sure pixels are 255 in the index PNGs: masks to train on, which leave such pixels out.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from imas import distributed
from imas.config import carried_config, load_config
from imas.data.catalog import catalog_of
from imas.data.check import check_data
from imas.engine import checkpoint
from imas.engine.evaluate import Evaluation, figures, format_table, write_csv, write_json
from imas.engine.log import start_logging
from imas.engine.pictures import confusion_picture
from imas.engine.predict import find_images, predict_images
from imas.engine.sliding import Predictor, Protocol
from imas.errors import Together, UserError, run_script
from imas.files import replacing
from imas.library import network_of
from imas.schema import Config
from imas.strict import replaced

log = logging.getLogger("imas")
_WITH_TRUTH = ("list", "root", "json", "csv", "confusion")
_WITHOUT_TRUTH = ("save_dir", "cityscapes_ids", "min_confidence")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a file written by training")
    parser.add_argument("--config", type=Path, help="an experiment's YAML (default: what the checkpoint carries)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key of it")
    parser.add_argument("--network", metavar="NAME", help="default: the one that selected the best checkpoint")
    how = parser.add_argument_group("views of an image (default: windows of dataset.val.crop.size)")
    how.add_argument("--whole", action="store_true", help="one window as large as the image")
    how.add_argument("--flip", action="store_true", help="average probabilities with those of the mirrored image")
    factors = {"nargs": "+", "type": float, "default": [1.0], "metavar": "S"}
    how.add_argument("--scales", **factors, help="average over the image resized by these factors")
    where = "where to sum probabilities (default: device; on the CPU an image for which it is too small)"
    how.add_argument("--accumulate", choices=("device", "cpu"), default="device", help=where)
    truth = parser.add_argument_group("evaluation")
    truth.add_argument("--list", type=Path, metavar="FILE", help="these images, not dataset.val.data_list")
    truth.add_argument("--root", type=Path, metavar="DIR", help="their folder, not dataset.val.data_root")
    truth.add_argument("--json", type=Path, metavar="FILE", help="write all figures, unrounded, with the protocol")
    truth.add_argument("--csv", type=Path, metavar="FILE", help="the same, a row a class")
    truth.add_argument("--confusion", type=Path, metavar="FILE.png", help="a picture of the confusion matrix")
    free = parser.add_argument_group("prediction, without ground truth")
    images = "image files (quote a pattern); sub-folders are kept"
    free.add_argument("--images", nargs="+", metavar="DIR|FILE|GLOB", help=images)
    free.add_argument("--save-dir", type=Path, metavar="OUT", help="folder for the predictions")
    free.add_argument("--min-confidence", type=float, default=0.0, metavar="P", help="write 255 for less sure pixels")
    ids = "write labelIds, as the Cityscapes test server wants them"
    free.add_argument("--cityscapes-ids", action="store_true", help=ids)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check everything that can be checked, then evaluate or predict."""
    options = parse(arguments)
    check_options(options)
    distributed.read_launcher()
    start_logging()
    state = checkpoint.read(options.checkpoint)
    config = read_config(options, state)
    protocol = Protocol(None if options.whole else config.dataset.val.crop.size, options.flip, tuple(options.scales))
    name, network = network_of(state, options.checkpoint, config, options.network)
    about = {"network": name, "checkpoint": str(options.checkpoint), "epoch": state.get("epoch")}
    (evaluate_list if options.images is None else predict_files)(options, config, network, protocol, about)


def check_options(options: argparse.Namespace) -> None:
    """Flags that contradict each other, and outputs that could not be written.

    Raises:
        UserError: all of them.
    """
    together, given = Together(), vars(options)
    predicts = options.images is not None
    names, why = (_WITH_TRUTH, "--images has no ground truth") if predicts else (_WITHOUT_TRUTH, "only with --images")
    flags = [f"--{name.replace('_', '-')}" for name in names if given[name]]
    if flags:
        together.errors.append(f"{', '.join(flags)}: {why}")
    if predicts and options.save_dir is None:
        together.errors.append("--images: needs --save-dir OUT, the folder for the predictions")
    if not all(0 < scale < float("inf") for scale in options.scales):
        together.errors.append(f"--scales {' '.join(map(str, options.scales))}: expected numbers above 0")
    if not 0 <= options.min_confidence <= 1:
        together.errors.append(f"--min-confidence {options.min_confidence:g}: expected a number between 0 and 1")
    for name in ("json", "csv", "confusion"):
        if given[name] is not None:
            together(need_writable, f"--{name}", given[name])
    if options.confusion is not None and options.confusion.suffix.lower() != ".png":
        together.errors.append(f"--confusion {options.confusion}: expected a name that ends in .png")
    if options.save_dir is not None:
        together(need_writable, "--save-dir", options.save_dir, True)
    together.finish()


def need_writable(flag: str, path: Path, folder: bool = False) -> None:
    """Check that a file, or a ``folder`` that may not exist yet, can be written.

    Raises:
        UserError: it cannot.
    """
    if not folder and path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; expected the name of a file")
    where = path.absolute() if folder else path.absolute().parent
    while folder and not where.exists():
        where = where.parent
    if not where.exists():
        raise UserError(f"{flag} {path}: there is no folder {where}")
    if not where.is_dir():
        raise UserError(f"{flag} {path}: {where} is a file; expected a folder")
    if not os.access(where, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {where} cannot be written to")


def read_config(options: argparse.Namespace, state: dict[str, Any]) -> Config:
    """The configuration of ``--config``, or of the checkpoint, with what the command line overrides.

    Raises:
        UserError: a checkpoint without a configuration; flags that do not fit the data set.
    """
    if options.config is not None:
        config = load_config(options.config, options.set)
    else:
        config = carried_config(state.get("config"), options.checkpoint, options.set)
    catalog = catalog_of(config.dataset)
    if options.cityscapes_ids and catalog.test_ids is None:
        raise UserError(f"--cityscapes-ids: the data set of this configuration is {config.dataset.type}")
    if options.root is not None and catalog.files is None:
        raise UserError(f"--root: the data set {config.dataset.type} has no folder")
    given = {"dataset.val.data_list": options.list, "dataset.val.data_root": options.root}
    return replaced(config, {key: str(path) for key, path in given.items() if path is not None})


def evaluate_list(
    options: argparse.Namespace, config: Config, network: nn.Module, protocol: Protocol, about: dict[str, Any]
) -> None:
    """Count on labeled images; print the table, and write what was asked for."""
    lists = check_data(config, training=False) if distributed.is_main() else None
    with distributed.process_group() as device:
        lists = distributed.gather(lists)[0]
        evaluation = Evaluation(config, lists, device, protocol, options.accumulate)
        (matrix,) = evaluation({about["network"]: network.to(device)}).values()
    if not distributed.is_main():
        return
    names, how = evaluation.catalog.class_names, f"{len(lists.val)} images, {protocol}"
    what = "{network} of {checkpoint} (epoch {epoch})".format_map(about)
    means = f"mIoU {100 * matrix.miou:.2f}, fwIoU {100 * matrix.fwiou:.2f}"
    log.info("%s on %s, in percent:\n%s", what, how, format_table(matrix, names))
    log.info("%s (%s, %s)", means, about["network"], how)
    record = about | {"list": config.dataset.val.data_list, "images": len(lists.val)} | protocol.to_dict()
    if options.json is not None:
        write_json(options.json, record | figures(matrix, names))
    if options.csv is not None:
        write_csv(options.csv, record, figures(matrix, names))
    if options.confusion is not None:
        with replacing(options.confusion) as temporary:
            confusion_picture(matrix, names, f"{means}: {what} on {how}.").save(temporary, "PNG")
    for path in filter(None, (options.json, options.csv, options.confusion)):
        log.info("written: %s", path)


def predict_files(
    options: argparse.Namespace, config: Config, network: nn.Module, protocol: Protocol, about: dict[str, Any]
) -> None:
    """Write predictions of image files.

    Raises:
        UserError: with status 1, after all others were written: files could not be read or would share their outputs.
    """
    images, problems = find_images(options.images, options.save_dir)
    count = len(images) + len(problems)
    log.info("%s of %s (epoch %s) on %d images, %s", *about.values(), len(images), protocol)
    with distributed.process_group() as device:
        predictor = Predictor(protocol, device, options.accumulate)
        ids = catalog_of(config.dataset).test_ids if options.cityscapes_ids else None
        how = (predictor, config.dataset, options.save_dir, ids, options.min_confidence)
        problems += predict_images(network.to(device), images, *how)
    if problems and distributed.is_main():
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{len(problems)} of {count} images have no prediction (all others are written):\n{lines}", 1)


if __name__ == "__main__":
    run_script(distributed.for_summary(main))
