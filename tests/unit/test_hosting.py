"""What the guests of a host hear when it cannot go on, and that others may come after them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ftcore.data.prepared import Prepared
from ftcore.errors import ConfigError, FtcoreError, TrainingError
from ftcore.recipe import Recipe, dump_recipe
from pipelines.hosting import Host

GUEST = {"name": "guest", "model": {"path": "base"}, "data": {"sources": "rows.jsonl"}, "method": "lora", "stage": "sft"}
RECIPE = dump_recipe(Recipe.model_validate(GUEST))


class OneGuestAtOnce:
    """A base with room for one guest: of two, a step runs out of memory."""

    def __init__(self, *arguments: Any) -> None:
        self.candidates: dict[str, Recipe] = {}

    def add(self, name: str, recipe: Recipe) -> None:
        self.candidates[name] = recipe

    def drop(self, name: str) -> None:
        del self.candidates[name]

    def step(self) -> dict[str, list[dict[str, Any]]]:
        if any("large" in name for name in self.candidates):
            raise MemoryError("out of memory\nby 2 GiB")
        return {name: [{"step": 2, "num_steps": 2, "validation_loss": 1.5}] for name in [self.candidates.popitem()[0]]}


def hosted(monkeypatch: pytest.MonkeyPatch, shared: Any, body: Callable[[Host], Awaitable[None]]) -> None:
    monkeypatch.setattr("ftcore.shared.Shared", shared)
    monkeypatch.setattr(Prepared, "open", lambda url: None)

    async def run() -> None:
        async with asyncio.timeout(20):
            await body(Host(RECIPE, (), "blocks", 0))

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_comes_to_a_host_that_cannot_go_on_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise ConfigError("this model makes its loss of whole logits")

    async def body(host: Host) -> None:
        for name in ("first", "second", "third"):
            with pytest.raises(FtcoreError, match="whole logits"):
                await host.begin(name, RECIPE)
                await host.look(name)
            assert not await host.num_guests()

    hosted(monkeypatch, refused, body)


def test_a_step_that_fails_ends_who_took_part_and_nobody_who_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(host: Host) -> None:
        for name in ("small", "large", "after"):
            await host.begin(name, RECIPE)
            if name == "large":
                with pytest.raises(TrainingError, match=r"(?s)MemoryError: out of memory\n.*together"):
                    await host.look(name)
            else:
                assert (await host.look(name))["done"]

    hosted(monkeypatch, OneGuestAtOnce, body)
