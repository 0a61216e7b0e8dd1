"""Multi-LoRA: linear layers that add to each row the update of that row's own adapter, any number of adapters of any rank in one batch.

In: rows x [1, T, in] of a step. Out: W x + B_a A_a x [1, T, out], a the row's adapter; W x alone for rows without one. Runs in: engines.

The active adapters' A matrices lie under one another in one stack [R, in], their B (scale included) in another [R, out]: a step is two
matrix multiplications a layer however many adapters take part, and between them each row keeps its own ranks alone.
An adapter holds the same ranks (its lanes) in every layer. A chunk of prompt belongs to one adapter: there only its lanes are used.
Without an active adapter nothing is added to the base's work. (S-LoRA, arXiv:2311.03285, gathers instead; Punica, arXiv:2310.18547.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class LayerUpdate:
    """One adapter's update of one linear layer."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[r, out], transposed and scaled: the update is (x a^T) b."""


def width_of(updates: Mapping[str, LayerUpdate]) -> int:
    """Lanes an adapter takes: its largest rank."""
    return max(update.a.shape[0] for update in updates.values())


@dataclass
class Rows:
    """Whose lanes each token of the step uses; shared by all layers, set before a step."""

    num_decoding: int = 0
    foreign: Tensor | None = None
    """[n, R] bool: True on the lanes that are not of a decoding row's own adapter; None where no decoding row has one."""
    num_lanes: int = 0
    """R: lanes in use, from 0."""
    chunks: tuple[tuple[int, int, int, int], ...] = ()
    """(first token, past last token, first lane, past last lane) of each chunk with an adapter."""

    proving: bool = False
    """Groups write down what they are called with."""

    @property
    def is_bare(self) -> bool:
        return self.foreign is None and not self.chunks


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


class Group:
    """Linear layers that read the same input (q, k, v; gate, up): one matrix multiplication for all."""

    def __init__(self, modules: Sequence[nn.Linear], rows: Rows, capacity: int, dtype: torch.dtype) -> None:
        """The layers' own weights become views of the joint one; a single layer, or one of another class, is called as it is."""
        self.modules, self.rows = tuple(modules), rows
        self.in_features = modules[0].in_features
        ends = list(accumulate(module.out_features for module in modules))
        self.slices = [slice(end - module.out_features, end) for end, module in zip(ends, modules, strict=True)]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if len(modules) > 1:
            self.weight = torch.cat([module.weight.data for module in modules])
            self.bias = None if modules[0].bias is None else torch.cat([module.bias.data for module in modules])
            for module, part in zip(modules, self.slices, strict=True):
                module.weight.data = self.weight[part]
                if self.bias is not None:
                    module.bias.data = self.bias[part]
        device = modules[0].weight.device
        self.a = tuple(torch.zeros(capacity, self.in_features, dtype=dtype, device=device) for _ in modules)
        """[lanes, in] of each layer."""
        self.b = tuple(torch.zeros(capacity, module.out_features, dtype=dtype, device=device) for module in modules)
        """[lanes, out] of each layer."""
        self.users: tuple[set[str], ...] = tuple(set() for _ in modules)
        """Active adapters that have each layer."""
        self.calls: list[int] = []
        """Rows of each call while the engine proves itself: what does not see each token of a step once cannot be adapted by row."""
        self._made: tuple[Tensor, Tensor] | None = None

    def part(self, number: int, x: Tensor) -> Tensor:
        """Layer `number` of x [..., in]. The first call for an input computes the whole group."""
        if number == 0 or self._made is None or self._made[0] is not x:
            self._made = (x, self.compute(x))
        y = self._made[1][..., self.slices[number]]
        if number == len(self.modules) - 1:
            self._made = None
        return y

    def compute(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out of all layers]."""
        y = self.modules[0](x) if self.weight is None else linear(x, self.weight, self.bias)
        rows = self.rows
        if rows.proving:
            self.calls.append(x.numel() // self.in_features)
        if rows.is_bare:
            return y
        flat, out = x.reshape(-1, self.in_features), y.view(-1, y.shape[-1])
        for a, b, part, users in zip(self.a, self.b, self.slices, self.users, strict=True):
            if not users:
                continue
            if rows.foreign is not None:
                n, r = rows.num_decoding, rows.num_lanes
                h = flat[:n] @ a[:r].T
                h.masked_fill_(rows.foreign, 0)  # not a product: what overflows in another's lanes would stay as NaN
                out[:n, part].addmm_(h, b[:r])
            for first, past, low, high in rows.chunks:
                out[first:past, part].addmm_(flat[first:past] @ a[low:high].T, b[low:high])
        return y

    def put(self, digest: str, first: int, width: int, updates: Sequence[LayerUpdate | None]) -> None:
        """Writes an adapter's updates (one a layer) into its lanes, zeros where it has none."""
        for a, b, users, update in zip(self.a, self.b, self.users, updates, strict=True):
            a[first : first + width] = 0
            b[first : first + width] = 0
            if update is not None:
                rank = update.a.shape[0]
                a[first : first + rank] = update.a
                b[first : first + rank] = update.b
                users.add(digest)

    def drop(self, digest: str) -> None:
        for users in self.users:
            users.discard(digest)

    def held(self, low: int, high: int) -> int:
        """Sum of the bits in these lanes."""
        used = [stack for a, b, users in zip(self.a, self.b, self.users, strict=True) if users for stack in (a, b)]
        return sum(bit_sum(stack[low:high]) for stack in used)

    def move(self, first: int, past: int, to: int) -> None:
        for stack in (*self.a, *self.b):
            stack[to : to + past - first] = stack[first:past].clone()


def bit_sum(tensor: Tensor) -> int:
    """Sum of a tensor's elements read as whole numbers: what two copies of the same weights have in common, wherever they lie."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.view(whole).sum(dtype=torch.int64))


class MultiLoraLinear(nn.Module):
    """One layer of a Group, in the place of the base's own."""

    def __init__(self, group: Group, number: int) -> None:
        super().__init__()
        self.base = group.modules[number]
        self._group, self._number = group, number
        self.in_features, self.out_features = self.base.in_features, self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._group.part(self._number, x)


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input, by their usual names."""


def grouped(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """`names` in groups: siblings of the plain class that are all there and alike; everything else alone."""
    left, groups = dict.fromkeys(names), []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((each for each in SIBLINGS if each[0] == leaf), None)
        full = tuple(f"{parent}.{each}" for each in family) if family else ()
        if full and all(each in left for each in full):
            linears = [modules[each] for each in full]
            alike = {(module.in_features, module.bias is None, module.weight.dtype) for module in linears}
            if len(alike) == 1 and all(type(module) is nn.Linear for module in linears):
                groups.append(full)
                for each in full:
                    del left[each]
    return groups + [(name,) for name in left]


class MultiLora:
    """Every adaptable layer of a model, and the adapters that are active in them."""

    def __init__(self, model: nn.Module, capacity: int, dtype: torch.dtype) -> None:
        """`capacity`: lanes, the sum of the ranks that can be active at once. Replaces the linear layers of `model` in place."""
        self.rows, self.lanes, self.device = Rows(), Lanes(capacity), next(model.parameters()).device
        self.layers: dict[str, MultiLoraLinear] = {}
        self.groups: dict[tuple[str, ...], Group] = {}
        skip = model.get_output_embeddings()
        modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not skip}
        for names in grouped(list(modules), modules):
            group = self.groups[names] = Group([modules[name] for name in names], self.rows, capacity, dtype)
            for number, name in enumerate(names):
                parent, _, leaf = name.rpartition(".")
                self.layers[name] = MultiLoraLinear(group, number)
                setattr(model.get_submodule(parent), leaf, self.layers[name])

    def prove_rows(self, counts: Sequence[int]) -> None:
        """Call after steps of `counts` tokens with `rows.proving` set: layers that saw anything else cannot be adapted row by row."""
        for names, group in self.groups.items():
            if group.calls != list(counts):
                for name in names:
                    del self.layers[name]
            group.calls = []

    def fingerprint(self, updates: Mapping[str, LayerUpdate]) -> int:
        """What `held` gives for lanes that hold exactly these updates."""
        total = 0
        for place, names in enumerate(self.groups, 1):
            own = [updates[name] for name in names if name in updates]
            total += place * sum(bit_sum(update.a) + bit_sum(update.b) for update in own)
        return total

    def held(self, digest: str) -> int:
        """The fingerprint of what an active adapter's lanes hold now."""
        low, high = self.lanes.held[digest]
        return sum(place * group.held(low, high) for place, group in enumerate(self.groups.values(), 1))

    def activate(self, digest: str, updates: Mapping[str, LayerUpdate], needed: Collection[str]) -> None:
        """Puts an adapter into the stacks, in place of ones that no row of `needed` (digests) uses. There must be room for `needed`."""
        if digest in self.lanes.held:
            return
        width = width_of(updates)
        first = self.lanes.find(width)
        for idle in [each for each in self.lanes.held if each not in needed]:
            if first is not None:
                break
            self.deactivate(idle)
            first = self.lanes.find(width)
        if first is None:
            first = self._compact(width)
        for names, group in self.groups.items():
            group.put(digest, first, width, [updates.get(name) for name in names])
        self.lanes.held[digest] = (first, first + width)  # last: half an adapter is none

    def deactivate(self, digest: str) -> None:
        """Frees an adapter's lanes; what they hold is nobody's until another is written over it."""
        self.lanes.held.pop(digest, None)
        for group in self.groups.values():
            group.drop(digest)

    def _compact(self, width: int) -> int:
        """Closes the gaps between held lanes; returns the first free lane."""
        at = 0
        for digest, (first, past) in sorted(self.lanes.held.items(), key=lambda item: item[1]):
            if first != at:
                for group in self.groups.values():
                    group.move(first, past, at)
                self.lanes.held[digest] = (at, at + past - first)
            at += past - first
        assert at + width <= self.lanes.capacity, "the caller admits no more ranks than there are lanes"
        return at

    def set_rows(self, decoding: Sequence[str], chunks: Sequence[tuple[str, int]]) -> None:
        """The digests (or "") of the decoding rows, and (digest, tokens) of each chunk behind them."""
        rows = self.rows
        rows.num_decoding, rows.foreign, rows.num_lanes = len(decoding), None, 0
        if any(decoding):
            rows.num_lanes = max(self.lanes.held[digest][1] for digest in decoding if digest)
            foreign = torch.ones(len(decoding), rows.num_lanes, dtype=torch.bool)
            for row, digest in enumerate(decoding):
                if digest:
                    low, high = self.lanes.held[digest]
                    foreign[row, low:high] = False
            rows.foreign = foreign.to(self.device)
        at, found = len(decoding), []
        for digest, count in chunks:
            if digest:
                found.append((at, at + count, *self.lanes.held[digest]))
            at += count
        rows.chunks = tuple(found)
