"""The torch engine against plain PEFT: every row of a mixed batch is its own adapter's, whatever joins, leaves, loads and unloads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.engines.base import ENGINES, LiveEngine, Request, Sampling, Token
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, IntegrityError, ModelError
from tests.oracles import KINDS, Truth, make_adapter

NUM_ADAPTERS = 8
DIGESTS = [f"{number:064x}" for number in range(1, NUM_ADAPTERS + 1)]


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {digest: make_adapter(tiny_model_dir, home / digest[-2:], i) for i, digest in enumerate(DIGESTS)}


@pytest.fixture(scope="module")
def truth(tiny_model_dir: Path, adapters: dict[str, Path]) -> Truth:
    return Truth(tiny_model_dir, adapters)


@asynccontextmanager
async def opened(base: Path, **keys: Any) -> AsyncIterator[LiveEngine]:
    engine = await Torch(**{"max_batch": 6, "max_context": 128, "chunk_tokens": 16, "num_threads": 1, **keys}).open(str(base))
    try:
        yield engine
    finally:
        await engine.close()


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 120))


async def answer(engine: LiveEngine, request: Request) -> list[Token]:
    return [token async for token in engine.generate(request)]


def some_request(rng: random.Random, number: int, adapter: str, **keys: Any) -> Request:
    prompt = tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 60)))
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=number, num_logprobs=0)
    return Request(f"r{number}", prompt, adapter, **{"max_tokens": rng.randrange(1, 12), "sampling": sampling, **keys})


def require_own(truth: Truth, request: Request, tokens: list[Token]) -> None:
    """Each log-probability is the adapter's own to 1e-4, and not any other's."""
    ids = [token.id for token in tokens]
    assert {token.adapter for token in tokens} == {request.adapter}
    got = torch.tensor([token.logprob for token in tokens])
    apart = {}
    for digest in ("", *DIGESTS):
        logps = truth.answer_logps(digest, request.prompt, ids)
        apart[digest] = float((logps[range(len(ids)), ids] - got).abs().max())
    assert apart.pop(request.adapter) <= 1e-4
    assert min(apart.values()) > 1e-3


def test_every_row_of_a_mixed_batch_is_its_own_adapters(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    async def go() -> list[tuple[Request, list[Token]]]:
        rng = random.Random(0)
        async with opened(tiny_model_dir) as engine:
            await asyncio.gather(*(engine.load_adapter(digest, folder) for digest, folder in adapters.items()))
            requests = [some_request(rng, i, ["", *DIGESTS][i % 9], max_tokens=10) for i in range(36)]
            answers = await asyncio.gather(*(answer(engine, request) for request in requests))
            stats = engine.stats()
            assert stats.num_running == stats.num_waiting == stats.cache_tokens == 0
            assert stats.num_tokens == 360
            assert stats.num_steps < 200  # together, not one after another
            return list(zip(requests, answers, strict=True))

    for request, tokens in run(go()):
        assert [token.finish for token in tokens] == [None] * 9 + ["length"]
        require_own(truth, request, tokens)


def test_no_answer_is_wrong_while_adapters_come_and_go(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    """Few lanes, so that stacks are compacted and adapters take turns; unloading waits for the rows that use it."""

    async def go() -> list[tuple[Request, list[Token]]]:
        rng = random.Random(1)
        done: list[tuple[Request, list[Token]]] = []
        async with opened(tiny_model_dir, max_lanes=24, prefix_mib=1) as engine:
            over = asyncio.Event()

            async def churn(seed: int) -> None:
                own = random.Random(seed)
                while not over.is_set():
                    digest = own.choice(DIGESTS)
                    await engine.load_adapter(digest, adapters[digest])
                    await asyncio.sleep(own.random() * 0.01)
                    await engine.unload_adapter(digest)

            async def client(seed: int) -> None:
                own = random.Random(seed)
                for i in range(25):
                    request = some_request(own, seed * 1000 + i, own.choice(["", *DIGESTS]))
                    while True:
                        try:
                            if request.adapter:
                                await engine.load_adapter(request.adapter, adapters[request.adapter])
                            done.append((request, await answer(engine, request)))
                            break
                        except ConfigError as error:
                            assert "not loaded" in str(error)

            churning = [asyncio.create_task(churn(rng.randrange(10**6))) for _ in range(2)]
            await asyncio.gather(*(client(seed) for seed in range(1, 9)))
            over.set()
            await asyncio.gather(*churning)
        return done

    done = run(go())
    assert len(done) == 200
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

    run(go())


def spoiled(folder: Path, copy: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    import json

    from safetensors.torch import load_file, save_file

    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "adapter_model.safetensors")
    return copy


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


def test_callers_that_give_up_leave_the_engine_and_the_others_alone(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
            bystander = asyncio.create_task(answer(engine, Request("bystander", (5, 6, 7), DIGESTS[0], max_tokens=100)))
            for turn in range(40):
                tasks = [
                    asyncio.create_task(answer(engine, Request("same", (5, 6, 7), max_tokens=50))),
                    asyncio.create_task(engine.health()),
                    asyncio.create_task(engine.load_adapter(DIGESTS[1], adapters[DIGESTS[1]])),
                    asyncio.create_task(engine.next_logits([[5, 6, 7]])),
                ]
                await asyncio.sleep(0.001 * (turn % 3))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.unload_adapter(DIGESTS[0]), 0.001)
            assert len(await bystander) == 100
            await engine.health()
            assert engine.stats().num_running == 0

    run(go())


def test_numbers_that_overflow_stay_in_their_own_row(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth, tmp_path: Path) -> None:
    def blow(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(3e38 if "lora_A" in name else 1.0)

    async def go() -> list[tuple[Request, list[Token]]]:
        async with opened(tiny_model_dir) as engine:
            poison = "f" * 64
            await engine.load_adapter(poison, spoiled(adapters[DIGESTS[0]], tmp_path / "poison", blow))
            await engine.load_adapter(DIGESTS[3], adapters[DIGESTS[3]])
            rng = random.Random(0)
            found = []
            for turn in range(4):
                bad = Request(f"bad{turn}", (5, 6, 7), poison, max_tokens=20)
                good = [some_request(rng, 10 * turn + i, digest, max_tokens=8) for i, digest in enumerate(("", DIGESTS[3], ""))]
                spoilt, *answers = await asyncio.gather(answer(engine, bad), *(answer(engine, request) for request in good))
                assert spoilt[-1].finish == "abort"
                found += list(zip(good, answers, strict=True))
            await engine.unload_adapter(poison)
            last = [some_request(rng, 90 + i, DIGESTS[3], max_tokens=8) for i in range(6)]
            return found + list(zip(last, await asyncio.gather(*(answer(engine, request) for request in last)), strict=True))

    for request, tokens in run(go()):
        require_own(truth, request, tokens)


def test_weights_that_were_swapped_in_a_slot_are_found(tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            for digest in DIGESTS[:2]:
                await engine.load_adapter(digest, adapters[digest])
            request = Request("a", (5, 6, 7), DIGESTS[1], max_tokens=3, sampling=Sampling(0, num_logprobs=0))
            require_own(truth, request, await answer(engine, request))
            group = next(group for group in engine._thread.decoder.lora.groups.values() if group.users)  # type: ignore[attr-defined]
            low, _ = engine._thread.decoder.lora.lanes.held[DIGESTS[1]]  # type: ignore[attr-defined]
            group.a[low, 0, 0] += 0.5
            assert (await answer(engine, request))[-1].finish == "abort"
            require_own(truth, request, await answer(engine, request))  # written anew

    run(go())


def test_an_adapter_that_waits_for_lanes_is_not_overtaken_for_ever(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_lanes=16, max_batch=4) as engine:
            for digest in (DIGESTS[1], DIGESTS[3]):  # ranks 8 and 16: never both
                await engine.load_adapter(digest, adapters[digest])
            over = asyncio.Event()

            async def hot(seed: int) -> None:
                number = 0
                while not over.is_set():
                    number += 1
                    await answer(engine, Request(f"hot{seed}-{number}", (5, 6), DIGESTS[1], max_tokens=4))

            busy = [asyncio.create_task(hot(seed)) for seed in range(6)]
            await asyncio.sleep(0.2)
            assert len(await asyncio.wait_for(answer(engine, Request("cold", (5, 6), DIGESTS[3], max_tokens=4)), 20)) == 4
            over.set()
            await asyncio.gather(*busy)

    run(go())


def test_loading_and_unloading_one_digest_at_once_ends_as_the_last_one_asked(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        digest = DIGESTS[0]
        async with opened(tiny_model_dir) as engine:
            await engine.load_adapter(digest, adapters[digest])
            using = asyncio.create_task(answer(engine, Request("u", (5, 6), digest, max_tokens=60)))
            await asyncio.sleep(0.01)
            leaving = asyncio.create_task(engine.unload_adapter(digest))
            await asyncio.sleep(0.01)
            await engine.load_adapter(digest, adapters[digest])  # waits until it has left
            assert using.done() and leaving.done()
            assert len(await answer(engine, Request("v", (5, 6), digest, max_tokens=2))) == 2

    run(go())


def test_nobody_waits_for_an_engine_that_closes(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        engine = await Torch(max_context=128, num_threads=1).open(str(tiny_model_dir))
        await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
        running = asyncio.create_task(answer(engine, Request("a", (5, 6), DIGESTS[0], max_tokens=120)))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(task) for task in (engine.unload_adapter(DIGESTS[0]), engine.next_logits([[5] * 100] * 50))]
        await asyncio.sleep(0)
        late = asyncio.create_task(answer(engine, Request("b", (5, 6), max_tokens=5)))
        await engine.close()
        for outcome in await asyncio.wait_for(asyncio.gather(running, late, *waiting, return_exceptions=True), 20):
            aborted = isinstance(outcome, list) and isinstance(outcome[-1], Token) and outcome[-1].finish == "abort"
            assert aborted or isinstance(outcome, ModelError), outcome
        with pytest.raises(ModelError, match="has ended"):
            await asyncio.wait_for(engine.load_adapter(DIGESTS[1], adapters[DIGESTS[1]]), 20)

    run(go())


def test_an_engine_that_cannot_begin_says_why(tmp_path: Path) -> None:
    async def go() -> None:
        with pytest.raises(ModelError, match="no such model folder"):
            await Torch().open(str(tmp_path / "nothing"))

    run(go())
