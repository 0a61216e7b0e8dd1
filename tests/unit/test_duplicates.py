"""Duplicates: the same content however it came, and nearly the same words above the threshold."""

from __future__ import annotations

import numpy as np
import pytest

from ftcore.data.duplicates import (
    COPY,
    KEY,
    PAIR,
    band_keys,
    clusters,
    content_hash,
    exact_pairs,
    item_text,
    key_ranges,
    near_pairs,
    signatures,
    slice_of,
)
from ftcore.data.types import Conversation, Message, Origin, Preference, Text

WORDS = np.array([f"word{i}" for i in range(500)])


def chat(*turns: str, row: int = 1, weight: int | None = None) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[at % 2], text, weight) for at, text in enumerate(turns))
    return Conversation(messages, Origin("a.jsonl", row))


def keys_of(values: list[int], split: int = -1) -> np.ndarray:
    keys = np.zeros(len(values), KEY)
    keys["key"], keys["check"], keys["item"], keys["split"] = values, values, np.arange(len(values)), split
    return keys


def pair(first: int, second: int, hashes: tuple[int, int] = (7, 7), splits: tuple[int, int] = (-1, -1)) -> np.ndarray:
    made = np.zeros(1, PAIR)
    made["row"], made["hash"], made["split"] = (first, second), hashes, splits
    return made


def near(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    """All pairs over all bands."""
    sketches = signatures(texts)
    hashes = np.arange(len(texts), dtype=np.uint64)
    found = set()
    for band in band_keys(sketches, threshold):
        keys = keys_of([0] * len(texts))
        keys["key"] = band
        found |= {tuple(sorted(rows)) for rows in near_pairs(keys, np.arange(len(texts)), hashes, sketches, threshold)["row"].tolist()}
    return found


def document(seed: int, changed: int = 0) -> str:
    words = np.random.default_rng(seed).choice(WORDS, 200)
    words[10 : 10 + changed] = "other"
    return " ".join(words)


def test_where_a_row_came_from_does_not_count() -> None:
    assert content_hash(chat("Hi", "Hello", row=1)) == content_hash(chat("Hi", "Hello", row=99))


@pytest.mark.parametrize("other", [chat("Hi", "hello"), chat("HiHello", ""), chat("Hi", "Hello", weight=0), chat("Hi", "Hello", "Bye")])
def test_any_change_of_content_counts(other: Conversation) -> None:
    assert content_hash(other) != content_hash(chat("Hi", "Hello"))


def test_a_document_and_a_turn_of_the_same_words_differ() -> None:
    assert content_hash(Text("Hi", Origin("a", 1))) != content_hash(chat("Hi"))


def test_the_words_of_a_preference_are_prompt_and_both_answers() -> None:
    answer = Message("assistant", "yes")
    item = Preference((Message("user", "well?"),), answer, Message("assistant", "no"), Origin("a", 1))
    assert item_text(item) == "well?\nyes\nno"


def test_equal_contents_are_paired_with_the_row_before() -> None:
    pairs = exact_pairs(keys_of([5, 9, 5, 5]), np.array([10, 11, 12, 13]))
    assert sorted(map(tuple, pairs["row"].tolist())) == [(10, 12), (12, 13)]


def test_half_a_hash_in_common_is_not_the_same_content() -> None:
    keys = keys_of([5, 5])
    keys["check"] = (1, 2)
    assert len(exact_pairs(keys, np.arange(2))) == 0


def test_ranges_of_keys_together_find_what_one_range_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.sort(np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64).repeat(2)).tolist()
    keys = keys_of(values)
    monkeypatch.setattr("ftcore.data.duplicates.RANGE_ROWS", 50)
    ranges = key_ranges(len(keys))
    parts = [slice_of(keys, low, high) for low, high in ranges]
    assert len(ranges) == 12
    assert sum(len(exact_pairs(part, part["item"].astype(np.int64))) for part in parts) == 300


def test_near_copies_are_found_and_different_texts_are_not() -> None:
    texts = [document(1), document(2), document(1, changed=6), document(3)]
    assert near(texts, 0.8) == {(0, 2)}


def test_texts_below_the_threshold_are_not_near() -> None:
    assert near([document(1), document(1, changed=60)], 0.8) == set()


def test_a_cluster_is_led_by_its_first_row() -> None:
    copies = clusters([pair(4, 9), pair(9, 2)])
    assert copies[["row", "leader"]].tolist() == [(4, 2), (9, 2)]


def test_a_cluster_is_led_by_its_held_out_row() -> None:
    copies = clusters([pair(4, 9, splits=(0, 2))])
    assert copies[["row", "leader", "split"]].tolist() == [(4, 9, 2)]


def test_a_copy_with_other_content_than_its_leader_is_a_near_one() -> None:
    copies = clusters([pair(0, 1), pair(1, 2, hashes=(7, 8))])
    assert copies[["row", "near"]].tolist() == [(1, False), (2, True)]


def test_no_pairs_make_no_clusters() -> None:
    assert clusters([]).dtype == COPY
    assert len(clusters([])) == 0
