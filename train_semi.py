"""Train one experiment.

    python train_semi.py --config exps/shapes_imas/config.yaml --seed 0
    torchrun --standalone --nproc_per_node=4 train_semi.py --config exps/.../config.yaml --seed 2
    sh single_run.sh exps/.../config.yaml                # the same, on all visible GPUs

Checkpoints go to OUT/<saver.snapshot_dir>/, everything else to OUT/log/. OUT is ``--out``, by default the folder of the
YAML.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

import torch
import yaml

from imas import distributed
from imas.build import build_method
from imas.config import load_config
from imas.data.check import check_data, examine
from imas.data.lists import Lists, read_lists
from imas.data.loaders import TrainingData
from imas.engine import checkpoint, lock, provenance
from imas.engine.interrupt import interruptible
from imas.engine.log import need_tensorboard, start_logging
from imas.engine.optim import AVERAGES, explain_batch
from imas.engine.provenance import in_numbers
from imas.engine.session import Session
from imas.errors import Together, UserError, run_script
from imas.methods import METHODS
from imas.report import write as write_page
from imas.schema import Config
from imas.strict import replaced

log = logging.getLogger("imas")
_DECODED = 50  # images of each training list that --check decodes, beside all masks and validation images


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the words of the authors' script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run (default 0)")
    override = "override a dotted key, for example trainer.epochs=2"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of all outputs (default: that of the YAML)")
    resume = "go on from the last checkpoint if there is one, never, or from this file (default: saver.auto_resume)"
    parser.add_argument("--resume", metavar="auto|never|FILE", help=resume)
    parser.add_argument("--check", action="store_true", help="look at everything, print the resolved recipe, and stop")
    bitwise = "CUDA kernels that repeat bitwise where there are such; slower"
    parser.add_argument("--deterministic", action="store_true", help=bitwise)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # old launchers pass these; torchrun knows better
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check everything that can be checked, then train."""
    options = parse(arguments)
    distributed.read_launcher()  # first: errors name the rank
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    config = load_config(options.config, options.set)
    if options.out is not None:
        config = replaced(config, {"out": options.out})
    start_logging()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # warns of kernels that have no such variant
        warnings.filterwarnings("ignore", "_histc_cuda")  # it adds ones, which is exact in any order
        torch.backends.cudnn.benchmark = False
    resume = options.resume or ("auto" if config.saver.auto_resume else "never")
    lists = prepare(config, resume, options.seed, options.check)
    if options.check:
        if distributed.is_main():
            show_recipe(config, lists, options.seed)
        return
    with distributed.process_group() as device, interruptible() as interruption:
        distributed.agree(provenance.identity(config, options.seed))
        lists = distributed.gather(lists)[0]
        _lock = lock.hold(config.log_dir) if distributed.is_main() else None
        start_logging(config.log_dir)
        if config.translated:
            log.info("translated: %s", "; ".join(config.translated))
        session = Session(
            config, lists, seed=options.seed, device=device, build=build_method, finish=write_report, resume=resume,
            interruption=interruption,
        )  # fmt: skip
        METHODS[config.method].run(session)


def prepare(config: Config, resume: str, seed: int, check: bool) -> Lists | None:
    """Look at everything that can be wrong with data, weights and checkpoints, before a folder is made. Rank 0 alone
    lists folders and reads images; the others get None.

    Args:
        check: nothing will be written, so that checkpoints of another run in the folder are warnings.

    Raises:
        UserError: all mistakes.
    """
    together = Together()
    in_folder = Together() if check and resume in ("auto", "never") else together
    together(_check_batch, config)
    resumed = in_folder(checkpoint.find_checkpoint, config.snapshot_dir, resume)
    stages = METHODS[config.method].stages  # each is compared with its own recipe when it begins
    if resumed is not None and distributed.is_main() and not stages:
        in_folder(_check_resumed, resumed, config, seed, resume != "auto")
    lists = together(read_lists if check else check_data, config) if distributed.is_main() else None
    if config.saver.use_tb and distributed.is_main():
        together(need_tensorboard)
    start = None if resumed is not None else config.trainer.start_from
    method = together(build_method, config, None, resumed is None and start is None)
    if method is not None and start is not None:
        together(checkpoint.start_from, method.networks(), start)
    if method is not None:
        together(checkpoint.need_space, config.snapshot_dir, method, AVERAGES[config.trainer.optimizer.type])
    together.finish()
    for line in in_folder.errors:
        log.warning("a training would not begin in this folder: %s", line)
    return lists


def _check_resumed(path: Path, config: Config, seed: int, by_hand: bool) -> None:
    state, path = checkpoint.read_or_previous(path)
    provenance.need_same(path, state, config, seed, by_hand)


def _check_batch(config: Config) -> None:
    """BatchNorm of ASPP's pooled branch sees one value of each channel an image."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or not config.net.sync_bn
    if config.dataset.train.batch_size == 1 and alone:
        raise UserError(
            "dataset.train.batch_size: 1, but BatchNorm cannot train on one image; take 2 or more, or net.sync_bn on "
            "several processes"
        )


def show_recipe(config: Config, lists: Lists, seed: int) -> None:
    """Print, for ``--check``, the resolved recipe, iterations, and differences from the reference batch."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    data = TrainingData(replaced(config, {"dataset.cache": False}), lists, seed, 0, world)  # counted, not read
    log.info("the resolved recipe of %s:\n%s", config.path, yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip())
    if config.translated:
        log.info("translated: %s", "; ".join(config.translated))
    for line in explain_batch(config, world):
        log.warning(line)
    found = examine(config, lists, decoded=_DECODED)
    log.info("data, with %d images of each training list:\n%s", _DECODED, "\n".join([found.table, *found.lines()]))
    log.info("%s", in_numbers(config, lists, len(data), world))
    if found.wrong:
        raise UserError("something is wrong with the data, see above; python -m imas.data check looks at all of it", 1)
    log.info("checked: nothing is wrong, and nothing was written")


def write_report(config: Config) -> None:
    """Write the page of a run or stage. A run that is done and saved does not fail for want of it."""
    try:
        log.info("report:       %s", write_page([config.log_dir], config.log_dir / "report.html"))
    except Exception as error:
        unforeseen = not isinstance(error, (UserError, OSError))
        log.warning("the page of the run was not written, the run itself is whole: %s", error, exc_info=unforeseen)


if __name__ == "__main__":
    run_script(distributed.for_summary(main))
