"""Speaker: a base with its adapters, proven, that answers conversations in this process. What serving does, without serving.

In: an engine section, a base, a version from the store. Out: text as it comes, or whole Answers. Runs in: `ftcore chat`, `ftcore generate`,
`ftcore evaluate`.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.data.types import Message
from ftcore.engines.base import Engine, EngineEnded, FinishReason, LiveEngine, Request, Sampling
from ftcore.errors import ConfigError, IntegrityError
from ftcore.export.merge import model_of
from ftcore.served_base import ServedBase
from ftcore.text_stream import TextStream

Tools = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Answer:
    """One answer, whole."""

    text: str
    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Voice:
    """What is spoken with: plain values, so that a worker elsewhere opens the same."""

    base: str
    revision: str
    store: str
    ref: AdapterRef | None

    @classmethod
    def find(cls, ref: str, store: str, base: str) -> Voice:
        """`ref` as people write it, or empty for the bare `base`; `base` may be empty where the adapter's card names one."""
        if not ref:
            if not base:
                raise ConfigError("there is nothing to talk to", wanted="an adapter, or --base FOLDER", remedy="ftcore adapters list")
            return cls(base, "main", store, None)
        place = AdapterStore(store)
        found = place.resolve(ref)
        model = model_of(place.card(found), base or None)
        return cls(model.path, model.revision, store, found)

    def __str__(self) -> str:
        return f"{self.ref.full} on {self.base}" if self.ref else self.base


class Speaker:
    """Made by `open`; answers any number of conversations at once."""

    def __init__(self, base: ServedBase, engine: LiveEngine, digest: str) -> None:
        self._base, self._engine, self._digest, self._number = base, engine, digest, 0

    @classmethod
    async def open(cls, voice: Voice, engine: Engine) -> Speaker:
        """Raises IntegrityError or ModelError when the adapter is not what its card says, on this base."""
        base = ServedBase(voice.base, voice.revision)
        speaker = cls(base, await engine.open(str(base.folder)), voice.ref.digest if voice.ref else "")
        try:
            if voice.ref is not None:
                await speaker.learn(voice.ref, voice.store)
        except BaseException:
            await speaker.close()
            raise
        return speaker

    async def learn(self, ref: AdapterRef, store: str) -> None:
        """Loads a version and proves it; `adapter` may name its digest from now on. Raises as `open` does."""
        place = AdapterStore(store)
        self._base.require_card(place.card(ref))
        with tempfile.TemporaryDirectory(prefix="ftcore-speaker-") as scratch:
            folder = place.fetch(ref, scratch)
            await self._engine.load_adapter(ref.digest, folder)
            if self._engine.computes:
                await self._base.prove(self._engine, ref.digest, folder, self._engine.precision)

    async def close(self) -> None:
        await self._engine.close()

    async def say(
        self, messages: Sequence[Message], max_tokens: int, sampling: Sampling, *, adapter: str | None = None, tools: Tools = ()
    ) -> AsyncGenerator[str | Answer, None]:
        """Pieces of text as they come, and last the whole Answer. Closing the iterator ends the answer.

        `adapter`: digest of one that it learnt, "" for the bare base; None takes the voice it was opened with.
        """
        digest = self._digest if adapter is None else adapter
        prompt = self._base.chat_prompt(messages, tools)
        self._number += 1
        limit = max(1, min(max_tokens, self._engine.max_context - len(prompt)))
        request = Request(str(self._number), prompt, digest, limit, self._base.stop_ids, sampling)
        stream, said, count = TextStream(self._base.tokenizer), "", 0
        async with aclosing(self._engine.generate(request)) as tokens:
            async for token in tokens:
                if token.finish == "abort":
                    raise EngineEnded("this answer was ended by the engine")
                if token.adapter != digest:
                    raise IntegrityError("another adapter's slot computed this answer", got=token.adapter[:12], wanted=digest[:12])
                count += token.finish != "stop"
                text = ("" if token.finish == "stop" else stream.push(token.id)) + (stream.end() if token.finish else "")
                said += text
                if text:
                    yield text
                if token.finish is not None:
                    yield Answer(said, token.finish, len(prompt), count)

    async def answer(self, messages: Sequence[Message], max_tokens: int, sampling: Sampling) -> Answer:
        """Raises DataError or ConfigError for a conversation that cannot be answered."""
        async with aclosing(self.say(messages, max_tokens, sampling)) as pieces:
            whole = [piece async for piece in pieces][-1]
        assert isinstance(whole, Answer)
        return whole
