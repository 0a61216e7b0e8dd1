"""fake: an engine that computes nothing. For measuring and breaking what is around an engine.

In: requests, adapter folders. Out: tokens that follow from the adapter's digest, the prompt and the seed. Runs in: tests, benchmarks.

What it says depends on everything that a real answer depends on, so that a mixed-up adapter shows; its adapters are read and checked as
files, and nothing is proven about their weights (`computes` is False, and serving says so).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ftcore.adapter_files import check_adapter
from ftcore.engines.base import ENGINES, Engine, EngineEnded, FinishReason, LiveEngine, Request, Stats, Token, check_prompt
from ftcore.errors import ConfigError


@ENGINES.register("fake")
class Fake(Engine):
    """Says what nobody computed."""

    kind: str = "fake"
    token_s: float = Field(0.0, ge=0)
    """Seconds a token takes."""
    vocabulary: int = Field(1000, ge=10)

    async def open(self, base: str) -> LiveEngine:
        return FakeEngine(self)


class FakeEngine(LiveEngine):
    """Rows take places as in a real engine, and wait when there are none."""

    computes = False
    precision = "none"

    def __init__(self, section: Fake) -> None:
        self.max_context, self.vocabulary = section.max_context, section.vocabulary
        self._section = section
        self._places = asyncio.Semaphore(section.max_batch)
        self._adapters: dict[str, int] = {}
        self._users: dict[str, set[str]] = {}
        self._running: dict[str, asyncio.Event] = {}
        self._num_running = self._num_waiting = self._num_tokens = self._num_admitted = 0
        self._waited_s = 0.0
        self._closed = False

    async def load_adapter(self, digest: str, folder: Path) -> None:
        self._require_open()
        facts = await asyncio.to_thread(check_adapter, folder)
        self._adapters.setdefault(digest, sum(4 * fact.num_elements for fact in facts.values()))

    async def unload_adapter(self, digest: str) -> None:
        while self._users.get(digest):
            await asyncio.sleep(0.001)
        self._adapters.pop(digest, None)

    def check(self, request: Request) -> None:
        super().check(request)
        if request.constraint is not None:
            raise ConfigError("this engine computes nothing, so it can hold no answer to a constraint", where="constraint")

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        self.check(request)
        self._require_open()
        if request.adapter and request.adapter not in self._adapters:
            raise ConfigError("this adapter is not loaded", where="adapter", got=request.adapter[:80], remedy="load it first")
        stop = self._running[request.id] = asyncio.Event()
        users = self._users.setdefault(request.adapter, set())
        users.add(request.id)
        self._num_waiting += 1
        came = time.monotonic()
        try:
            async with self._places:
                self._num_waiting -= 1
                self._num_admitted += 1
                self._waited_s += time.monotonic() - came
                self._num_running += 1
                try:
                    async for token in self._tokens(request, stop):
                        yield token
                finally:
                    self._num_running -= 1
                    self._num_waiting += 1
        finally:
            self._num_waiting -= 1
            users.discard(request.id)
            self._running.pop(request.id, None)

    async def _tokens(self, request: Request, stop: asyncio.Event) -> AsyncGenerator[Token, None]:
        total = min(request.max_tokens, self.max_context - len(request.prompt))
        for position in range(total):
            await asyncio.sleep(self._section.token_s)
            if stop.is_set() or self._closed:
                yield Token(-1, request.adapter, finish="abort")
                return
            self._num_tokens += 1
            token = said(request, position, self.vocabulary)
            last: FinishReason | None = "stop" if token in request.stop_ids else "length" if position == total - 1 else None
            logprob = -1.0 if request.sampling.num_logprobs is not None else None
            yield Token(token, request.adapter, logprob, (), last)
            if last:
                return

    async def abort(self, request_id: str) -> None:
        if request_id in self._running:
            self._running[request_id].set()

    async def next_logits(self, prompts: Sequence[Sequence[int]], digest: str = "") -> Sequence[Any]:
        for prompt in prompts:
            check_prompt(prompt, self.max_context, self.vocabulary)
        if digest and digest not in self._adapters:
            raise ConfigError("this adapter is not loaded", where="adapter", got=digest[:80], remedy="load it first")
        return [[float(said(Request("", tuple(prompt), digest), i, 100)) for i in range(self.vocabulary)] for prompt in prompts]

    def stats(self) -> Stats:
        return Stats(
            self._num_running, self._num_waiting, num_tokens=self._num_tokens, adapters=tuple(self._adapters),
            adapter_bytes=sum(self._adapters.values()), num_admitted=self._num_admitted, waited_s=self._waited_s,
        )  # fmt: skip

    async def health(self) -> None:
        self._require_open()

    async def close(self) -> None:
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise EngineEnded("this engine has ended", got="closed", remedy="open it again")


def said(request: Request, position: int, vocabulary: int) -> int:
    """The token at a position: the same for the same adapter, prompt and seed."""
    text = f"{request.adapter}:{request.prompt}:{request.sampling.seed}:{position}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % vocabulary
