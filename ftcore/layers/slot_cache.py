"""Slot cache: keys and values of the rows of a batch, and attention over them, for a step that mixes decoding rows and chunks of prompts.

In: a StepPlan, queries, keys, values [T, H, D] of the step's tokens laid end to end. Out: [T, H, D]. Runs in: the engine's thread, called
by FlatDecoder, or through transformers' attention interface for every other family whose attention goes through it.

Keys [place, H_kv, position, D] for each layer. Rows that decode hold places 0..n-1, so their part of the cache is one view and attention
over it one call. Memory that no token was written to is not touched, so on a CPU an empty cache costs nothing.

Legend: n decoding rows, T tokens of the step, L cached positions, G query heads a key head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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

    slots: Tensor
    """[T x H_kv] int64: where the keys of each token and key head go, in a layer's keys seen as [places x H_kv x positions, D]."""
    positions: Tensor
    """[T] int64."""
    decode_lengths: tuple[int, ...]
    """Cached positions of each decoding row, its new token's included."""
    chunks: tuple[tuple[int, int, int], ...]
    """(place, positions cached before, tokens) of each chunk."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    """For each window of a layer: [n, 1, 1, L] additive, 0 for what a decoding row sees, -inf for the rest; None where all see all."""

    @property
    def num_decoding(self) -> int:
        return len(self.decode_lengths)


class SlotCache:
    """Keys and values of every layer."""

    def __init__(
        self, num_layers: int, num_places: int, max_context: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> None:
        """`num_heads`: key heads. Two places more than asked are made: for swaps, and for probes."""
        shape = (num_layers, 2, num_places + 2, num_heads, max_context, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # masked positions count as 0 x value: never NaN
        self._flat = [(keys.view(-1, head_dim), values.view(-1, head_dim)) for keys, values in self.data]
        self._num_heads, self._max_context = num_heads, max_context

    def plan(self, decode_lengths: Sequence[int], chunks: Sequence[tuple[int, int, int]]) -> StepPlan:
        """`decode_lengths`: positions each decoding row holds once this step's token is in; `chunks`: (place, cached before, tokens)."""
        n = len(decode_lengths)
        places = torch.cat([torch.arange(n)] + [torch.full((count,), place) for place, _, count in chunks])
        positions = torch.cat(
            [torch.tensor(decode_lengths, dtype=torch.int64) - 1] + [torch.arange(start, start + count) for _, start, count in chunks]
        )
        heads = places[:, None] * self._num_heads + torch.arange(self._num_heads)
        slots = (heads * self._max_context + positions[:, None]).flatten()
        device = self.data.device
        return StepPlan(slots.to(device), positions.to(device), tuple(decode_lengths), tuple(chunks))

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
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]; writes the keys and values first."""
        size = key.shape[-1]
        for flat, new in zip(self._flat[layer], (key, value), strict=True):
            flat.index_copy_(0, step.slots, new.reshape(-1, size).to(flat.dtype))
        keys, values = self.data[layer, 0], self.data[layer, 1]
        parts = []
        n = step.num_decoding
        if n:
            parts.append(_decode(query[:n], keys[:n], values[:n], step, scale, window))
        at = n
        for place, start, count in step.chunks:
            parts.append(_read(query[at : at + count], keys[place], values[place], start, scale, window))
            at += count
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _decode(query: Tensor, keys: Tensor, values: Tensor, step: StepPlan, scale: float | None, window: int | None) -> Tensor:
    """query [n, H, D], keys [n, H_kv, max, D] -> [n, H, D]. The G query heads of a key head take the place of query positions."""
    n, heads, size = query.shape
    kv_heads, length = keys.shape[1], max(step.decode_lengths)
    if window not in step.masks:
        step.masks[window] = _mask(step.decode_lengths, window, query)
    grouped = query.reshape(n, kv_heads, heads // kv_heads, size)
    out = scaled_dot_product_attention(grouped, keys[:, :, :length], values[:, :, :length], attn_mask=step.masks[window], scale=scale)
    return out.reshape(n, heads, size)


def _mask(lengths: Sequence[int], window: int | None, like: Tensor) -> Tensor | None:
    """[n, 1, 1, L] additive mask of decoding rows, or None where every row sees every position."""
    longest = max(lengths)
    if min(lengths) == longest and (window is None or longest <= window):
        return None
    at, own = torch.arange(longest)[None], torch.tensor(lengths)[:, None]
    out = at >= own if window is None else (at >= own) | (at < own - window)
    return torch.zeros(out.shape, dtype=like.dtype).masked_fill_(out, float("-inf"))[:, None, None].to(like.device)


def _read(query: Tensor, keys: Tensor, values: Tensor, start: int, scale: float | None, window: int | None) -> Tensor:
    """A chunk of one prompt: query [C, H, D], keys [H_kv, max, D] -> [C, H, D]."""
    count = query.shape[0]
    length = start + count
    own, seen = keys[None, :, :length], values[None, :, :length]
    mask = None
    if start or (window is not None and length > window):
        at = torch.arange(start, length, device=query.device)[:, None]
        to = torch.arange(length, device=query.device)[None]
        mask = (to <= at) if window is None else (to <= at) & (at - to < window)
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None], own, seen, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=query.shape[1] != own.shape[1],
    )  # fmt: skip
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
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return slot_cache.attend(module.layer_idx, slot_step, q, k, v, scaling, sliding_window)[None], None


def register() -> str:
    """Makes the path known to transformers and returns its name. No mask function is registered, so that no mask is ever built for it."""
    AttentionInterface.register(NAME, slot_attention)
    return NAME
