"""Packed: a wide linear layer of a base on a CPU, in the layout that oneDNN's kernels read.

In: a weight [out, in], a bias. Out: a function x [..., in] -> [..., out], or None where the plain layer is as good. Runs in: engines.

A plain matrix multiplication lays the weight out anew at each call, which for a few rows costs as much as the sums themselves; a served
base never changes, so it is done once. Narrow layers fit the caches and gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

WIDE = 2048
ROWS = 16
"""The layout is chosen for so many rows; others work with it as well."""


def packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """The layer without its plain weight, which the caller may drop."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[0] < WIDE or not torch.backends.mkldnn.is_available():
        return None
    try:
        own = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        run = torch.ops.mkldnn._linear_pointwise

        def call(x: Tensor) -> Tensor:
            return run(x, own, bias, "none", [], "")

        x = torch.linspace(-1, 1, 3 * weight.shape[1]).view(3, -1)
        want = linear(x, weight, bias)
        if not torch.allclose(call(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max())):
            return None
    except (AttributeError, RuntimeError):  # a torch that has these not, or not for this processor
        return None
    return call
