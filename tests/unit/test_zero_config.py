"""The DeepSpeed configuration follows from the recipe; what contradicts it, or cannot work, is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from ftcore.backends.deepspeed import DeepSpeed
from ftcore.errors import ConfigError
from ftcore.optim import Optim
from ftcore.recipe import parse_recipe
from ftcore.zero_config import DEFAULTS, configuration

RECIPE = "name: a\nmodel: {path: b, dtype: bf16}\ndata: {sources: c.jsonl}\nmethod: lora\nstage: sft\nresources: {workers: 2}\n"


def problems(backend: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_recipe(f"{RECIPE}backend: {{kind: deepspeed, {backend}}}\n", overrides=overrides)
    return str(error.value)


def part(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def test_the_recipe_decides_and_raw_keys_add() -> None:
    raw: dict[str, Any] = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 5}, "wall_clock_breakdown": True}
    tree = configuration(DeepSpeed(zero=2, deepspeed=raw), Optim(clip_norm=0.5), bf16=False)
    wanted = {
        "zero_optimization.stage": 2, "gradient_clipping": 0.5, "bf16.enabled": False, "data_types.grad_accum_dtype": "fp32",
        "zero_optimization.overlap_comm": False, "zero_optimization.reduce_bucket_size": 5, "wall_clock_breakdown": True,
        "zero_optimization.sub_group_size": DEFAULTS["zero_optimization.sub_group_size"],
    }  # fmt: skip
    assert {path: part(tree, path) for path in wanted} == wanted
    assert "offload_optimizer" not in tree["zero_optimization"]


def test_offload_follows_from_the_recipe() -> None:
    tree = configuration(DeepSpeed(offload_params="nvme", offload_optimizer="cpu", nvme_path="/fast"), Optim(), bf16=True)
    assert part(tree, "zero_optimization.offload_param") == {"device": "nvme", "nvme_path": "/fast"}
    assert part(tree, "zero_optimization.offload_optimizer") == {"device": "cpu"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("gradient_clipping: 5", "gradient_clipping  got 5, but optim.clip_norm makes it 1.0"),
        ("zero_optimization: {stage: 2}", "zero_optimization.stage  got 2, but backend.zero makes it 3"),
        ("optimizer: {type: Adam}", "optimizer.type  this follows from optim; set it there"),
        ("fp16: {enabled: true}", "fp16.enabled  this follows from model.dtype"),
        ("train_batch_size: 8", "train_batch_size  this follows from optim.batch_size"),
        ("zero_optimization: {overlap_comm: auto}", "zero_optimization.overlap_comm  `auto` is filled in by Hugging Face's Trainer only"),
        ("zero_optimization: {offload_optimizer: {device: nvme}}", "zero_optimization.offload_optimizer.device  this follows from backend"),
        ("zero_optimization: {offload_param: {nvme_path: /x}}", "zero_optimization.offload_param.nvme_path  this follows from backend"),
        ("zero_optimization: {cpu_offload: true}", "zero_optimization.cpu_offload  this follows from backend.offload_optimizer"),
        ("bfloat16: {enabled: true}", "bfloat16.enabled  this follows from model.dtype"),
        (
            "gradient_cliping: 5",
            "gradient_cliping  DeepSpeed has no such key, and would pass over it in silence; did you mean `gradient_cl",
        ),
        ("zero_optimization: 3", "zero_optimization  wanted a mapping; got 3"),
    ],
)
def test_a_raw_key_that_contradicts_the_recipe_is_refused_by_name(raw: str, words: str) -> None:
    assert f"backend.deepspeed.{words}" in problems(f"deepspeed: {{{raw}}}")


@pytest.mark.parametrize(
    ("backend", "override", "words"),
    [
        ("zero: 3", "resources.workers=1", "backend.kind  ZeRO shards over workers, and there is one: nothing is sharded"),
        ("zero: 3", "resources.workers={min: 1, max: 4}", "set resources.workers.min to 2 or more"),
        ("zero: 3", "optim.kind=adamw_8bit", "optim.kind  the deepspeed backend shards the state of adamw only; got adamw_8bit"),
        ("zero: 3", "model.dtype=fp64", "model.dtype  the deepspeed backend trains in fp32 and bf16; got fp64"),
        ("zero: 2, offload_params: cpu", "name=a", "backend.offload_params  weights are sharded, and so offloaded, in stage 3 only"),
        ("offload_optimizer: nvme", "name=a", "backend.nvme_path  offloading to nvme needs a folder"),
        ("nvme_path: /fast", "name=a", "backend.nvme_path  nothing is offloaded to nvme"),
        ("zero: 2, offload_optimizer: nvme, nvme_path: /x", "name=a", "NVMe offload is stage 3's"),
        ("zero: 4", "name=a", "backend.zero  unknown value; got 4"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(backend: str, override: str, words: str) -> None:
    assert words in problems(backend, override)


def test_one_worker_may_offload() -> None:
    recipe = parse_recipe(f"{RECIPE}backend: {{kind: deepspeed, offload_optimizer: cpu}}\n", overrides=["resources.workers=1"])
    assert recipe.backend.offload_optimizer == "cpu"
