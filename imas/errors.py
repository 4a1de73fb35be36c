"""Mistakes that the person at the keyboard can mend, and how a script ends with them."""

from __future__ import annotations

import errno
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_NO_MEMORY = (
    "the GPU is out of memory. trainer.amp: bf16, trainer.checkpoint_encoder: true, or a smaller "
    "dataset.train.batch_size with a larger trainer.accumulate need less"
)
_WORKERS = (
    "a worker process that reads images has ended. If it was killed, memory is short: fewer dataset.workers need "
    "less. At a bus error, or where no space is left, shared memory is short: make /dev/shm larger (of a container: "
    "--shm-size), or set dataset.workers: 0"
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class UserError(Exception):
    """Something that the user can mend: one message, no traceback, an exit status."""

    status = 2  # 1: begun, but something is wrong or missing

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status or self.status


class ConfigError(UserError, ValueError):
    """Everything that is wrong with a configuration, one line each."""


class Together:
    """Several checks whose mistakes come as one ``UserError``: ``together(check, argument)`` returns what ``check``
    returns, or None where it failed.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            self.errors.append(str(error))
            return None

    def finish(self) -> None:
        """Raise all mistakes found, if any."""
        if self.errors:
            raise UserError("\n".join(self.errors))


def run_script(main: Callable[[], None]) -> None:
    """Call a script's ``main``. A ``UserError``, a full or read-only disk, a GPU out of memory and a worker process
    that has died end it with a message on stderr and an exit status instead of a traceback. Signs that a terminal or
    job log cannot show are replaced. A command whose output nobody reads any more (``| head``) ends; a training goes
    on, since its log file has what the console lacks.
    """
    logging.raiseExceptions = False  # a handler that cannot write says so in a traceback
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError as error:
        _end(f"nobody reads the output any more ({error.strerror})", 128 + signal.SIGPIPE)
    except UserError as error:
        _end(str(error), error.status)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what = "cannot be read or written" if error.errno == errno.EACCES else "cannot be written"
        _end(f"{error.filename or 'the output folder'}: {what} ({error.strerror})", UserError.status)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1:] or [""]
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this file does not import torch
            sentence, reason = _NO_MEMORY, str(error).splitlines()
        elif "DataLoader worker" in str(error) or "shared memory" in str(error) or "torch_shm" in str(error):
            sentence = _WORKERS
        else:
            raise
        _end(f"{sentence} ({reason[0]})", UserError.status)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the interpreter would print it once more, as a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(message: str, status: int) -> NoReturn:
    """With several processes the message names rank and host."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    who = f"rank {os.environ.get('RANK')} on {platform.node()}: " if several else ""
    print(f"error: {who}{message}", file=sys.stderr)
    sys.exit(status)
