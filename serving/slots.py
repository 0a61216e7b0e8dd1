"""Slots: the adapters a replica holds. Loaded in the background, proven before they answer, pinned while they do, dropped when revoked.

In: refs that requests need. Out: digests that the engine holds, pinned; or the reason why not. Runs in: serving replicas; no Ray, no HTTP.

One load at a time for a digest, several digests at once, tenants in turn; a load never delays what is loaded. A ref that was refused is
remembered for a while, so that a broken version is not fetched again for every request. Two tenants with the same content share the
engine's copy, but each ref is checked against its own card.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from ftcore.adapter_files import WEIGHTS
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import Card
from ftcore.engines.base import EngineEnded, LiveEngine
from ftcore.errors import FtcoreError, IntegrityError, ModelError, StorageError
from serving.turns import Turns

log = logging.getLogger(__name__)
REFUSED_FOR_S = 30.0
"""How long a refusal is remembered; one of the store, which may come back, for a second."""

LOAD_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Prove = Callable[[AdapterRef, Path], Awaitable[None]]
"""Holds a fetched version to its card on this base, once the engine has it. Raises with the reason."""
Admit = Callable[[Card], None]
"""Blocks. Raises IntegrityError for a version that may not be served, before it is fetched and for as long as it is loaded."""


@dataclass
class Slot:
    """One version in this replica."""

    ref: AdapterRef
    card: Card
    folder: Path
    pins: int = 0
    used: float = field(default_factory=time.monotonic)
    load_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


@dataclass
class Counts:
    """What happened to a replica's versions since it began."""

    num_refused: int = 0
    num_swaps: int = 0
    """Versions that came in beside another one of their name."""
    load_s: float = 0.0
    """Of all loads together."""
    loads: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BOUNDS_S) + 1))
    """How many loads took at most each of LOAD_BOUNDS_S and more than the one before it; longer ones last."""

    def loaded(self, seconds: float, is_swap: bool) -> None:
        self.loads[bisect_left(LOAD_BOUNDS_S, seconds)] += 1
        self.load_s += seconds
        self.num_swaps += is_swap


class Slots:
    """The versions of one replica."""

    def __init__(
        self, engine: LiveEngine, store: AdapterStore, cache: Path, admit: Admit, prove: Prove, *, max_bytes: int, num_loads: int = 4
    ) -> None:
        """`cache`: where versions are fetched to; `max_bytes`: of all loaded adapters, as the engine counts them."""
        self._engine, self._store, self._cache, self._admit, self._prove, self._max_bytes = engine, store, cache, admit, prove, max_bytes
        self._slots: dict[AdapterRef, Slot] = {}
        self._loading: dict[AdapterRef, asyncio.Task[Slot]] = {}
        self._refused: dict[AdapterRef, tuple[float, FtcoreError]] = {}
        self._turns = Turns(num_loads, each=max(1, num_loads // 2))
        self._digests: dict[str, asyncio.Lock] = {}
        self._coming: dict[AdapterRef, int] = {}
        """Bytes that the engine is being given."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._leaving_bytes = 0
        """Of those, what the engine still holds."""
        self.counts = Counts()
        self.kept: frozenset[AdapterRef] = frozenset()
        """Versions that stay when nobody uses them, unless they are revoked."""

    @property
    def resident(self) -> dict[AdapterRef, Slot]:
        return dict(self._slots)

    @property
    def refusals(self) -> dict[AdapterRef, str]:
        return {ref: str(error) for ref, (_, error) in self._refused.items()}

    @property
    def can_keep_more(self) -> bool:
        """Whether the versions that stay leave room for another one."""
        return sum(slot.num_bytes for ref, slot in self._slots.items() if ref in self.kept) < self._max_bytes

    @asynccontextmanager
    async def pinned(self, ref: AdapterRef) -> AsyncIterator[Slot]:
        """Holds a version for as long as an answer takes; loads it first if need be. Raises the reason when it cannot be served."""
        slot = self._slots.get(ref)
        while slot is None:
            await self.load(ref)
            slot = self._slots.get(ref)  # dropped again before we came to run: load again
        slot.pins += 1
        try:
            yield slot
        finally:
            slot.pins -= 1
            slot.used = time.monotonic()

    async def load(self, ref: AdapterRef) -> None:
        """Brings a version in; of several calls at once, one works."""
        if ref in self._slots:
            return
        until, refused = self._refused.get(ref, (0.0, None))
        if refused is not None and time.monotonic() < until:
            raise copy(refused)  # raised itself, it would keep every request that it was told
        task = self._loading.get(ref) or self._begin(ref)
        await asyncio.wait([task])
        error = task.exception()
        if error is not None:
            raise copy(error) if isinstance(error, FtcoreError) else error

    def load_behind(self, ref: AdapterRef) -> None:
        """Begins to bring a version in; nobody waits for it, and a refusal is logged."""
        until, error = self._refused.get(ref, (0.0, None))
        if ref not in self._slots and ref not in self._loading and (error is None or time.monotonic() >= until):
            self._begin(ref)

    def _begin(self, ref: AdapterRef) -> asyncio.Task[Slot]:
        task = self._loading[ref] = asyncio.create_task(self._load(ref))
        task.add_done_callback(lambda done: self._loaded(ref, done))
        return task

    def _loaded(self, ref: AdapterRef, task: asyncio.Task[Slot]) -> None:
        self._loading.pop(ref, None)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, FtcoreError) and not isinstance(error, EngineEnded):
            forget = 1.0 if isinstance(error, StorageError) else REFUSED_FOR_S
            self._refused[ref] = (time.monotonic() + forget, copy(error))
            if len(self._refused) > 1000:
                self._refused.pop(next(iter(self._refused)))
            self.counts.num_refused += 1
            log.warning("refused %s: %s", ref, str(error).replace("\n", " "))
        else:
            self._refused.pop(ref, None)

    async def _load(self, ref: AdapterRef) -> Slot:
        started = time.monotonic()
        async with self._digests.setdefault(ref.digest, asyncio.Lock()), self._turns.turn(ref.tenant):
            try:
                card, folder = await self._bring(ref)
            except (FtcoreError, OSError, asyncio.CancelledError):
                raise
            except Exception as error:  # whatever a library says of a hostile file: it is refused as any other, and remembered
                raise IntegrityError("this version cannot be loaded", where=ref, got=f"{type(error).__name__}: {error}"[:300]) from error
            is_swap = any((other.tenant, other.name) == (ref.tenant, ref.name) for other in self._slots)
            slot = self._slots[ref] = Slot(ref, card, folder, load_s=time.monotonic() - started)
            self.counts.loaded(slot.load_s, is_swap)
        self._make_room(ref)
        log.info("loaded %s in %.2f s", ref, slot.load_s)
        return slot

    async def _bring(self, ref: AdapterRef) -> tuple[Card, Path]:
        """Fetches a version, has the engine load it, and proves it. What may not be served, or could never fit, is not fetched."""
        card = await asyncio.to_thread(self._store.card, ref)
        await asyncio.to_thread(self._admit, card)
        weights = card.files.get(WEIGHTS)
        if weights is not None and (size := weights.bytes) > self._max_bytes:
            wanted = f"at most {self._max_bytes >> 20} MiB (adapter_mib)"
            raise ModelError("this adapter is larger than the memory for all adapters", where=ref, got=f"{size >> 20} MiB", wanted=wanted)
        folder = await asyncio.to_thread(self._store.fetch, ref, self._cache)
        try:
            if not self._holders(ref.digest):
                self._coming[ref] = Slot(ref, card, folder).num_bytes
            self._make_room(ref)
            await self._engine.load_adapter(ref.digest, folder)
            self._coming.pop(ref, None)
            await self._prove(ref, folder)
        except BaseException:
            self._coming.pop(ref, None)
            if not self._holders(ref.digest):
                await self._engine.unload_adapter(ref.digest)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        return card, folder

    def drop(self, ref: AdapterRef) -> None:
        """Takes a version out at once: no new answer begins with it. The engine forgets it when the last one has ended."""
        slot = self._slots.pop(ref, None)
        if slot is not None:
            log.info("dropped %s", ref)
            num_bytes = 0 if slot.pins else slot.num_bytes
            self._leaving_bytes += num_bytes
            task = asyncio.create_task(self._release(slot, num_bytes))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _release(self, slot: Slot, num_bytes: int) -> None:
        digest = slot.ref.digest
        async with self._digests.setdefault(digest, asyncio.Lock()):
            try:
                if not self._holders(digest):
                    with suppress(EngineEnded):
                        await self._engine.unload_adapter(digest)
            finally:
                self._leaving_bytes -= num_bytes
            if slot.ref not in self._slots:
                await asyncio.to_thread(shutil.rmtree, slot.folder, ignore_errors=True)

    def _holders(self, digest: str) -> list[AdapterRef]:
        return [ref for ref in self._slots if ref.digest == digest]

    def _make_room(self, newest: AdapterRef) -> None:
        """Drops what is not in use, least recently used first, until the rest fits with what is coming. Pinned and kept versions stay,
        whatever the limit."""
        held = self._engine.stats().adapter_bytes + sum(self._coming.values()) - self._leaving_bytes
        over = held - self._max_bytes
        free = (slot for ref, slot in self._slots.items() if not slot.pins and ref != newest and ref not in self.kept)
        for slot in sorted(free, key=lambda slot: slot.used):
            if over > 0:
                over -= slot.num_bytes
                self.drop(slot.ref)
        if over > 0:
            log.warning("loaded adapters exceed %d MiB, and every one is in use or kept", self._max_bytes >> 20)

    async def drop_refused(self) -> list[AdapterRef]:
        """Drops every resident version that was revoked, or may not be served any more. A store that is away drops nothing."""
        found = []
        for ref, slot in self.resident.items():
            try:
                await asyncio.to_thread(self._require_still, slot)
            except StorageError:
                continue
            except Exception as error:  # somebody wrote there, and not something that can be read: better safe
                if not isinstance(error, FtcoreError):
                    error = IntegrityError("whether this may be served cannot be read", where=ref, got=type(error).__name__)
                found.append(ref)
                self._refused[ref] = (time.monotonic() + REFUSED_FOR_S, copy(error))
                self.drop(ref)
        return found

    def _require_still(self, slot: Slot) -> None:
        reason = self._store.revocation(slot.ref)
        if reason is not None:
            raise IntegrityError("this version was revoked", where=slot.ref, got=reason)
        self._admit(slot.card)
