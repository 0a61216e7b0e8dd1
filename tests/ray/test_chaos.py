"""Killed in every way that the chaos command knows, a run finishes and is bit for bit the one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def chaos(*words: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(REPO / "benchmarks/chaos.py"), *words]
    done = subprocess.run(command, cwd=REPO, env=kept, capture_output=True, text=True, timeout=1800, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.proof
def test_a_kill_in_mid_checkpoint_is_survived_bit_for_bit() -> None:
    said = chaos("--kills", "1", "--steps-between", "12", "--where", "checkpoint")
    assert "1 finished / 1 identical" in said and "final weights the same bytes" in said


@pytest.mark.proof
def test_one_kill_of_each_kind_is_survived_bit_for_bit() -> None:
    said = chaos("--kills", "5", "--steps-between", "12", "--where", "worker,seat,node,driver,checkpoint")
    assert "5 kills (seed 0): 5 finished / 5 identical" in said and "final weights the same bytes" in said


@pytest.mark.proof
def test_twenty_kills_are_survived_bit_for_bit() -> None:
    assert "20 finished / 20 identical" in chaos("--kills", "20")


@pytest.mark.proof
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_comes() -> None:
    said = chaos("--kills", "3", "--steps-between", "600", "--where", "lose,gain,drain", "--tolerance", "1e-9")
    assert "3 finished / 3 identical" in said


@pytest.mark.proof
def test_a_run_leaves_a_machine_that_goes_without_a_failure() -> None:
    said = chaos("--kills", "2", "--steps-between", "400", "--where", "leave,terminate")
    assert "2 finished / 2 identical" in said
