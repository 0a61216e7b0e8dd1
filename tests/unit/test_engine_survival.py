"""What may happen to an engine: callers that give up, numbers that overflow, slots that are altered, rows that wait, the end."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.engines.base import EngineEnded, Request, Sampling, Token
from ftcore.engines.torch import Torch
from ftcore.errors import ModelError
from tests.live_engines import DIGESTS, answer, opened, require_own, run, some_request, spoiled
from tests.live_engines import adapters as adapters
from tests.live_engines import truth as truth
from tests.oracles import Truth


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
            holder = asyncio.create_task(answer(engine, Request("holder", (5, 6, 7), DIGESTS[0], max_tokens=100)))
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.unload_adapter(DIGESTS[0]), 0.001)
            assert len(await bystander) == len(await holder) == 100
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
                bad = Request(f"bad{turn}", tuple(range(5, 8 + 30 * turn)), poison, max_tokens=20)  # the longest is read in seven chunks
                good = [some_request(rng, 10 * turn + i, digest, max_tokens=8) for i, digest in enumerate(("", DIGESTS[3], ""))]
                spoilt, *answers = await asyncio.gather(answer(engine, bad), *(answer(engine, request) for request in good))
                assert [token.finish for token in spoilt] == ["abort"]
                with pytest.raises(ModelError, match="not finite"):
                    await anext(engine.embed([bad.prompt], poison))
                assert poison not in {owner[0] for owner, _ in engine._thread._admission.prefixes._kept}
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
            lora = engine._thread.decoder.lora
            slot = lora.held_slots[DIGESTS[1]]
            next(iter(lora.groups.values())).shelves[slot.width].a[0][slot.number, 0, 0] += 0.5
            assert (await answer(engine, request))[-1].finish == "abort"
            require_own(truth, request, await answer(engine, request))  # written anew
            next(iter(lora.groups.values())).shelves[slot.width].a[0][lora.held_slots[DIGESTS[1]].number, 0, 0] += 0.5
            under_way = asyncio.create_task(answer(engine, Request("b", (5, 6, 7), DIGESTS[1], max_tokens=80)))
            await asyncio.sleep(0)
            with pytest.raises(EngineEnded, match="held other weights"):
                await anext(engine.embed([[5, 6, 7]], DIGESTS[1]))
            assert (await under_way)[-1].finish == "abort"
            vector = await anext(engine.embed([[5, 6, 7]], DIGESTS[1]))
            assert float((torch.as_tensor(vector) - truth.embedding(DIGESTS[1], (5, 6, 7))).abs().max()) <= 1e-5

    run(go())


def test_an_adapter_that_waits_for_a_slot_is_not_overtaken_for_ever(tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_lanes=8, max_batch=4) as engine:
            for digest in (DIGESTS[1], DIGESTS[7]):  # both of rank 8: never both
                await engine.load_adapter(digest, adapters[digest])
            over = asyncio.Event()

            async def hot(seed: int) -> None:
                number = 0
                while not over.is_set():
                    number += 1
                    await answer(engine, Request(f"hot{seed}-{number}", (5, 6), DIGESTS[1], max_tokens=4))

            busy = [asyncio.create_task(hot(seed)) for seed in range(6)]
            await asyncio.sleep(0.2)
            assert len(await asyncio.wait_for(answer(engine, Request("cold", (5, 6), DIGESTS[7], max_tokens=4)), 20)) == 4
            assert len(await asyncio.wait_for(engine.next_logits([[5, 6]], DIGESTS[7]), 20)) == 1
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
