"""The forecast is held against what torch's allocator gives out in a real micro-step, so that it cannot drift from the loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from ftcore import plan_probe
from ftcore.backends.base import World
from ftcore.backends.plain import Plain
from ftcore.data.collate import collate
from ftcore.data.types import Block
from ftcore.errors import ConfigError
from ftcore.forecast import forecast
from ftcore.models import DTYPES, CausalModel, autocast_dtype, choose_layout
from ftcore.recipe import Recipe
from pipelines.plan import main

TOKENS = 1024
CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 6000, "tie_word_embeddings": False,
}  # fmt: skip


def recipe_of(folder: Path, method: dict[str, Any], dtype: str, checkpointing: bool, **config: Any) -> Recipe:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return Recipe.model_validate({
        "name": "a", "model": {"path": str(folder), "dtype": dtype}, "data": {"sources": "none.jsonl", "max_length": TOKENS},
        "stage": "sft", "method": method, "backend": {"kind": "plain", "gradient_checkpointing": checkpointing}, "optim": {"max_steps": 2},
    })  # fmt: skip


@contextmanager
def stepping(recipe: Recipe, num_segments: int) -> Iterator[Callable[[], None]]:
    """A micro-step over one block of TOKENS, after a first one."""
    facts = json.loads(Path(recipe.model.path, "config.json").read_text())
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts), dtype=DTYPES[recipe.model.dtype])
    base.config.use_cache, base.name_or_path = False, recipe.model.path
    base.config._name_or_path = recipe.model.path
    model = recipe.method.apply(base)
    assert isinstance(recipe.backend, Plain)
    stepper = recipe.backend.open(model, recipe.optim, 2, World(), autocast_dtype(recipe.model.dtype))
    policy = stepper.run(lambda: CausalModel(model, choose_layout(base, "auto", packs=True)))
    ids = np.random.default_rng(0).integers(0, 6000, TOKENS).astype(np.int32)
    block = Block(
        ids=ids,
        mask=np.ones(TOKENS, np.uint8),
        lengths=np.full(num_segments, TOKENS // num_segments, np.int32),
        rows=np.arange(num_segments),
    )
    batch = collate([block], padded=False)
    model.train()

    def step() -> None:
        stepper.micro_step(lambda: policy.cross_entropy(batch), scale=1e-3, last=True)

    step()
    yield step
    stepper.close()


def peak_of_a_step(recipe: Recipe) -> int:
    """Bytes that the second micro-step takes at its worst moment, beside weights, gradients and optimizer."""
    with stepping(recipe, 4) as step, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(events)]).max())


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing", "config"),
    [
        ({"kind": "full"}, "fp32", False, {}),
        ({"kind": "full"}, "fp32", True, {"tie_word_embeddings": True}),
        ({"kind": "full"}, "bf16", False, {}),
        ({"kind": "lora", "targets": "all-linear"}, "fp32", False, {"model_type": "qwen3", "head_dim": 32}),
        ({"kind": "lora", "targets": "all-linear", "dropout": 0.1}, "bf16", True, {}),
        ({"kind": "lora", "targets": ["q_proj", "v_proj"]}, "bf16", False, {}),
    ],
)
def test_a_step_takes_what_was_forecast(
    tmp_path: Path, method: dict[str, Any], dtype: str, checkpointing: bool, config: dict[str, Any]
) -> None:
    recipe = recipe_of(tmp_path, method, dtype, checkpointing, **config)
    told = sum(part.bytes for part in forecast(recipe).need.parts if part.phases == ("step",) and part.name != "holes of the heap")
    assert told == pytest.approx(peak_of_a_step(recipe), rel=0.08)


def test_a_probe_tells_the_time_of_a_run_on_a_workers_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By processor time: of one thread it is the same, however busy the machine is."""
    recipe, threads = recipe_of(tmp_path, {"kind": "lora"}, "fp32", False), []

    def clock() -> float:
        threads.append(torch.get_num_threads())
        return time.process_time()

    monkeypatch.setattr(plan_probe, "time", SimpleNamespace(perf_counter=clock))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        known = forecast(recipe)
        seconds = plan_probe.probe(known, 1)
        assert set(threads) == {1} and torch.get_num_threads() == 2
        torch.set_num_threads(1)
        took = []
        with stepping(recipe, 1) as step:
            for _ in range(3):
                started = time.process_time()
                step()
                took.append(time.process_time() - started)
    finally:
        torch.set_num_threads(before)
    assert seconds is not None and known.steps == 2
    assert 0.5 < seconds / (2 * known.micro_steps * min(took)) < 2


def test_a_probe_for_a_gpu_does_not_time_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = recipe_of(tmp_path, {"kind": "lora"}, "fp32", False).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree | {"resources": {"gpus_per_worker": 1}}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU on this machine"):
        main([str(tmp_path / "recipe.yaml"), "--gpu", "H100", "--probe"])


def test_a_plan_says_what_was_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = recipe_of(tmp_path, {"kind": "lora"}, "fp32", False).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree | {"resources": {"cpus_per_worker": 2.5}}))
    main([str(tmp_path / "recipe.yaml"), "--probe", "--memory", "8"])
    assert "by a probe on this machine, 2 threads" in capsys.readouterr().out
