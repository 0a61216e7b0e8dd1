"""Panel: systems that are asked together: all adapters of one base in one batch of the embedded engine, or the models of an endpoint.

In: systems, questions. Out: Said; likelihoods of answers where the weights are here. Runs in: workers of an evaluation.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcore.adapters import AdapterStore
from ftcore.data.types import Conversation
from ftcore.engines.base import Sampling
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, DataError
from ftcore.evals.given import Said
from ftcore.evals.systems import System
from ftcore.recipe import Model
from ftcore.speaker import Answer, Speaker, Voice

if TYPE_CHECKING:
    from ftcore.evals.bench import Bench
    from ftcore.evals.predictors import Forecast

GREEDY = Sampling(temperature=0.0, seed=0)


class Panel(ABC):
    """Opens what it needs when it is first asked for it."""

    weighs: ClassVar[bool]
    """Whether it tells how likely a given answer is."""
    holds: ClassVar[bool]
    """Whether it can hold an answer to a JSON schema."""

    @abstractmethod
    async def say(self, system: System, asked: Conversation, max_tokens: int, *, schema: dict[str, Any] | None = None) -> Said:
        """The most likely answer to a conversation that ends with a question. A fault of the row is told in `error`."""

    @abstractmethod
    def weigh(self, system: System, answers: Sequence[Conversation]) -> list[Forecast | str]:
        """How likely the turns with weight 1 are, or why one cannot be asked so."""

    @abstractmethod
    def weigh_texts(self, system: System, texts: Sequence[str]) -> list[Forecast]:
        """How likely bare texts are, from their first token on, outside any conversation."""

    @abstractmethod
    async def close(self) -> None: ...


class EnginePanel(Panel):
    """One base, spoken with by the embedded engine; weighed by a plain forward pass on its device, in fp32 unless a dtype is asked for."""

    weighs, holds = True, False

    def __init__(self, systems: Sequence[System], engine: Torch) -> None:
        self._systems, self._engine = systems, engine
        self._places = asyncio.Semaphore(engine.max_batch)
        self._opening = asyncio.Lock()
        self._speaker: Speaker | None = None
        self._bench: Bench | None = None

    async def say(self, system: System, asked: Conversation, max_tokens: int, *, schema: dict[str, Any] | None = None) -> Said:
        speaker = await self._speaking()
        digest = system.voice.ref.digest if system.voice and system.voice.ref else ""
        async with self._places:  # what waits here is not counted as slowness of the system
            started, first, whole = time.monotonic(), None, None
            try:
                pieces = speaker.say(asked.messages, max_tokens, GREEDY, adapter=digest, tools=asked.tools)
                async with aclosing(pieces):
                    async for piece in pieces:
                        first = first or time.monotonic() - started
                        whole = piece
            except (DataError, ConfigError) as error:  # this row's own fault: the others go on
                return Said("", error=f"{error.what}: {error.got}")
        assert isinstance(whole, Answer)
        return Said(whole.text, whole.finish, whole.prompt_tokens, whole.completion_tokens, first, time.monotonic() - started)

    def weigh(self, system: System, answers: Sequence[Conversation]) -> list[Forecast | str]:
        if self._bench is None:
            self._bench = self._opened_bench()
        name = system.voice.ref.full if system.voice and system.voice.ref else None
        faults = [_fault(self._bench, answer) for answer in answers]
        whole = [answer for answer, fault in zip(answers, faults, strict=True) if not fault]
        forecasts = iter(self._bench.predictor(system.name, name).forecast(whole))
        return [fault or next(forecasts) for fault in faults]

    def weigh_texts(self, system: System, texts: Sequence[str]) -> list[Forecast]:
        if self._bench is None:
            self._bench = self._opened_bench()
        name = system.voice.ref.full if system.voice and system.voice.ref else None
        return self._bench.predictor(system.name, name).forecast_texts(texts, min(self._engine.max_context, self._bench.max_context))

    async def _speaking(self) -> Speaker:
        async with self._opening:
            if self._speaker is None:
                first = self._voices()[0]
                speaker = await Speaker.open(Voice(first.base, first.revision, first.store, None), self._engine)
                try:
                    for ref, store in {voice.ref: voice.store for voice in self._voices() if voice.ref}.items():
                        await speaker.learn(ref, store)
                except BaseException:
                    await speaker.close()
                    raise
                self._speaker = speaker
        return self._speaker

    def _opened_bench(self) -> Bench:
        from ftcore.evals.bench import Bench

        first = self._voices()[0]
        dtype = "fp32" if self._engine.dtype == "auto" else self._engine.dtype
        model = Model(path=first.base, revision=first.revision, dtype=dtype, attention="sdpa")
        with tempfile.TemporaryDirectory(prefix="ftcore-panel-") as scratch:
            folders = {
                voice.ref.full: AdapterStore(voice.store).fetch(voice.ref, Path(scratch))
                for voice in self._voices()
                if voice.ref is not None
            }
            return Bench(model, folders, device=self._engine.place(), dtype=dtype)

    def _voices(self) -> list[Voice]:
        return [system.voice for system in self._systems if system.voice is not None]

    async def close(self) -> None:
        if self._speaker is not None:
            await self._speaker.close()


class EndpointPanel(Panel):
    """An endpoint, asked several questions at once."""

    weighs, holds = False, True

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, "asking")

    async def say(self, system: System, asked: Conversation, max_tokens: int, *, schema: dict[str, Any] | None = None) -> Said:
        assert system.endpoint is not None
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, system.endpoint.answer, asked.messages, asked.tools, max_tokens, schema
            )
        except DataError as error:
            return Said("", error=f"{error.what}: {error.got}")

    def weigh(self, system: System, answers: Sequence[Conversation]) -> list[Forecast | str]:
        raise ConfigError(
            "an endpoint does not tell how likely a given answer is", where=system.name, remedy="judge its text: --task answers"
        )

    def weigh_texts(self, system: System, texts: Sequence[str]) -> list[Forecast]:
        raise ConfigError("an endpoint does not tell how likely a text is", where=system.name, remedy="leave it out")

    async def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _fault(bench: Bench, answer: Conversation) -> str:
    try:
        bench.chat.encode(answer)
    except DataError as error:
        return f"{error.what}: {error.got}"
    return ""


def open_panel(systems: Sequence[System], engine: Torch, at_once: int) -> Panel:
    """Of systems that share one."""
    return EndpointPanel(at_once) if systems[0].endpoint else EnginePanel(systems, engine)
