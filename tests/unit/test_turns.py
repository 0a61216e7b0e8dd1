"""Turns: owners are served one after another, however much each of them asks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from serving.turns import Turns


async def served(turns: Turns, owners: list[str]) -> list[str]:
    """The order in which those that ask at once are served."""
    order: list[str] = []

    async def one(owner: str) -> None:
        async with turns.turn(owner):
            order.append(owner)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(owner) for owner in owners))
    return order


def test_who_asks_little_waits_for_one_of_who_asks_much() -> None:
    assert asyncio.run(served(Turns(1), ["hog"] * 5 + ["light", "other", "light"])) == [
        "hog", "hog", "light", "other", "hog", "light", "hog", "hog"
    ]  # fmt: skip


def test_an_owner_holds_no_more_than_its_own() -> None:
    async def go() -> None:
        turns, held, most = Turns(4, each=2), dict.fromkeys(("hog", "light"), 0), dict.fromkeys(("hog", "light"), 0)

        async def one(owner: str) -> None:
            async with turns.turn(owner):
                held[owner] += 1
                most[owner] = max(most[owner], held[owner])
                await asyncio.sleep(0.001)
                held[owner] -= 1

        await asyncio.gather(*(one(owner) for owner in ["hog"] * 20 + ["light"]))
        assert most == {"hog": 2, "light": 1}

    asyncio.run(go())


def test_who_goes_away_while_it_waits_or_works_leaves_the_place_as_it_should_be() -> None:
    async def go() -> None:
        turns, pool, done = Turns(1), ThreadPoolExecutor(2), threading.Event()
        works = asyncio.create_task(turns.in_thread("hog", pool, done.wait))
        waits = asyncio.create_task(turns.in_thread("hog", pool, done.wait))
        await asyncio.sleep(0)
        works.cancel()
        waits.cancel()
        for task in (works, waits):
            with suppress(asyncio.CancelledError):
                await task
        light = asyncio.create_task(turns.in_thread("light", pool, lambda: "done"))
        await asyncio.sleep(0.05)
        assert not light.done(), "the thread still works for nobody"
        done.set()
        assert await light == "done"
        assert await served(turns, ["hog", "light"]) == ["hog", "light"]
        pool.shutdown()

    asyncio.run(go())
