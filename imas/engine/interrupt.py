"""Signals: a run that is asked to stop finishes its iteration, saves, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .. import distributed
from ..errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(UserError):
    """The run was asked to stop, and has saved; 75 is EX_TEMPFAIL: start again to go on."""

    status = 75


class Interruption:
    """Whether this run was asked to stop.

    With several processes all stop before the same iteration: whoever gets the signal announces one that lies far
    enough ahead for all (``distributed.announce``).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.announced = False

    def stops_before(self, iteration: int) -> bool:
        """Whether this iteration is not to begin. Asked on every rank before every iteration."""
        if distributed.world_size() == 1:
            return self.received is not None
        if self.received is not None and not self.announced:
            self.announced = True
            distributed.announce(iteration)
        announced = distributed.announced()
        return announced is not None and iteration >= announced


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Signals set a flag as long as this lasts; a second one of a kind acts as it always does. One that is ignored, as
    SIGHUP is under nohup, stays ignored.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: FrameType | None) -> None:
        interruption.received = signal.Signals(number)
        signal.signal(number, before[number])

    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
