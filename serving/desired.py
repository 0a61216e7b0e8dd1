"""Desired: the versions that a replica should hold, whether or not anybody asked for them yet, and what is missing of them.

In: `preload` of the settings, the store's pointers. Out: versions loaded and kept; for each name that cannot answer, the reason.
Runs in: serving replicas; no Ray, no HTTP.

A name is held when each of its current versions is in, or the version before it, which answers while the new one is refused. A name that
the settings list has to be held for a replica to be ready. Under `all` a refused adapter, or one that finds no room, is reported and holds
nothing up: one tenant's broken version is not everybody's outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import FtcoreError
from serving.directory import Directory
from serving.settings import ServeSettings
from serving.slots import Slots
from serving.tenants import tenant_names

NUM_LOADS = 4


class Desired:
    """Of one replica."""

    def __init__(self, settings: ServeSettings, store: AdapterStore, slots: Slots) -> None:
        self._settings, self._slots = settings, slots
        self._directory = Directory(store, self._tenants)
        self._all_tenants = tenant_names(settings)
        self._room = asyncio.Semaphore(NUM_LOADS)
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
        await asyncio.to_thread(self._directory.refresh)
        wanted = list(self._wanted())
        resident = self._slots.resident
        resident = self._slots.resident
        stand_ins = (before for ref, before in wanted if ref not in resident and before is not None)
        self._slots.kept = frozenset([ref for ref, _ in wanted]).union(stand_ins)
        await asyncio.gather(*(self._bring(*pair) for pair in wanted))
        self._was_tried |= not self._directory.problem

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
        picture = self._directory.picture
        for tenant, names in picture.tenants.items():
            for name, known in names.items():
                if self._settings.preloads_all or f"{tenant}/{name}" in self._settings.preload:
                    for digest in known.current:
                        ref = AdapterRef(tenant, name, digest)
                        yield ref, picture.before(ref)

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
            found[f"{ref.tenant}/{ref.name}"] = found.get(f"{ref.tenant}/{ref.name}") or reason
        return {name: reason for name in self._settings.preload if (reason := found.get(name, "no version of it can be used"))}
