"""The state of a run: held in one place, saved, and resumed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..data.catalog import catalog_of
from ..data.lists import Lists
from ..data.loaders import TrainingData
from ..data.normalise import Normalise
from ..methods.base import Labeled, Method, Progress, Unlabeled
from ..schema import Config
from . import checkpoint, precision, provenance
from .interrupt import Interrupted, Interruption
from .meter import Meter
from .optim import build_optimizer, lr_factor, param_groups, total_batch

log = logging.getLogger("imas")


@dataclass
class Run:
    """One run: what is trained, on what, and how far it is."""

    config: Config
    lists: Lists
    seed: int
    device: torch.device
    method: Method  # on the device, with the weights to start with
    interruption: Interruption  # whether to stop
    epoch: int = 0  # epochs done
    step: int = 0  # updates done in the epoch after these
    best: dict[str, float] | None = None  # best mIoU in percent of each network
    rates: dict[str, float] = field(default_factory=dict)  # what the method's last update gave for the log
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (index, score) of the epoch's unlabeled images
    whole: bool = True  # False within an update, while networks, teacher and momentum do not belong together
    pace: float | None = None  # seconds an iteration, as lately
    evaluating: float = 0.0  # seconds that the last evaluation took
    saved: float = field(default_factory=time.monotonic)  # time of the last checkpoint

    def __post_init__(self) -> None:
        config, method, world = self.config, self.method, distributed.world_size()
        self.data = TrainingData(config, self.lists, self.seed, distributed.rank(), world)
        precision.prepare(method, config.trainer, self.device)
        options = config.trainer.optimizer
        groups = param_groups(method.trained(), options.kwargs.decay)
        self.optimizer = build_optimizer(groups, options, lr_factor(config, world))
        self.scaler = precision.make_scaler(config.trainer, self.device)
        self.meter = Meter(catalog_of(config.dataset).class_names)  # of the epoch
        self.description = provenance.describe(config, self.lists, self.seed, world) | {
            "iterations_per_epoch": len(self.data),
            "parameters": {
                name: sum(weight.numel() for weight in network.parameters())
                for name, network in method.scored().items()
            },
        }

    def progress(self, iteration: int, batch: int = 0) -> Progress:
        """The progress that a batch of this iteration sees, with this rank's own random numbers for it."""
        counted = iteration * self.config.trainer.accumulate + batch
        words = (self.seed * 1_000_003 + counted) * 4096 + distributed.rank()
        generator = torch.Generator().manual_seed(words % 2**63)
        epoch = iteration // len(self.data)
        return Progress(epoch, self.config.trainer.epochs, iteration, len(self.data), generator)

    def stop_if_asked(self, iteration: int) -> None:
        """Raise ``Interrupted`` where this iteration is not to begin."""
        if self.interruption.stops_before(iteration):
            raise Interrupted(f"before iteration {iteration} (epoch {self.epoch})")

    def save_due(self) -> bool:
        """Whether the last checkpoint is older than ``saver.save_every``, by the clock of rank 0."""
        every = self.config.saver.save_every
        if every is None:
            return False
        due = distributed.is_main() and time.monotonic() - self.saved > 60 * every
        return distributed.any_rank(due, self.device)


def save(run: Run, improved: bool) -> None:
    """Write the checkpoint; called on all ranks, since each has a part of an epoch that is not done."""
    partial = None
    if run.step:
        if run.meter.waiting:
            run.meter.window(run.epoch * len(run.data) + run.step - 1)
        scores = [(index.cpu(), score.cpu()) for index, score in run.scores]
        partial = {"metrics": run.meter.read, "scores": distributed.gather(scores)}
    run.saved = time.monotonic()
    if not distributed.is_main():
        return
    state = {
        "epoch": run.epoch,
        "step": run.step,
        "iterations_per_epoch": len(run.data),
        **checkpoint.method_states(run.method),
        "optimizer_state": run.optimizer.state_dict(),
        "scaler_state": run.scaler.state_dict(),
        "best_miou": None if run.best is None else next(iter(run.best.values())),
        "best": run.best,
        "rates": run.rates,
        "seed": run.seed,
        "config": run.config.to_dict(),
        "run": run.description,
        "partial": partial,
    }
    best = run.config.snapshot_dir / checkpoint.BEST if improved else None
    if best is not None:  # first: a run that is cut off in between repeats the epoch
        checkpoint.save(state, best)
    checkpoint.save(state, run.config.snapshot_dir / checkpoint.LAST, twin=best)
    if run.step:
        path = run.config.snapshot_dir / checkpoint.LAST
        log.info("saved after %d updates of epoch %d: %s", run.step, run.epoch, path)


def resume(run: Run, path: Path, by_hand: bool) -> None:
    """Set a run to the state of a checkpoint, and log what has changed since then.

    Raises:
        UserError: it cannot be used; it is of another run (``provenance.need_same``).
    """
    state, path = checkpoint.read_or_previous(path)
    recipe = provenance.need_same(path, state, run.config, run.seed, by_hand)
    checkpoint.resume(state, path, run.method, run.optimizer)
    run.epoch, run.step = state["epoch"], state.get("step", 0)
    run.best, run.rates = state.get("best"), state.get("rates") or {}
    before = state.get("run")  # of the authors' code: None
    if changed := [*recipe, *(provenance.surroundings_changed(before, run.description) if before else ())]:
        log.warning("%s", "\n  ".join(["changed since the checkpoint:", *changed]))
    if run.best and provenance.val_digest(before) != provenance.val_digest(run.description):
        best = next(iter(run.best.values()))
        log.warning("the best mIoU until now (%.2f) is of another val list: the best starts anew", best)
        run.best = None
    world, length = distributed.world_size(), len(run.data)
    former_world = (before or {}).get("processes", 1)
    if run.step and (former_world, state["iterations_per_epoch"]) != (world, length):
        # Images are dealt to the ranks in turn: those of the updates done are the first of the epoch's order.
        seen, batch = run.step * before["total_batch"], total_batch(run.config, world)
        run.step = min(seen // batch, length)
        log.warning(
            "%s: is from within an epoch of %d updates of %d images; of the %d images seen the last %d are seen again, "
            "and update %d of %d comes next",
            path, state["iterations_per_epoch"], before["total_batch"], seen, max(seen - run.step * batch, 0),
            run.step + 1, length,
        )  # fmt: skip
    if (run.epoch or run.step) and former_world != world:
        log.warning(
            "the run was on %d process(es) until now and goes on with %d: it is no longer bitwise the same run",
            former_world, world,
        )  # fmt: skip
    if state.get("scaler_state"):
        run.scaler.load_state_dict(state["scaler_state"])
    if partial := state.get("partial"):
        run.meter.read = partial["metrics"]
        scores = partial["scores"] if former_world == world else [sum(partial["scores"], [])]
        mine = scores[distributed.rank()] if distributed.rank() < len(scores) else []
        run.scores = [(index.to(run.device), score.to(run.device)) for index, score in mine]


def to_device(batch: dict[str, Any], normalise: Normalise, device: torch.device) -> tuple[Labeled, Unlabeled | None]:
    """A batch of the loader on the device: images normalised, labels as int64, padding as a mask."""

    def images(values: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(normalise(value.to(device, non_blocking=True)) for value in values)

    def tensor(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    first, second = batch["labeled"], batch.get("unlabeled")
    labeled = Labeled(*images([first["image"]]), tensor(first["label"]).long(), images(first["strong"]))
    if second is None:
        return labeled, None
    (weak,), real = images([second["weak"]]), tensor(second["real"])
    rows, columns = (torch.arange(side, device=device) for side in weak.shape[-2:])
    valid = (rows < real[:, :1]).unsqueeze(2) & (columns < real[:, 1:]).unsqueeze(1)
    label = tensor(second["label"]).long() if "label" in second else None
    return labeled, Unlabeled(weak, images(second["strong"]), valid, tensor(second["index"]), label)
