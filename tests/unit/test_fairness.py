"""Fairness between owners: a hog does not make a light one wait, nobody saves up by pausing."""

from __future__ import annotations

import asyncio
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
    """Counted, not timed: how many of the hog's answers end while the light one's is asked for and made. In turn it would be a hundred."""

    async def go() -> list[int]:
        async with opened(tiny_model_dir, max_batch=4) as engine:

            def ask(owner: str, number: int) -> asyncio.Task[object]:
                request = Request(f"{owner}{number}", (5, 6, 7), max_tokens=8, salt=owner, sampling=Sampling(seed=1))
                return asyncio.create_task(answer(engine, request))

            hog = [ask("hog", number) for number in range(100)]
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

    assert max(run(go())) <= 12  # at most a batch that was under way, and the batches it shared
