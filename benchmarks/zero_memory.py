"""Anonymous memory of every rank under ZeRO-3 and under plain, on a model made on the spot: load, steps, checkpoints, final export.

    python benchmarks/zero_memory.py [--layers 24] [--hidden 1024] [--workers 2 3] [--methods lora full] [--backends zero3 plain]

A thread in each rank samples RssAnon (file pages are the kernel's to drop); the figure is the peak over what the process held after the
same run of a model of as many layers, 64 wide, for many imports come late: at the first load, step, export. `whole` is weights, gradients
and optimizer state in fp32: 4 bytes a frozen weight, 16 a trained one, 20 under DeepSpeed, which keeps a master copy in fp32 too. `bound`
is 1.15 / N of that plus the largest layer ever gathered, weights alone: a transformer layer, which recomputation gathers whole, or the
embedding. Exits with 1 when a rank under ZeRO-3 is over it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing as mp
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Sampler:
    """Peak anonymous memory of each phase."""

    def __init__(self) -> None:
        self.baseline = anonymous_bytes()
        self.peaks: dict[str, int] = {}
        self.phase = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            if self.phase:
                self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), anonymous_bytes() - self.baseline)

    def begin(self, phase: str) -> None:
        self.phase = phase

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def make_model(folder: Path, *, layers: int, hidden: int, vocabulary: int) -> None:
    """A random Qwen2 in sharded fp32 safetensors, written tensor by tensor."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ftcore.safetensors_stream import TensorFile, TensorPlan

    demo = REPO / "ftcore" / "demo" / "base"
    folder.mkdir(parents=True)
    for path in demo.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(path, folder / path.name)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        parameters = list(Qwen2ForCausalLM(config).named_parameters())
    files = [parameters[i::4] for i in range(4)]
    index = {"metadata": {}, "weight_map": {}}
    for number, group in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        plans = [TensorPlan(key, torch.float32, tuple(p.shape)) for key, p in group]
        with TensorFile(folder / name, plans, {"format": "pt"}) as file:
            for plan in plans:
                noise = torch.randn(plan.shape) * 0.02
                file.write(plan.name, noise if len(plan.shape) > 1 else torch.ones(plan.shape))
                index["weight_map"][plan.name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def recipe_tree(base: Path, runs: Path, name: str, backend: str, method: str, steps: int) -> dict[str, Any]:
    stage: dict[str, Any] = {"kind": "plain"} if backend == "plain" else {"kind": "deepspeed", "zero": 3}
    stage["gradient_checkpointing"] = True  # activations are not what is measured
    return {
        "name": name, "model": {"path": str(base), "dtype": "fp32"}, "data": {"sources": "unused.jsonl"}, "stage": "sft",
        "method": {"kind": "lora", "rank": 8, "targets": "all-linear"} if method == "lora" else {"kind": "full"}, "backend": stage,
        "optim": {"lr": 1e-3, "batch_size": 4, "max_steps": steps}, "output": {"runs": str(runs), "checkpoint_every": 1, "keep": 1},
        "eval": {"every_steps": 1},
    }  # fmt: skip


def measure(rank: int, size: int, store: str, small: dict[str, Any], tree: dict[str, Any], results: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trained(small, rank, size, lambda phase: None)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with Sampler() as sampler:
        shapes = trained(tree, rank, size, sampler.begin)
    Path(results, f"{rank}.json").write_text(json.dumps([sampler.peaks, shapes]))
    dist.destroy_process_group()


Shapes = list[tuple[str, tuple[int, ...], bool]]


def trained(tree: dict[str, Any], rank: int, size: int, begin: Callable[[str], None]) -> Shapes:
    """(name, shape, trained) of every parameter of a model that was loaded, trained and exported; `begin` is told each phase."""
    from ftcore.backends.base import World
    from ftcore.loop import Training
    from ftcore.recipe import Recipe
    from ftcore.rundir import RunDir
    from tests.memory_blocks import MemoryBlocks, packed_blocks

    recipe = Recipe.model_validate(tree)
    blocks = MemoryBlocks(packed_blocks(8), packed_blocks(2, seed=4))
    begin("load")
    training = Training(recipe, World(rank, size, rank), blocks, RunDir(recipe.output.runs, recipe.name), None, None)
    training.restore()
    begin("steps")
    training.run_steps()
    begin("export")
    training.finish()
    parameters = training.model.named_parameters()
    shapes = [(name, tuple(p.ds_shape) if "ds_id" in vars(p) else tuple(p.shape), p.requires_grad) for name, p in parameters]
    training.close()
    return shapes


def run(base: Path, layers: int, backend: str, method: str, workers: int, steps: int) -> tuple[list[dict[str, int]], Shapes]:
    """Each rank's peaks by phase, and (name, shape, trained) of every parameter."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="zero-memory-") as folder:
        make_model(Path(folder) / "small", layers=layers, hidden=64, vocabulary=8192)
        small = recipe_tree(Path(folder) / "small", Path(folder) / "runs", "small", backend, method, steps)
        tree = recipe_tree(base, Path(folder) / "runs", "run", backend, method, steps)
        store = str(Path(folder) / "store")
        processes = [context.Process(target=measure, args=(rank, workers, store, small, tree, folder)) for rank in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"exit codes {[process.exitcode for process in processes]}")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(workers)]
    return [peaks for peaks, _ in found], found[0][1]


def sizes(shapes: Shapes, trained_bytes: int) -> tuple[int, int]:
    """(bytes of the whole, bytes of the largest layer)."""
    layers: Counter[str] = Counter()
    for name, shape, _ in shapes:
        in_stack = re.search(r"layers\.\d+", name)
        layers[in_stack[0] if in_stack else name] += 4 * math.prod(shape)
    return sum(math.prod(shape) * (trained_bytes if is_trained else 4) for _, shape, is_trained in shapes), max(layers.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--backends", nargs="+", default=["zero3", "plain"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zero-memory-base-") as folder:
        base = Path(folder) / "base"
        make_model(base, layers=args.layers, hidden=args.hidden, vocabulary=args.vocabulary)
        titles = f"{'method':7}{'backend':9}{'N':>2}  {'whole':>9}  {'peak by rank, MiB':28}{'x whole':>8}  {'bound':>9}"
        print(f"{titles}  load / steps / export, rank 0")
        over = False
        for method in args.methods:
            for backend in args.backends:
                for workers in args.workers:
                    peaks, shapes = run(base, args.layers, backend, method, workers, args.steps)
                    whole, largest = sizes(shapes, 16 if backend == "plain" else 20)
                    bound = 1.15 / workers * whole + largest
                    tops = [max(each.values()) for each in peaks]
                    shown = " ".join(f"{top / 2**20:8.0f}" for top in tops)
                    verdict = "ok" if max(tops) <= bound else "over"
                    over |= backend != "plain" and verdict == "over"
                    phases = " / ".join(f"{peaks[0].get(phase, 0) / 2**20:.0f}" for phase in ("load", "steps", "export"))
                    print(
                        f"{method:7}{backend:9}{workers:2}  {whole / 2**20:9.0f}  {shown:28}{max(tops) / whole:8.3f}  "
                        f"{bound / 2**20:9.0f}  {phases}  {verdict if backend != 'plain' else ''}",
                        flush=True,
                    )
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
