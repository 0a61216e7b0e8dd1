"""The learning-rate schedule and the optimizer's groups, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftcore.optim import Optim


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
