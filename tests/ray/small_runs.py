"""Small runs for the tests on Ray: rows, a recipe of two workers, what its journal says, and something done at a step."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.relay import Message
from ftcore.recipe import Recipe
from pipelines import fit as fit_module
from pipelines.fit import Outcome

WORDS = ["open", "close", "file", "report", "folder", "move", "rename", "archive", "quick", "fox", "jumps", "name", "answer", "question"]
SLOW_STEPS = 60


def write_rows(path: Path, count: int = 120) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            question, answer = f"{index} {' '.join(draw.choices(WORDS, k=6))}", " ".join(draw.choices(WORDS, k=8))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def recipe_of(place: dict[str, Any], name: str, **changes: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**place, "name": name, **{key: {**place[key], **value} for key, value in changes.items()}})


def journal(outcome: Outcome) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in outcome.run.folder.read("metrics.jsonl").decode().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@contextmanager
def at_step(step: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls `act(pids by rank)` in this process, once, when the driver hears of `step`."""
    hear, pids = fit_module._Ear.hear, {}

    def heard(ear: Any, message: Message) -> None:
        hear(ear, message)
        if message["event"] == "worker":
            pids[message["rank"]] = message["pid"]
        if message["event"] == "lines" and message["lines"][-1]["step"] >= step and "done" not in pids:
            pids["done"] = 0
            act(pids)

    with monkeypatch.context() as patched:
        patched.setattr(fit_module._Ear, "hear", heard)
        yield
