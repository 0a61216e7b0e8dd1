"""The same preparation spread by Ray Data: the same blocks to the byte, the same audit, the same errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore.errors import DataError
from ftcore.recipe import Recipe
from pipelines.prepare import prepare

pytestmark = pytest.mark.ray
Make = Callable[..., Recipe]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: Path) -> Make:
    def recipe(rows: list[str], engine: str, **data: Any) -> Recipe:
        for number in range(3):  # three files, so that there are three orders
            (tmp_path / f"rows-{number}.jsonl").write_text("\n".join(rows[number::3]) + "\n")
        section = {"sources": [f"{tmp_path}/rows-*.jsonl"], "cache": f"{tmp_path}/{engine}", "max_length": 1024, "engine": engine, **data}
        return Recipe.model_validate(
            {"name": "t", "model": {"path": str(tiny_model_dir)}, "data": section, "method": "lora", "stage": "sft"}
        )

    return recipe


@pytest.fixture
def three_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.build.ORDER_BYTES", 1)


def lines(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [
        json.dumps({"instruction": f"Say {n % 90}", "output": f"{n % 90} " + "yes " * int(random.integers(1, 3) * (n % 90))})
        for n in range(count)
    ]


def test_ray_makes_the_same_blocks_to_the_byte(make: Make, local_ray: None, three_orders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.build.FINISH_HERE_TOKENS", 0)
    options = {"validation": 0.1, "max_rejected": 0.1}
    rows = [*lines(200), "{broken", '{"instruction": "well?", "output": ""}']
    here, there = (prepare(make(rows, engine, **options), log=quiet) for engine in ("process", "ray"))
    assert there.manifest == here.manifest  # every file's SHA-256, the audit, counts and digests


def test_rows_whose_copies_are_kept_are_prepared_on_ray_too(make: Make, local_ray: None, three_orders: None) -> None:
    here, there = (prepare(make(lines(60), engine, duplicates="keep"), log=quiet) for engine in ("process", "ray"))
    assert there.manifest == here.manifest


def test_an_error_in_a_task_arrives_with_its_place(make: Make, local_ray: None, three_orders: None) -> None:
    rows = [*lines(20), json.dumps({"instruction": "Say it", "output": "very long " * 900})]
    with pytest.raises(DataError, match=r"rows-2\.jsonl, row 7"):
        prepare(make(rows, "ray", overlong="refuse"), log=quiet)
