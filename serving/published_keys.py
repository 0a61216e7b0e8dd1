"""Published keys: the public halves of the replicas' receipt keys, in the store, so that a receipt can be checked when its replica is gone.

In: a key id and its PEM. Out: all of them. Runs in: replicas (publish), the ingress (list).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from ftcore.errors import StorageError
from ftcore.storage import Folder

HOME = "_receipts"
"""No tenant can have this name."""
FRESH_S = 1.0
FILE = re.compile(r"([0-9a-f]{16})\.pub\.pem")


def publish_key(store: str, key_id: str, pem: str) -> None:
    """Raises StorageError when it cannot be kept: a replica whose receipts nobody could check does not begin."""
    if not Folder(store).create(f"{HOME}/{key_id}.pub.pem", pem.encode()):
        raise StorageError("another replica has published this receipt key", where=store, got=key_id)


def published_keys(store: str) -> dict[str, str]:
    """Key id -> PEM."""
    return _read(Folder(store) / HOME, {})


class PublishedKeys:
    """For whoever asks often: one listing does for a second, and a key, which never changes, is read once. On a thread of its own."""

    def __init__(self, store: str) -> None:
        self._folder, self._keys, self._listed = Folder(store) / HOME, dict[str, str](), -FRESH_S
        self._lock, self._reading = asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix="receipt-keys")

    async def now(self) -> dict[str, str]:
        """Key id -> PEM."""
        async with self._lock:
            if time.monotonic() - self._listed >= FRESH_S:
                self._keys = await asyncio.get_running_loop().run_in_executor(self._reading, _read, self._folder, self._keys)
                self._listed = time.monotonic()
            return self._keys

    def close(self) -> None:
        self._reading.shutdown(wait=False)


def _read(folder: Folder, known: Mapping[str, str]) -> dict[str, str]:
    names = [match for name in folder.files() if (match := FILE.fullmatch(name))]
    return {match[1]: known.get(match[1]) or folder.read(match[0]).decode() for match in names}
