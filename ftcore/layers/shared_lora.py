"""Shared LoRA: linear layers of one frozen base, with the updates of several candidates, each on its own range of tokens.

In: x [..., in] whose tokens lie candidate by candidate. Out: y [..., out]. Runs in: train workers of a search.

    y[range k] = x[range k] W^T + s_k (x[range k] A_k^T) B_k^T          (Hu et al. 2021, eq. 3, once a candidate)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


@dataclass
class Ranges:
    """Whose tokens the next forward pass holds: (candidate, first token, past last token), in order; shared by all layers."""

    parts: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """One candidate's part of one layer: A [rank, in], B [out, rank]."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float


class _Add(Function):
    """Adds every update to its own rows of y, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, parts: list[tuple[int, int, float]], *weights: Tensor) -> Tensor:
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        narrow = []
        for (first, past, scale), a, b in zip(parts, weights[::2], weights[1::2], strict=True):
            h = rows[first:past] @ a.to(x.dtype).T
            out[first:past].addmm_(h, b.to(x.dtype).T, alpha=scale)
            narrow.append(h)
        ctx.mark_dirty(y)
        ctx.parts = parts
        ctx.save_for_backward(x, *weights, *narrow)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (d_y,) = gradients
        x, *held = ctx.saved_tensors
        weights, narrow = held[: 2 * len(ctx.parts)], held[2 * len(ctx.parts) :]
        rows, d_out = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        d_rows = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        found: list[Tensor] = []
        for (first, past, scale), a, b, h in zip(ctx.parts, weights[::2], weights[1::2], narrow, strict=True):
            own = d_out[first:past]
            d_h = (own @ b.to(own.dtype)).mul_(scale)
            if d_rows is not None:
                torch.mm(d_h, a.to(d_h.dtype), out=d_rows[first:past])
            found += [(d_h.T @ rows[first:past]).to(a.dtype), (own.T @ h).mul_(scale).to(b.dtype)]
        return d_y, None if d_rows is None else d_rows.view_as(x), None, *found


class SharedLinear(nn.Module):
    """One layer of the base, in the place of its own."""

    def __init__(self, base: nn.Module, ranges: Ranges) -> None:
        super().__init__()
        self.base, self.ranges = base, ranges
        self.updates: dict[str, Update] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        mine = [(self.updates[name], first, past) for name, first, past in self.ranges.parts if name in self.updates]
        if not mine:
            return y
        weights = [weight for update, _, _ in mine for weight in (update.a, update.b)]
        return _Add.apply(y, x, [(first, past, update.scale) for update, first, past in mine], *weights)
