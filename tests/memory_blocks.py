"""Prepared blocks held in memory, for tests of the training loop alone."""

from __future__ import annotations

import numpy as np

from ftcore.data.types import Block


class MemoryBlocks:
    def __init__(self, train: list[Block], validation: list[Block] | None = None, digest: str = "0" * 64) -> None:
        self.splits = {"train": train, "validation": validation or [], "test": []}
        self.digest = digest

    def num_blocks(self, split: str) -> int:
        return len(self.splits[split])

    def block_lengths(self, split: str) -> np.ndarray:
        return np.array([block.num_tokens for block in self.splits[split]], np.int64)

    def block(self, split: str, index: int) -> Block:
        return self.splits[split][index]


def random_segments(count: int, *, seed: int, vocab: int, low: int = 4, high: int = 24) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) pairs of random length with a prompt that is not trained."""
    rng = np.random.default_rng(seed)
    segments = []
    for _ in range(count):
        length = int(rng.integers(low, high))
        mask = np.ones(length, np.uint8)
        mask[: int(rng.integers(1, length - 1))] = 0
        segments.append((rng.integers(0, vocab, length).astype(np.int32), mask))
    return segments


def block_of(segments: list[tuple[np.ndarray, np.ndarray]], first_row: int = 0) -> Block:
    return Block(
        ids=np.concatenate([ids for ids, _ in segments]),
        mask=np.concatenate([mask for _, mask in segments]),
        lengths=np.array([len(ids) for ids, _ in segments], np.int32),
        rows=np.arange(first_row, first_row + len(segments)),
    )


def packed_blocks(count: int, *, per_block: int = 3, seed: int = 0, vocab: int = 300) -> list[Block]:
    segments = random_segments(count * per_block, seed=seed, vocab=vocab)
    return [block_of(segments[i * per_block : (i + 1) * per_block], i * per_block) for i in range(count)]
