from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ftcore import loss_chunks, losses


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "CHUNK_ELEMENTS", 16 * 50)


def drawn(dtype: torch.dtype, trained_head: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(70, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 12, dtype=dtype, requires_grad=trained_head)
    return hidden, weight, torch.randint(0, 50, (70,))


def test_the_chunked_loss_and_its_gradients_are_the_plain_ones() -> None:
    hidden, weight, targets = drawn(torch.float64)
    ours = losses.linear_cross_entropy(hidden, weight, targets)
    d_hidden, d_weight = torch.autograd.grad(ours * 0.3, (hidden, weight))
    plain = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    e_hidden, e_weight = torch.autograd.grad(plain * 0.3, (hidden, weight))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(d_hidden, e_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_weight, e_weight, rtol=1e-12, atol=1e-12)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets = drawn(torch.float32, trained_head=False)
    losses.linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None and float(hidden.grad.abs().sum()) > 0


def test_bf16_hidden_states_give_the_loss_in_fp32_within_bf16s_precision() -> None:
    hidden, weight, targets = drawn(torch.bfloat16)
    ours = losses.linear_cross_entropy(hidden, weight, targets)
    plain = cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert abs(float(ours.detach() / plain.detach()) - 1) < 0.01


def test_log_probabilities_of_any_head_are_those_of_its_whole_logits() -> None:
    hidden, _, targets = drawn(torch.float64)
    head = nn.Linear(12, 50, bias=True, dtype=torch.float64)
    ours = losses.token_logps(hidden, head, targets, 50)
    plain = torch.log_softmax(head(hidden), -1)[torch.arange(70), targets]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), hidden)[0], torch.autograd.grad(plain.sum(), hidden)[0])


def test_a_batch_without_targets_adds_nothing_and_still_reaches_the_weights() -> None:
    hidden, weight, targets = drawn(torch.float32)
    total = (
        losses.linear_cross_entropy(hidden[:0], weight, targets[:0])
        + losses.token_logps(hidden[:0], lambda h: h @ weight.T, targets[:0], 50).sum()
    )
    total.backward()
    assert float(total.detach()) == 0.0
    assert hidden.grad is not None and float(hidden.grad.abs().sum()) == 0.0
