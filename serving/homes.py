"""Homes: which of the served bases answers with an adapter version. With one base that is never a question, and nothing is read.

In: versions, their lineage, what replicas say their bases are. Out: an Answerer; or the reason why none here can answer.
Runs in: the ingress.

A name goes on meaning the version before it where its new one belongs to a base that is not served here, or is refused on its own.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import IntegrityError, ModelError, StorageError
from serving.directory import Directory
from serving.gate import Refusal
from serving.jobs import Answerer
from serving.lineage import Lineage, Origin
from serving.settings import ServeSettings
from serving.states import States

log = logging.getLogger(__name__)


class Homes:
    """Of one ingress process."""

    def __init__(self, settings: ServeSettings, directory: Directory, states: States) -> None:
        self._bases = settings.all_bases
        self._poll_s, self._directory, self._states = settings.poll_s, directory, states
        self._lineage = Lineage(AdapterStore(settings.store))
        self._reading = ThreadPoolExecutor(2, thread_name_prefix="cards")  # one reads for requests while the other follows
        self._told: set[AdapterRef] = set()
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Once the directory is: reads what its names mean, then again and again."""
        await self._follow()
        self._watch = asyncio.create_task(self._again())

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        self._reading.shutdown(wait=False)

    async def answerer(self, ref: AdapterRef, before: AdapterRef | None) -> Answerer:
        """`before`: what the name of `ref` meant before, if a name was asked for. Raises ModelError for a version whose base is not served
        here, IntegrityError and StorageError as its card does, Refusal 503 while a base that may be its own does not say so yet."""
        try:
            base = await self._home(ref)
        except (IntegrityError, ModelError):
            if before is None:
                raise
            return Answerer(await self._home(before), before)
        other = self.known(before) if before is not None else None
        elsewhere = Answerer(other, before) if other not in (None, "", base) else None
        return Answerer(base, ref, before if other == base else None, elsewhere, self._directory.picture.is_changing(ref))

    def known(self, ref: AdapterRef) -> str | None:
        """The base's name, without asking anybody; empty for one that is not served here, None while that cannot be told."""
        if self._is_one:
            return next((name for name, base in self._bases.items() if base.is_for(ref.tenant)), "")
        origin = self._lineage.known(ref)
        return None if origin is None else self._match(ref, origin) or (None if self._is_any_silent else "")

    def is_hidden(self, ref: AdapterRef) -> bool:
        """Whether its tenant sees a base of that name: the name alone means the base."""
        base = self._bases.get(ref.name)
        return base is not None and base.is_for(ref.tenant)

    async def learn(self) -> None:
        """Asks the replicas what their bases are, unless each has said so."""
        if self._is_any_silent and not self._is_one:
            await self._states.now()

    async def _home(self, ref: AdapterRef) -> str:
        base = self.known(ref)
        if base is None:
            base = await self._learnt(ref)
        if not base:
            raise ModelError("its base is not served here", where=ref)
        return base

    async def _learnt(self, ref: AdapterRef) -> str:
        """`known`, after asking whoever knows."""
        origin = self._lineage.known(ref)
        if origin is None:
            if self._directory.problem:  # a thread would wait for the store, and others for the thread
                raise StorageError("the adapter store is away", got=self._directory.problem)
            origin = await asyncio.get_running_loop().run_in_executor(self._reading, self._lineage.read, ref)
        if not (base := self._match(ref, origin)):
            await self.learn()
            base = self._match(ref, origin)
        if not base and self._is_any_silent:
            raise Refusal(503, "the base of this adapter does not answer yet", "base_unavailable", kind="server_error", retry_after_s=5)
        return base

    def _match(self, ref: AdapterRef, origin: Origin) -> str:
        """Of two bases with the same weights, the one with the same template, else the first: its replicas say what is wrong."""
        served = {name: self._states.origins.get(name) for name, base in self._bases.items() if base.is_for(ref.tenant)}
        bases = {name: own for name, own in served.items() if own is not None and own.weights == origin.weights}
        return next((name for name, own in bases.items() if origin.is_on(own)), next(iter(bases), ""))

    @property
    def _is_one(self) -> bool:
        return len(self._bases) == 1

    @property
    def _is_any_silent(self) -> bool:
        """Whether a base has not said yet what it is."""
        return len(self._states.origins) < len(self._bases)

    async def _follow(self) -> None:
        picture = self._directory.picture
        if not self._is_one and not self._directory.problem:
            await asyncio.get_running_loop().run_in_executor(self._reading, self._lineage.follow, picture)
        current = set(picture.current())
        homeless = {ref: "not served: no base here is its own" for ref in current if self.known(ref) == ""}
        hidden = {ref: f"asked for as {ref.tenant}/{ref.name} alone: a base has its name" for ref in current if self.is_hidden(ref)}
        for ref, problem in (hidden | homeless).items():
            if ref not in self._told:
                log.warning("%s is %s", ref, problem)
        self._told = {*hidden, *homeless}

    async def _again(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._follow()
            except Exception:  # whatever it is, the next second may be better
                log.exception("reading which bases adapters belong to failed")
