"""The loop on one CUDA device. Skipped, and saying so, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.backends.base import World
from ftcore.journal import read_lines
from ftcore.loop import train
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from tests.memory_blocks import MemoryBlocks, packed_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
BLOCKS = MemoryBlocks(packed_blocks(24, seed=3))


def losses(base: Path, runs: Path, name: str, device: str, dtype: str, **backend: Any) -> list[float]:
    recipe = Recipe.model_validate(
        {
            "name": name,
            "model": {"path": str(base), "dtype": dtype},
            "data": {"sources": "unused.jsonl"},
            "method": {"kind": "lora", "rank": 4},
            "stage": "sft",
            "backend": {"kind": "plain", "micro_batch": 4, **backend},
            "optim": {"lr": 5e-3, "batch_size": 8, "epochs": 10, "max_steps": 10},
            "output": {"runs": str(runs)},
        }
    )
    run = RunDir(runs, name)
    train(recipe, World(device=device), BLOCKS, run)
    return [line["loss"] for line in read_lines(run) if "loss" in line]


def test_fp32_losses_on_the_device_are_those_of_the_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    there = losses(tiny_model_dir, tmp_path, "there", "cuda", "fp32")
    here = losses(tiny_model_dir, tmp_path, "here", "cpu", "fp32")
    assert max(abs(a - b) for a, b in zip(there, here, strict=True)) < 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precisions_learn(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    found = losses(tiny_model_dir, tmp_path, dtype, "cuda", dtype)
    assert found[-1] < found[0] - 0.02


def test_deterministic_reruns_are_bit_identical(tiny_model_dir: Path, tmp_path: Path) -> None:
    one, other = (losses(tiny_model_dir, tmp_path, name, "cuda", "bf16", deterministic=True) for name in ("one", "other"))
    assert one == other
