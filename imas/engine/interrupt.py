"""Signals: a run that is asked to stop finishes its iteration, saves, and prints how to go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .. import distributed
from ..errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ONE_REQUEST = 5.0  # seconds within which copies of a signal are one request: SLURM and torchrun both send it


class Interrupted(UserError):
    """The run was asked to stop, and has saved; 75 is EX_TEMPFAIL: start again to go on."""

    status = 75

    def __init__(self, where: str) -> None:
        super().__init__(f"stopped {where} and saved; the same command with --resume auto goes on from there")


class Interruption:
    """Whether this run was asked to stop.

    With several processes all stop before the same iteration: whoever gets the signal announces one that no rank can
    have begun (``distributed.announce``).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.announced = False

    def asked(self, iteration: int) -> bool:
        """Whether the run is to stop soon, as far as this rank knows.

        Args:
            iteration: the next one of this rank, so that the others learn when to stop.
        """
        if distributed.world_size() == 1:
            return self.received is not None
        if self.received is not None and not self.announced:
            self.announced = True
            distributed.announce(iteration)
        return self.received is not None or distributed.announced() is not None

    def stops_before(self, iteration: int) -> bool:
        """Whether this iteration is not to begin. Asked on every rank before every iteration."""
        return self.asked(iteration) and (distributed.world_size() == 1 or distributed.announced() <= iteration)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Signals are noted as long as this lasts. One that comes again after some seconds acts as it always does.

    A run that leaves this by ``Interrupted`` has saved and is about to end with its own status: signals that come then
    are ignored. SIGHUP stays ignored where it was, under nohup.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    first: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        interruption.received = signal.Signals(number)
        if time.monotonic() - first.setdefault(number, time.monotonic()) > _ONE_REQUEST:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    noted = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in noted}
    after = before
    try:
        yield interruption
    except Interrupted:
        after = dict.fromkeys(noted, signal.SIG_IGN) if interruption.received is not None else before
        raise
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)
