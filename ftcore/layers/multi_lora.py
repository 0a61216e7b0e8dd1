"""Multi-LoRA: linear layers that add to each row the update of that row's own adapter, any number of adapters of any rank in one batch.

In: rows x [T, in] of a step. Out: W x + B_a A_a x [T, out], a the row's adapter; W x alone for rows without one. Runs in: engines.

An active adapter holds a slot of its width (its largest rank, rounded up to a power of two) in stacks A [slots, width, in] and
B [slots, width, out] (scale included), the same slot in every layer. Decoding rows are laid out by slot, [slots, most rows of one, in], so
that a layer is two batched matrix multiplications for each width: every active adapter's weights are read once, whatever their number and
whoever has how many rows. A chunk of prompt belongs to one adapter. Rows without one are left out.
(Punica, arXiv:2310.18547, and S-LoRA, arXiv:2311.03285, gather on GPUs.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ftcore.layers.packed import packed


@dataclass(frozen=True)
class LayerUpdate:
    """One adapter's update of one linear layer."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[r, out], transposed and scaled: the update is (x a^T) b."""


MIN_WIDTH = 8


def width_of(rank: int) -> int:
    """The width of slots that take an adapter of this (largest) rank."""
    return max(MIN_WIDTH, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Slot:
    width: int
    number: int


@dataclass(frozen=True)
class Batch:
    """The decoding rows whose adapters are of one width."""

    width: int
    low: int
    high: int
    """Slots low..high-1 take part."""
    depth: int
    """Rows of each slot, padded: the most that one has."""
    take: Tensor | None
    """[(high - low) x depth] row of each place, any row where there is none; None where the decoding rows lie so already, all of them."""
    rows: Tensor | None
    """Rows that have an adapter of this width."""
    places: Tensor | None
    """Where each of `rows` lies."""


def batches_of(slots: Sequence[Slot | None], device: torch.device) -> tuple[Batch, ...]:
    """`slots`: each decoding row's."""
    found = []
    for width in sorted({slot.width for slot in slots if slot is not None}):
        own = [(row, slot.number) for row, slot in enumerate(slots) if slot is not None and slot.width == width]
        low, high = min(number for _, number in own), max(number for _, number in own) + 1
        filled = [0] * (high - low)
        within = []
        for _, number in own:
            within.append((number - low, filled[number - low]))
            filled[number - low] += 1
        depth = max(filled)
        places = [slot * depth + at for slot, at in within]
        if places == list(range(len(slots))) and len(places) == (high - low) * depth:
            found.append(Batch(width, low, high, depth, None, None, None))
            continue
        take = [0] * ((high - low) * depth)
        for place, (row, _) in zip(places, own, strict=True):
            take[place] = row
        parts = (torch.tensor(each, device=device) for each in (take, [row for row, _ in own], places))
        found.append(Batch(width, low, high, depth, *parts))
    return tuple(found)


@dataclass
class Rows:
    """Whose slot each token of the step uses; shared by all layers, set before a step."""

    num_decoding: int = 0
    batches: tuple[Batch, ...] = ()
    """Of the decoding rows."""
    chunks: tuple[tuple[int, int, Slot], ...] = ()
    """(first token, past last token, slot) of each chunk with an adapter."""
    proving: bool = False
    """Groups write down what they are called with."""

    @property
    def is_bare(self) -> bool:
        return not self.batches and not self.chunks


class Shelf:
    """The slots of one width in one Group."""

    def __init__(self, num_slots: int, width: int, modules: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        device = modules[0].weight.device
        self.a = tuple(torch.zeros(num_slots, width, module.in_features, dtype=dtype, device=device) for module in modules)
        self.b = tuple(torch.zeros(num_slots, width, module.out_features, dtype=dtype, device=device) for module in modules)
        self.users: tuple[set[str], ...] = tuple(set() for _ in modules)
        """Active adapters that have each layer."""

    def put(self, digest: str, number: int, updates: Sequence[LayerUpdate | None]) -> None:
        """Writes an adapter's updates (one a layer) into a slot, zeros where it has none."""
        for a, b, users, update in zip(self.a, self.b, self.users, updates, strict=True):
            a[number], b[number] = 0, 0
            if update is not None:
                rank = update.a.shape[0]
                a[number, :rank], b[number, :rank] = update.a, update.b
                users.add(digest)

    def drop(self, digest: str) -> None:
        for users in self.users:
            users.discard(digest)

    def held(self, number: int) -> int:
        """Sum of the bits in a slot."""
        return sum(bit_sum(stack[number]) for stack in (*self.a, *self.b))


class Group:
    """Linear layers that read the same input (q, k, v; gate, up): one matrix multiplication for all."""

    def __init__(self, modules: Sequence[nn.Linear], rows: Rows, dtype: torch.dtype) -> None:
        """Layers of a class of their own (quantised) are called as they are."""
        self.modules, self.rows = tuple(modules), rows
        self.in_features = modules[0].in_features
        ends = list(accumulate(module.out_features for module in modules))
        self.slices = [slice(end - module.out_features, end) for end, module in zip(ends, modules, strict=True)]
        self._base: Callable[[Tensor], Tensor] = modules[0]
        if all(type(module) is nn.Linear for module in modules):
            self._join()
        elif len(modules) > 1:
            self._base = self._each
        self.dtype = dtype
        self.shelves: dict[int, Shelf] = {}
        """By width, made when the first adapter of a width comes."""
        self.calls: list[int] = []
        """Rows of each call while the engine proves itself: what does not see each token of a step once cannot be adapted by row."""
        self._made: tuple[Tensor, Tensor] | None = None

    def _join(self) -> None:
        """One weight for all; the layers' own become views of it, or empty where it is packed."""
        modules = self.modules
        weight = modules[0].weight.data if len(modules) == 1 else torch.cat([module.weight.data for module in modules])
        own = None if modules[0].bias is None else modules[0].bias.data
        bias = own if own is None or len(modules) == 1 else torch.cat([module.bias.data for module in modules])
        fast = packed(weight, bias)
        self._base = fast or (lambda x: linear(x, weight, bias))
        for module, part in zip(modules, self.slices, strict=True):
            module.weight.data = weight[part] if fast is None else weight.new_empty(0, self.in_features)
            if bias is not None:
                module.bias.data = bias[part]

    def _each(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.modules], -1)

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
        y = self._base(x)
        rows = self.rows
        if rows.proving:
            self.calls.append(x.numel() // self.in_features)
        if not rows.is_bare:
            flat, out = x.reshape(-1, self.in_features), y.view(-1, y.shape[-1])
            for batch in rows.batches:
                self._add(batch, flat[: rows.num_decoding], out[: rows.num_decoding])
            for first, past, slot in rows.chunks:
                shelf, number = self.shelves[slot.width], slot.number
                for a, b, part, users in zip(shelf.a, shelf.b, self.slices, shelf.users, strict=True):
                    if users:
                        out[first:past, part].addmm_(flat[first:past] @ a[number].T, b[number])
        return y

    def _add(self, batch: Batch, x: Tensor, out: Tensor) -> None:
        """x [n, in], out [n, out of all layers]."""
        shelf, slots = self.shelves[batch.width], batch.high - batch.low
        if not any(shelf.users):
            return
        taken = (x if batch.take is None else x.index_select(0, batch.take)).view(slots, batch.depth, -1)
        for a, b, part, users in zip(shelf.a, shelf.b, self.slices, shelf.users, strict=True):
            if not users:
                continue
            h = torch.bmm(taken, a[batch.low : batch.high].transpose(1, 2))
            if batch.rows is None or batch.places is None:
                out.view(slots, batch.depth, -1)[..., part].baddbmm_(h, b[batch.low : batch.high])
            else:
                made = torch.bmm(h, b[batch.low : batch.high])
                out[:, part].index_add_(0, batch.rows, made.view(slots * batch.depth, -1).index_select(0, batch.places))

    def shelf(self, num_slots: int, width: int) -> Shelf:
        if width not in self.shelves:
            self.shelves[width] = Shelf(num_slots, width, self.modules, self.dtype)
        return self.shelves[width]


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
    """`names` in groups: siblings that are all there and alike; everything else alone."""
    left, groups = dict.fromkeys(names), []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((each for each in SIBLINGS if each[0] == leaf), None)
        full = tuple(f"{parent}.{each}" for each in family) if family else ()
        if full and all(each in left for each in full):
            linears = [modules[each] for each in full]
            if len({(type(module), module.in_features, module.bias is None, module.weight.dtype) for module in linears}) == 1:
                groups.append(full)
                for each in full:
                    del left[each]
    return groups + [(name,) for name in left]


class MultiLora:
    """Every adaptable layer of a model, and the adapters that are active in them."""

    def __init__(self, model: nn.Module, max_active: int, max_lanes: int, dtype: torch.dtype) -> None:
        """At most `max_active` adapters of each width are active at once, of at most `max_lanes` ranks together.

        Replaces the linear layers of `model` in place.
        """
        self.rows, self.device = Rows(), next(model.parameters()).device
        self._max_active, self._max_lanes = max_active, max_lanes
        self.held_slots: dict[str, Slot] = {}
        """By digest."""
        self._decoding: tuple[str, ...] | None = None
        """What `rows.batches` were made of; None when they have to be made again."""
        self.layers: dict[str, MultiLoraLinear] = {}
        self.groups: dict[tuple[str, ...], Group] = {}
        skip = model.get_output_embeddings()
        modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not skip}
        for names in grouped(list(modules), modules):
            group = self.groups[names] = Group([modules[name] for name in names], self.rows, dtype)
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
        """What `held` gives for a slot that holds exactly these updates."""
        total = 0
        for place, names in enumerate(self.groups, 1):
            own = [updates[name] for name in names if name in updates]
            total += place * sum(bit_sum(update.a) + bit_sum(update.b) for update in own)
        return total

    def held(self, digest: str) -> int:
        """The fingerprint of what an active adapter's slot holds now."""
        slot = self.held_slots[digest]
        return sum(place * group.shelves[slot.width].held(slot.number) for place, group in enumerate(self.groups.values(), 1))

    def activate(self, digest: str, rank: int, updates: Mapping[str, LayerUpdate], needed: Collection[str]) -> bool:
        """Puts an adapter into the lowest slot that no digest of `needed` holds; False when there is none."""
        if digest in needed:
            return True
        width = width_of(rank)
        num_slots = max(1, min(self._max_active, self._max_lanes // width))
        taken = {slot.number for each, slot in self.held_slots.items() if each in needed and slot.width == width}
        number = next((number for number in range(num_slots) if number not in taken), None)
        if number is None:
            return False
        slot = Slot(width, number)
        if self.held_slots.get(digest) == slot:
            return True
        self.deactivate(digest)  # it lay higher: low slots keep the range short that a step reads
        for other in [each for each, held in self.held_slots.items() if held == slot]:
            self.deactivate(other)
        for names, group in self.groups.items():
            group.shelf(num_slots, width).put(digest, number, [updates.get(name) for name in names])
        self.held_slots[digest] = slot  # last: half an adapter is none
        return True

    def deactivate(self, digest: str) -> None:
        """Frees an adapter's slot; what it holds is nobody's until another is written over it."""
        slot = self.held_slots.pop(digest, None)
        self._decoding = None
        if slot is not None:
            for group in self.groups.values():
                group.shelves[slot.width].drop(digest)

    def set_rows(self, decoding: Sequence[str], chunks: Sequence[tuple[str, int]]) -> None:
        """The digests (or "") of the decoding rows, and (digest, tokens) of each chunk behind them."""
        rows, asked = self.rows, tuple(decoding)
        if asked != self._decoding:
            rows.batches = batches_of([self.held_slots[digest] if digest else None for digest in asked], self.device)
            rows.num_decoding, self._decoding = len(asked), asked
        at, found = len(asked), []
        for digest, count in chunks:
            if digest:
                found.append((at, at + count, self.held_slots[digest]))
            at += count
        rows.chunks = tuple(found)
