"""The torch engine: a thread that computes step after step, and the event loop's side of it.

In: requests and adapter folders from an event loop. Out: tokens, back on that loop. Runs in: one thread of a serving process.

The loop never waits for a step: it leaves orders in a queue and is called back once a step with everything the step made.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftcore.batching import Batcher, Row
from ftcore.decoder import Decoder, cores
from ftcore.engines.base import FinishReason, LiveEngine, Request, Stats, Token, check_request
from ftcore.errors import ConfigError, ModelError
from ftcore.layers.multi_lora import LayerUpdate
from ftcore.lora_updates import read_updates
from ftcore.prefixes import Prefixes
from ftcore.sampling import Asked, sample

if TYPE_CHECKING:
    from ftcore.engines.torch import Torch

Order = Callable[[], None]


class TorchEngine(LiveEngine):
    """See LiveEngine. `start` opens one."""

    def __init__(self, section: Torch, base: str) -> None:
        self._section, self._base = section, base
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._streams: dict[str, asyncio.Queue[Token]] = {}
        self._updates: dict[str, dict[str, LayerUpdate]] = {}
        self._leaving: dict[str, list[Future[None]]] = {}
        self._rows: dict[str, Row] = {}
        self._stats = Stats()
        self._counts = {"steps": 0, "tokens": 0, "prompt": 0, "reused": 0}
        self._died: BaseException | None = None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    async def start(cls, section: Torch, base: str) -> TorchEngine:
        engine = cls(section, base)
        engine._thread.start()
        await asyncio.wrap_future(engine._ready)
        return engine

    # ---- the event loop's side

    async def load_adapter(self, digest: str, folder: Path) -> None:
        if digest in self._updates:
            return
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(digest, folder))
            task.add_done_callback(lambda _: self._loading.pop(digest, None))
        await asyncio.shield(task)

    async def _load(self, digest: str, folder: Path) -> None:
        layers = {name: (layer.in_features, layer.out_features) for name, layer in self._decoder.lora.layers.items()}
        rank = min(self._section.max_rank, self._section.max_lanes)
        reading = self._loaders.submit(read_updates, folder, layers, rank, self._decoder.dtype)
        updates = await asyncio.wrap_future(reading)
        await self._ordered(lambda: self._updates.__setitem__(digest, updates))

    async def unload_adapter(self, digest: str) -> None:
        gone: Future[None] = Future()
        self._order(lambda: self._leave(digest, gone))
        await asyncio.wrap_future(gone)

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        check_request(request, self.max_context, self._decoder.vocabulary)
        if request.id in self._streams:
            raise ConfigError("a request of this id is under way", where="id", got=request.id)
        self._require_alive()
        stream: asyncio.Queue[Token] = asyncio.Queue()
        self._streams[request.id] = stream
        ended = False
        try:
            await self._ordered(lambda: self._enter(request))
            while not ended:
                token = await stream.get()
                ended = token.finish is not None
                yield token
        finally:
            self._streams.pop(request.id, None)
            if not ended:
                self._order(lambda: self._end(request.id, None))

    async def abort(self, request_id: str) -> None:
        await self._ordered(lambda: self._end(request_id, "abort"))

    async def next_logits(self, prompts: Sequence[Sequence[int]], digest: str = "") -> Sequence[Sequence[float]]:
        found = []
        for prompt in prompts:  # one an order: other rows' tokens come between
            found.append(await self._ordered(partial(self._logits, prompt, digest)))
        return found

    def stats(self) -> Stats:
        return self._stats

    async def health(self) -> None:
        await self._ordered(self._publish)

    async def close(self) -> None:
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _order(self, order: Order) -> None:
        self._orders.put(order)

    async def _ordered(self, order: Callable[[], Any]) -> Any:
        """Has the engine's thread do something between two steps; its result, or what it raised."""
        self._require_alive()
        done: Future[Any] = Future()

        def do() -> None:
            try:
                done.set_result(order())
            except Exception as error:
                done.set_exception(error)

        self._orders.put(do)
        return await asyncio.wrap_future(done)

    def _require_alive(self) -> None:
        if self._died is not None:
            raise ModelError(
                "this engine has ended", got=f"{type(self._died).__name__}: {self._died}"[:300], remedy="open it again"
            ) from self._died

    # ---- the thread's side

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._section.num_threads or cores())
            self._decoder = Decoder(self._section, self._base)
            self.max_context, self.precision = self._decoder.max_context, self._decoder.precision
            self._batcher = Batcher(self._section.max_batch, self._section.chunk_tokens)
            self._prefixes = Prefixes(self._section.prefix_mib << 20)
        except BaseException as error:
            self._died = error
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while self._obey():
                self._admit()
                self._step()
        except BaseException as error:
            self._died = error
        finally:
            self._deliver([(name, Token(-1, "", finish="abort")) for name in list(self._rows)])
            self._refuse_the_rest()

    def _obey(self) -> bool:
        """Does what was ordered; waits for an order when there is nothing to compute. False when it is to end."""
        while True:
            idle = not self._batcher.rows and not self._batcher.waiting
            if idle:
                self._publish()
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _refuse_the_rest(self) -> None:
        self._died = self._died or RuntimeError("closed")
        with contextlib.suppress(queue.Empty):
            while True:
                order = self._orders.get_nowait()
                if order is not None:
                    order()

    def _enter(self, request: Request) -> None:
        if request.adapter and (request.adapter not in self._updates or request.adapter in self._leaving):
            raise ConfigError("this adapter is not loaded", where="adapter", got=request.adapter[:80], remedy="load it first")
        total = min(self.max_context, len(request.prompt) + request.max_tokens)
        seed = request.sampling.seed
        row = Row(request, total, list(request.prompt), seed=secrets.randbits(63) if seed is None else seed)
        self._rows[request.id] = row
        self._batcher.waiting.append(row)

    def _admit(self) -> None:
        """Lets waiting rows in, oldest first, while there are places and lanes for them."""
        batcher, lora = self._batcher, self._decoder.lora
        for row in list(batcher.waiting):
            if not batcher.has_room:
                return
            digest = row.request.adapter
            needed = {each.request.adapter for each in batcher.rows} - {""}
            if digest and digest not in needed:
                ranks = sum(_width(self._updates[each]) for each in (needed | {digest}))
                if ranks > lora.lanes.capacity:
                    continue
                lora.activate(digest, self._updates[digest], [*needed])
            batcher.waiting.remove(row)
            batcher.admit(row)
            saved = self._prefixes.longest((digest, row.request.salt), row.tokens[:-1])
            if saved is not None:
                self._decoder.cache.restore(row.place, saved)
                row.num_cached = saved.shape[-2]
                self._counts["reused"] += row.num_cached

    def _step(self) -> None:
        step = self._batcher.step()
        if step.is_empty:
            return
        logits = self._decoder.step(step)
        due = [*step.decoding, *(chunk.row for chunk in step.chunks if chunk.is_last)]
        for row in step.decoding:
            row.num_cached += 1
        for chunk in step.chunks:
            chunk.row.num_cached += chunk.count
            self._counts["prompt"] += chunk.count
        asked = [Asked(row.request.sampling, row.request.prompt, row.tokens[row.num_prompt :], row.seed) for row in due]
        drawn = sample(logits, asked) if due else []
        made = []
        for row, token in zip(due, drawn, strict=True):
            row.tokens.append(token.id)
            finish: FinishReason | None = None
            if token.id in row.request.stop_ids:
                finish = "stop"
            elif len(row.tokens) >= row.max_total:
                finish = "length"
            made.append((row.request.id, Token(token.id, row.request.adapter, token.logprob, token.top, finish)))
        for chunk in step.chunks:
            if chunk.row.num_cached == chunk.row.num_prompt:
                self._keep_prefix(chunk.row)
        self._counts["steps"] += 1
        self._counts["tokens"] += len(made)
        self._settle()
        for name, last in made:
            if last.finish is not None:
                self._remove(name)
        self._publish()
        self._deliver(made)

    def _settle(self) -> None:
        lengths = {row.place: row.num_cached for row in self._batcher.rows}
        self._move(self._batcher.settle(), lengths)

    def _move(self, moves: list[tuple[int, int]], lengths: dict[int, int]) -> None:
        for source, target in moves:
            length = lengths[source]
            self._decoder.cache.move([(source, target)], [length])
            lengths[target] = length

    def _keep_prefix(self, row: Row) -> None:
        if self._prefixes.limit:
            key = (row.request.adapter, row.request.salt)
            self._prefixes.keep(key, row.request.prompt, lambda length: self._decoder.cache.saved(row.place, length))

    def _end(self, name: str, finish: str | None) -> None:
        if name in self._rows:
            self._remove(name)
            if finish is not None:
                self._deliver([(name, Token(-1, "", finish="abort"))])

    def _remove(self, name: str) -> None:
        row = self._rows.pop(name)
        lengths = {each.place: each.num_cached for each in self._batcher.rows}
        self._move(self._batcher.remove(row), lengths)
        digest = row.request.adapter
        if digest in self._leaving and not any(each.request.adapter == digest for each in self._rows.values()):
            self._forget(digest)

    def _leave(self, digest: str, gone: Future[None]) -> None:
        if digest not in self._updates:
            gone.set_result(None)
            return
        self._leaving.setdefault(digest, []).append(gone)
        if not any(row.request.adapter == digest for row in self._rows.values()):
            self._forget(digest)

    def _forget(self, digest: str) -> None:
        self._decoder.lora.deactivate(digest)
        self._updates.pop(digest, None)
        self._prefixes.forget(digest)
        for gone in self._leaving.pop(digest):
            gone.set_result(None)

    def _logits(self, prompt: Sequence[int], digest: str) -> list[float]:
        if digest:
            if digest not in self._updates:
                raise ConfigError("this adapter is not loaded", where="adapter", got=digest[:80], remedy="load it first")
            needed = {each.request.adapter for each in self._batcher.rows} - {""}
            if sum(_width(self._updates[each]) for each in needed | {digest}) > self._decoder.lora.lanes.capacity:
                raise ModelError("there are no free lanes to compute with", got=digest[:12], remedy="raise engine.max_lanes, or ask again")
            self._decoder.lora.activate(digest, self._updates[digest], [*needed])
        return self._decoder.next_logits(prompt, digest, self._batcher.spare).tolist()

    def _publish(self) -> None:
        counts, batcher = self._counts, self._batcher
        self._stats = Stats(
            len(batcher.rows), len(batcher.waiting), counts["steps"], counts["tokens"], counts["prompt"], counts["reused"],
            tuple(self._updates), sum(_bytes(updates) for updates in self._updates.values()),
            sum(row.num_cached for row in batcher.rows), self._section.max_batch * self.max_context,
        )  # fmt: skip

    def _deliver(self, made: Sequence[tuple[str, Token]]) -> None:
        if made:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._hand_out, made)

    def _hand_out(self, made: Sequence[tuple[str, Token]]) -> None:
        for name, token in made:
            stream = self._streams.get(name)
            if stream is not None:
                stream.put_nowait(token)


def _width(updates: dict[str, LayerUpdate]) -> int:
    return max(update.a.shape[0] for update in updates.values())


def _bytes(updates: dict[str, LayerUpdate]) -> int:
    return sum(update.a.nbytes + update.b.nbytes for update in updates.values())
