"""Turns: places that owners take in turn, so that who asks much does not make who asks little wait behind all of it.

In: owners. Out: their turns. Runs in: one event loop, of the ingress or a replica; no Ray.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """So many places; of the owners that wait, each gets one before any gets another."""

    def __init__(self, num_places: int, each: int = 1) -> None:
        """`each`: places that one owner holds at most."""
        self._num_places, self._each = num_places, each
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Whoever is next comes first."""
        self._held: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        await self._take(owner)
        try:
            yield
        finally:
            self._give_back(owner)

    async def in_thread(self, owner: str, pool: Executor, do: Callable[[], T]) -> T:
        """What `do` returns. The place is held until it has ended, also where nobody waits for it any more."""
        await self._take(owner)
        task = asyncio.get_running_loop().run_in_executor(pool, do)
        task.add_done_callback(lambda _: self._give_back(owner))
        return await asyncio.shield(task)

    async def _take(self, owner: str) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(waiter)
        self._deal()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it was given just then
                self._give_back(owner)
            raise

    def _give_back(self, owner: str) -> None:
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._deal()

    def _deal(self) -> None:
        while self._held.total() < self._num_places:
            owner = next((each for each in self._waiting if self._held[each] < self._each), None)
            if owner is None:
                return
            queue = self._waiting.pop(owner)
            waiter = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind the others
            if not waiter.done():
                waiter.set_result(None)
                self._held[owner] += 1
