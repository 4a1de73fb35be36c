"""Seconds by part of what runs."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


class Clock:
    """Seconds by part. A part within another counts for itself alone. On a CPU this is processor time, of all threads,
    since other programs on the machine disturb that less.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.stack, self.detailed = device, Counter(), ["rest"], False
        self.now = time.perf_counter if device.type == "cuda" else time.process_time
        self.last = self.now()

    def lap(self) -> None:
        """Book the time since the last call for the part that runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what runs inside as this part, in rounds that look at parts (on a GPU they wait for it)."""
        if not self.detailed:
            yield
            return
        self.lap()
        self.stack.append(part)
        yield
        self.lap()
        self.stack.pop()

    def put_around(self, owner: object, **parts: str) -> None:
        """Let the time of ``owner``'s functions, by name, count for a part."""
        for name, part in parts.items():
            setattr(owner, name, partial(self._timed, part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable, *args, **kwargs):
        with self(part):
            return function(*args, **kwargs)

    def measure(self, step: Callable[[], object], detailed: bool) -> tuple[Counter, object]:
        """Seconds by part and as ``all``, and what the step gives."""
        gc.collect()
        self.detailed, self.seconds = detailed, Counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = self.last = self.now()
        result = step()
        self.lap()
        return self.seconds + Counter({"all": self.now() - start}), result
