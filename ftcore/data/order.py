"""Order: which blocks each optimizer step learns from, fixed by (seed, epoch, step) alone, and how a window is dealt to ranks.

In: the number of blocks, batch size, seed. Out: block indices. Runs in: train workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """An epoch visits every block once, in windows of `batch_size`; the last window of an epoch may be short. Any step is found at once."""

    num_blocks: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_blocks / self.batch_size)

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        """`max_steps` alone when it is set, else `epochs` (at least one step)."""
        return max_steps or max(1, round(epochs * self.steps_per_epoch))

    def window(self, step: int) -> np.ndarray:
        """Global block indices of 0-based optimizer step `step`, int64 [<= batch_size]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return _epoch_order(self.num_blocks, self.seed, epoch)[index * self.batch_size : (index + 1) * self.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_blocks)


def deal(window: np.ndarray, sizes: np.ndarray, ranks: int, micro_batch: int) -> list[list[list[int]]]:
    """Window -> micro-batches of each rank: [ranks][micro-steps][<= micro_batch] block indices.

    Blocks of like size share a micro-batch (less padding), micro-batches go to the rank with the least work so far; every block exactly
    once. `sizes`: tokens of each block of the window. Ranks may get unequal numbers of micro-steps; the loop evens them out with
    silent ones.
    """
    by_size = np.argsort(-sizes, kind="stable")
    micro_batches = [by_size[i : i + micro_batch] for i in range(0, len(by_size), micro_batch)]
    work = [0] * ranks
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for part in micro_batches:
        rank = min(range(ranks), key=lambda r: (len(dealt[r]), work[r]))
        work[rank] += int(sizes[part].sum())
        dealt[rank].append([int(b) for b in window[part]])
    return dealt


def step_seed(seed: int, step: int, rank: int) -> int:
    """One random stream for each (run, step, rank): dropout needs no saved state, and a resumed step draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
