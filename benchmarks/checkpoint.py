"""What a checkpoint costs: the stall of training, its bytes over what it must hold, and the seconds to seek and to restore.

    python benchmarks/checkpoint.py [--hidden 256] [--layers 4] [--rank 64] [--checkpoints 4] [--every 50]

One process, LoRA over all linear layers, real steps of the one training loop. The stall is what `save` keeps the training thread for:
the wait for the checkpoint before and the copies; writing goes on beside the steps, and what it takes from them is measured too, as the
difference of a step's CPU-independent wall time with and without a writer. Bytes: all files over 12 for each trained number (fp32 weight
and two moments).
"""

# ruff: noqa: E402 (the checkout is put on the path first)
from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftcore.backends.base import World
from ftcore.data.order import Order
from ftcore.loop import Training
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir, checkpoint_key
from tests.conftest import make_tiny_model
from tests.memory_blocks import MemoryBlocks, packed_blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="the default interval, which the stall is spread over")
    parser.add_argument("--steps-between", type=int, default=6, help="steps really made between two checkpoints here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftcore-checkpoint-") as folder:
        recipe = recipe_in(Path(folder), options)
        blocks = MemoryBlocks(packed_blocks(64, per_block=12))
        measure(recipe, blocks, options)
        restore(recipe, blocks)
    seek()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def recipe_in(folder: Path, options: argparse.Namespace) -> Recipe:
    base = make_tiny_model(folder / "base", hidden=options.hidden, layers=options.layers)
    return Recipe.model_validate({
        "name": "run", "model": {"path": str(base), "dtype": "fp32"}, "data": {"sources": "unused.jsonl"}, "stage": "sft",
        "method": {"kind": "lora", "rank": options.rank, "targets": "all-linear"}, "backend": {"kind": "plain", "micro_batch": 8},
        "optim": {"batch_size": 8, "max_steps": 10_000}, "output": {"runs": str(folder / "runs"), "keep": 100},
    })  # fmt: skip


def measure(recipe: Recipe, blocks: MemoryBlocks, options: argparse.Namespace) -> None:
    training = begun(recipe, blocks)
    steps: dict[bool, list[float]] = {True: [], False: []}
    stalls = []
    for _ in range(3):
        training._step()
    for _ in range(options.checkpoints):
        training.writer.wait()
        steps[False] += [timed(training._step) for _ in range(options.steps_between)]
        stalls.append(timed(lambda: training.writer.save(training.at, recipe.method, training.stepper, is_main=True)))
        while training.writer._thread is not None and training.writer._thread.is_alive():
            steps[True].append(timed(training._step))
    training.writer.wait()
    step, stall = statistics.median(steps[False]), statistics.median(stalls)
    beside = statistics.median(steps[True]) if steps[True] else step
    numbers = sum(parameter.numel() for _, parameter in training.stepper.trainable)
    folder = training.run.folder / checkpoint_key(training.run.checkpoint_steps()[-1])
    total = sum((folder.path / name).stat().st_size for name in folder.files())
    training.close()
    print(f"trained numbers {numbers:,} ({4 * numbers / 2**20:.1f} MiB of adapter in fp32); step {1000 * step:.0f} ms (median)")
    print(f"stall at a checkpoint {1000 * stall:.1f} ms (median; worst {1000 * max(stalls):.1f}): "
          f"{stall / (options.every * step):.2%} of the time of {options.every} steps (goal < 1 %)")  # fmt: skip
    print(f"a step while a checkpoint is written {1000 * beside:.0f} ms ({len(steps[True])} such steps)")
    print(f"bytes of a checkpoint {total:,}: {total / (12 * numbers):.4f} x 12 bytes a trained number (goal <= 1.05)")


def restore(recipe: Recipe, blocks: MemoryBlocks) -> None:
    run = RunDir(recipe.output.runs, recipe.name)
    training = Training(recipe, World(), blocks, run, None, None)
    seconds = timed(training.restore)
    print(f"restore (verify, load adapter and optimizer, journal) {seconds:.2f} s, at step {training.at.step}")
    training.close()


def seek() -> None:
    order = Order(num_blocks=10_000_000, batch_size=8, seed=7)
    first = timed(lambda: order.window(1_000_000))
    again = timed(lambda: order.window(1_000_001))
    print(f"seek to step 1,000,000 of an epoch of 10,000,000 blocks {first:.2f} s, the next window {1e6 * again:.0f} us")


def begun(recipe: Recipe, blocks: MemoryBlocks) -> Training:
    training = Training(recipe, World(), blocks, RunDir(recipe.output.runs, recipe.name), None, None)
    training.restore()
    return training


def timed(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
