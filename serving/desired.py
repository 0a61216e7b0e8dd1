"""Desired: the versions that a replica should hold, whether or not anybody asked for them yet, and what is missing of them.

In: `preload` of the settings, the store's pointers. Out: versions loaded and kept; for each name that cannot answer, the reason.
Runs in: serving replicas; no Ray, no HTTP.

A name is held when each of its current versions is in, or the version before it, which answers while the new one is refused. A name that
the settings list has to be held for a replica to be ready. Under `all` a refused adapter, or one that finds no room, is reported and holds
nothing up: one tenant's broken version is not everybody's outage. Where there are several bases, each replica leaves the versions of the
others to theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import FtcoreError
from serving.directory import Directory, Picture
from serving.lineage import Lineage, Origin
from serving.settings import ServeSettings
from serving.slots import Slots
from serving.tenants import tenant_names

NUM_LOADS = 4


class Desired:
    """Of one replica."""

    def __init__(self, settings: ServeSettings, store: AdapterStore, slots: Slots, origin: Origin) -> None:
        self._settings, self._slots, self._origin = settings, slots, origin
        self._lineage = Lineage(store) if settings.bases else None
        self._directory = Directory(store, self._tenants)
        self._all_tenants = tenant_names(settings)
        self._room = asyncio.Semaphore(NUM_LOADS)
        self._picture = Picture()
        self._was_tried = False
        """Every name of one picture was."""

    def _tenants(self) -> list[str]:
        if self._settings.preloads_all:
            return self._all_tenants()
        return sorted({name.partition("/")[0] for name in self._settings.preload})

    async def follow(self) -> None:
        """Brings in what is desired now. Refusals are logged where they happen, and told by `missing`."""
        if not self._settings.preload:
            return
        self._picture = await asyncio.to_thread(self._look)
        wanted = list(self._wanted())
        resident = self._slots.resident
        stand_ins = (before for ref, before in wanted if ref not in resident and before is not None)
        self._slots.kept = frozenset([ref for ref, _ in wanted]).union(stand_ins)
        await asyncio.gather(*(self._bring(*pair) for pair in wanted))
        self._was_tried |= not self._directory.problem

    def _look(self) -> Picture:
        picture = self._directory.refresh()
        if self._lineage is not None and not self._directory.problem:
            self._lineage.follow(picture)
        return picture

    async def _bring(self, ref: AdapterRef, before: AdapterRef | None) -> None:
        async with self._room:
            for each in (ref, before):
                if each is None or each in self._slots.resident or not self._slots.can_keep_more:
                    return
                try:
                    await self._slots.load(each)
                    return
                except FtcoreError:
                    continue

    def _wanted(self) -> Iterator[tuple[AdapterRef, AdapterRef | None]]:
        """(a current version, what answers if it is refused) of every desired name."""
        for ref in self._picture.current():
            if (self._settings.preloads_all or _name(ref) in self._settings.preload) and self._is_ours(ref):
                before = self._picture.before(ref)
                yield ref, before if before is not None and self._is_ours(before) else None

    def _is_ours(self, ref: AdapterRef) -> bool:
        """Whether it was trained on this base; one whose card cannot be read is taken, and then refused with the reason."""
        if not self._settings.is_for(ref.tenant):
            return False
        origin = self._lineage.known(ref) if self._lineage is not None else None
        return origin is None or origin.weights == self._origin.weights

    @property
    def missing(self) -> dict[str, str]:
        """Name -> why it holds this replica up; empty when it is ready."""
        if not self._settings.preload:
            return {}
        if not self._was_tried:
            return {"preload": self._directory.problem or "not loaded yet"}
        if self._settings.preloads_all:
            return {}
        resident, refusals = self._slots.resident, self._slots.refusals
        unheld = "not loaded yet" if self._slots.can_keep_more else "it finds no room in adapter_mib"
        found: dict[str, str] = {}
        for ref, before in self._wanted():
            reason = "" if ref in resident or before in resident else refusals.get(ref, unheld)
            found[_name(ref)] = found.get(_name(ref)) or reason
        moved = {_name(ref) for ref in self._picture.current()} - found.keys()  # to another base: those replicas' to hold
        listed = (name for name in self._settings.preload if name not in moved)
        return {name: reason for name in listed if (reason := found.get(name, "no version of it can be used"))}


def _name(ref: AdapterRef) -> str:
    return f"{ref.tenant}/{ref.name}"
