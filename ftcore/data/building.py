"""Building: the half-made folder beside the prepared ones: locked while its process lives, swept when that process is gone.

In: the cache folder and a digest. Out: a scratch Folder that is removed in the end, whatever happens. Runs in: the driver.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftcore.errors import StorageError
from ftcore.storage import Folder, explain_oserror

PREFIX = ".building-"
_LOCK = "lock"
ABANDONED_S = 24 * 3600
log = logging.getLogger(__name__)


@contextmanager
def building(cache: Folder, digest: str) -> Iterator[Folder]:
    """A folder `<cache>/.building-<digest>-<token>` with `staged/` and `blocks/` in it, for one build.

    Local: first sweeps what killed processes left (their lock is free), then holds a lock of its own. Remote storage has no locks: there
    only what nobody wrote to for a day is swept. It is removed at the end, also after Ctrl-C.
    """
    scratch = cache / f"{PREFIX}{digest[:12]}-{secrets.token_hex(4)}"
    if not cache.is_local:
        sweep_remote(cache)
        try:
            yield scratch
        finally:
            _remove_remote(scratch)
        return
    try:
        sweep(cache.path)
        making = scratch.path.with_name(scratch.path.name.replace(PREFIX, ".making-"))
        for name in ("staged", "blocks"):
            (making / name).mkdir(parents=True)
        lock = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        making.rename(scratch.path)  # only now visible to `sweep`, and locked already
    except OSError as error:
        raise explain_oserror(error, "write", str(scratch)) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)
        os.close(lock)


def sweep(cache: Path) -> list[Path]:
    """Removes the building folders nobody holds; returns them."""
    swept = []
    for left in sorted(cache.glob(f"{PREFIX}*")):
        try:
            lock = os.open(left / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            continue  # its process is just removing it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        shutil.rmtree(left, ignore_errors=True)
        swept.append(left)
    return swept


def sweep_remote(cache: Folder) -> None:
    """Removes remote building folders in which nothing was written for ABANDONED_S."""
    for name in cache.names():
        if name.startswith(PREFIX):
            left = cache / name
            if all(time.time() - left.modified(key) > ABANDONED_S for key in left.files()):
                _remove_remote(left)


def _remove_remote(scratch: Folder) -> None:
    """What cannot be removed now is swept later; it must not hide how the build ended."""
    try:
        scratch.delete()
    except StorageError as error:
        log.warning("staged rows are left in %s: %s", scratch, error)
