"""Varlen attention: causal attention over segments laid end to end, none of which sees another.

In: queries, keys, values [1, H, T, D] and the segments' lengths. Out: [1, T, H, D]. Runs in: train workers, through transformers'
attention interface.

The work is the sum of the segments' squared lengths, not the square of the block's, and no [T, T] mask is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ftcore.errors import ModelError

NAME = "ftcore_varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; `segment_lengths` sums to T. query [1, H, T, D], key and value [1, H_kv, T, D].

    Raises ModelError for what it would have to ignore: soft-capping, sinks, position biases, bidirectional layers, no `segment_lengths`.
    """
    require_plain(module, extra, "the segment-isolating path", "set data.pack: false")
    if segment_lengths is None or query.shape[0] != 1:
        raise ModelError("this model does not hand the segments' lengths to its attention", remedy="set data.pack: false")
    grouped = query.shape[1] != key.shape[1]
    parts = []
    lengths = list(segment_lengths)
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        band = _band(q.shape[2], sliding_window, q.device) if sliding_window and q.shape[2] > sliding_window else None
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def require_plain(module: nn.Module, extra: Mapping[str, Any], path: str, remedy: str) -> None:
    """Raises ModelError for what an attention path of ours would have to ignore of transformers' arguments."""
    for name in ("softcap", "s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(f"this model's attention uses `{name}`, which {path} does not have", remedy=remedy)
    if extra.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelError("this model's attention is not causal", remedy=remedy)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Causal and at most `window` back, itself included: bool [length, length], True where attended."""
    at = torch.arange(length, device=device)
    return (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < window)


def register() -> str:
    """Makes the path known to transformers and returns its name. No mask function is registered, so that no mask is ever built for it."""
    AttentionInterface.register(NAME, varlen_attention)
    return NAME
