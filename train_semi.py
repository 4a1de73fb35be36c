"""Train one experiment.

    python train_semi.py --config exps/shapes_imas/config.yaml --seed 0
    torchrun --standalone --nproc_per_node=4 train_semi.py --config exps/.../config.yaml --seed 2
    sh single_run.sh exps/.../config.yaml                # the same, on all visible GPUs

Checkpoints go to <folder of the YAML>/<saver.snapshot_dir>/, everything else to <folder of the YAML>/log/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from imas import distributed
from imas.build import build_method
from imas.config import load_config
from imas.data.check import check_data
from imas.data.loaders import read_lists
from imas.engine.fit import fit
from imas.engine.log import start_logging
from imas.strict import UserError, run_script

log = logging.getLogger("imas")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the words of the authors' script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run (default 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a dotted key, for example trainer.epochs=2",
    )
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # old launchers pass these; torchrun knows better
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check everything that can be checked, then train."""
    options = parse(arguments)
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    config = load_config(options.config, options.set)
    start_logging()
    lists = check_data(config) if distributed.is_main() else read_lists(config)
    with distributed.process_group() as device:
        torch.manual_seed(options.seed)
        method = build_method(config).to(device)
        start_logging(config.log_dir)
        for line in config.translated:
            log.info("translated: %s", line)
        fit(method, config, lists, seed=options.seed, device=device)


if __name__ == "__main__":
    run_script(main)
