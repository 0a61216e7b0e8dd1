"""Multi-LoRA: linear layers that add to each row the update of that row's own adapter, any number of adapters of any rank in one batch.

In: rows x [1, T, in] of a step. Out: W x + B_a A_a x [1, T, out], a the row's adapter; W x alone for rows without one. Runs in: engines.

The active adapters' A matrices lie under one another in one stack [R, in], their B (scale included) in another [R, out]: a step is two
matrix multiplications a layer however many adapters take part, with a mask [T, R] between them that leaves each row its own ranks.
An adapter holds the same ranks (its lanes) in every layer. A chunk of prompt belongs to one adapter: there only its lanes are used.
Without an active adapter nothing is added to the base's work. (S-LoRA, arXiv:2311.03285, gathers instead; Punica, arXiv:2310.18547.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerUpdate:
    """One adapter's update of one linear layer."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[r, out], transposed and scaled: the update is (x a^T) b."""


@dataclass
class Rows:
    """Whose lanes each token of the step uses; shared by all layers, set before a step."""

    num_decoding: int = 0
    mask: Tensor | None = None
    """[n, R]: 1 on the lanes of a decoding row's adapter; None where no decoding row has one."""
    num_lanes: int = 0
    """R: lanes in use, from 0."""
    chunks: tuple[tuple[int, int, int, int], ...] = ()
    """(first token, past last token, first lane, past last lane) of each chunk with an adapter."""

    @property
    def is_bare(self) -> bool:
        return self.mask is None and not self.chunks


class Lanes:
    """Which lanes each active adapter holds, first fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, tuple[int, int]] = {}

    def find(self, width: int) -> int | None:
        """The first lane of a free run of `width`, or None."""
        at = 0
        for first, past in sorted(self.held.values()):
            if first - at >= width:
                return at
            at = past
        return at if self.capacity - at >= width else None

    @property
    def num_used(self) -> int:
        return max((past for _, past in self.held.values()), default=0)


class MultiLoraLinear(nn.Module):
    """A base linear layer and the stacked updates of the active adapters."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, rows: Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.in_features, self.out_features = in_features, out_features
        self.stacks: tuple[Tensor, Tensor] | None = None
        """A [lanes, in] and B [lanes, out]; None until an adapter has this layer."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.stacks is None or self.rows.is_bare:
            return y
        flat, out = x[0], y[0]
        rows, (a, b) = self.rows, self.stacks
        if rows.mask is not None:
            n, r = rows.num_decoding, rows.num_lanes
            out[:n] += ((flat[:n] @ a[:r].T) * rows.mask) @ b[:r]
        for first, past, low, high in rows.chunks:
            out[first:past].addmm_(flat[first:past] @ a[low:high].T, b[low:high])
        return y

    def put(self, first: int, width: int, update: LayerUpdate | None, capacity: int, dtype: torch.dtype) -> None:
        """Writes an adapter's update into its lanes, zeros where it has none; the stacks are made at the first update."""
        if self.stacks is None:
            if update is None:
                return
            device = self.weight.device
            self.stacks = (
                torch.zeros(capacity, self.in_features, dtype=dtype, device=device),
                torch.zeros(capacity, self.out_features, dtype=dtype, device=device),
            )
        rank = 0
        if update is not None:
            rank = update.a.shape[0]
            for stack, part in zip(self.stacks, (update.a, update.b), strict=True):
                stack[first : first + rank] = part
        for stack in self.stacks:
            stack[first + rank : first + width] = 0

    def move(self, first: int, past: int, to: int) -> None:
        for stack in self.stacks or ():
            stack[to : to + past - first] = stack[first:past].clone()


class MultiLora:
    """Every adaptable layer of a model, and the adapters that are active in them."""

    def __init__(self, model: nn.Module, capacity: int, dtype: torch.dtype) -> None:
        """`capacity`: lanes, the sum of the ranks that can be active at once. Wraps the linear layers of `model` in place."""
        self.rows, self.lanes, self.dtype = Rows(), Lanes(capacity), dtype
        self.layers: dict[str, MultiLoraLinear] = {}
        skip = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not skip:
                parent, _, leaf = name.rpartition(".")
                wrapped = MultiLoraLinear(module, module.in_features, module.out_features, self.rows)
                setattr(model.get_submodule(parent), leaf, wrapped)
                self.layers[name] = wrapped

    def activate(self, digest: str, updates: Mapping[str, LayerUpdate], needed: Sequence[str]) -> None:
        """Puts an adapter into the stacks, in place of ones that no row of `needed` (digests) uses. There must be room for `needed`."""
        if digest in self.lanes.held:
            return
        width = max(update.a.shape[0] for update in updates.values())
        first = self.lanes.find(width)
        for idle in [each for each in self.lanes.held if each not in needed]:
            if first is not None:
                break
            self.deactivate(idle)
            first = self.lanes.find(width)
        if first is None:
            first = self._compact(width)
        self.lanes.held[digest] = (first, first + width)
        for name, layer in self.layers.items():
            layer.put(first, width, updates.get(name), self.lanes.capacity, self.dtype)

    def deactivate(self, digest: str) -> None:
        """Frees an adapter's lanes; what they hold is masked until another is written over it."""
        self.lanes.held.pop(digest, None)

    def _compact(self, width: int) -> int:
        """Closes the gaps between held lanes; returns the first free lane."""
        at = 0
        for digest, (first, past) in sorted(self.lanes.held.items(), key=lambda item: item[1]):
            if first != at:
                for layer in self.layers.values():
                    layer.move(first, past, at)
                self.lanes.held[digest] = (at, at + past - first)
            at += past - first
        assert at + width <= self.lanes.capacity, "the caller admits no more ranks than there are lanes"
        return at

    def set_rows(self, decoding: Sequence[str], chunks: Sequence[tuple[str, int]]) -> None:
        """The digests (or "") of the decoding rows, and (digest, tokens) of each chunk behind them."""
        rows, device = self.rows, next(iter(self.layers.values())).weight.device
        rows.num_decoding, rows.mask, rows.num_lanes = len(decoding), None, 0
        if any(decoding):
            rows.num_lanes = max(self.lanes.held[digest][1] for digest in decoding if digest)
            mask = torch.zeros(len(decoding), rows.num_lanes, dtype=self.dtype)
            for row, digest in enumerate(decoding):
                if digest:
                    low, high = self.lanes.held[digest]
                    mask[row, low:high] = 1
            rows.mask = mask.to(device)
        at, found = len(decoding), []
        for digest, count in chunks:
            if digest:
                found.append((at, at + count, *self.lanes.held[digest]))
            at += count
        rows.chunks = tuple(found)
