"""Losses over hidden states that never hold the [tokens, vocabulary] logits.

In: hidden states at the trained positions [N, D], the head, targets [N]. Out: a summed cross-entropy, or log-probabilities [N].
Runs in: train workers.

The logits of one chunk of tokens at a time are made, used and dropped. With a plain linear head their gradient is taken in the forward
pass, while they are there (the idea of cut cross-entropy, Wijmans et al. 2024, and of Liger's fused linear loss, Hsu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ftcore.loss_chunks import chunk_rows


class _LinearCrossEntropy(Function):
    """sum_n [logsumexp(h_n W^T) - (h_n W^T)_{y_n}], with dh (and dW when the head is trained) computed on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        accumulate = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head_VD = weight_VD.to(hidden_ND.dtype)
            total = hidden_ND.new_zeros((), dtype=accumulate)
            d_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
            d_weight = torch.zeros_like(weight_VD, dtype=accumulate) if ctx.needs_input_grad[1] else None
            rows = chunk_rows(weight_VD.shape[0])
            for start in range(0, len(targets_N), rows):
                hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
                logits = (hidden @ head_VD.T).to(accumulate)
                at = torch.arange(len(targets), device=targets.device)
                top, chosen = logits.amax(-1), logits[at, targets]
                powers = logits.sub_(top[:, None]).exp_()  # in place: one array of this size at a time
                sums = powers.sum(-1)
                total += (sums.log() + top - chosen).sum()
                if d_hidden is None and d_weight is None:
                    continue
                gradient = powers.div_(sums[:, None])  # the softmax
                gradient[at, targets] -= 1
                narrow = gradient.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[start : start + rows] = narrow @ head_VD
                if d_weight is not None:
                    d_weight += narrow.T @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (scale,) = gradients
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
        )


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross-entropy of a plain linear head. Two matmuls a chunk (three when the head is trained), as many as the unchunked loss."""
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype == torch.float32:
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))  # as nn.Linear would under autocast
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


def token_logps(hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, vocabulary: int) -> Tensor:
    """log p(target) for each row, [N], in fp32 (fp64 for fp64 models), for any head: one with an adapter on it, a bias, ...

    Each chunk's logits are recomputed in the backward pass.
    """
    rows = chunk_rows(vocabulary)

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        return -cross_entropy(wide, targets, reduction="none")

    starts = range(0, max(1, len(targets_N)), rows)
    parts = [(hidden_ND[s : s + rows], targets_N[s : s + rows]) for s in starts]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(logps, hidden, targets, use_reentrant=False) for hidden, targets in parts])
    return torch.cat([logps(hidden, targets) for hidden, targets in parts])
