"""Collate: Blocks -> Batch, either end to end without any padding or one segment a row, padded on the right.

In: Blocks (numpy). Out: a Batch of tensors with shifted targets. Runs in: train workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ftcore.data.types import Block

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens; B is 1 when segments are laid end to end.

    ids, positions int64 [B, T]; targets int64 [B, T]: the next token of the same segment where it is trained, else -100;
    attention_mask int64 [B, T] or None (end to end); segment_lengths: of every segment, in order;
    target_segments int64 [N]: for each of the N trained targets, in row-major order, the index of its segment.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    segment_lengths: tuple[int, ...]
    target_segments: Tensor
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return sum(self.segment_lengths)

    def to(self, device: str) -> Batch:
        if device == "cpu":
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "positions", "targets", "target_segments")}
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(self, **moved, attention_mask=mask)

    def silent(self) -> Batch:
        """The same tokens with nothing to learn: a short rank's part in a window. Runs the graph, adds zero."""
        return replace(self, targets=torch.full_like(self.targets, IGNORED), target_segments=self.target_segments[:0], num_trained=0)


def collate(blocks: Sequence[Block], *, padded: bool, pad_id: int = 0) -> Batch:
    """Blocks -> Batch. `padded`: one segment a row (for attention that cannot keep segments apart)."""
    lengths = np.concatenate([block.lengths for block in blocks]).astype(np.int64)
    ids = np.concatenate([block.ids for block in blocks]).astype(np.int64)
    mask = np.concatenate([block.mask for block in blocks]).astype(bool)
    starts = np.cumsum(lengths) - lengths
    segments = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(ids)) - starts[segments]
    targets = np.full(len(ids), IGNORED, np.int64)
    learnt = mask & (positions > 0)  # nothing comes before a segment's first token
    at = np.flatnonzero(learnt)
    targets[at - 1] = ids[at]
    lengths_out, owners, count = tuple(int(n) for n in lengths), torch.from_numpy(segments[at]), len(at)
    if not padded:
        rows = [torch.from_numpy(array)[None] for array in (ids, positions, targets)]
        return Batch(rows[0], rows[1], rows[2], None, lengths_out, owners, count)
    shape = (len(lengths), int(lengths.max()))
    wide = []
    for values, filler in ((ids, pad_id), (positions, 0), (targets, IGNORED), (np.ones_like(ids), 0)):
        rows_BT = np.full(shape, filler, np.int64)
        rows_BT[segments, positions] = values
        wide.append(torch.from_numpy(rows_BT))
    return Batch(wide[0], wide[1], wide[2], wide[3], lengths_out, owners, count)
