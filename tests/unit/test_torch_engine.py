"""The torch engine against plain PEFT: every row of a mixed batch is its own adapter's, whatever joins, leaves, loads and unloads."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.engines.base import ENGINES, Request, Sampling, Token
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, IntegrityError, ModelError
from tests.live_engines import DIGESTS, NUM_ADAPTERS, answer, come_and_go, mixed, opened, require_own, run, some_request, spoiled
from tests.live_engines import adapters as adapters
from tests.live_engines import truth as truth
from tests.oracles import KINDS, Truth


def test_every_row_of_a_mixed_batch_is_its_own_adapters(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    async def go() -> list[tuple[Request, list[Token]]]:
        async with opened(tiny_model_dir) as engine:
            await asyncio.gather(*(engine.load_adapter(digest, folder) for digest, folder in adapters.items()))
            done = await mixed(engine, random.Random(0))
            stats = engine.stats()
            assert stats.num_running == stats.num_waiting == stats.cache_tokens == 0
            assert stats.num_tokens == 360
            assert stats.num_steps < 200  # together, not one after another
            return done

    for request, tokens in run(go()):
        assert [token.finish for token in tokens] == [None] * 9 + ["length"]
        require_own(truth, request, tokens)


@pytest.mark.parametrize("num_requests", [200, pytest.param(10_000, marks=pytest.mark.proof)])
def test_no_answer_is_wrong_while_adapters_come_and_go(
    tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth, num_requests: int
) -> None:
    """Few slots, so that adapters move and take turns; unloading waits for the rows that use it."""

    async def go() -> list[tuple[Request, list[Token]]]:
        async with opened(tiny_model_dir, max_lanes=24, prefix_mib=1) as engine:
            return await come_and_go(engine, adapters, num_requests, pause_s=0.01)

    done = run(go(), num_requests)
    assert len(done) == num_requests
    for request, tokens in done:
        require_own(truth, request, tokens)


def test_a_seed_gives_the_same_text_in_any_company(tiny_model_dir: Path) -> None:
    async def go() -> list[list[int]]:
        rng = random.Random(2)
        texts = []
        async with opened(tiny_model_dir) as engine:
            prompt = tuple(range(5, 40))
            for company in (0, 3, 5):
                asked = Request(f"a{company}", prompt, max_tokens=30, sampling=Sampling(temperature=0.9, top_p=0.9, seed=7))
                others = [some_request(rng, company * 100 + i, "") for i in range(company)]
                first, *_ = await asyncio.gather(answer(engine, asked), *(answer(engine, other) for other in others))
                texts.append([token.id for token in first])
        return texts

    alone, *others = run(go())
    assert len(set(alone)) > 5
    assert others == [alone, alone]


def test_a_prompt_read_before_is_not_read_again_but_only_under_its_own_adapter_and_salt(
    tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth
) -> None:
    async def go() -> list[tuple[Request, list[Token], int]]:
        found = []
        async with opened(tiny_model_dir) as engine:
            for digest in DIGESTS[:2]:
                await engine.load_adapter(digest, adapters[digest])
            prompt = tuple(3 + i % 200 for i in range(70))
            cases = [(DIGESTS[0], ""), (DIGESTS[0], ""), (DIGESTS[1], ""), ("", ""), (DIGESTS[0], "other"), (DIGESTS[1], "")]
            for i, (digest, salt) in enumerate(cases):
                before = engine.stats().num_reused_tokens
                request = Request(f"p{i}", (*prompt, i + 9), digest, max_tokens=4, salt=salt, sampling=Sampling(0, num_logprobs=0))
                tokens = await answer(engine, request)
                found.append((request, tokens, engine.stats().num_reused_tokens - before))
            await engine.unload_adapter(DIGESTS[0])
            await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
            before = engine.stats().num_reused_tokens
            await answer(engine, Request("again", prompt, DIGESTS[0], max_tokens=2))
            assert engine.stats().num_reused_tokens == before
        return found

    found = run(go())
    assert [reused for _, _, reused in found] == [0, 64, 0, 0, 0, 64]
    for request, tokens, _ in found:
        require_own(truth, request, tokens)


def test_a_client_that_leaves_frees_its_place(tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_batch=2) as engine:
            streams = [engine.generate(Request(f"l{i}", (5, 6, 7), max_tokens=100)) for i in range(2)]
            for stream in streams:
                await anext(stream)
            waiting = asyncio.create_task(answer(engine, Request("next", (8, 9), max_tokens=3)))
            await streams[0].aclose()
            assert len(await waiting) == 3
            await engine.abort("l1")
            rest = [token async for token in streams[1]]
            assert rest[-1].finish == "abort"
            await engine.health()
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.cache_tokens) == (0, 0, 0)

    run(go())


def test_stop_tokens_end_an_answer(tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            request = Request("a", (5, 6, 7), max_tokens=20, sampling=Sampling(temperature=0))
            ids = [token.id for token in await answer(engine, request)]
            stop = ids[5]
            first = ids.index(stop)
            tokens = await answer(
                engine, Request("b", (5, 6, 7), max_tokens=20, sampling=Sampling(temperature=0), stop_ids=frozenset({stop}))
            )
            assert [token.id for token in tokens] == ids[: first + 1]
            assert [token.finish for token in tokens][-1] == "stop"

    run(go())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("x", ()), "prompt is empty"),
        (Request("x", tuple(range(3, 131))), "does not fit the context"),
        (Request("x", (5,), max_tokens=0), "at least one token"),
        (Request("x", (10**7,)), "does not have"),
        (Request("x", (5,), "f" * 64), "not loaded"),
        (Request("x", (5,), sampling=Sampling(logit_bias={10**8: 1.0})), "logit_bias"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_the_engine_goes_on(tiny_model_dir: Path, request_: Request, words: str) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            with pytest.raises(ConfigError, match=words):
                await answer(engine, request_)
            assert len(await answer(engine, Request("y", (5, 6), max_tokens=2))) == 2

    run(go())


def test_the_engine_says_what_plain_peft_says_after_a_prompt(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            digest, prompts = DIGESTS[3], [[5, 6, 7], list(range(10, 60))]
            await engine.load_adapter(digest, adapters[digest])
            for name in (digest, ""):
                got = torch.stack([torch.as_tensor(row) for row in await engine.next_logits(prompts, name)]).log_softmax(-1)
                want = torch.stack([truth.logps(name, prompt)[-1] for prompt in prompts])
                assert float((got - want).abs().max()) <= 1e-4
                vectors = torch.stack([torch.as_tensor(row) async for row in engine.embed(prompts, name)])
                want = torch.stack([truth.embedding(name, prompt) for prompt in prompts])
                assert float((vectors - want).abs().max()) <= 1e-5
                assert float((vectors - truth.embedding(DIGESTS[0], prompts[0])).abs().max()) > 1e-2

    run(go())


def test_what_is_only_read_is_read_with_everybody_elses_steps(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    """Embeddings for three adapters and none, proofs and streams at once: each is its own adapter's, and no step is anybody's alone."""

    async def go() -> None:
        async with opened(tiny_model_dir, max_batch=4) as engine:
            for digest in DIGESTS[:3]:
                await engine.load_adapter(digest, adapters[digest])
            names, prompts = ["", *DIGESTS[:3]], [[5 + number] * (3 + number) for number in range(8)]
            streams = [asyncio.create_task(answer(engine, Request(f"s{n}", (9, n + 3), names[n], 100, salt="s"))) for n in range(4)]
            while engine.stats().num_running < 4:
                await asyncio.sleep(0.001)

            async def embedded(name: str) -> torch.Tensor:
                return torch.stack([torch.as_tensor(row) async for row in engine.embed(prompts, name, salt=f"e{name[-1:]}")])

            proving = asyncio.create_task(engine.next_logits([list(range(10, 60))], DIGESTS[2]))
            for name, vectors in zip(names, await asyncio.gather(*map(embedded, names)), strict=True):
                want = torch.stack([truth.embedding(name, prompt) for prompt in prompts])
                assert float((vectors - want).abs().max()) <= 1e-5
            (logits,) = await proving
            apart = torch.as_tensor(logits).log_softmax(-1) - truth.logps(DIGESTS[2], list(range(10, 60)))[-1]
            assert float(apart.abs().max()) <= 1e-4
            assert [len(tokens) for tokens in await asyncio.gather(*streams)] == [100] * 4
            assert engine.stats().num_steps <= 150  # the streams alone take 100, each input alone one more, each proof five
            assert engine.stats().num_preempted

    run(go())


def test_an_embedding_that_nobody_waits_for_is_not_read(tiny_model_dir: Path) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_batch=1) as engine:
            embedding = engine.embed([[5] * 100 for _ in range(200)])
            assert len(await anext(embedding)) == 32
            await embedding.aclose()
            await engine.health()
            assert engine.stats().num_waiting == engine.stats().num_running == 0
            assert engine.stats().num_prompt_tokens < 100 * 100
            num_rows = []
            async for _ in engine.embed([[5, 6]] * 20):
                await engine.health()
                num_rows.append(engine.stats().num_waiting + engine.stats().num_running)
            assert len(num_rows) == 20 and max(num_rows) <= 1, "they wait outside"

    run(go())


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("dora", lambda config, _: config.update(use_dora=True), ModelError, "DoRA"),
        ("whole modules", lambda config, _: config.update(modules_to_save=["lm_head"]), ModelError, "modules_to_save"),
        ("bias", lambda config, _: config.update(bias="all"), ModelError, "biases"),
        ("another method", lambda config, _: config.update(peft_type="IA3"), ModelError, "IA3"),
        ("a stranger", lambda _, t: t.update({"base_model.model.model.layers.0.extra.weight": torch.ones(2)}), ModelError, "extra"),
        ("another base", lambda _, t: t.update({k.replace("layers.0", "layers.70"): t.pop(k) for k in list(t)}), ModelError, "layers.70"),
        ("half a pair", lambda _, t: t.pop(next(k for k in t if "lora_B" in k)), IntegrityError, "half"),
        ("a zero B", lambda _, t: [v.zero_() for k, v in t.items() if "lora_B" in k], IntegrityError, "zero"),
        ("not finite", lambda _, t: next(iter(t.values())).fill_(float("nan")), IntegrityError, "finite"),
        ("pissa", lambda config, _: config.update(init_lora_weights="pissa_niter_4"), ModelError, "base's own weights"),
        ("another width", lambda _, t: t.update({k: v[:, :-1].contiguous() for k, v in t.items() if "lora_A" in k}), ModelError, "shapes"),
    ],
)
def test_an_adapter_that_cannot_be_served_whole_is_refused(
    tiny_model_dir: Path, adapters: dict[str, Path], tmp_path: Path, name: str, change: Any, error: type[Exception], words: str
) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            folder = spoiled(adapters[DIGESTS[0]], tmp_path / "spoiled", change)
            with pytest.raises(error, match=words):
                await engine.load_adapter("a" * 64, folder)
            assert engine.stats().adapters == ()
            await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])

    run(go())


def test_a_rank_above_the_limit_is_refused(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_rank=4) as engine:
            with pytest.raises(ModelError, match=r"rank is (8|16)"):
                await engine.load_adapter(DIGESTS[1], adapters[DIGESTS[1]])

    run(go())


def test_an_engine_that_ended_says_so(tiny_model_dir: Path) -> None:
    async def go() -> None:
        engine = await Torch(max_context=64, num_threads=1).open(str(tiny_model_dir))
        stream = engine.generate(Request("a", (5, 6), max_tokens=60))
        await anext(stream)
        await engine.close()
        assert [token.finish async for token in stream][-1] == "abort"
        with pytest.raises(ModelError, match="has ended"):
            await engine.health()
        with pytest.raises(ModelError, match="has ended"):
            await answer(engine, Request("b", (5, 6)))

    run(go())


def test_the_registry_knows_it() -> None:
    assert "torch" in ENGINES
    assert len(KINDS) == NUM_ADAPTERS
