"""Packing: nothing lost, nothing over, nearly nothing empty."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ftcore.data.pack import fill, join, pack, plan_blocks
from ftcore.data.types import Example, Origin
from ftcore.errors import DataError


def alpaca_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Log-normal, median about 100 tokens, cut at 2048: the shape of instruction data."""
    return np.clip(np.random.default_rng(seed).lognormal(4.6, 0.8, count), 8, 2048).astype(int)


def examples(lengths: list[int]) -> list[Example]:
    made = []
    for number, length in enumerate(lengths):
        mask = np.ones(length, np.uint8)
        made.append(Example(np.full(length, number, np.int32), mask, np.zeros(length, np.uint8), Origin("a.jsonl", number + 1)))
    return made


def test_every_example_is_in_exactly_one_block() -> None:
    plan = plan_blocks(alpaca_lengths(3000), 2048)
    assert sorted(member for members in plan for member in members) == list(range(3000))


def test_no_block_holds_more_than_its_room() -> None:
    lengths = alpaca_lengths(3000)
    assert max(lengths[members].sum() for members in plan_blocks(lengths, 2048)) <= 2048


@pytest.mark.parametrize("count", [1000, 20_000])
def test_alpaca_lengths_fill_at_least_97_percent(count: int) -> None:
    lengths = alpaca_lengths(count)
    assert fill(int(lengths.sum()), len(plan_blocks(lengths, 2048)), 2048) >= 0.97


def test_the_same_lengths_give_the_same_plan() -> None:
    lengths = alpaca_lengths(2000)
    assert plan_blocks(lengths, 1024 * 2) == plan_blocks(list(lengths), 2048)


def test_a_best_fit_is_taken_before_a_looser_one() -> None:
    assert sorted(map(sorted, plan_blocks([6, 5, 4, 5], 10))) == [[0, 2], [1, 3]]


def test_blocks_come_in_the_order_of_their_rows_so_the_first_ones_are_a_fair_sample() -> None:
    lengths = alpaca_lengths(8000)
    plan = plan_blocks(lengths, 2048)
    quarter = [lengths[member] for members in plan[: len(plan) // 4] for member in members]
    assert abs(np.mean(quarter) / lengths.mean() - 1) < 0.15


def test_an_example_longer_than_a_block_is_refused_with_its_length() -> None:
    with pytest.raises(DataError, match="65 tokens"):
        plan_blocks([3, 65], 64)


def test_twenty_thousand_examples_are_planned_in_seconds() -> None:
    lengths = alpaca_lengths(20_000)
    started = time.process_time()
    plan_blocks(lengths, 131_072)
    assert time.process_time() - started < 5


def test_a_stream_is_packed_in_windows_and_rows_count_through() -> None:
    blocks = list(pack(examples([3] * 25), 6, window=10))
    assert sorted(int(row) for block in blocks for row in block.rows) == list(range(25))
    assert all(set(block.ids.tolist()) == set(block.rows.tolist()) for block in blocks)


def test_the_last_window_is_never_a_small_remainder() -> None:
    # windows of 10 and 15, not 10, 10 and 5: rows 10.. may share blocks with 24
    blocks = list(pack(examples([1] * 25), 100, window=10))
    assert [len(block.lengths) for block in blocks] == [10, 15]


def test_an_empty_stream_gives_no_block() -> None:
    assert list(pack([], 8)) == []


def test_a_joined_block_counts_no_segment_start_as_trained() -> None:
    block = join(examples([4, 3]), [0, 1])
    assert (block.num_tokens, block.num_trained) == (7, 5)
