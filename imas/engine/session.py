"""One experiment as stages, each in folders of its own and done once: trainings, and what networks of an earlier
training make of images (``inference``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import distributed
from ..data.check import look_at, refused
from ..data.lists import Lists
from ..errors import UserError
from ..methods.base import Method
from ..schema import Config
from . import checkpoint, provenance
from .fit import fit
from .inference import Inference
from .interrupt import Interrupted, Interruption
from .log import set_aside, start_logging
from .precision import prepare_network
from .run import Run, resume

log = logging.getLogger("imas")

_DONE = "done"  # the file that marks a finished stage, beside its checkpoints


@dataclass
class Session:
    """Trains the stages of a method, called by its ``run``."""

    config: Config  # of the experiment
    lists: Lists
    seed: int
    device: torch.device
    build: Callable[[Config, type[Method], bool], Method]  # the last argument: whether to load pretrained encoders
    finish: Callable[[Config], None]  # called with the configuration of a stage that has ended, on the main process
    resume: str  # ``auto``, ``never`` or a checkpoint file: see ``checkpoint.find_checkpoint``
    interruption: Interruption

    def __post_init__(self) -> None:
        self.by_hand = self.resume not in ("auto", "never")
        self.inference = Inference(self.config, self.device, self.interruption)

    def fit(
        self,
        stage: str,
        kind: type[Method],
        config: Config | None = None,
        lists: Lists | None = None,
        start: Path | None = None,
        momentum: str | None = None,
        keep: Collection[int] = (),
    ) -> Config:
        """Train one stage, or what is left of it; a stage that is done is skipped.

        Args:
            stage: its name and the name of its folders below those of checkpoints and logs; "" for a method without
                stages, whose folders those are.
            kind: the method class that is trained.
            config: of this stage, where it differs from the experiment's.
            lists: of this stage, where they differ.
            start: a checkpoint whose networks the stage starts from.
            momentum: a network whose momentum goes on from there, too. The stage trains it alone.
            keep: numbers of epochs, from 1, whose networks stay (``checkpoint.kept``).

        Returns:
            The stage's configuration, whose ``snapshot_dir`` has its checkpoints.

        Raises:
            UserError: the stage was trained with another seed or recipe; pseudo labels that are missing or do not fit.
        """
        config, lists = config or self.config, lists or self.lists
        config = dataclasses.replace(config, stage=stage, wants=kind.wants(config.options))
        mark = config.snapshot_dir / _DONE
        found = checkpoint.find_checkpoint(config.snapshot_dir, self._resume(config))
        if stage and mark.is_file():
            done = self.last(config)
            if changed := provenance.need_same(done, checkpoint.read(done), config, self.seed, self.by_hand):
                log.warning("%s", "\n  ".join([f"changed since stage {stage}, which stays as it is:", *changed]))
            log.info("stage %s is done: %s", stage, config.snapshot_dir)
            return config
        if stage and distributed.any_rank(self.interruption.asked(0), self.device):
            raise Interrupted(f"before stage {stage}")
        self._check_labels(config, lists)
        start = start or (None if config.trainer.start_from is None else Path(config.trainer.start_from))
        torch.manual_seed(self.seed)
        method = self.build(config, kind, found is None and start is None)
        if found is None and start is not None:
            checkpoint.start_from(method.networks(), start)
        start_logging(config.log_dir)
        if stage:
            log.info("stage %s begins", stage)
        run = Run(config, lists, self.seed, self.device, method.to(self.device), self.interruption)
        if found is not None:
            resume(run, found, self.by_hand)
        elif momentum is not None:
            checkpoint.take_momentum(run.optimizer, start, momentum)
        own = found is not None and found.parent.resolve() == config.snapshot_dir.resolve()
        if distributed.is_main() and not own:
            set_aside(config.folder, stage)
        source = "none" if found is None else found.name
        distributed.agree({"checkpoint": source, "epochs done": run.epoch, "updates done of the next": run.step})
        fit(run, keep)
        if distributed.is_main():
            self.finish(config)
            if stage:
                mark.touch()
        distributed.barrier()  # the next stage reads what this one has written
        return config

    def last(self, config: Config) -> Path:
        """The last checkpoint of a stage that is done, by the configuration that ``fit`` gave."""
        return config.snapshot_dir / checkpoint.LAST

    def _resume(self, config: Config) -> str:
        """A checkpoint file resumes the stage that it belongs to; the other stages go on by themselves."""
        if not self.by_hand:
            return self.resume
        folder, own = Path(self.resume).resolve().parent, config.snapshot_dir.resolve()
        another = folder != own and (config.stage or folder.is_relative_to(own))
        return "auto" if another else self.resume

    def _check_labels(self, config: Config, lists: Lists) -> None:
        """See that each unlabeled image of a stage has a pseudo label that fits, if it reads such."""
        folders = (each.dataset.train.pseudo_labels for each in (config, self.config))
        if not config.wants.pseudo_label or len(set(folders)) == 1:  # those of the experiment were looked at before
            return
        mine = Lists([], lists.unlabeled[distributed.rank() :: distributed.world_size()], [])
        if problems := sum(distributed.gather(refused(config, look_at(config, mine))), []):
            raise UserError("\n".join(problems))

    def network(self, kind: type[Method], stage: Config, which: str | int) -> nn.Module:
        """A network of a stage that has been trained, on the device, in eval mode.

        Args:
            kind: the method class that was trained; the network is the one that it selects the best checkpoint by.
            stage: what ``fit`` returned.
            which: ``best`` (the last if no evaluation gave a figure), ``last``, or an epoch of ``keep``.

        Raises:
            UserError: see ``checkpoint.read`` and ``checkpoint.load_network``.
        """
        file = {"best": checkpoint.BEST, "last": checkpoint.LAST}.get(which) or checkpoint.kept(which)
        if which == "best" and not (stage.snapshot_dir / file).is_file():
            file = checkpoint.LAST
        path = stage.snapshot_dir / file
        name, network = next(iter(self.build(self.config, kind, False).scored().items()))
        checkpoint.load_network(network, name, checkpoint.read(path), path)
        prepare_network(network, self.config.trainer)
        return network.to(self.device).eval()
