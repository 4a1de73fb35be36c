"""One experiment as stages: each trains one method on its lists, in folders of its own, and is done once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from .. import distributed
from ..data.lists import Lists
from ..methods.base import Method
from ..schema import Config
from . import checkpoint
from .fit import fit
from .log import start_logging

log = logging.getLogger("imas")

_DONE = "done"  # the file that marks a finished stage, beside its checkpoints


class Session:
    """What a method's ``run`` trains with.

    Args:
        config: of the experiment.
        lists: its images.
        build: (config, method class, whether to load pretrained encoders) → method.
        finish: called with the configuration of each stage that has ended, on the main process.
        resume: ``auto``, ``never`` or a checkpoint file: see ``checkpoint.find_checkpoint``.
    """

    def __init__(
        self,
        config: Config,
        lists: Lists,
        *,
        seed: int,
        device: torch.device,
        build: Callable[[Config, type[Method], bool], Method],
        finish: Callable[[Config], None],
        resume: str,
    ) -> None:
        self.config, self.lists, self.seed, self.device = config, lists, seed, device
        self.build, self.finish, self.resume = build, finish, resume

    def fit(
        self,
        stage: str,
        kind: type[Method],
        config: Config | None = None,
        lists: Lists | None = None,
        start: Path | None = None,
        momentum: str | None = None,
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

        Returns:
            The stage's configuration, whose ``snapshot_dir`` has its checkpoints.
        """
        config, lists = config or self.config, lists or self.lists
        config = dataclasses.replace(config, stage=stage, wants=kind.wants(config.options))
        mark = config.snapshot_dir / _DONE
        if stage and mark.is_file() and self.resume != "never":
            log.info("stage %s is done: %s", stage, config.snapshot_dir)
            return config
        found = checkpoint.find_checkpoint(config.snapshot_dir, self._resume(config))
        start = start or (None if config.trainer.start_from is None else Path(config.trainer.start_from))
        torch.manual_seed(self.seed)
        method = self.build(config, kind, found is None and start is None)
        if found is None and start is not None:
            checkpoint.start_from(method.networks(), start)
        start_logging(config.log_dir)
        if stage:
            log.info("stage %s begins", stage)
        fit(
            method.to(self.device),
            config,
            lists,
            seed=self.seed,
            device=self.device,
            resumed_from=found,
            by_hand=self.resume not in ("auto", "never"),
            momentum=None if found is not None or momentum is None else (start, momentum),
        )
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
        if not config.stage or self.resume in ("auto", "never"):
            return self.resume
        return self.resume if Path(self.resume).resolve().parent == config.snapshot_dir.resolve() else "auto"
