"""Runs of the deepspeed backend in gloo worlds: one launch trains many recipes, for importing deepspeed costs seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore.journal import read_lines
from ftcore.rundir import RunDir
from tests.memory_blocks import MemoryBlocks, packed_blocks

BLOCKS = MemoryBlocks(packed_blocks(50, per_block=2, seed=3), packed_blocks(5, seed=4))
ALL_SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""The tiny model is below the size from which stage 3 keeps parameters sharded between uses."""
STEPS = 8


@dataclass(frozen=True)
class Job:
    """One recipe to train, to the end or until it is asked to stop after some steps."""

    tree: dict[str, Any]
    stop_after: int | None = None


def job(
    base: Path, runs: Path, name: str, backend: dict[str, Any], method: dict[str, Any], *, dtype: str = "fp32",
    stop_after: int | None = None, **optim: Any,
) -> Job:  # fmt: skip
    """Accumulates two or more micro-steps a rank, with a gradient clip that bites in every step."""
    if backend.get("zero", 3) == 3 and backend["kind"] == "deepspeed":
        backend = {"deepspeed": ALL_SHARDED, **backend}
    lr = 5e-3 if method["kind"] == "lora" else 1e-3
    tree = {
        "name": name, "model": {"path": str(base), "dtype": dtype}, "data": {"sources": "unused.jsonl"}, "stage": "sft", "method": method,
        "backend": {"micro_batch": 2, **backend}, "eval": {"every_steps": 4}, "output": {"runs": str(runs), "checkpoint_every": 50},
        "optim": {"lr": lr, "batch_size": 10, "max_steps": STEPS, "seed": 1, "weight_decay": 0.01, "clip_norm": 0.2, **optim},
    }  # fmt: skip
    return Job(tree, stop_after)


def train_all(rank: int, size: int, jobs: list[Job]) -> list[str]:
    """What became of each job: "finished at 12", or the first line of the error."""
    from ftcore.backends.base import World
    from ftcore.errors import FtcoreError
    from ftcore.loop import train
    from ftcore.recipe import Recipe

    told = []
    for each in jobs:
        recipe = Recipe.model_validate(each.tree)
        seen: list[int] = []
        stop = each.stop_after
        run = RunDir(recipe.output.runs, recipe.name)
        world = World(rank=rank, size=size, local_rank=rank)

        def asked(seen: list[int] = seen, stop: int | None = stop) -> bool:
            seen.append(1)
            return stop is not None and len(seen) >= stop

        try:
            told.append(f"finished at {train(recipe, world, BLOCKS, run, should_stop=asked).steps}")
        except FtcoreError as error:
            told.append(error.what)
    return told


def losses(runs: Path, name: str) -> list[float]:
    return [line["loss"] for line in read_lines(RunDir(runs, name)) if "loss" in line]


def validations(runs: Path, name: str) -> list[float]:
    return [line["validation_loss"] for line in read_lines(RunDir(runs, name)) if "validation_loss" in line]


def clipped(runs: Path, name: str) -> bool:
    return all(line["grad_norm"] > 0.2 for line in read_lines(RunDir(runs, name)) if "loss" in line)


def apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=math.inf)
