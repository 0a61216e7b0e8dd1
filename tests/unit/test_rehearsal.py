"""The heaviest micro-batch is tried before the first step, and leaves no trace; where memory gives out, the error names the forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftcore import loop
from ftcore.data.order import Order, deal
from ftcore.errors import TrainingError
from ftcore.journal import read_lines
from ftcore.rehearsal import heaviest_step
from ftcore.rundir import RunDir
from ftcore.stages.sft import Sft
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.unit.test_loop import recipe_for, run

LONG = packed_blocks(1, per_block=20, seed=5)
BLOCKS = MemoryBlocks([*packed_blocks(23, seed=3), *LONG])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_heaviest_step_is_the_one_whose_largest_micro_batch_holds_most(padded: bool, micro_batch: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 37)
    order = Order(37, 8, 1)

    def weight(step: int) -> int:
        window = order.window(step)
        return max(
            int(sizes[part].max()) * len(part) if padded else int(sizes[part].sum())
            for rank in deal(window, sizes[window], 2, micro_batch) for part in rank
        )  # fmt: skip

    for start, end in ((0, 5), (0, 3), (6, 100)):
        within = range(start, min(end, (start // 5 + 1) * 5))
        heaviest = max(within, key=weight)
        found = heaviest_step(order, sizes, range(start, end), micro_batch, padded=padded)
        assert found == (heaviest if weight(heaviest) > 1.1 * weight(start) else None)


def test_blocks_of_like_size_need_no_rehearsal() -> None:
    assert heaviest_step(Order(16, 4, 1), np.full(16, 512) - np.arange(16), range(4), 2, padded=False) is None
    assert heaviest_step(Order(16, 4, 1), np.full(16, 512), range(4, 4), 2, padded=False) is None


def outcome(recipe: Any) -> tuple[list[tuple[float, float]], str]:
    run(recipe, BLOCKS)
    folder = RunDir(recipe.output.runs, recipe.name).folder
    lines = [line for line in read_lines(RunDir(recipe.output.runs, recipe.name)) if "loss" in line]
    [weights] = [name for name in folder.names("final") if name.endswith("model.safetensors")]
    return [(line["loss"], line["grad_norm"]) for line in lines], folder.read(f"final/{weights}").hex()


@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 4, "dropout": 0.1}, {"kind": "full"}])
def test_a_rehearsal_changes_no_bit_of_a_run(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    tried: list[int] = []
    of_window = loop.Training._window

    def window(self: loop.Training, step: int) -> Any:
        tried.append(step)
        return of_window(self, step)

    monkeypatch.setattr(loop.Training, "_window", window)
    changes: dict[str, Any] = {"method": method, "optim": {"lr": 5e-3, "batch_size": 2, "max_steps": 12}}
    recipe = recipe_for(tiny_model_dir, tmp_path, name="with", **changes)
    with_one = outcome(recipe)
    heavy = next(step for step in range(12) if 23 in Order(24, 2, recipe.optim.seed).window(step))
    assert heavy > 0 and tried == [heavy, *range(12)]
    monkeypatch.setattr(loop.Training, "rehearse", lambda self: None)
    assert outcome(recipe_for(tiny_model_dir, tmp_path, name="without", **changes)) == with_one


def refusing(monkeypatch: pytest.MonkeyPatch, limit: int, error: Exception) -> None:
    """Has the loss of a batch of `limit` tokens or more run out of memory."""
    of_loss = Sft.loss

    def loss(self: Sft, models: Any, batch: Any) -> Any:
        if batch.num_tokens >= limit:
            raise error
        return of_loss(self, models, batch)

    monkeypatch.setattr(Sft, "loss", loss)


def real_cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_too_little_memory_is_told_before_the_first_step_with_the_forecast(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if kind == "gpu" else real_cpu_error()
    refusing(monkeypatch, LONG[0].num_tokens, error)
    recipe = recipe_for(tiny_model_dir, tmp_path, optim={"lr": 5e-3, "batch_size": 4, "max_steps": 6})
    with pytest.raises(TrainingError, match="ran out of memory in its first") as caught:
        run(recipe, BLOCKS)
    assert "GiB by the forecast" in caught.value.wanted and "allocate" in caught.value.got
    assert caught.value.remedy
    assert not [line for line in read_lines(RunDir(tmp_path, "run")) if "loss" in line]
    assert RunDir(tmp_path, "run").checkpoint_steps() == []


def test_memory_that_gives_out_later_is_left_to_a_restart(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, LONG[0].num_tokens, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(loop.Training, "rehearse", lambda self: None)
    with pytest.raises(torch.OutOfMemoryError):
        run(recipe_for(tiny_model_dir, tmp_path, optim={"lr": 5e-3, "batch_size": 2, "max_steps": 12}), BLOCKS)
