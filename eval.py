"""Evaluate one network of a checkpoint, exactly as training does after each epoch.

python eval.py --config exps/shapes_imas/config.yaml --checkpoint exps/shapes_imas/checkpoints/ckpt_best.pth
torchrun --standalone --nproc_per_node=4 eval.py --config ... --checkpoint ... --network student --json out.json
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from imas import distributed
from imas.build import build_model
from imas.config import load_config
from imas.data.check import check_data
from imas.data.lists import read_lists
from imas.engine import checkpoint
from imas.engine.evaluate import Evaluation, figures, format_table
from imas.engine.log import start_logging
from imas.strict import UserError, run_script

log = logging.getLogger("imas")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a file written by training")
    parser.add_argument("--network", choices=("teacher", "student"), help="default: the teacher, if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check everything that can be checked, then evaluate."""
    options = parse(arguments)
    config = load_config(options.config, options.set)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    distributed.read_launcher()
    start_logging()
    lists = check_data(config, training=False) if distributed.is_main() else read_lists(config, False)
    state = checkpoint.read(options.checkpoint)
    name = options.network or ("teacher" if state.get("teacher_state") else "student")
    network = build_model(config.net, pretrained=False)
    checkpoint.load_network(network, name, state, options.checkpoint)
    with distributed.process_group() as device:
        evaluation = Evaluation(config, lists, device)
        matrix = evaluation({name: network.to(device)})[name]
    if not distributed.is_main():
        return
    log.info(
        "%s of %s (epoch %s) on %d images, windows of %d, in percent:\n%s",
        name, options.checkpoint, state.get("epoch"), len(lists.val), config.dataset.val.crop.size,
        format_table(matrix, evaluation.catalog.class_names),
    )  # fmt: skip
    log.info("mIoU %.2f", 100 * matrix.miou)
    if options.json is not None:
        protocol = {"network": name, "checkpoint": str(options.checkpoint), "epoch": state.get("epoch")}
        protocol |= {"images": len(lists.val), "window": config.dataset.val.crop.size}
        content = protocol | figures(matrix, evaluation.catalog.class_names)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        log.info("figures: %s", options.json)


if __name__ == "__main__":
    run_script(main)
