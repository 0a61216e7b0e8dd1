"""What every engine does, whatever computes: streams, ends, waits its turn, lets go, refuses in words."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ftcore.constraints import regex_constraint
from ftcore.engines.base import ENGINES, Engine, LiveEngine, Request, Sampling, Token
from ftcore.errors import ConfigError, ModelError
from tests.conftest import make_tiny_model
from tests.constrained import compiled, require_valid, text_of
from tests.live_engines import DIGESTS, run
from tests.live_engines import adapters as adapters

SECTIONS: dict[str, dict[str, Any]] = {
    "torch": {"num_threads": 1}, "fake": {"vocabulary": 256, "token_s": 0.001}, "vllm": {"dtype": "fp32", "kv_cache_mib": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wider-model"), hidden=128)  # heads of 32, the least that vLLM computes on a CPU


@pytest.fixture(params=list(ENGINES))
def section(request: pytest.FixtureRequest) -> Engine:
    kind = request.param
    assert kind in SECTIONS, f"say here how the contract opens engine `{kind}`"
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: tests/contract/test_vllm.py runs this in its own environment")
    return ENGINES[kind].model_validate({"max_batch": 3, "max_context": 64, **SECTIONS[kind]})


@asynccontextmanager
async def opened(section: Engine, base: Path) -> AsyncIterator[LiveEngine]:
    engine = await section.open(str(base))
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: LiveEngine, request: Request) -> list[Token]:
    return [token async for token in engine.generate(request)]


def test_an_answer_streams_to_its_length_and_says_whose_it_is(section: Engine, tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            for digest in DIGESTS[:3]:
                await engine.load_adapter(digest, adapters[digest])
            rows = [Request(f"r{i}", (5, 6, 7 + i), ["", *DIGESTS[:3]][i % 4], max_tokens=5, sampling=Sampling(seed=i)) for i in range(12)]
            answers = await asyncio.gather(*(answer(engine, request) for request in rows))
            for request, tokens in zip(rows, answers, strict=True):
                assert [token.finish for token in tokens] == [None] * 4 + ["length"]
                assert {token.adapter for token in tokens} == {request.adapter}
                assert all(0 <= token.id < engine.vocabulary for token in tokens)
            again = await asyncio.gather(*(answer(engine, request) for request in rows))
            assert [[token.id for token in tokens] for tokens in again] == [[token.id for token in tokens] for tokens in answers]
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_tokens) == (0, 0, 120)
            assert set(stats.adapters) == set(DIGESTS[:3])

    run(go())


def test_the_context_is_the_most_there_is(section: Engine, tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            tokens = await answer(engine, Request("a", (5,) * 60, max_tokens=1000))
            assert (len(tokens), tokens[-1].finish) == (4, "length")

    run(go())


def test_who_leaves_or_is_aborted_makes_room(section: Engine, tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
            streams = [engine.generate(Request(f"s{i}", (5, 6), DIGESTS[0], max_tokens=60)) for i in range(3)]
            for stream in streams:
                await anext(stream)
            waiting = asyncio.create_task(answer(engine, Request("w", (5, 6), max_tokens=3)))
            unloading = asyncio.create_task(engine.unload_adapter(DIGESTS[0]))
            await streams[0].aclose()
            assert len(await waiting) == 3
            await engine.abort("s1")
            assert [token async for token in streams[1]][-1].finish == "abort"
            assert [token async for token in streams[2]][-1].finish == "length"
            await unloading
            assert engine.stats().adapters == ()
            with pytest.raises(ConfigError, match="not loaded"):
                await answer(engine, Request("x", (5, 6), DIGESTS[0]))
            await engine.abort("nobody")
            await engine.health()

    run(go())


def test_what_cannot_be_answered_is_refused(section: Engine, tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            for request in (
                Request("a", ()), Request("b", (5,) * 64), Request("c", (5,), max_tokens=0), Request("d", (10**9,)), Request("e", (-1,)),
                Request("f", (5,), "a" * 64), Request("g", (5,), sampling=Sampling(logit_bias={-1: 1.0})),
                Request("h", (5,), sampling=Sampling(num_logprobs=-1)), Request("i", (5,), sampling=Sampling(repetition_penalty=0)),
                Request("j", (5,), sampling=Sampling(temperature=float("nan"))),
            ):  # fmt: skip
                with pytest.raises(ConfigError):
                    await answer(engine, request)
            with pytest.raises(ConfigError):
                await engine.next_logits([[10**9]])
            assert len((await engine.next_logits([[5, 6]]))[0]) == engine.vocabulary

    run(go())


def test_an_answer_is_held_to_its_constraint_or_refused_before_it_begins(
    section: Engine, tiny_model_dir: Path, adapters: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    pattern = "(?:open|rename) [a-z]{2,5}"
    (grammar,) = compiled(tokenizer, regex_constraint(pattern, "regex"))
    request = Request("a", (5, 6), DIGESTS[0], 60, frozenset({tokenizer.eos_token_id}), constraint=grammar)

    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
            if engine.computes:
                engine.check(request)
                tokens = await answer(engine, request)
                assert (tokens[-1].finish, {token.adapter for token in tokens}) == ("stop", {DIGESTS[0]})
                require_valid(pattern, text_of(tokenizer, tokens))
            else:
                with pytest.raises(ConfigError, match="computes nothing"):
                    engine.check(request)
            with pytest.raises(ConfigError, match="stop token"):
                engine.check(replace(request, stop_ids=frozenset()))

    run(go())


def test_an_engine_that_was_closed_says_so(section: Engine, tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(section, tiny_model_dir) as engine:
            stream = engine.generate(Request("a", (5, 6), max_tokens=60))
            await anext(stream)
            await engine.close()
            assert [token async for token in stream][-1].finish == "abort"
            with pytest.raises(ModelError, match="has ended"):
                await answer(engine, Request("b", (5, 6)))
            with pytest.raises(ModelError, match="has ended"):
                await engine.health()

    run(go())
