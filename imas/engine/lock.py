"""One live run a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from pathlib import Path
from typing import TextIO

from ..errors import UserError

log = logging.getLogger("imas")


def hold(folder: Path) -> TextIO:
    """Make the folder and lock it, for as long as the returned file stays open; host and pid are in it.

    The lock is the kernel's and goes with this process, however it ends; worker processes do not inherit it.

    Raises:
        UserError: another live run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 closed with the process
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder}: in use by another live run ({holder}). Stop that one, or name another folder with --out"
            ) from None
        # Lustre without -o flock, some NFS
        log.warning("%s: this file system has no locks (%s), so nothing stops two runs in it", folder, error.strerror)
    file.seek(0)
    file.truncate()
    file.write(f"host {platform.node()}, pid {os.getpid()}\n")
    file.flush()
    return file
