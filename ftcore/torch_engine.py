"""The torch engine: the event loop's side of an EngineThread.

In: requests and adapter folders from an event loop. Out: tokens, back on that loop. Runs in: serving processes, `ftcore chat`.

The loop never waits for a step: it leaves orders, and is called back once a step with everything the step made.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.batching import Wants
from ftcore.engine_thread import EngineThread, Made
from ftcore.engines.base import LiveEngine, Request, Stats, Token, check_prompt, check_request
from ftcore.lora_updates import LoadedAdapter, read_updates
from ftcore.residents import Residents

if TYPE_CHECKING:
    from ftcore.engines.torch import Torch


class TorchEngine(LiveEngine):
    """See LiveEngine. `start` opens one."""

    def __init__(self, section: Torch, base: str) -> None:
        self._section = section
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(section, base, self._deliver)
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        self._residents = Residents()
        self._streams: dict[int, asyncio.Queue[Token]] = {}
        self._keys: dict[str, set[int]] = {}
        self._next_key = itertools.count()

    @classmethod
    async def start(cls, section: Torch, base: str) -> TorchEngine:
        engine = cls(section, base)
        engine._thread.start()
        try:
            await asyncio.wrap_future(engine._thread.ready)
        except asyncio.CancelledError:
            engine._thread.stop()
            raise
        decoder = engine._thread.decoder
        engine.max_context, engine.vocabulary, engine.precision = decoder.max_context, decoder.vocabulary, decoder.precision
        return engine

    async def load_adapter(self, digest: str, folder: Path) -> None:
        await self._residents.bring_in(digest, lambda: self._load(digest, folder))

    async def unload_adapter(self, digest: str) -> None:
        await self._residents.take_out(digest, lambda: self._unload(digest))

    async def _load(self, digest: str, folder: Path) -> None:
        if self._thread.has_ended:
            raise self._thread.end_error()
        adapter = await self._loop.run_in_executor(self._loaders, self._read, folder)
        await self._ordered(partial(self._thread.keep, digest, adapter))
        self._residents.known.add(digest)

    def _read(self, folder: Path) -> LoadedAdapter:
        lora = self._thread.decoder.lora
        layers = {name: (layer.in_features, layer.out_features) for name, layer in lora.layers.items()}
        updates = read_updates(folder, layers, min(self._section.max_rank, self._section.max_lanes), self._thread.decoder.dtype)
        size = sum(update.a.nbytes + update.b.nbytes for update in updates.values())
        return LoadedAdapter(updates, max(update.a.shape[0] for update in updates.values()), size, lora.fingerprint(updates))

    async def _unload(self, digest: str) -> None:
        self._residents.known.discard(digest)
        gone = await self._ordered(partial(self._thread.leave, digest))
        await asyncio.wrap_future(gone)

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        check_request(request, self.max_context, self.vocabulary)
        key, stream = next(self._next_key), asyncio.Queue[Token]()
        self._streams[key] = stream
        self._keys.setdefault(request.id, set()).add(key)
        ended = False
        try:
            await self._ordered(partial(self._thread.enter, key, request))
            while not ended:
                token = await stream.get()
                ended = token.finish is not None
                yield token
        finally:
            del self._streams[key]
            self._keys[request.id].discard(key)
            if not self._keys[request.id]:
                del self._keys[request.id]
            if not ended:
                self._thread.order(partial(self._thread.end, key))

    async def abort(self, request_id: str) -> None:
        for key in list(self._keys.get(request_id, ())):
            await self._ordered(partial(self._thread.end, key))

    async def next_logits(self, prompts: Sequence[Sequence[int]], digest: str = "") -> Sequence[Any]:
        return [await self._read_only(Request("", self._checked(prompt), digest), "logits") for prompt in prompts]

    async def embed(self, prompts: Sequence[Sequence[int]], digest: str = "", salt: str = "") -> AsyncGenerator[Any, None]:
        asked = iter([Request("", self._checked(prompt), digest, salt=salt) for prompt in prompts])
        tasks = deque[asyncio.Task[Any]]()
        try:
            while True:
                for request in itertools.islice(asked, self._section.max_batch - len(tasks)):
                    tasks.append(asyncio.create_task(self._read_only(request, "embedding")))
                if not tasks:
                    return
                yield await tasks[0]
                tasks.popleft()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _checked(self, prompt: Sequence[int]) -> tuple[int, ...]:
        check_prompt(prompt, self.max_context, self.vocabulary)
        return tuple(prompt)

    async def _read_only(self, request: Request, wants: Wants) -> Any:
        key = next(self._next_key)
        try:
            return await asyncio.wrap_future(await self._ordered(partial(self._thread.enter, key, request, wants)))
        except asyncio.CancelledError:
            self._thread.order(partial(self._thread.end, key))
            raise

    def stats(self) -> Stats:
        return self._thread.stats

    async def health(self) -> None:
        await self._ordered(self._thread.publish)

    async def close(self) -> None:
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._loaders.shutdown)
        await self._residents.settle()

    async def _ordered(self, do: Callable[[], Any]) -> Any:
        """Has the engine's thread do something between two steps; its result, or what it raised."""
        return await asyncio.wrap_future(self._thread.order(do))

    def _deliver(self, made: Made) -> None:
        """Called by the engine's thread."""
        if made:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._hand_out, made)

    def _hand_out(self, made: Made) -> None:
        for key, token in made:
            if (stream := self._streams.get(key)) is not None:
                stream.put_nowait(token)
