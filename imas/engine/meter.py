"""Scalars of training, kept on the device until they are looked at; and the time that it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; the last checkpoint is from before."""

    status = 1


class Meter:
    """Scalars of an epoch, read from the device only when a window of them is asked for.

    Args:
        class_names: a scalar with a value for each class is read as ``name/class``.
    """

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        self.class_names = class_names
        self.clear()

    def clear(self) -> None:
        """Begin an epoch."""
        self.waiting: list[dict[str, Tensor]] = []
        self.read: list[dict[str, float]] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.waiting.append(scalars)

    def window(self, iteration: int) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks. ``iteration``: that of the last step.

        Raises:
            NonFiniteLoss: at the first step of the window with a scalar that is not finite.
        """
        names = []
        for name, value in self.waiting[0].items():
            names += [f"{name}/{each}" for each in self.class_names] if value.dim() else [name]
        mine = torch.stack([torch.cat([value.float().view(-1) for value in step.values()]) for step in self.waiting])
        first = iteration + 1 - len(mine)
        # Summed first: what is not finite on one rank stops all, at the same iteration.
        values = distributed.sum_over_ranks(mine.clone()) / distributed.world_size() + 0.0  # which makes 0 of -0
        for offset, step in enumerate(values.tolist()):
            bad = [f"{name} = {value}" for name, value in zip(names, step) if not math.isfinite(value)]
            if bad:
                every = ", ".join(f"{name} = {value:.5g}" for name, value in zip(names, step) if "/" not in name)
                finite = distributed.gather(bool(mine[offset].isfinite().all()))
                ranks = ", ".join(str(i) for i, fine in enumerate(finite) if not fine)
                where = f" on rank {ranks}" if len(finite) > 1 else ""
                raise NonFiniteLoss(
                    f"iteration {first + offset}: {' and '.join(bad)}{where} (all: {every}). The last checkpoint is "
                    "from before; a lower trainer.optimizer.kwargs.lr, or a look at the data, may help."
                )
        self.read += [dict(zip(names, step)) for step in values.tolist()]
        self.waiting.clear()
        return dict(zip(names, values.mean(0).tolist()))

    def means(self) -> dict[str, float]:
        """Means over the epoch."""
        return {name: sum(step[name] for step in self.read) / len(self.read) for name in self.read[0]}


class Clock:
    """Seconds of iterations since the clock was made, and those of waiting for data among them."""

    def __init__(self) -> None:
        self.began, self.waited, self.iterations = time.perf_counter(), 0.0, 0

    def waits(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``, with the waiting for each of them counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.iterations += 1
            yield batch

    def means(self) -> dict[str, float]:
        """Seconds per iteration. On a GPU they are true once the device has been waited for."""
        if not self.iterations:
            return {}
        seconds = time.perf_counter() - self.began
        return {"seconds": seconds / self.iterations, "seconds_waiting": self.waited / self.iterations}
