"""Scratch: a folder on this machine for one replica's copies of adapters. What killed replicas left is removed by the next that begins.

In: nothing, or a folder. Out: a folder that is locked for as long as its process lives. Runs in: serving replicas.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
PREFIX = "ftcore-adapters-"
YOUNG_S = 60.0
"""A folder may be this old before its owner has locked it."""


class Scratch:
    """`remove` when it is over; a process that dies leaves it to `Scratch.new` of another."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # the kernel gives it back, however the process ends

    @classmethod
    def new(cls, parent: Path | None = None) -> Scratch:
        """One of a name of its own, in the folder for temporary files."""
        parent = parent or Path(tempfile.gettempdir())
        for left in parent.glob(f"{PREFIX}*"):
            if _is_left(left):
                log.warning("removing what a replica that was killed left: %s", left)
                shutil.rmtree(left, ignore_errors=True)
        return cls(Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _is_left(path: Path) -> bool:
    """Whether a folder is ours, and nobody who lives holds it."""
    with suppress(OSError):
        found = path.lstat()
        if found.st_uid != os.getuid() or not path.is_dir() or path.is_symlink() or time.time() - found.st_mtime < YOUNG_S:
            return False
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(lock)
    return False
