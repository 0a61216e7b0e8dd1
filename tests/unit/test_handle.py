"""What the ingress does when the replica that it asked dies: asks another one, unless the answer has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ftcore.engines.base import Sampling
from serving.app import TRIES, Handle
from serving.jobs import Answerer, Event, Job, Opening, Piece

JOB = Job("1", "acme", Answerer("base"), "a", 1, Sampling())
EVENTS: list[Event] = [Opening("", "base", "replica", False, 3), Piece(0, "yes", finish="length")]


class Dying:
    """A deployment's handle; each string of `fates` is what one replica does: `.` one event, `x` it dies."""

    def __init__(self, *fates: str) -> None:
        self._fates, self.num_asked, self.answer = iter(fates), 0, self

    def options(self, **_: Any) -> Dying:
        return self

    def remote(self, _: Job) -> Dying:
        self.num_asked += 1
        self._fate = next(self._fates)
        return self

    def cancel(self) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        events = iter(EVENTS)
        for step in self._fate:
            if step == "x":
                raise ActorDiedError
            yield next(events)


async def _asked(handle: Dying) -> list[Event]:
    return [event async for event in Handle(handle).answer(JOB)]


@pytest.mark.parametrize("num_deaths", range(TRIES))
def test_what_a_dying_replica_had_not_begun_another_answers(num_deaths: int) -> None:
    handle = Dying(*["x"] * num_deaths, "..")
    assert asyncio.run(_asked(handle)) == EVENTS
    assert handle.num_asked == num_deaths + 1


@pytest.mark.parametrize("fates", [(".x", ".."), ("x",) * (TRIES + 1)])
def test_what_had_begun_or_dies_again_and_again_is_told_as_it_is(fates: tuple[str, ...]) -> None:
    handle = Dying(*fates)
    with pytest.raises(ActorDiedError):
        asyncio.run(_asked(handle))
    assert handle.num_asked == (1 if "." in fates[0] else TRIES)
