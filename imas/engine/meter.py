"""Scalars of training, kept on the device until they are looked at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import distributed
from ..strict import UserError


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; the last checkpoint is from before."""

    status = 1


class Meter:
    """Scalars of an epoch, read from the device only when a window of them is asked for."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Tensor]] = []
        self.read: list[dict[str, float]] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.waiting.append(scalars)

    def window(self, iteration: int) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks. ``iteration``: that of the last step.

        Raises:
            NonFiniteLoss: at the first step of the window with a scalar that is not finite.
        """
        names = list(self.waiting[0])
        values = torch.stack([torch.stack([step[name].float() for name in names]) for step in self.waiting])
        first = iteration + 1 - len(values)
        for offset, step in enumerate(values.tolist()):
            bad = [f"{name} = {value}" for name, value in zip(names, step) if not math.isfinite(value)]
            if bad:
                every = ", ".join(f"{name} = {value:.5g}" for name, value in zip(names, step))
                raise NonFiniteLoss(
                    f"iteration {first + offset}: {' and '.join(bad)} (all: {every}). The last checkpoint is from "
                    "before; a lower trainer.optimizer.kwargs.lr, or a look at the data, may help."
                )
        values = distributed.sum_over_ranks(values) / distributed.world_size()
        self.read += [dict(zip(names, step)) for step in values.tolist()]
        self.waiting.clear()
        return dict(zip(names, values.mean(0).tolist()))

    def means(self) -> dict[str, float]:
        """Means over the epoch."""
        return {name: sum(step[name] for step in self.read) / len(self.read) for name in self.read[0]}
