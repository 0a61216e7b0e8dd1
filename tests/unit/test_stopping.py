"""Two ranks asked to stop: none may leave before rank 0's checkpoint is sealed, for the first to leave takes the others with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ftcore import rundir
from ftcore.backends.base import World
from ftcore.errors import Interrupted
from ftcore.loop import train
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.worlds import in_world


def sealed_when_leaving(rank: int, size: int, tree: dict[str, Any]) -> list[int]:
    """Asks rank 0 to stop at once, with a disk that takes two seconds; the sealed steps this rank sees when it is let go."""
    recipe, seal = Recipe.model_validate(tree), rundir.seal

    def slow_seal(*arguments: Any) -> dict[str, Any]:
        time.sleep(2)  # a large checkpoint
        return seal(*arguments)

    rundir.seal = slow_seal
    run = RunDir(recipe.output.runs, recipe.name)
    with pytest.raises(Interrupted):
        train(recipe, World(rank=rank, size=size), MemoryBlocks(packed_blocks(16)), run, should_stop=lambda: rank == 0)
    return run.checkpoint_steps()


def test_no_rank_leaves_before_the_checkpoint_is_sealed(tiny_model_dir: Path, tmp_path: Path) -> None:
    tree = {
        "name": "run", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "data": {"sources": "unused.jsonl"}, "method": "lora",
        "stage": "sft", "optim": {"batch_size": 4, "max_steps": 9}, "output": {"runs": str(tmp_path)},
    }  # fmt: skip
    assert in_world(2, sealed_when_leaving, tree) == [[1], [1]]
