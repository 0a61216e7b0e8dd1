"""Packing: lays whole examples end to end in blocks so that almost no token of a step is padding.

In: Examples, or only their lengths. Out: Blocks of at most `block_tokens`, every example in exactly one.
Runs in: Ray Data tasks, the driver.

Best-fit decreasing over windows of 10 000 examples and more: the longest first, each into the block it leaves least room in.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from ftcore.data.types import Block, Example
from ftcore.errors import DataError

WINDOW = 10_000
"""Fewest examples packed together where there are that many; a window holds less than twice as many."""


def pack(examples: Iterable[Example], block_tokens: int, *, window: int = WINDOW) -> Iterator[Block]:
    """Packs a stream, one window in memory at a time; `rows` of the blocks count the examples from 0 in the order they came.

    Raises DataError when one example is longer than a block.
    """
    stream = iter(examples)
    first = 0
    held = list(islice(stream, 2 * window))
    while held:
        taken = held if len(held) < 2 * window else held[:window]
        for members in plan_blocks([len(example.ids) for example in taken], block_tokens):
            yield join([taken[member] for member in members], [first + member for member in members])
        first += len(taken)
        held = held[len(taken) :]
        held += islice(stream, 2 * window - len(held))


def join(segments: Sequence[Example], rows: Sequence[int]) -> Block:
    """Examples as the segments of one block, in the order given."""
    return Block(
        ids=np.concatenate([segment.ids for segment in segments]).astype(np.int32, copy=False),
        mask=np.concatenate([segment.mask for segment in segments]).astype(np.uint8, copy=False),
        lengths=np.array([len(segment.ids) for segment in segments], np.int32),
        rows=np.array(rows, np.int64),
    )


def plan_blocks(lengths: Sequence[int] | np.ndarray, block_tokens: int) -> list[list[int]]:
    """Which examples share a block: lists of indices into `lengths`. Same lengths, same plan.

    Members are in their original order, and blocks in the order of their longest member, so a prefix of the blocks is a fair sample.
    O(n log n): `spaces` is the sorted list of the distinct amounts of room, found by bisection.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.max()) > block_tokens:
        worst = int(sizes.argmax())
        raise DataError(
            "an example is longer than a block",
            where=f"example {worst}",
            got=f"{sizes[worst]} tokens",
            wanted=f"<= {block_tokens}",
            remedy="raise data.block_tokens or lower data.max_length",
        )
    blocks: list[list[int]] = []
    spaces: list[int] = []  # distinct amounts of room, ascending
    with_room: dict[int, list[int]] = {}  # amount of room -> blocks that have it, newest last
    for index in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[index])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            block, room = len(blocks), block_tokens
            blocks.append([])
        else:
            room = spaces[at]
            block = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], spaces[at]
        blocks[block].append(index)
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(spaces, left)
            with_room[left].append(block)
    blocks.sort(key=lambda members: members[0])
    for members in blocks:
        members.sort()
    return blocks


def fill(num_tokens: int, num_blocks: int, block_tokens: int) -> float:
    """Share of the room in the blocks that holds tokens, 0..1; 1 when there are no blocks."""
    return num_tokens / (num_blocks * block_tokens) if num_blocks else 1.0
