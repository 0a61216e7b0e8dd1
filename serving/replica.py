"""Replica: one base, one engine, and the adapters that its requests need. The part of serving that computes.

In: Jobs. Out: an Opening, Pieces, a Closing. Runs in: Ray Serve replicas; or in any event loop, for tests and `ftcore chat`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.constraints import Grammar, Grammars
from ftcore.data.types import Message
from ftcore.engines.base import EngineEnded, LiveEngine, Request, Token, check_prompt
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.receipts import Said, Signer, said, said_vector
from ftcore.served_base import ServedBase
from ftcore.text_stream import TextStream
from ftcore.tool_calls import CallPart, CallStream, ToolFormat, call_constraint, marks_are_special, whole_calls
from serving.desired import Desired
from serving.jobs import Closing, Event, Finish, Job, Opening, Piece, TokenInfo, Vector, gathered
from serving.lineage import Origin
from serving.published_keys import publish_key
from serving.publishers import Publishers
from serving.scratch import Scratch
from serving.settings import ServeSettings
from serving.slots import Slots
from serving.turns import Turns

log = logging.getLogger(__name__)
SWITCH_S = 0.0002
"""The engine's thread gives Python up at every operation of a step; a thread that loads an adapter would keep it 5 ms each time."""
MAX_CHARACTERS_A_TOKEN = 64
"""Longer prompts than this times the context are refused before anything is done with them; others by the base, by its longest token."""


@dataclass(frozen=True)
class Plan:
    """A job as this replica's base takes it."""

    job: Job
    prompt: tuple[int, ...]
    limit: int
    grammar: Grammar | None
    format: ToolFormat | None
    """How calls are written, where there are tools."""


class Replica:
    """Answers Jobs. `open` makes one."""

    def __init__(self, settings: ServeSettings, engine: LiveEngine, base: ServedBase, scratch: Scratch) -> None:
        """`scratch`: removed when it closes."""
        self.settings, self.engine, self.base = settings, engine, base
        self._scratch = scratch
        self.store = AdapterStore(settings.store)
        self.slots = Slots(
            engine, self.store, scratch.path, Publishers(settings).require, self._prove, max_bytes=settings.adapter_mib << 20
        )
        self.signer = Signer()
        self.origin = Origin(base.weights, base.tokenizer_digest, base.chat.template_digest if base.chat else "")
        self.desired = Desired(settings, self.store, self.slots, self.origin)
        self.num_answers = 0
        self.grammars = Grammars(base.tokenizer, base.stop_ids, engine.vocabulary)
        self._tokenising, self._turns = ThreadPoolExecutor(1, thread_name_prefix="tokenising"), Turns(1)
        self._watches = [
            asyncio.create_task(self._again(self.slots.drop_refused, "looking for versions that may not be served any more")),
            asyncio.create_task(self._again(self.desired.follow, "bringing in what is desired")),
        ]

    @classmethod
    async def open(cls, settings: ServeSettings, cache: Path | None = None) -> Replica:
        sys.setswitchinterval(SWITCH_S)
        base = await asyncio.to_thread(ServedBase, settings.base, settings.base_revision, settings.chat_template)
        engine = await settings.engine.open(str(base.folder))
        replica = cls(settings, engine, base, Scratch(cache) if cache is not None else await asyncio.to_thread(Scratch.new))
        await asyncio.to_thread(publish_key, settings.store, replica.signer.key_id, replica.signer.public_pem)
        await replica.desired.follow()
        return replica

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self.engine.close()
        self._tokenising.shutdown(wait=False)
        self.grammars.close()
        await asyncio.to_thread(self._scratch.remove)  # fetched again by whoever needs it

    async def answer(self, job: Job) -> AsyncGenerator[Event, None]:
        """Streams the events of one job; closing the iterator aborts it. Raises FtcoreError for what cannot be answered."""
        answered = self._embedded(job) if job.inputs else self._answered(job)
        async with aclosing(answered if job.is_streamed else gathered(answered)) as events:
            async for event in events:
                yield event

    async def _embedded(self, job: Job) -> AsyncGenerator[Event, None]:
        prompts = []
        for each in job.inputs:
            prompts.append(await self._turns.in_thread(job.tenant, self._tokenising, partial(self._tokens, each)))
            check_prompt(prompts[-1], self.engine.max_context, self.engine.vocabulary)
        async with self._held(job) as (ref, was_cold):
            digest, name = (ref.digest, ref.full) if ref else ("", "")
            total, outputs = sum(map(len, prompts)), list[Said]()
            async with aclosing(self.engine.embed(prompts, digest, job.tenant)) as vectors:
                async for vector in vectors:
                    index, values = len(outputs), vector.astype("<f4").tobytes()
                    if not index:  # what an engine refuses, it refuses before
                        yield Opening(name, self.base.weights, self.signer.key_id, was_cold, total)
                    outputs.append(said_vector(values))
                    yield Vector(index, values)
            yield self._closing(job, name, total, 0, outputs)

    def _closing(self, job: Job, name: str, prompt_tokens: int, used: int, outputs: Sequence[Said]) -> Closing:
        receipt = self.signer.sign(job.id, job.tenant, name, self.base.weights, outputs)
        self.num_answers += 1
        return Closing(prompt_tokens, used, {key: str(value) for key, value in receipt.model_dump().items()})

    async def _answered(self, job: Job) -> AsyncGenerator[Event, None]:
        format = self.base.tool_format(self.settings.tool_format) if job.tools else None
        prompt = await self._turns.in_thread(job.tenant, self._tokenising, partial(self._prompt, job))
        grammar = await self._grammar(job, format)
        room = self.engine.max_context - len(prompt)
        self.engine.check(Request(job.id, prompt, "", job.max_tokens or 1, self.base.stop_ids, job.sampling, constraint=grammar))
        plan = Plan(job, prompt, min(room, job.max_tokens or room), grammar, format)
        async with self._held(job) as (ref, was_cold):
            digest, name = (ref.digest, ref.full) if ref else ("", "")
            yield Opening(name, self.base.weights, self.signer.key_id, was_cold, len(prompt))
            texts, used, computed = [""] * job.num_choices, 0, set()
            calls: list[list[CallPart]] = [[] for _ in texts]
            async with aclosing(self._choices(plan, digest)) as events:
                async for choice, token, piece in events:
                    computed.add(token.adapter)
                    if piece is not None:
                        used += piece.num_tokens
                        texts[choice] += piece.text
                        calls[choice] += piece.calls
                        yield piece
            if computed != {digest}:
                raise IntegrityError("another adapter's slot computed this answer", got=str(computed)[:80], wanted=digest[:12])
            outputs = [
                said(text, [(call.name, call.arguments) for call in whole_calls(own)]) for text, own in zip(texts, calls, strict=True)
            ]
            yield self._closing(job, name, len(prompt), used, outputs)

    async def _grammar(self, job: Job, format: ToolFormat | None) -> Grammar | None:
        """What the answer is held to, compiled. Raises ConfigError where it cannot be."""
        constraint = job.constraint
        if job.tools is not None and format is not None and job.tools.is_held:
            constraint = call_constraint(format, job.tools, self.base.tokenizer)
        if constraint is None:
            return None
        if not self.engine.computes:
            raise ConfigError("this engine computes nothing, so it can hold no answer to a format")
        return await self.grammars.compile(constraint)

    async def _choices(self, plan: Plan, digest: str) -> AsyncGenerator[tuple[int, Token, Piece | None], None]:
        """Every choice's tokens as they come. A choice that fails ends all."""
        job = plan.job
        queue: asyncio.Queue[tuple[int, Token, Piece | None] | BaseException | None] = asyncio.Queue()

        async def one(choice: int) -> None:
            try:
                async with aclosing(self._one(plan, choice, digest)) as events:
                    async for event in events:
                        queue.put_nowait((choice, *event))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        if job.num_choices == 1:
            async with aclosing(self._one(plan, 0, digest)) as events:
                async for token, piece in events:
                    yield 0, token, piece
            return
        tasks = [asyncio.create_task(one(choice)) for choice in range(job.num_choices)]
        try:
            ended = 0
            while ended < job.num_choices:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    ended += 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, plan: Plan, choice: int, digest: str) -> AsyncGenerator[tuple[Token, Piece | None], None]:
        job, sampling = plan.job, plan.job.sampling
        if choice and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + choice)
        request = Request(f"{job.id}-{choice}", plan.prompt, digest, plan.limit, self.base.stop_ids, sampling, job.tenant, plan.grammar)
        calling = CallStream(plan.format, job.tools) if plan.format is not None and job.tools is not None else None
        special = plan.format is not None and marks_are_special(plan.format, self.base.tokenizer)
        stream = TextStream(self.base.tokenizer, job.stops, keep_special=special)
        held: list[TokenInfo] = []
        num_tokens = 0
        async with aclosing(self.engine.generate(request)) as tokens:
            async for token in tokens:
                if token.problem:
                    raise ConfigError(token.problem)
                if token.finish == "abort":
                    raise EngineEnded("this answer was ended by the engine", where=job.id)
                num_tokens += token.finish != "stop"
                text = "" if token.finish == "stop" else stream.push(token.id)
                if token.finish is not None:
                    text += stream.end()
                if token.logprob is not None and token.finish != "stop":
                    held.append(self._info(token))
                finish: Finish | None = "stop" if stream.stopped else token.finish
                parts: tuple[CallPart, ...] = ()
                if calling is not None:
                    text, parts, finish = _called(calling, text, finish)
                piece = None
                if text or parts or finish:
                    piece, held, num_tokens = Piece(choice, text, tuple(held), finish, num_tokens, parts), [], 0
                yield token, piece
                if finish:
                    return

    def _info(self, token: Token) -> TokenInfo:
        words = self.base.tokenizer.decode
        return TokenInfo(words([token.id]), token.logprob or 0.0, tuple((words([id_]), logprob) for id_, logprob in token.top))

    def _prompt(self, job: Job) -> tuple[int, ...]:
        tools = job.tools.shown if job.tools else ()
        turns = [turn for turn in job.prompt if isinstance(turn, Message)] if not isinstance(job.prompt, str) else []
        if not turns:
            return self._tokens(job.prompt if isinstance(job.prompt, str) else [token for token in job.prompt if isinstance(token, int)])
        self._require_short(sum(len(turn.content) + len(str(turn.tool_calls)) for turn in turns) + len(str(tools)))
        return self.base.chat_prompt(turns, tools, self.engine.max_context)

    def _tokens(self, text: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(text, str):
            return tuple(text)
        self._require_short(len(text))
        return self.base.text_prompt(text, self.engine.max_context)

    def _require_short(self, num_characters: int) -> None:
        if num_characters > MAX_CHARACTERS_A_TOKEN * self.engine.max_context:
            got = f"{num_characters} characters"
            raise ConfigError("the prompt does not fit the context", where="prompt", got=got, wanted="a shorter one")

    @asynccontextmanager
    async def _held(self, job: Job) -> AsyncIterator[tuple[AdapterRef | None, bool]]:
        """(the version that answers, whether it had to be loaded). A name that was just promoted means its version before until the new one
        is in."""
        ref, fallback = job.answerer.ref, job.answerer.fallback
        if ref is None:
            yield None, False
            return
        resident = self.slots.resident
        if ref not in resident and fallback is not None:
            if fallback in resident and job.answerer.is_changing:
                self.slots.load_behind(ref)
                ref = fallback
            else:
                try:
                    await self.slots.load(ref)
                except (IntegrityError, ModelError):  # logged where it was refused
                    ref = fallback
        async with self.slots.pinned(ref):
            yield ref, ref not in resident

    async def _prove(self, ref: AdapterRef, folder: Path) -> None:
        card = await asyncio.to_thread(self.store.card, ref)
        self.base.require_card(card)
        if self.engine.computes:
            await self.base.prove(self.engine, ref.digest, folder, self.engine.precision)
        else:
            log.warning("%s is served unproven: this engine computes nothing", ref)

    async def _again(self, look: Callable[[], Awaitable[object]], what: str) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await look()
            except Exception:  # the next second may be better; this watch never ends by itself
                log.exception("%s failed", what)

    def state(self) -> dict[str, Any]:
        """What this replica holds, for people, metrics and readiness."""
        return {
            "replica": self.signer.key_id, "missing": self.desired.missing, **asdict(self.origin),
            "resident": {slot.ref.full: {"pins": slot.pins, "load_s": round(slot.load_s, 3)} for slot in self.slots.resident.values()},
            "refused": {ref.full: reason for ref, reason in self.slots.refusals.items()},
            "engine": asdict(self.engine.stats()), "num_answers": self.num_answers, **asdict(self.slots.counts),
        }  # fmt: skip


def _called(calling: CallStream, text: str, finish: Finish | None) -> tuple[str, tuple[CallPart, ...], Finish | None]:
    """What a piece of text shows, calls, and ends."""
    shown, parts = calling.push(text)
    if finish is not None:
        rest, last = calling.end()
        shown, parts = shown + rest, parts + last
    if calling.is_full or (finish == "stop" and calling.num_calls):
        finish = "tool_calls"
    return shown, parts, finish
