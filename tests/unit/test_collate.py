from __future__ import annotations

import numpy as np

from ftcore.data.collate import collate
from ftcore.data.types import Block


def block(lengths: list[int], mask: list[int], start: int = 10) -> Block:
    total = sum(lengths)
    return Block(
        np.arange(start, start + total, dtype=np.int32), np.array(mask, np.uint8), np.array(lengths, np.int32), np.arange(len(lengths))
    )


TWO = [block([3, 2], [0, 1, 1, 1, 1]), block([2], [0, 1], start=20)]


def test_end_to_end_rows_have_no_padding_and_targets_never_cross_a_segment() -> None:
    batch = collate(TWO, padded=False)
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 20, 21]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.targets.tolist() == [[11, 12, -100, 14, -100, 21, -100]]  # 13 is trained but first of its segment: nothing predicts it
    assert (batch.segment_lengths, batch.target_segments.tolist(), batch.num_trained) == ((3, 2, 2), [0, 0, 1, 2], 4)
    assert batch.attention_mask is None


def test_padded_rows_hold_one_segment_each_with_the_same_targets() -> None:
    batch = collate(TWO, padded=True, pad_id=9)
    assert batch.ids.tolist() == [[10, 11, 12], [13, 14, 9], [20, 21, 9]]
    assert batch.targets.tolist() == [[11, 12, -100], [14, -100, -100], [21, -100, -100]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]


def test_the_count_of_trained_tokens_is_the_blocks_own() -> None:
    assert sum(b.num_trained for b in TWO) == collate(TWO, padded=False).num_trained


def test_a_silent_batch_has_the_tokens_and_nothing_to_learn() -> None:
    silent = collate(TWO, padded=False).silent()
    assert (silent.num_trained, len(silent.target_segments), int((silent.targets != -100).sum())) == (0, 0, 0)
    assert silent.num_tokens == 7
