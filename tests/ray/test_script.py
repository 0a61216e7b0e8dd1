"""`python pipelines/sft.py` from a bare checkout, as a person runs it: Ctrl-C in the middle, the same command again, a wrong key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ray.small_runs import write_rows

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines/sft.py"


def command(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    words = [sys.executable, str(SCRIPT), "recipe.yaml", *overrides]
    return subprocess.Popen(words, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", count=80)
    recipe = {
        "name": "script", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 2}, "stage": "sft",
        "data": {"sources": ["rows.jsonl"], "max_length": 64, "validation": 0},
        "optim": {"batch_size": 4, "epochs": 1000, "max_steps": 300},
        "output": {"adapter": "acme/script", "checkpoint_every": 1000},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_ctrl_c_leaves_a_sealed_step_and_prints_the_command_that_goes_on(folder: Path) -> None:
    first = command(folder)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step 1/300"):
            first.send_signal(signal.SIGINT)
            break
    _, complaint = first.communicate(timeout=400)
    assert first.returncode == 75, complaint
    assert f"go on with: python {SCRIPT} recipe.yaml" in complaint
    again = command(folder)
    said, complaint = again.communicate(timeout=900)
    assert again.returncode == 0, complaint
    assert "going on after step" in said and "published acme/script@" in said


def test_a_wrong_key_is_refused_at_once_with_the_nearest_name(folder: Path) -> None:
    process = command(folder, "optim.learning_rate=1")
    _, complaint = process.communicate(timeout=400)
    assert process.returncode == 2 and "optim.lr" in complaint
