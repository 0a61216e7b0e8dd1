"""What `ftcore plan` forecasts against what runs took: peak memory of one rank, over a grid of models, methods, lengths, worlds.

    python benchmarks/plan_error.py [--malloc workers | --device cuda] [--only lora] [--world 1 2]

In: models made here. Out: a table with the median and the worst error; exit code 1 where the median is above 5 % or the worst above 10 %.
Runs in: one process a point (one a rank), on this machine; the whole loop: load, two steps, a checkpoint, the final export.

Measured is VmHWM over what the process held after the same run of a tiny model, for many imports come late; the forecast's part `runtime`
is left out likewise. `--malloc exact` has every tensor given back as it is freed, so that what is measured is what is held: the forecast
without its part for holes of the heap. `--malloc workers` has the settings that training workers have, and the forecast with that part.
With `--device cuda` measured is torch.cuda.max_memory_allocated over what was allocated after that tiny run (cuBLAS keeps its workspaces),
and the forecast is of the device without its context; points of one process, for there may be one GPU.
Points below 1 GiB are shown and not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
GIB = 2**30
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
MEDIAN_GOAL, WORST_GOAL = 0.05, 0.10


@dataclass(frozen=True)
class Point:
    """One cell of the grid."""

    shape: str
    method: str
    dtype: str = "fp32"
    tokens: int = 4096
    micro_batch: int = 1
    checkpointing: bool = False
    world: int = 1
    backend: str = "plain"

    @property
    def name(self) -> str:
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.shape:<8}{self.method:<7}{self.dtype:<5}{self.tokens:>6} x {self.micro_batch}, {self.backend} x {self.world}{again}"


QWEN2: dict[str, Any] = {"model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 16384}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": QWEN2 | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "deep": QWEN2 | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8,
                     "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "wide": QWEN2 | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 16,
                     "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False},
    "words": QWEN2 | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
                      "num_key_value_heads": 8, "vocab_size": 64000, "tie_word_embeddings": False},
    "normed": QWEN2 | {"model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64,
                       "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True},
}  # fmt: skip
GRID = (
    Point("deep", "full"),
    Point("deep", "full", checkpointing=True, tokens=8192),
    Point("wide", "full", tokens=2048, micro_batch=2),
    Point("words", "full", tokens=2048),
    Point("wide", "full", dtype="bf16", tokens=2048),
    Point("deep", "lora"),
    Point("deep", "lora", dtype="bf16", tokens=4096, micro_batch=2),
    Point("wide", "lora", checkpointing=True, tokens=8192),
    Point("normed", "lora", tokens=4096),
    Point("words", "lora", dtype="bf16", tokens=8192),
    Point("wide", "qlora", dtype="bf16", tokens=8192),
    Point("deep", "full", world=2, tokens=2048),
    Point("wide", "full", world=2, backend="zero3", tokens=2048),
)


def recipe_tree(point: Point, base: Path, runs: Path, device: str) -> dict[str, Any]:
    backend: dict[str, Any] = {"kind": "plain"} if point.backend == "plain" else {"kind": "deepspeed", "zero": int(point.backend[-1])}
    backend |= {"micro_batch": point.micro_batch, "gradient_checkpointing": point.checkpointing}
    method = {"kind": point.method} | ({} if point.method == "full" else {"rank": 8, "targets": "all-linear"})
    return {
        "name": point.shape, "model": {"path": str(base), "dtype": point.dtype}, "stage": "sft", "method": method, "backend": backend,
        "data": {"sources": "unused.jsonl", "max_length": point.tokens, "cache": str(runs / "none")},
        "optim": {"lr": 1e-4, "batch_size": point.world * point.micro_batch, "max_steps": 2},
        "resources": {"workers": point.world, "gpus_per_worker": int(device == "cuda")},
        "output": {"runs": str(runs)},
    }  # fmt: skip


def make_model(shape: str, dtype: str, folder: Path) -> Path:
    """Random weights, saved in the dtype they are trained in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftcore.models import DTYPES

    torch.manual_seed(0)
    facts = dict(SHAPES[shape])
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(folder)
    for path in (REPO / "ftcore" / "demo" / "base").iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(path, folder / path.name)
    return folder


def train_once(point: Point, base: Path, runs: Path, rank: int, device: str) -> None:
    import numpy as np

    from ftcore.backends.base import World
    from ftcore.data.types import Block
    from ftcore.loop import train
    from ftcore.recipe import Recipe
    from ftcore.rundir import RunDir
    from tests.memory_blocks import MemoryBlocks

    recipe = Recipe.model_validate(recipe_tree(point, base, runs, device))
    lengths = np.full(4, point.tokens // 4, np.int32)
    ids = np.random.default_rng(0).integers(3, 8000, point.tokens).astype(np.int32)
    block = Block(ids=ids, mask=np.ones(point.tokens, np.uint8), lengths=lengths, rows=np.arange(4))
    train(
        recipe,
        World(rank, point.world, rank, device),
        MemoryBlocks([block] * (2 * recipe.optim.batch_size)),
        RunDir(recipe.output.runs, recipe.name),
    )


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(point: Point, folder: Path, rank: int, device: str) -> int:
    """Peak bytes of this process in the run of `point`, over what it held after the run of a tiny model."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if point.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=point.world)
    tiny = Point("tiny", point.method, point.dtype, 64, point.micro_batch, point.checkpointing, point.world, point.backend)
    train_once(tiny, folder / "tiny", folder / "tiny-runs", rank, device)
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again here
    train_once(point, folder / "base", folder / "runs", rank, device)
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")) - before
    if point.world > 1:
        dist.destroy_process_group()
    return peak


def forecast_bytes(point: Point, folder: Path, malloc: str, device: str) -> int:
    """Of what `measure` can see."""
    from ftcore.forecast import forecast
    from ftcore.memory import Need
    from ftcore.recipe import Recipe

    known = forecast(Recipe.model_validate(recipe_tree(point, folder / "base", folder / "runs", device)))
    left_out = {"runtime", "CUDA context", "NCCL"} | ({"holes of the heap"} if malloc == "exact" else set())
    return Need(tuple(part for part in known.need.parts if part.name not in left_out), known.need.on_gpu).peak


def run(point: Point, malloc: str, device: str = "cpu") -> tuple[int, int]:
    """(forecast, measured) bytes of the rank that held most."""
    from cluster.runtime_env import MALLOC

    with tempfile.TemporaryDirectory(prefix="plan-error-") as place:
        folder = Path(place)
        made = [sys.executable, __file__, "--make", json.dumps(asdict(point)), "--folder", place]
        subprocess.run(made, check=True, capture_output=True)
        settings = MALLOC if malloc == "workers" else EXACT
        ranks = [
            subprocess.Popen([*made[:2], "--one", made[3], "--folder", place, "--rank", str(rank), "--device", device],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | settings)
            for rank in range(point.world)
        ]  # fmt: skip
        measured = []
        for process in ranks:
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"{point.name}: {err[-2000:]}")
            measured.append(int(out.splitlines()[-1]))
        return forecast_bytes(point, folder, malloc, device), max(measured)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="points whose name holds this")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--malloc", choices=("exact", "workers"), default="exact")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name in ("--one", "--make"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        point = Point(**json.loads(args.make))
        for name, shape in (("tiny", "tiny"), ("base", point.shape)):
            make_model(shape, point.dtype, args.folder / name)
        return 0
    if args.one:
        print(measure(Point(**json.loads(args.one)), args.folder, args.rank, args.device))
        return 0
    worlds = args.world if args.device == "cpu" else [1]
    errors = []
    print(f"{'point':<60}{'forecast':>10}{'measured':>10}  error", flush=True)
    for point in (p for p in GRID if args.only in p.name and p.world in worlds):
        said, took = run(point, args.malloc, args.device)
        error = said / took - 1
        counted = took >= GIB
        errors += [abs(error)] if counted else []
        print(f"{point.name:<60}{said / GIB:>6.2f} GiB{took / GIB:>6.2f} GiB  {error:>+6.1%}{'' if counted else '  (small)'}", flush=True)
    if not errors:
        return 0
    median, worst = statistics.median(errors), max(errors)
    print(f"{len(errors)} points: median {median:.1%} (goal {MEDIAN_GOAL:.0%}), worst {worst:.1%} (goal {WORST_GOAL:.0%})")
    return int(median > MEDIAN_GOAL or worst > WORST_GOAL)


if __name__ == "__main__":
    sys.exit(main())
