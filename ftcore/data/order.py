"""Order: which blocks each optimizer step learns from, fixed by (seed, epoch, step) alone, and how a window is dealt to ranks.

In: the number of blocks, batch size, seed. Out: block indices. Runs in: train workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ROUNDS = 4
"""Double rounds of the Feistel network: eight half rounds, twice what a pseudorandom permutation needs (Luby and Rackoff 1988)."""


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
        """Global block indices of 0-based optimizer step `step`, int64 [<= batch_size]. Costs the same wherever the step is."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.batch_size
        places = np.arange(first, min(first + self.batch_size, self.num_blocks), dtype=np.uint64)
        return _shuffled(places, self.num_blocks, self.seed, epoch)


def _shuffled(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """What a shuffle of range(size) has at `places`, without making the shuffle: a keyed bijection, so time and memory go with the places.

    A Feistel network over `left x right >= size`; a value outside the range is sent through again until it falls inside (Black and
    Rogaway 2002, Ciphers with Arbitrary Finite Domains, sections 4 and 5). At most about 1 / sqrt(size) of them are.
    """
    left = math.isqrt(max(size - 1, 0)) + 1
    right = -(-size // left)
    keys = np.random.Philox(key=[seed, epoch]).random_raw(2 * ROUNDS)
    values = places
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        low: np.ndarray = values[outside] % np.uint64(left)
        high: np.ndarray = values[outside] // np.uint64(left)
        for of_high, of_low in zip(keys[::2], keys[1::2], strict=True):
            low = (low + _mixed(high + of_high) % np.uint64(left)) % np.uint64(left)
            high = (high + _mixed(low + of_low) % np.uint64(right)) % np.uint64(right)
        values = values.copy()
        values[outside] = high * np.uint64(left) + low
        outside = values >= size
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 bits in, 64 well-mixed bits out: the finisher of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
