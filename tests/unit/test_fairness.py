"""Fairness between owners: a hog does not make a light one wait, nobody saves up by pausing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftcore.admission import Admission
from ftcore.batching import TURN, Batcher, Row
from ftcore.engines.base import Request, Sampling, Token
from ftcore.fairness import MADE, Fairness
from ftcore.pace import LEAST, Pace
from tests.live_engines import DIGESTS, answer, opened, require_own, run
from tests.live_engines import adapters as adapters
from tests.live_engines import truth as truth
from tests.oracles import Truth


def rows(owner: str, count: int) -> list[Row]:
    return [Row(Request(f"{owner}{number}", (1,) * 10, salt=owner), 20) for number in range(count)]


def test_the_one_with_the_least_work_goes_first_and_then_in_turn() -> None:
    fair = Fairness()
    waiting = rows("hog", 6) + rows("light", 2)
    fair.joins("hog", ())
    fair.read("hog", 1000)
    fair.joins("light", {"hog"})
    order = []
    for row in fair.order(waiting):
        fair.read(row.request.salt, row.num_prompt)
        order.append(row.request.id)
    assert order == ["light0", "hog0", "light1", "hog1", "hog2", "hog3", "hog4", "hog5"]


def test_a_pause_saves_nothing_up() -> None:
    fair = Fairness()
    fair.joins("busy", ())
    for _ in range(500):
        fair.made("busy")
    fair.joins("back", {"busy"})
    assert fair._work == {"busy": 500 * MADE, "back": 500 * MADE}
    fair.joins("next", {"back"})
    assert "busy" not in fair._work  # it has no rows any more


def test_who_holds_most_places_gives_one_to_whom_it_helps() -> None:
    fair = Fairness()
    fair.joins("hog", ())
    fair.read("hog", 100)
    fair.joins("light", {"hog"})
    assert fair.gives_way("light", Counter(hog=4)) == "hog"
    assert fair.gives_way("light", Counter(hog=2, light=1)) == "", "they would change places for ever"
    assert fair.gives_way("hog", Counter(hog=4)) == ""
    fair.read("light", 500)
    assert fair.gives_way("light", Counter(hog=4)) == "", "the light one is none"
    assert fair.gives_way("light", Counter()) == ""


@pytest.mark.parametrize("stretch", [None, 1.0])
def test_a_row_that_stepped_back_ends_as_if_it_had_not(
    tiny_model_dir: Path, adapters: dict[str, Path], truth: Truth, stretch: float | None
) -> None:
    """Long rows of a hog fill every place, and beside a light one they take turns or not; what they say, with seeds and adapters, is what
    they say alone."""

    async def go() -> tuple[list[tuple[Request, list[Token], list[Token]]], int]:
        async with opened(tiny_model_dir, max_batch=3, stretch=stretch) as engine:
            for digest in DIGESTS[:3]:
                await engine.load_adapter(digest, adapters[digest])

            def hog(number: int) -> Request:
                sampling = Sampling(temperature=1.0, seed=number, num_logprobs=0, repetition_penalty=1.1)
                return Request(f"hog{number}", (5, 6, 7 + number), ["", *DIGESTS[:2]][number % 3], 90, salt="hog", sampling=sampling)

            alone = [await answer(engine, hog(number)) for number in range(6)]
            tasks = [asyncio.create_task(answer(engine, hog(number))) for number in range(6)]
            while engine.stats().num_running < 3:
                await asyncio.sleep(0)
            lights = [
                Request(f"light{number}", (9, 9, number + 3), DIGESTS[2 * (number % 2)], 3, salt=f"light{number % 2}")
                for number in range(12)
            ]
            await asyncio.gather(*(answer(engine, light) for light in lights))
            together = await asyncio.gather(*tasks)
            assert engine.stats().num_running == engine.stats().num_waiting == engine.stats().cache_tokens == 0
            return [(hog(n), *both) for n, both in enumerate(zip(alone, together, strict=True))], engine.stats().num_preempted

    found, num_preempted = run(go())
    assert num_preempted, "nobody stepped back"
    for request, alone, together in found:
        assert [token.id for token in alone] == [token.id for token in together] and len(alone) == 90
        require_own(truth, replace(request, sampling=replace(request.sampling, repetition_penalty=1.0)), together)


def test_a_light_tenant_hardly_waits_while_a_hog_asks_for_hundreds_of_answers(tiny_model_dir: Path) -> None:
    """Counted, not timed: how many of the hog's answers end while the light one's is asked for and made. In turn it would be all."""

    async def go() -> list[int]:
        async with opened(tiny_model_dir, max_batch=4) as engine:

            def ask(owner: str, number: int) -> asyncio.Task[object]:
                request = Request(f"{owner}{number}", (5, 6, 7), max_tokens=8, salt=owner, sampling=Sampling(seed=1))
                return asyncio.create_task(answer(engine, request))

            hog = [ask("hog", number) for number in range(200)]
            while not any(task.done() for task in hog):
                await asyncio.sleep(0)
            ended = []
            for number in range(6):
                before = sum(task.done() for task in hog)
                await ask("light", number)
                ended.append(sum(task.done() for task in hog) - before)
            assert not all(task.done() for task in hog), "the hog was gone before the light one was answered"
            await asyncio.gather(*hog)
            return ended

    # At most a batch that was under way, and the batches it shared. The best of some: the engine goes on while this thread is late.
    assert min(run(go())) <= 8


def test_who_reads_much_delays_a_light_prompt_by_one_place_at_most(tiny_model_dir: Path) -> None:
    """Every place is taken by long inputs of one owner: the next one that ends gives its place, and half of each step goes to it."""

    async def go() -> list[int]:
        async with opened(tiny_model_dir, max_batch=4, prefix_mib=0) as engine:

            async def read() -> int:
                return len([vector async for vector in engine.embed([[5] * 120] * 4, salt="hog")])

            hog, num_steps = [asyncio.create_task(read()) for _ in range(15)], []
            while engine.stats().num_running < 4:
                await asyncio.sleep(0)
            for number in range(6):
                before = engine.stats().num_steps
                await answer(engine, Request(f"light{number}", tuple(range(5, 37)), max_tokens=3, salt="light"))
                num_steps.append(engine.stats().num_steps - before)
            assert engine.stats().num_waiting > 10, "the hog was gone before the light one was answered"
            for task in hog:
                task.cancel()
            await asyncio.gather(*hog, return_exceptions=True)
            return num_steps

    # An input ends, a prompt at half a step's tokens, an answer. The best of some: the engine goes on while this thread is late.
    assert min(run(go())) <= 8 + 4 + 3 + 2


def decoding(batcher: Batcher, *made: Row) -> None:
    for row in made:
        batcher.admit(row)
        row.tokens = [*row.request.prompt, 1]
        row.num_cached = row.num_prompt
        batcher.settle()


def test_rows_of_a_hog_take_turns_beside_a_light_one() -> None:
    """Each place holds what its row wrote, however they change; every row of the hog has its turn."""
    batcher, hog, light = Batcher(8, 64), rows("hog", 6), rows("light", 1)
    decoding(batcher, *hog, *light)
    places: dict[int, Row] = {row.place: row for row in batcher.decoding}
    taken: Counter[str] = Counter()
    for _ in range(3 * TURN):
        for source, target in batcher.hold(lambda num_own: 2 * num_own):
            places[target] = places[source]
        step = batcher.step()
        assert [row.place for row in batcher.decoding] == list(range(7))
        assert [places[row.place] for row in batcher.decoding] == batcher.decoding
        assert len(step.decoding) == 3 and step.num_heavy == 2 and light[0] in step.decoding
        taken.update(row.request.id for row in step.decoding)
    assert taken == {"light0": 3 * TURN} | {f"hog{number}": TURN for number in range(6)}


def test_a_prompt_of_a_hog_is_read_with_what_is_left_beside_a_light_one() -> None:
    batcher, hog, light = Batcher(8, 64), rows("hog", 4), rows("light", 1)
    decoding(batcher, *hog[:3], *light)
    hog[3].tokens = list(hog[3].request.prompt)
    batcher.admit(hog[3])
    for fitting, read in ((2, 0), (3, 0), (7, 4)):
        batcher.hold(lambda _, fitting=fitting: fitting)  # type: ignore[misc]
        step = batcher.step()
        assert (len(step.decoding) - 1, sum(chunk.count for chunk in step.chunks)) == (min(3, fitting), read)
    batcher.remove(light[0])
    batcher.hold(lambda _: 0)
    assert len(batcher.step().decoding) == 3 and batcher.step().chunks[0].count == 10, "nobody is light any more"


def test_rows_come_in_however_many_wait() -> None:
    nothing: Any = None
    batcher = Batcher(8, 64)
    admission = Admission(batcher, nothing, nothing, {}, nothing)
    many = [row for number in range(64) for row in rows(f"owner{number % 8}", 256)]
    started = time.thread_time()
    for row in many:
        admission.enter(row)
    assert time.thread_time() - started < 3
    assert len(batcher.waiting) == len(many) and set(admission.fair._work) == {f"owner{number}" for number in range(8)}


@pytest.mark.parametrize(("each", "want"), [(0.0, 15), (0.2, 1), (0.1, 2), (2.0, LEAST)])
def test_as_many_rows_go_beside_a_light_one_as_lengthen_a_step_by_what_is_allowed(each: float, want: float) -> None:
    """A step takes 0.9 and `each` for a row; 1.2 times that of one row is allowed."""
    pace, had = Pace(1.2, 15), []
    for _ in range(2000):
        num_others = min(15, pace.beside(1))
        pace.took(1, num_others, 0.9 + each * (1 + num_others))
        had.append(num_others)
    mean = sum(had[-1000:]) / 1000
    assert 0.6 * want <= mean <= 1.6 * want or (mean > 14 and want == 15), mean
    assert Pace(None, 15).beside(1) == 15
