"""Fairness between owners: a hog does not make a light one wait, nobody saves up by pausing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from ftcore.batching import Row
from ftcore.engines.base import Request, Sampling
from ftcore.fairness import MADE, Fairness
from tests.live_engines import answer, opened, run


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
    assert order == ["hog0", "light0", "hog1", "light1", "hog2", "hog3", "hog4", "hog5"]


def test_a_pause_saves_nothing_up() -> None:
    fair = Fairness()
    fair.joins("busy", ())
    for _ in range(500):
        fair.made("busy")
    fair.joins("back", {"busy"})
    assert fair._work == {"busy": 500 * MADE, "back": 500 * MADE}
    fair.joins("next", {"back"})
    assert "busy" not in fair._work  # it has no rows any more


def test_a_light_tenant_hardly_waits_while_a_hog_asks_for_a_hundred_answers(tiny_model_dir: Path) -> None:
    async def go() -> tuple[float, float]:
        async with opened(tiny_model_dir, max_batch=4) as engine:

            async def light(number: int) -> float:
                started = time.perf_counter()
                await answer(engine, Request(f"light{number}", (5, 6, 7), max_tokens=8, salt="light", sampling=Sampling(seed=1)))
                return time.perf_counter() - started

            alone = sorted([await light(number) for number in range(20)])
            hog = [
                asyncio.create_task(answer(engine, Request(f"hog{number}", (5, 6, 7), max_tokens=8, salt="hog", sampling=Sampling(seed=1))))
                for number in range(100)
            ]
            await asyncio.sleep(0.05)
            beside = sorted([await light(100 + number) for number in range(8)])
            assert not all(task.done() for task in hog), "the hog was gone before the light one was measured"
            await asyncio.gather(*hog)
            return alone[len(alone) // 2], beside[len(beside) // 2]

    alone, beside = run(go())
    assert beside < 6 * alone  # one turn of waiting for a place and a fuller batch; behind the hog's queue it would be 25 turns
