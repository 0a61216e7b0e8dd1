"""Residents: which digests a live engine knows, and the loads and unloads that change it, one at a time for a digest.

In: what loads or unloads a digest. Out: nothing; the digest is known, or is not. Runs in: an engine's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

Change = Callable[[], Coroutine[Any, Any, None]]


class Residents:
    """Of several callers that want the same change, one makes it; what one caller gives up goes on for the others."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self._changes: dict[str, asyncio.Task[None]] = {}
        """The load or unload of a digest that is under way."""

    async def bring_in(self, digest: str, load: Change) -> None:
        """Returns once the digest is known: `load` adds it to `known`, or raises the reason."""
        while digest not in self.known:
            await self._change(digest, load)

    async def take_out(self, digest: str, unload: Change) -> None:
        """Returns once the digest is gone: `unload` takes it out of `known` first."""
        while digest in self.known or digest in self._changes:
            await self._change(digest, unload)

    async def _change(self, digest: str, begin: Change) -> None:
        task = self._changes.get(digest)
        if task is None:
            task = self._changes[digest] = asyncio.create_task(begin())
            task.add_done_callback(lambda _: self._changes.pop(digest, None))
            await asyncio.shield(task)
            return
        with contextlib.suppress(Exception):  # its own caller hears of it; this one looks again
            await asyncio.shield(task)
        await asyncio.sleep(0)

    async def settle(self) -> None:
        """Waits for the changes that are under way, however they end."""
        for task in list(self._changes.values()):
            with contextlib.suppress(Exception):  # its own caller hears of it
                await task
