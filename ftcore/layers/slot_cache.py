"""Slot cache: keys and values of the rows of a batch, and attention over them, for a step that mixes decoding rows and chunks of prompts.

In: a StepPlan, queries, keys, values [1, H, T, D] of the step's tokens laid end to end. Out: [1, T, H, D]. Runs in: the engine's thread,
through transformers' attention interface, so for every family whose attention goes through it.

Keys [place, H_kv, position, D] for each layer. Rows that decode hold places 0..n-1, so their part of the cache is one view and attention
over it one call. Memory that no token was written to is not touched, so on a CPU an empty cache costs nothing.

Legend: n decoding rows, T tokens of the step, L cached positions, G query heads a key head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ftcore.errors import ModelError
from ftcore.layers import varlen

NAME = "ftcore_slots"
NO_ENGINE = "no engine here serves such a base yet: serve another"


@dataclass(frozen=True)
class StepPlan:
    """Where each token of a step lies. Tokens: one for each decoding row (places 0..n-1), then each chunk's."""

    places: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    num_decoding: int
    decode_lengths: tuple[int, ...]
    """Cached positions of each decoding row, its new token's included."""
    chunks: tuple[tuple[int, int, int], ...]
    """(place, positions cached before, tokens) of each chunk."""
    visible: Tensor | None
    """[n, 1, 1, L] additive: 0 for what a decoding row sees, -inf beyond its length."""


def plan(decode_lengths: Sequence[int], chunks: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype) -> StepPlan:
    """`decode_lengths`: positions each decoding row holds once this step's token is in; `chunks`: (place, cached before, tokens)."""
    n = len(decode_lengths)
    places = [torch.arange(n)] + [torch.full((count,), place) for place, _, count in chunks]
    positions = [torch.tensor(decode_lengths, dtype=torch.int64) - 1] + [torch.arange(start, start + count) for _, start, count in chunks]
    visible = None
    if n and min(decode_lengths) < max(decode_lengths):
        beyond = torch.arange(max(decode_lengths))[None] >= torch.tensor(decode_lengths)[:, None]
        visible = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None].to(device)
    return StepPlan(
        torch.cat(places).to(device), torch.cat(positions).to(device), n, tuple(decode_lengths), tuple(chunks), visible
    )  # fmt: skip


class SlotCache:
    """Keys and values of every layer."""

    def __init__(
        self, num_layers: int, num_places: int, max_context: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> None:
        """`num_heads`: key heads. Two places more than asked are made: for swaps, and for probes."""
        shape = (num_layers, 2, num_places + 2, num_heads, max_context, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # masked positions count as 0 x value: never NaN

    def move(self, moves: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """Copies places, `lengths` positions of each."""
        for (source, target), length in zip(moves, lengths, strict=True):
            self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def clear(self, place: int) -> None:
        """After a row whose numbers were not finite: they must not be the masked part of the next one."""
        self.data[:, :, place] = 0

    def saved(self, place: int, length: int) -> Tensor:
        """A copy of a place's first positions, [layers, 2, H_kv, length, D]."""
        return self.data[:, :, place, :, :length].clone()

    def restore(self, place: int, saved: Tensor) -> None:
        self.data[:, :, place, :, : saved.shape[-2]] = saved

    def attend(
        self, layer: int, step: StepPlan, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]; writes the keys and values first."""
        keys, values = self.data[layer, 0], self.data[layer, 1]
        keys[step.places, :, step.positions] = key[0].transpose(0, 1).to(keys.dtype)
        values[step.places, :, step.positions] = value[0].transpose(0, 1).to(values.dtype)
        parts = []
        n = step.num_decoding
        if n:
            parts.append(_decode(query[0, :, :n], keys[:n], values[:n], step, scale, window))
        at = n
        for place, start, count in step.chunks:
            parts.append(_read(query[:, :, at : at + count], keys[place], values[place], start, scale, window))
            at += count
        return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None]


def _decode(query: Tensor, keys: Tensor, values: Tensor, step: StepPlan, scale: float | None, window: int | None) -> Tensor:
    """query [H, n, D], keys [n, H_kv, max, D] -> [n, H, D]. The G query heads of a key head take the place of query positions."""
    heads, n, size = query.shape
    kv_heads, length = keys.shape[1], max(step.decode_lengths)
    grouped = query.transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, size)
    mask = step.visible
    if window is not None and length > window:
        lengths = torch.tensor(step.decode_lengths, device=query.device)
        behind = torch.arange(length, device=query.device)[None] < (lengths - window)[:, None]
        mask = (torch.zeros((n, 1, 1, length), dtype=query.dtype, device=query.device) if mask is None else mask).masked_fill(
            behind[:, None, None], float("-inf")
        )
    out = scaled_dot_product_attention(grouped, keys[:, :, :length], values[:, :, :length], attn_mask=mask, scale=scale)
    return out.reshape(n, heads, size)


def _read(query: Tensor, keys: Tensor, values: Tensor, start: int, scale: float | None, window: int | None) -> Tensor:
    """A chunk of one prompt: query [1, H, C, D], keys [H_kv, max, D] -> [C, H, D]."""
    count = query.shape[2]
    length = start + count
    own, seen = keys[None, :, :length], values[None, :, :length]
    mask = None
    if start or (window is not None and length > window):
        at = torch.arange(start, length, device=query.device)[:, None]
        to = torch.arange(length, device=query.device)[None]
        mask = (to <= at) if window is None else (to <= at) & (at - to < window)
    out = scaled_dot_product_attention(
        query, own, seen, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != own.shape[1]
    )
    return out[0].transpose(0, 1)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    slot_cache: SlotCache | None = None,
    slot_step: StepPlan | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. Raises ModelError for what it would have to ignore."""
    varlen.require_plain(module, extra, "the torch engine", NO_ENGINE)
    if slot_cache is None or slot_step is None or query.shape[0] != 1:
        raise ModelError("this base does not hand the engine's cache to its attention", remedy=NO_ENGINE)
    if attention_mask is not None:
        raise ModelError("this base makes attention masks of its own, which the torch engine does not have", remedy=NO_ENGINE)
    return slot_cache.attend(module.layer_idx, slot_step, query, key, value, scaling, sliding_window), None


def register() -> str:
    """Makes the path known to transformers and returns its name. No mask function is registered, so that no mask is ever built for it."""
    AttentionInterface.register(NAME, slot_attention)
    return NAME
