"""Ray's price: a step under Ray Train against the same loop in bare gloo processes, and the seconds from a command to its first step.

    python benchmarks/ray_overhead.py [--workers 2] [--steps 12] [--rounds 3] [--tokens 512]

Same recipe, blocks, threads and allocator settings in both. Rounds are interleaved; a step's time is the median over steps after the
second, then the median over rounds; CPU seconds are given too, which other work on the machine disturbs less. Then `pipelines/sft.py`
runs with its blocks prepared before, twice, and the time to its first step is split into what it waited for.
"""

# ruff: noqa: E402 (the checkout is put on the path first, for this process and those it starts)
from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from cluster.connect import connect
from cluster.runtime_env import worker_variables
from ftcore.backends.base import World
from ftcore.data.prepared import Prepared
from ftcore.loop import train
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir
from pipelines.launch import Post, launch
from pipelines.prepare import prepare
from tests.conftest import make_tiny_model

WORDS = ["open", "close", "file", "report", "folder", "move", "rename", "archive", "quick", "fox", "jumps", "name", "answer", "question"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a block; a step has two blocks a worker")
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftcore-bench-") as folder:
        recipe = recipe_in(Path(folder), options)
        prepared = prepare(recipe, log=silent)
        compare(recipe, prepared, options)
        first_step(recipe, Path(folder))
    print(f"{time.monotonic() - started:.0f} s in all; seed 0; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def recipe_in(folder: Path, options: argparse.Namespace) -> Recipe:
    base = make_tiny_model(folder / "base", hidden=options.hidden, layers=6, vocab=400)
    draw, rows = random.Random(0), folder / "rows.jsonl"
    with rows.open("w") as file:
        for index in range(40 * options.steps):
            turns = [("user", f"{index} {' '.join(draw.choices(WORDS, k=30))}"), ("assistant", " ".join(draw.choices(WORDS, k=40)))]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return Recipe.model_validate(
        {
            "name": "bench", "model": {"path": str(base), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 8}, "stage": "sft",
            "data": {"sources": [str(rows)], "max_length": options.tokens, "validation": 0, "cache": str(folder / "prepared")},
            "optim": {"batch_size": 2 * options.workers, "max_steps": options.steps, "epochs": 1000},
            "resources": {"workers": options.workers}, "output": {"runs": str(folder / "runs"), "checkpoint_every": 100_000},
        }
    )  # fmt: skip


def silent(_: object) -> None:
    pass


def compare(recipe: Recipe, prepared: Prepared, options: argparse.Namespace) -> None:
    connection = connect(local_cpus=options.workers, log=silent)
    kinds: dict[str, list[dict[str, float]]] = {"bare": [], "ray": []}
    for number in range(options.rounds):
        for kind in ("bare", "ray") if number % 2 == 0 else ("ray", "bare"):
            run = RunDir(recipe.output.runs, f"{kind}-{number}")
            there = importlib.import_module("benchmarks.ray_overhead").measured  # workers import it by this name
            work = partial(there, dump_recipe(recipe), prepared.url, run)
            if kind == "ray":
                launch(work, recipe.resources, connection, name=run.name, hear=silent)
            else:
                bare(work, recipe)
            kinds[kind].append(json.loads(run.folder.read("measured.json")))
    connection.close()
    print(f"{'':<8}{'s/step':>10}{'CPU s/step':>12}{'tokens/s':>12}")
    wall = {kind: statistics.median(found["step"] for found in rounds) for kind, rounds in kinds.items()}
    cpu = {kind: statistics.median(found["cpu"] for found in rounds) for kind, rounds in kinds.items()}
    for kind, rounds in kinds.items():
        tokens = statistics.median(found["tokens_per_s"] for found in rounds)
        print(f"{kind:<8}{wall[kind]:>10.4f}{cpu[kind]:>12.4f}{tokens:>12,.0f}")
    print(f"{'ratio':<8}{wall['ray'] / wall['bare']:>10.3f}{cpu['ray'] / cpu['bare']:>12.3f}   (goal: <= 1.03 at steps >= 0.2 s)")


def measured(recipe_yaml: str, prepared_url: str, run: RunDir, post: Post) -> None:
    """The loop on one rank; rank 0 writes its median wall and CPU seconds a step."""
    marks: list[tuple[float, float, float]] = []
    lines: list[dict[str, Any]] = []

    def progress(line: dict[str, Any]) -> None:
        marks.append((time.perf_counter(), time.process_time(), line["tokens_per_s"]))
        lines.append(line)
        post.say({"event": "lines", "lines": [line]})

    train(parse_recipe(recipe_yaml), post.world, Prepared.open(prepared_url), run, progress, post.should_stop)
    if post.world.is_main:
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks[1:])]
        found = {"step": statistics.median(wall for wall, _ in steps), "cpu": statistics.median(cpu for _, cpu in steps)}
        run.folder.write_json("measured.json", {**found, "tokens_per_s": statistics.median(mark[2] for mark in marks[2:])})


def bare(work: Any, recipe: Recipe) -> None:
    """The same in processes that know nothing of Ray."""
    before = {name: os.environ.get(name) for name in worker_variables(recipe.resources)}
    os.environ.update(worker_variables(recipe.resources) | {"GLOO_SOCKET_IFNAME": "lo"})
    spawn, size = multiprocessing.get_context("spawn"), recipe.resources.workers
    with tempfile.TemporaryDirectory() as folder:
        ranks = [spawn.Process(target=_bare_rank, args=(work, rank, size, f"{folder}/store")) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    assert [process.exitcode for process in ranks] == [0] * size
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    os.environ.pop("GLOO_SOCKET_IFNAME")


def _bare_rank(work: Any, rank: int, size: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(Post(World(rank, size, rank), silent, lambda: False))
    dist.destroy_process_group()


def first_step(recipe: Recipe, folder: Path) -> None:
    """Seconds from typing the command to each line it says, in the second of two runs (the first warms the file cache)."""
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    for number in range(2):
        began, seen = time.monotonic(), {}
        words = [sys.executable, str(ROOT / "pipelines/sft.py"), str(file), f"name=first-{number}"]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, env={**os.environ, "FTCORE_LOCAL_CPUS": str(recipe.resources.workers)}
        )
        assert process.stdout is not None
        for line in process.stdout:
            for name, start in (
                ("Ray is there", "ray: "),
                ("blocks are there", "prepared"),
                ("first step", "step 1/"),
                ("not published", "not published"),
            ):
                if line.startswith(start):
                    seen.setdefault(name, time.monotonic() - began)
        assert process.wait() == 0
    print(
        "from the command to: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in seen.items()) + "   (goal: first step in 10 s)"
    )


if __name__ == "__main__":
    sys.exit(main())
