"""The loss does not depend on how the work is cut: packing, micro-batches, accumulation, workers; and it is the loss a plain loop gets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftcore.backends.base import World
from ftcore.data.collate import collate
from ftcore.data.order import Order
from ftcore.journal import read_lines
from ftcore.loop import Training, train
from ftcore.models import CausalModel, choose_layout, load_base
from ftcore.recipe import Model, Recipe
from ftcore.rundir import RunDir
from tests.memory_blocks import MemoryBlocks, block_of, packed_blocks, random_segments
from tests.worlds import in_world

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
BLOCKS = packed_blocks(50, per_block=2, seed=3)


def recipe_for(base: Path, runs: Path, name: str, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": name,
        "model": {"path": str(base), "dtype": changes.pop("dtype", "fp64")},
        "data": {"sources": "unused.jsonl"},
        "stage": "sft",
        "method": changes.pop("method", {"kind": "lora", "rank": 4, "targets": "all-linear"}),
        "backend": {"kind": "plain", "micro_batch": changes.pop("micro_batch", 8)},
        "optim": {"lr": changes.pop("lr", 5e-3), "batch_size": 8, "epochs": 10, "max_steps": 20, "seed": 1, "weight_decay": 0.01},
        "output": {"runs": str(runs), "checkpoint_every": 1000},
    }
    return Recipe.model_validate(tree | changes)


def losses_of(recipe: Recipe, blocks: MemoryBlocks, world: World | None = None) -> list[float]:
    run = RunDir(recipe.output.runs, recipe.name)
    train(recipe, world or World(), blocks, run)
    return [line["loss"] for line in read_lines(run) if "loss" in line]


def losses_on_rank(rank: int, size: int, tree: dict[str, Any]) -> list[float]:
    return losses_of(Recipe.model_validate(tree), MemoryBlocks(BLOCKS), World(rank=rank, size=size))


def spread(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == 20
    return float(np.max(np.abs(np.array(one) - np.array(other))))


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 4, "targets": "all-linear"}, {"kind": "full"}], ids=["lora", "full"])
def test_accumulation_does_not_change_the_losses(tiny_model_dir: Path, tmp_path: Path, dtype: str, method: dict[str, Any]) -> None:
    lr = 1e-3 if method["kind"] == "full" else 5e-3  # what each is trained with; a rate too high amplifies the last bits of fp32
    whole = losses_of(recipe_for(tiny_model_dir, tmp_path, "whole", dtype=dtype, method=method, micro_batch=8, lr=lr), MemoryBlocks(BLOCKS))
    parts = losses_of(recipe_for(tiny_model_dir, tmp_path, "parts", dtype=dtype, method=method, micro_batch=2, lr=lr), MemoryBlocks(BLOCKS))
    assert whole[-1] < whole[0] - 0.05
    assert spread(whole, parts) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("workers", "dtype"),
    [
        (2, "fp32"),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in ((2, "fp64"), (3, "fp64"), (3, "fp32"), (4, "fp64"), (4, "fp32"))),
    ],
)
def test_the_number_of_workers_does_not_change_the_losses(tiny_model_dir: Path, tmp_path: Path, workers: int, dtype: str) -> None:
    alone = losses_of(recipe_for(tiny_model_dir, tmp_path, "alone", dtype=dtype, micro_batch=2), MemoryBlocks(BLOCKS))
    together = recipe_for(tiny_model_dir, tmp_path, "together", dtype=dtype, micro_batch=2)
    in_world(workers, losses_on_rank, together.model_dump(mode="json"))
    lines = [line["loss"] for line in read_lines(RunDir(tmp_path, "together")) if "loss" in line]
    assert spread(alone, lines) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_packed_and_unpacked_rows_give_the_same_losses(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    """Packed: blocks of two segments end to end. Unpacked: the same two segments as padded rows under a padding mask."""
    packed = losses_of(recipe_for(tiny_model_dir, tmp_path, "packed", dtype=dtype), MemoryBlocks(BLOCKS))
    padded = recipe_for(
        tiny_model_dir,
        tmp_path,
        "padded",
        dtype=dtype,
        model={"path": str(tiny_model_dir), "dtype": dtype, "attention": "sdpa"},
        data={"sources": "unused.jsonl", "pack": False},
    )
    assert spread(packed, losses_of(padded, MemoryBlocks(BLOCKS))) <= TOLERANCE[dtype]


def test_changing_one_segment_moves_no_other_segments_logits(tiny_model_dir: Path) -> None:
    model = load_base(Model(path=str(tiny_model_dir), dtype="fp32"))
    causal = CausalModel(model, choose_layout(model, "auto", packs=True))
    segments = random_segments(4, seed=5, vocab=300)
    changed = [*segments]
    changed[1] = ((segments[1][0] + 7) % 300, segments[1][1])
    with torch.no_grad():
        before, after = (causal.logits(collate([block_of(s)], padded=False))[0] for s in (segments, changed))
    starts = np.cumsum([0, *(len(ids) for ids, _ in segments)])
    moved = [float((before[a:b] - after[a:b]).abs().max()) for a, b in pairwise(starts)]
    assert moved[1] > 0.01
    assert [moved[0], moved[2], moved[3]] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_losses_equal_those_of_a_plain_transformers_and_peft_loop(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, "ours", dtype=dtype)
    ours = losses_of(recipe, MemoryBlocks(BLOCKS))
    theirs = plain_loop(tiny_model_dir, recipe, getattr(torch, {"fp64": "float64", "fp32": "float32"}[dtype]))
    assert spread(ours, theirs) <= TOLERANCE[dtype]


def plain_loop(base: Path, recipe: Recipe, dtype: torch.dtype) -> list[float]:
    """One padded row a segment, transformers' own logits, PEFT's LoRA, torch's AdamW. Only the order of blocks is taken from the recipe."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(recipe.optim.seed)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay
    )
    losses = []
    for step in range(20):
        rows = []
        for index in Order(len(BLOCKS), 8, recipe.optim.seed).window(step):
            block, at = BLOCKS[index], 0
            for length in block.lengths:
                rows.append((block.ids[at : at + length], block.mask[at : at + length]))
                at += int(length)
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, mask) in enumerate(rows):
            ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
            labels[row, : len(tokens)][torch.as_tensor(mask, dtype=torch.bool)] = ids[row, : len(tokens)][
                torch.as_tensor(mask, dtype=torch.bool)
            ]
            attention[row, : len(tokens)] = 1
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr_at(step, 20)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_gradient_checkpointing_does_not_change_the_losses(tiny_model_dir: Path, tmp_path: Path) -> None:
    backend = {"kind": "plain", "micro_batch": 4, "gradient_checkpointing": True}
    without = losses_of(recipe_for(tiny_model_dir, tmp_path, "without", micro_batch=4), MemoryBlocks(BLOCKS))
    with_it = losses_of(recipe_for(tiny_model_dir, tmp_path, "with", backend=backend), MemoryBlocks(BLOCKS))
    assert spread(without, with_it) <= 1e-10


def test_a_run_stopped_and_resumed_is_bit_identical_to_an_uninterrupted_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    method = {"kind": "lora", "rank": 4, "dropout": 0.1}
    whole = losses_of(recipe_for(tiny_model_dir, tmp_path, "whole", dtype="fp32", method=method), MemoryBlocks(BLOCKS))
    stopped = recipe_for(
        tiny_model_dir, tmp_path, "stopped", dtype="fp32", method=method, output={"runs": str(tmp_path), "checkpoint_every": 6}
    )
    training = Training(stopped, World(), MemoryBlocks(BLOCKS), RunDir(tmp_path, "stopped"), None, None)
    training.restore()
    while training.at.step < 9:  # killed three steps after the checkpoint of step 6
        training._step()
        if training.at.step % 6 == 0:
            training.writer.save(training.at, stopped.method, training.stepper, is_main=True)
    training.writer.wait()
    training.close()
    resumed = losses_of(stopped, MemoryBlocks(BLOCKS))
    assert resumed == whole
