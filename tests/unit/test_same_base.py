"""A run goes on from the base it began with, wherever that lies, and from no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import ConfigError
from ftcore.recipe import Recipe
from pipelines.fit import Outcome, fit
from tests.conftest import make_tiny_model
from tests.ray.small_runs import journal, write_rows


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def recipe_of(base: Path, root: Path, name: str = "run", **optim: Any) -> Recipe:
    rows = root / "rows.jsonl"
    return Recipe.model_validate({
        "name": name, "model": {"path": str(base), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 2}, "stage": "sft",
        "data": {"sources": [str(rows if rows.exists() else write_rows(rows, 40))], "max_length": 64, "cache": str(root / "prepared")},
        "optim": {"batch_size": 4, "max_steps": 6, "schedule": "constant", "warmup": 0, **optim}, "resources": {"workers": 1},
        "output": {"runs": str(root / "runs"), "store": str(root / "store"), "checkpoint_every": 2},
    })  # fmt: skip


def fitted(recipe: Recipe) -> Outcome:
    return fit(recipe, log=lambda line: None)


def unfinished(base: Path, root: Path) -> Outcome:
    """A run of 6 steps whose last checkpoint is that of step 4."""
    outcome = fitted(recipe_of(base, root))
    for kept in ("final", "checkpoints/step-000006"):
        shutil.rmtree(outcome.run.folder.path / kept)
    return outcome


def test_a_base_that_was_moved_is_known_again(base: Path, tmp_path: Path) -> None:
    whole = journal(unfinished(base, tmp_path))
    moved = base.rename(tmp_path / "elsewhere")
    again = fitted(recipe_of(moved, tmp_path))
    assert journal(again) == whole
    assert again.run.is_finished()


@pytest.mark.parametrize("place", ["base", "elsewhere"])
def test_another_base_is_refused_under_the_same_path_and_under_another(base: Path, tmp_path: Path, place: str) -> None:
    outcome = unfinished(base, tmp_path)
    other = make_tiny_model(tmp_path / place, seed=1)
    with pytest.raises(ConfigError) as refused:
        fitted(recipe_of(other, tmp_path))
    assert ("base is not the one" in refused.value.what) == (place == "base")
    assert "model.path" in f"{refused.value.got} {refused.value.remedy}"
    assert outcome.run.checkpoint_steps() == [4]


def test_a_finished_run_is_not_published_on_another_base(base: Path, tmp_path: Path) -> None:
    fitted(recipe_of(base, tmp_path))
    make_tiny_model(base, seed=1)
    with pytest.raises(ConfigError, match="base is not the one"):
        fitted(recipe_of(base, tmp_path))
