"""What the tests on Ray share: where their runs lie, and one run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.fit import Outcome, fit
from tests.ray.small_runs import SLOW_STEPS, recipe_of, write_rows


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Any]:
    """What all recipes of this file share: base, rows, and where things land."""
    root = tmp_path_factory.mktemp("fit")
    return {
        "model": {"path": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"sources": [str(write_rows(root / "rows.jsonl"))], "max_length": 64, "validation": 0.1, "cache": str(root / "prepared")},
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "stage": "sft",
        "optim": {"batch_size": 4, "lr": 1e-2, "max_steps": SLOW_STEPS, "epochs": 100},
        "resources": {"workers": 2, "max_failures": 1},
        "output": {"runs": str(root / "runs"), "store": str(root / "store"), "checkpoint_every": 5},
    }


@pytest.fixture(scope="session")
def uninterrupted(local_ray: None, place: dict[str, Any]) -> Outcome:
    return fit(recipe_of(place, "whole", output={"adapter": "acme/support"}), log=lambda line: None)
