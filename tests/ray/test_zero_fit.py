"""The main job under ZeRO-3 on Ray Train: sharded over two workers, one of them killed, published and verified."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapters import AdapterStore
from ftcore.recipe import Recipe
from pipelines.fit import fit
from tests.ray.small_runs import at_step, journal, write_rows
from tests.zero_runs import ALL_SHARDED, apart

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
STEPS = 16


def recipe_for(base: Path, root: Path, name: str, **changes: Any) -> Recipe:
    rows = root / "rows.jsonl"
    tree: dict[str, Any] = {
        "name": name, "model": {"path": str(base), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 4}, "stage": "sft",
        "data": {"sources": [str(rows if rows.exists() else write_rows(rows))], "max_length": 64, "cache": str(root / "prepared")},
        "backend": {"kind": "deepspeed", "zero": 3, "deepspeed": ALL_SHARDED}, "resources": {"workers": 2, "max_failures": 1},
        "optim": {"batch_size": 4, "lr": 1e-2, "max_steps": STEPS},
        "output": {"runs": str(root / "runs"), "store": str(root / "store"), "checkpoint_every": 5, "adapter": f"acme/{name}"},
    }  # fmt: skip
    return Recipe.model_validate(tree | changes)


def test_a_sharded_run_with_a_killed_worker_is_published_and_trains_what_one_plain_worker_trains(
    local_ray: None, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_step(8, lambda pids: os.kill(pids[1], signal.SIGKILL), monkeypatch):
        killed = fit(recipe_for(tiny_model_dir, tmp_path, "killed"), log=lambda line: None)
    assert killed.ref is not None
    assert AdapterStore(str(tmp_path / "store")).verify(killed.ref).world_size == 2
    whole = fit(recipe_for(tiny_model_dir, tmp_path, "whole", backend="plain", resources={"workers": 1}), log=lambda line: None)
    steps, losses = zip(*journal(killed), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    assert apart(list(losses), [loss for _, loss in journal(whole)]) <= 1e-5
