"""Training speed: our loop against TRL's SFTTrainer, same model, rows, dtype, threads, allocator and checkpointing.

    python benchmarks/train_speed.py [--rows alpaca.json] [--steps 12] [--dtype fp32] [--rounds 3]

Every case is a process of its own; rounds are interleaved; the table gives the median of real (non-padding) tokens a second, after warm-up.
Cases: trl-default (padded), trl-grouped (padded, like lengths together), trl-best (packed, its own best-fit), and ours: packed, grouped,
padded in random order. TRL must be installed (`pip install -c constraints.txt trl`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
CASES = ("trl-default", "trl-grouped", "trl-best", "ours-packed", "ours-grouped", "ours-padded")
VOCABULARY, BATCH, MAX_LENGTH = 32000, 8, 512  # 8 a device is TRL's default


def lengths(rows: Path | None, count: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens: of a real alpaca file at 4.3 characters a token, or log-normal like it."""
    if rows:
        records = json.loads(rows.read_text())
        pairs = [(len(r["instruction"]) + len(r.get("input", "")), len(r["output"])) for r in records]
        return [(max(4, int(p / 4.3) + 12), max(2, int(a / 4.3))) for p, a in pairs][:count]
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.normal(3.1, 0.55, count)).astype(int) + 12
    answers = np.exp(rng.normal(4.3, 1.15, count)).astype(int) + 2
    return [(int(p), int(a)) for p, a in zip(prompts, answers, strict=True)]


def token_rows(pairs: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(1)
    cut = [(min(p, MAX_LENGTH // 2), min(a, MAX_LENGTH - min(p, MAX_LENGTH // 2))) for p, a in pairs]
    return [(rng.integers(3, VOCABULARY, p).tolist(), rng.integers(3, VOCABULARY, a).tolist()) for p, a in cut]


def make_base(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.conftest import make_tiny_model

    make_tiny_model(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_trl(case: str, base: Path, rows: list[tuple[list[int], list[int]]], args: argparse.Namespace) -> float:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict(
        {
            "input_ids": [p + a for p, a in rows],
            "completion_mask": [[0] * len(p) + [1] * len(a) for p, a in rows],
        }
    )
    packing = case == "trl-best"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4 if packing else BATCH,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        packing=packing,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=args.dtype == "bf16",
        train_sampling_strategy="group_by_length" if case == "trl-grouped" else "random",
        learning_rate=1e-4,
        disable_tqdm=True,
        completion_only_loss=True,
        dataloader_num_workers=0,
    )
    seen: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *unused: Any, **kwargs: Any) -> None:
            seen.append((time.perf_counter(), counted[0]))

    counted = [0]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counting(features: list[dict[str, Any]]) -> Any:
        counted[0] += sum(len(feature["input_ids"]) for feature in features)
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    return rate(seen, args.warmup)


def rate(seen: list[tuple[float, int]], warmup: int) -> float:
    (start, first), (end, last) = seen[warmup - 1], seen[-1]
    return (last - first) / (end - start)


def run_ours(case: str, base: Path, rows: list[tuple[list[int], list[int]]], args: argparse.Namespace) -> float:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ftcore.backends.base import World
    from ftcore.data.pack import pack
    from ftcore.data.types import Block, Example, Origin
    from ftcore.loop import Training
    from ftcore.recipe import Recipe
    from ftcore.rundir import RunDir
    from tests.memory_blocks import MemoryBlocks

    examples = [
        Example(
            np.array(p + a, np.int32),
            np.array([0] * len(p) + [1] * len(a), np.uint8),
            np.zeros(len(p) + len(a), np.uint8),
            Origin("rows", i),
        )
        for i, (p, a) in enumerate(rows)
    ]
    packed = case == "ours-packed"
    if packed:
        blocks = list(pack(examples, MAX_LENGTH))
    else:
        blocks = [Block(e.ids, e.mask, np.array([len(e.ids)], np.int32), np.array([i])) for i, e in enumerate(examples)]
    recipe = Recipe.model_validate(
        {
            "name": case,
            "model": {"path": str(base), "dtype": args.dtype, "attention": "auto" if packed else "sdpa"},
            "data": {"sources": "memory", "pack": packed},
            "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
            "stage": "sft",
            "backend": {"kind": "plain", "micro_batch": 4 if packed else BATCH},
            # like lengths can only share a micro-batch when the window holds several of them
            "optim": {
                "lr": 1e-4,
                "batch_size": 4 if packed else BATCH * (8 if case == "ours-grouped" else 1),
                "max_steps": args.steps,
                "epochs": 1000,
            },
            "output": {"runs": tempfile.mkdtemp()},
        }
    )
    seen: list[tuple[float, int]] = []
    run = RunDir(recipe.output.runs, recipe.name)
    training = Training(recipe, World(), MemoryBlocks(blocks), run, lambda r: seen.append((time.perf_counter(), r["tokens"])), None)
    training.restore()
    while training.at.step < training.num_steps:
        training._step()
    training.close()
    return rate(seen, args.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="an alpaca JSON file to take lengths from")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rows = token_rows(lengths(args.rows, 2000))
        result = run_trl(args.one, args.base, rows, args) if args.one.startswith("trl") else run_ours(args.one, args.base, rows, args)
        print("RATE", result)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        rates: dict[str, list[float]] = {case: [] for case in args.cases}
        for _ in range(args.rounds):
            for case in args.cases:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", case, "--base", folder]
                done = subprocess.run(
                    command, env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("RATE")]
                if not lines:
                    sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
                rates[case].append(float(lines[0].split()[1]))
                print(f"  {case}: {rates[case][-1]:.0f} tokens/s", flush=True)
    print(f"\n{args.dtype}, LoRA r8 all-linear, 32k vocabulary, 1 thread, {args.steps} steps, median of {args.rounds}")
    for case, values in rates.items():
        middle = statistics.median(values)
        versus = [
            f"{middle / statistics.median(rates[peer]):.2f}x {peer}" for peer in args.cases if peer != case and case.startswith("ours")
        ]
        print(f"{case:<14}{middle:>8.0f} tokens/s  {'  '.join(versus)}")


if __name__ == "__main__":
    main()
