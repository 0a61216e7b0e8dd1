"""The learning-rate schedule and the optimizer's groups, against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.optim import Optim
from ftcore.optimizer_state import read_state, write_state
from ftcore.recipe import parse_recipe


def test_the_rate_climbs_to_its_peak_and_no_higher() -> None:
    optim = Optim(lr=1.0, warmup=4)
    rates = [optim.lr_at(step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and max(rates) == 1.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert Optim(lr=1.0, warmup=0).lr_at(50, 100) == pytest.approx(0.5)


def test_linear_falls_evenly() -> None:
    optim = Optim(lr=1.0, warmup=0, schedule="linear")
    assert [optim.lr_at(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_constant_stays() -> None:
    optim = Optim(lr=1.0, warmup=2, schedule="constant")
    assert [optim.lr_at(step, 5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_the_decay_ends_at_the_floor() -> None:
    optim = Optim(lr=2.0, warmup=0, schedule="linear", min_lr_ratio=0.1)
    assert optim.lr_at(10, 10) == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (0.001, 1), (7, 7), (500, 100), (0, 0)])
def test_warmup_is_a_share_below_one_and_steps_from_one(warmup: float, steps: int) -> None:
    assert Optim(warmup=warmup).warmup_steps(100) == steps


def test_every_step_moves_something() -> None:
    optim = Optim(lr=1.0, warmup=0.03)
    assert min(optim.lr_at(step, 100) for step in range(100)) > 0


def test_biases_and_norms_get_no_weight_decay_and_frozen_weights_no_group() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    decayed, plain = Optim(weight_decay=0.1).build(model).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in plain["params"]] == [(3,), (3,), (3,)] and plain["weight_decay"] == 0.0


def test_the_optimizer_is_adamw_with_the_sections_numbers() -> None:
    optimizer = Optim(lr=0.5, betas=(0.8, 0.9), eps=1e-6).build(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.5, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_is_refused_where_there_is_nothing_to_page(kind: str) -> None:
    with pytest.raises(ModelError, match="nothing to page") as refused:
        Optim(kind=kind).build(nn.Linear(2, 2))
    assert refused.value.remedy == f"optim.kind={kind.removeprefix('paged_')}"


def stepped(kind: str, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(64, 80)  # 5120 weights: 8 bits; 80 biases: fp32
    optimizer = Optim(kind=kind, lr=1e-2).build(model)
    for _ in range(num_steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.linspace(-1, 1, 64)[None] * (1 + float(model.weight.detach().sum()))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_restored_optimizer_steps_to_the_same_bits(kind: str) -> None:
    model, optimizer = stepped(kind, 5)
    tensors, steps = read_state(optimizer, model.named_parameters())
    other, fresh = stepped(kind, 0)
    other.load_state_dict(model.state_dict())
    write_state(fresh, other.named_parameters(), tensors, steps, "here")
    for _ in range(3):
        step(model, optimizer)
        step(other, fresh)
    assert steps == 5 and torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_eight_bit_state_takes_a_quarter_and_writes_its_tables_once() -> None:
    (model, optimizer), (_, wide) = stepped("adamw_8bit", 1), stepped("adamw", 1)
    tensors, _ = read_state(optimizer, model.named_parameters())
    assert tensors["weight.state1"].dtype == torch.uint8 and tensors["bias.state1"].dtype == torch.float32
    assert sorted(name for name in tensors if "qmap" in name) == ["qmap1", "qmap2"]
    narrow = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("weight."))
    assert narrow < 0.27 * sum(moment.nbytes for moment in wide.state[wide.param_groups[0]["params"][0]].values())


@pytest.mark.parametrize("other", ["adamw", "fewer", "more"])
def test_state_of_another_optimizer_or_model_does_not_bind(other: str) -> None:
    model, optimizer = stepped("adamw_8bit", 2)
    tensors, steps = read_state(optimizer, model.named_parameters())
    if other == "fewer":
        del tensors["weight.absmax2"]
    if other == "more":
        tensors["head.state1"] = torch.zeros(3)
    fresh, into = stepped("adamw" if other == "adamw" else "adamw_8bit", 0)
    with pytest.raises(IntegrityError, match="does not bind"):
        write_state(into, fresh.named_parameters(), tensors, steps, "here")


TREE: dict[str, Any] = {"name": "a", "model": {"path": "b"}, "data": {"sources": "c.jsonl"}, "method": {"kind": "qlora"}, "stage": "sft"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("optim.kind=paged_adamw_8bit", "resources.gpus_per_worker is 0; take adamw_8bit"),
        ("optim.kind=adamw_4bit", "optim.kind"),
        ("method.compute_dtype=fp16", "fp16 computes on GPUs only"),
        ("method.compute_dtype=fp32", "under model.dtype: bf16 everything is computed in bf16"),
        ("model.dtype=fp64", "fp64 has no quantised form"),
        ("method.bits=8 method.double_quant=true", "double_quant quantises the scales of 4-bit blocks"),
    ],
)
def test_what_cannot_be_is_refused_without_a_model(changes: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_recipe(json.dumps(TREE), "a.yaml", changes.split())


@pytest.mark.parametrize("changes", ["model.dtype=fp32 method.compute_dtype=bf16", "method.compute_dtype=bf16", "method.bits=8"])
def test_what_can_be_is_not_refused(changes: str) -> None:
    assert parse_recipe(json.dumps(TREE), "a.yaml", changes.split()).method.kind == "qlora"
