"""What sharing a base saves: candidates trained in one pass over one frozen base, against one after another, in one process each time.

    python benchmarks/shared_trials.py [--candidates 2,4,8] [--steps 12] [--rounds 3] [--threads 1]

The demo's base, rows, blocks and recipe, LoRA of ranks 4 to 32 at rates of their own. Steps alone are timed; start-up (loading the
base, applying LoRA) is told apart. Both end with the same losses (tests/unit/test_shared.py). Goal: 1.3x.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANKS = (4, 8, 16, 32)
WARM_UP = 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="2,4,8", help="how many at once (2,4,8)")
    for name, default in {"steps": 12, "rounds": 3, "threads": 1, "micro_batch": 1}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    parser.add_argument("--tokens", type=int, default=512, help="of a block; longer rows are left out (512)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    from cluster.runtime_env import MALLOC

    args = parsed()
    if args.one:
        measure(args)
        return
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(args.threads)}  # what every training worker starts with
    print(f"{'candidates':>10} {'alone s':>9} {'together s':>11} {'ratio':>7} {'with start-up':>14}")
    for count in args.candidates.split(","):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", count], env=environment, check=True)


def measure(args: argparse.Namespace) -> None:
    import torch

    from ftcore.backends.base import World
    from ftcore.demo.tenants import demo_teams, write_day
    from ftcore.loop import Training
    from ftcore.recipe import Recipe, load_recipe
    from ftcore.rundir import RunDir
    from ftcore.shared import Shared
    from pipelines.prepare import prepare

    torch.set_num_threads(args.threads)
    count = int(args.one)
    with tempfile.TemporaryDirectory(prefix="ftcore-bench-") as scratch:
        day = write_day(demo_teams(0)[0], Path(scratch), day="monday", num_train=300, num_test=2, seed=0)

        def recipe(number: int) -> Recipe:
            rank = RANKS[number % len(RANKS)]
            words = [f"name=candidate-{number}", f"model.path={ROOT}/ftcore/demo/base", f"data.sources.0.path={day.rows}"]
            words += [f"data.cache={scratch}/prepared", f"output.runs={scratch}/runs", f"optim.max_steps={args.steps + WARM_UP}"]
            words += [f"method.rank={rank}", f"optim.lr={1e-3 * (number + 1)}", "eval.every_steps=100000", "data.engine=process"]
            words += [f"data.max_length={args.tokens}", "data.overlong=drop", "data.max_rejected=1"]
            return load_recipe(ROOT / "pipelines/recipes/demo-lora.yaml", [*words, f"backend.micro_batch={args.micro_batch}"])

        prepared = prepare(recipe(0), log=lambda line: None)

        def alone(number: int) -> tuple[float, float]:
            began = time.perf_counter()
            training = Training(recipe(number), World(), prepared, RunDir(f"{scratch}/runs", f"candidate-{number}"), None, None)
            ready = time.perf_counter() - began
            for _ in range(WARM_UP):
                training._step()
            began = time.perf_counter()
            for _ in range(args.steps):
                training._step()
            taken = time.perf_counter() - began
            training.close()
            return ready, taken

        def together() -> tuple[float, float]:
            began = time.perf_counter()
            shared = Shared(recipe(0), prepared)
            for number in range(count):
                shared.add(str(number), recipe(number))
            ready = time.perf_counter() - began
            for _ in range(WARM_UP):
                shared.step()
            began = time.perf_counter()
            for _ in range(args.steps):
                shared.step()
            return ready, time.perf_counter() - began

        rounds = []
        for _ in range(args.rounds):
            each = [alone(number) for number in range(count)]
            rounds.append((sum(r for r, _ in each), sum(t for _, t in each), *together()))
    ready_alone, alone_s, ready_together, together_s = (statistics.median(values) for values in zip(*rounds, strict=True))
    whole = (ready_alone + alone_s) / (ready_together + together_s)
    print(f"{count:>10} {alone_s:>9.2f} {together_s:>11.2f} {alone_s / together_s:>6.2f}x {whole:>13.2f}x", flush=True)


if __name__ == "__main__":
    main()
