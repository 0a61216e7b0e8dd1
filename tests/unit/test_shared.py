"""Candidates that share a base: each learns what it learns alone, and comes and goes without touching the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftcore.backends.base import World
from ftcore.errors import ConfigError, TrainingError
from ftcore.journal import read_lines
from ftcore.loop import train
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from ftcore.shared import Shared
from tests.memory_blocks import MemoryBlocks, packed_blocks

BLOCKS = MemoryBlocks(packed_blocks(14, seed=1), packed_blocks(4, seed=2))
CANDIDATES: dict[str, dict[str, Any]] = {
    "small": {"method": {"kind": "lora", "rank": 2, "alpha": 4, "targets": "all-linear"}, "optim": {"lr": 3e-3, "max_steps": 20}},
    "large": {
        "method": {"kind": "lora", "rank": 16, "alpha": 8, "rslora": True, "targets": ["q_proj", "v_proj"]},
        "optim": {"lr": 1e-2, "epochs": 3},
    },
    "decays": {
        "method": {"kind": "lora", "rank": 4},
        "optim": {"lr": 5e-3, "max_steps": 12, "seed": 7, "batch_size": 5, "weight_decay": 0.1},
    },
}


def recipe(base: Path, name: str, runs: Path, **changes: Any) -> Recipe:
    sections = {**CANDIDATES[name], **changes}
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"path": str(base), "dtype": changes.get("dtype", "fp32")},
            "data": {"sources": "unused.jsonl"},
            "method": sections["method"],
            "stage": "sft",
            "backend": {"kind": "plain", "micro_batch": 2},
            "optim": {"batch_size": 4, "schedule": "linear", **sections["optim"]},
            "eval": {"every_steps": 4},
            "output": {"runs": str(runs)},
        }
    )


def alone(base: Path, name: str, runs: Path) -> list[dict[str, Any]]:
    run = RunDir(runs, name)
    train(recipe(base, name, runs), World(), BLOCKS, run)
    return read_lines(run)


def test_each_candidate_has_the_losses_it_has_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Others of another rank, scale, order, length and set of layers beside it; one joins late, one ends early."""
    shared = Shared(recipe(tiny_model_dir, "small", tmp_path), BLOCKS)
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    shared.add("small", recipe(tiny_model_dir, "small", tmp_path))
    shared.add("large", recipe(tiny_model_dir, "large", tmp_path))
    for number in range(40):
        if number == 3:
            shared.add("decays", recipe(tiny_model_dir, "decays", tmp_path))
        if not shared.candidates:
            break
        for name, told in shared.step().items():
            assert isinstance(told, list)
            lines[name] += told
    for name in CANDIDATES:
        expected = alone(tiny_model_dir, name, tmp_path)
        assert len(lines[name]) == len(expected)
        for ours, theirs in zip(lines[name], expected, strict=True):
            for key in {"loss", "validation_loss", "lr", "grad_norm"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (name, theirs["step"], key)
            assert ours["step"] == theirs["step"]
    finals = [round(lines[name][-1]["validation_loss"], 3) for name in CANDIDATES]
    assert len(set(finals)) == len(CANDIDATES), "candidates so alike prove nothing"


def test_a_candidate_whose_loss_is_lost_ends_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    shared = Shared(recipe(tiny_model_dir, "small", tmp_path), BLOCKS)
    shared.add("small", recipe(tiny_model_dir, "small", tmp_path))
    wild = shared.add("wild", recipe(tiny_model_dir, "large", tmp_path))
    shared.step()
    next(iter(wild.updates.values())).a.data.fill_(float("nan"))
    told = shared.step()
    assert isinstance(told["wild"], TrainingError)
    assert "wild" not in shared.candidates
    expected = alone(tiny_model_dir, "small", tmp_path)
    after = shared.step()["small"]
    assert isinstance(after, list)
    assert after[0]["loss"] == pytest.approx(expected[2]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": {"kind": "full"}}, "only LoRA"),
        ({"method": {"kind": "lora", "dropout": 0.1}}, "dropout"),
        ({"method": {"kind": "lora", "dora": True}}, "DoRA"),
        ({"method": {"kind": "lora", "modules_to_save": ["embed_tokens"]}}, "whole modules"),
        ({"dtype": "bf16"}, "another base"),
    ],
)
def test_who_cannot_share_the_base_is_refused_with_the_reason(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    shared = Shared(recipe(tiny_model_dir, "small", tmp_path), BLOCKS)
    with pytest.raises(ConfigError, match=why):
        shared.add("odd", recipe(tiny_model_dir, "small", tmp_path, **changes))
