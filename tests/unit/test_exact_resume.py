"""Killed and resumed: bit for bit the same at the same world size, within a tolerance at another, every block in the very same window.

Workers are processes of a gloo group that end by a real SIGKILL: in the middle of a step, or while a checkpoint is being written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore import rundir
from ftcore.backends.base import World
from ftcore.data.order import Order
from ftcore.journal import read_lines
from ftcore.loop import Training, train
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from tests import worlds
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.worlds import in_world

BLOCKS = packed_blocks(50, seed=3)
STEPS, EVERY = 25, 5
METHODS = {"lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "full": {"kind": "full"}}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
proof = pytest.mark.proof
QUICK = ((2, "lora"),)


def tree_for(base: Path, runs: Path, name: str, method: dict[str, Any], dtype: str = "fp32", steps: int = STEPS) -> dict[str, Any]:
    return {
        "name": name, "model": {"path": str(base), "dtype": dtype}, "data": {"sources": "unused.jsonl"}, "stage": "sft", "method": method,
        "backend": {"kind": "plain", "micro_batch": 1},
        "optim": {"lr": 1e-3 if method["kind"] == "full" else 5e-3, "batch_size": 8, "max_steps": steps, "seed": 1},
        "output": {"runs": str(runs), "checkpoint_every": EVERY, "keep": 100},
    }  # fmt: skip


def live(rank: int, size: int, tree: dict[str, Any], kill: tuple[int, str, int] | None = None, trace: str = "") -> None:
    """Trains on this rank. `kill`: (rank, "step" or "write", step) to die at; `trace`: folder to note down which blocks each step took."""
    recipe = Recipe.model_validate(tree)
    if kill and kill[0] == rank:
        _plant(kill[1], kill[2])
    if trace:
        _follow(Path(trace) / f"{os.getpid()}-{rank}.jsonl")
    train(recipe, World(rank=rank, size=size), MemoryBlocks(BLOCKS), RunDir(recipe.output.runs, recipe.name))


def _plant(where: str, step: int) -> None:
    """A SIGKILL to this very process, between forward passes of `step`, or when the checkpoint of `step` is half-written."""
    weight, seal = Training._loss, rundir.seal

    def loss(training: Training, *arguments: Any) -> Any:
        if training.at.step + 1 == step:
            due = (step - 1) // EVERY * EVERY
            while due and due not in training.run.checkpoint_steps():  # a thread writes it
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return weight(training, *arguments)

    def sealed(folder: Any, extra: Any = None) -> Any:
        if extra and extra.get("step") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return seal(folder, extra)

    if where == "step":
        Training._loss = loss
    else:
        rundir.seal = sealed


def _follow(file: Path) -> None:
    of_loss, known = Training._loss, {block.ids.tobytes(): index for index, block in enumerate(BLOCKS)}

    def loss(training: Training, batch: Any, sums: Any) -> Any:
        if batch.num_trained:
            block = known[np.asarray(batch.ids.flatten().tolist(), np.int32).tobytes()]
            with file.open("a") as lines:
                lines.write(json.dumps([time.time(), training.at.step, block]) + "\n")
        return of_loss(training, batch, sums)

    Training._loss = loss


def killed_world(size: int, *arguments: Any) -> None:
    """`live` on `size` ranks, of which one dies by SIGKILL; then, as a supervisor would, all others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        results = worlds.FORKSERVER.SimpleQueue()
        common = (str(Path(folder) / "store"), arguments, results)
        processes = [worlds.FORKSERVER.Process(target=worlds._entry, args=(live, rank, size, *common)) for rank in range(size)]
        for process in processes:
            process.start()
        until = time.monotonic() + 900
        while not any(process.exitcode == -signal.SIGKILL for process in processes) and time.monotonic() < until:
            time.sleep(0.05)
        assert any(process.exitcode == -signal.SIGKILL for process in processes), [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()


def outcome(tree: dict[str, Any]) -> tuple[list[float], str]:
    """Losses of every step in order, and the digest of the final weights; the journal has each step once."""
    run = RunDir(tree["output"]["runs"], tree["name"])
    lines = [line for line in read_lines(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, tree["optim"]["max_steps"] + 1))
    [weights] = [name for name in run.folder.names("final") if name.endswith("model.safetensors")]
    return [line["loss"] for line in lines], hashlib.sha256(run.folder.read(f"final/{weights}")).hexdigest()


@pytest.mark.parametrize(
    ("size", "method"),
    [
        *QUICK,
        *(pytest.param(size, method, marks=proof) for size in (1, 2, 3, 4) for method in METHODS if (size, method) not in QUICK),
    ],
)  # fmt: skip
def test_killed_in_a_step_and_in_a_checkpoint_a_run_is_bit_identical(tiny_model_dir: Path, tmp_path: Path, size: int, method: str) -> None:
    whole, killed = (tree_for(tiny_model_dir, tmp_path, name, METHODS[method]) for name in ("whole", "killed"))
    in_world(size, live, whole)
    killed_world(size, killed, (0, "write", 10))
    run = RunDir(tmp_path, "killed")
    assert run.checkpoint_steps() == [5] and list((run.folder.path / "checkpoints").glob(".*.tmp"))
    killed_world(size, killed, (size - 1, "step", 18))
    assert run.checkpoint_steps() == [5, 10, 15]
    in_world(size, live, killed)
    assert outcome(killed) == outcome(whole)
    assert not list((run.folder.path / "checkpoints").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("before", "after", "method", "dtype"),
    [
        *(
            pytest.param(before, after, method, dtype, marks=proof)
            for before, after in ((2, 1), (2, 3), (3, 2), (4, 1))
            for method in METHODS
            for dtype in TOLERANCE
        ),
    ],
)  # fmt: skip
def test_resumed_at_another_world_size_the_next_20_losses_are_the_same(
    tiny_model_dir: Path, tmp_path: Path, before: int, after: int, method: str, dtype: str
) -> None:
    whole = tree_for(tiny_model_dir, tmp_path, "whole", METHODS[method] | ({"dropout": 0.0} if method == "lora" else {}), dtype)
    in_world(before, live, whole)
    resumed = {**whole, "name": "resumed"}
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "final")
    for step in range(2 * EVERY, STEPS + 1, EVERY):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step:06d}")
    in_world(after, live, resumed)
    ours, theirs = outcome(resumed)[0], outcome(whole)[0]
    assert ours[:EVERY] == theirs[:EVERY]
    difference = float(np.max(np.abs(np.array(ours[EVERY:]) - np.array(theirs[EVERY:]))))
    assert difference <= TOLERANCE[dtype], difference


def test_over_kills_and_other_world_sizes_every_block_is_trained_once_an_epoch_in_the_same_windows(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (trace := tmp_path / "trace").mkdir()
    tree = tree_for(tiny_model_dir, tmp_path, "run", METHODS["lora"], steps=21)  # three epochs of seven windows
    killed_world(2, tree, (1, "step", 8), str(trace))
    killed_world(3, tree, (0, "write", 15), str(trace))
    in_world(1, live, tree, None, str(trace))
    notes = [json.loads(line) for file in trace.iterdir() for line in file.read_text().splitlines()]
    order = Order(len(BLOCKS), 8, 1)
    for step in range(21):
        times = sorted(note[0] for note in notes if note[1] == step)
        wanted = sorted(int(block) for block in order.window(step))
        last = sorted(note[2] for note in notes if note[1] == step and note[0] in times[-len(wanted) :])
        assert last == wanted, step
        if step < EVERY:
            assert len(times) == len(wanted), "what was sealed before the first kill is never trained again"
    trained = [block for step in range(order.steps_per_epoch) for block in order.window(step)]
    assert sorted(trained) == list(range(len(BLOCKS)))
