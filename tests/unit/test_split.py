"""Split: by content, so that it is stable, and never with the same content on both sides."""

from __future__ import annotations

import numpy as np
import pytest

from ftcore.data.split import AUTO, SPLITS, deal, lacking, nearest
from ftcore.recipe import Data, Source

TRAIN, VALIDATION, TEST = range(3)
HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)


def data(**changes: object) -> Data:
    return Data.model_validate({"sources": ["rows.jsonl"], "validation": 0.1, "test": 0.2} | changes)


def auto(count: int) -> np.ndarray:
    return np.full(count, AUTO, np.int8)


def test_rows_are_dealt_in_the_shares_asked_for() -> None:
    counts = np.bincount(deal(HASHES, auto(len(HASHES)), data()), minlength=3) / len(HASHES)
    assert counts == pytest.approx([0.7, 0.1, 0.2], abs=0.01)


def test_a_row_stays_where_it_is_when_other_rows_come() -> None:
    assert np.array_equal(deal(HASHES, auto(len(HASHES)), data())[:100], deal(HASHES[:100], auto(100), data()))


def test_more_test_rows_take_none_away_from_test() -> None:
    small, large = (deal(HASHES, auto(len(HASHES)), data(test=share)) for share in (0.1, 0.3))
    assert np.all(large[small == TEST] == TEST)


def test_a_source_that_names_its_split_keeps_all_its_rows_there() -> None:
    assert set(deal(HASHES, np.full(len(HASHES), VALIDATION, np.int8), data()).tolist()) == {VALIDATION}


def test_a_wanted_split_without_a_row_is_noticed() -> None:
    assert lacking(np.array([9, 0, 1]), data()) == [VALIDATION]


def test_a_single_row_is_kept_for_training_only() -> None:
    assert lacking(np.array([1, 0, 0]), data()) == []


def test_a_single_row_that_fell_to_validation_is_wanted_back_for_training() -> None:
    assert lacking(np.array([0, 2, 0]), data())[0] == TRAIN


def test_sources_that_all_name_their_split_are_left_alone() -> None:
    assert lacking(np.array([9, 0, 0]), data(sources=(Source(path="a", split="train"),))) == []


def test_the_nearest_row_is_the_one_whose_share_is_closest() -> None:
    shares = np.array([0.9, 0.35, 0.1])
    distance = nearest((shares * 2.0**64).astype(np.uint64), VALIDATION, data())
    assert distance == pytest.approx([0.6, 0.05, 0.1])
    assert SPLITS[VALIDATION] == "validation"
