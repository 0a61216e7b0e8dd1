"""The audit: tallies that merge, a gate that refuses, a table that is safe to print."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from ftcore.data.audit import PLACES, Audit, Tally
from ftcore.data.types import ROLES, Origin, Rejected
from ftcore.errors import DataError
from ftcore.recipe import Data


def data(**changes: object) -> Data:
    return Data.model_validate({"sources": ["rows.jsonl"]} | changes)


def sound(rows: int = 100) -> Audit:
    """What a healthy data set looks like."""
    audit = Audit(read=rows, answers=rows, stopped=rows)
    audit.add_lengths(np.full(rows, 50))
    audit.add_trained([0, 0, 10 * rows, 0, 0, 0])
    train = audit.split("train")
    train.rows, train.examples, train.tokens, train.trained = rows, rows, 50 * rows, 10 * rows
    return audit


def reject(audit: Audit, count: int, reason: str = "empty answer", file: str = "b.jsonl") -> None:
    for row in range(1, count + 1):
        audit.read += 1
        audit.reject(Rejected(Origin(file, row), reason))


def test_parts_merged_are_the_whole() -> None:
    whole, left, right = sound(), sound(), Audit()
    for audit, rows in ((whole, range(1, 9)), (left, range(1, 5)), (right, range(5, 9))):
        for row in rows:
            audit.read += 1
            audit.reject(Rejected(Origin("b.jsonl", row), "broken JSON", "line ends early"))
        audit.add_lengths(np.array([7 * row for row in rows]))
        audit.redact(["email"] * len(rows), Origin("b.jsonl", rows[0]))
    left.merge(right)
    whole.redacted["email"].places.append("b.jsonl, row 5")  # the only thing the whole saw once: each part names its first place
    assert left == whole


def test_it_survives_json() -> None:
    audit = sound()
    reject(audit, 2)
    audit.note("a.json: format alpaca")
    assert Audit.from_json(json.loads(json.dumps(audit.to_json()))) == audit


def test_sound_data_passes() -> None:
    sound().check(data())


def spoil_stop(audit: Audit) -> None:
    audit.stopped = 0


def spoil_labels(audit: Audit) -> None:
    audit.split("train").trained = 0


def spoil_kept(audit: Audit) -> None:
    audit.splits.clear()


def spoil_truncated(audit: Audit) -> None:
    audit.truncated = Tally(6, ["a.jsonl, row 3"])


def spoil_rejected(audit: Audit) -> None:
    reject(audit, 2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_stop, "no answer ends in a trained stop token"),
        (spoil_labels, "not one trained token in the train split"),
        (spoil_kept, "no row is left"),
        (spoil_truncated, r"6\.00% of examples lose labels.*a\.jsonl, row 3"),
        (spoil_rejected, r"1\.96% of rows rejected.*empty answer 2x \(b\.jsonl, row 1; b\.jsonl, row 2\)"),
    ],
)
def test_bad_data_is_refused_with_the_reason(spoil: Callable[[Audit], None], words: str) -> None:
    audit = sound()
    spoil(audit)
    with pytest.raises(DataError, match=words):
        audit.check(data())


def test_the_recipe_decides_how_much_is_too_much() -> None:
    audit = sound()
    reject(audit, 2)
    spoil_truncated(audit)
    audit.check(data(max_rejected=0.02, max_truncated=0.06))


def test_all_problems_are_named_at_once() -> None:
    audit = sound()
    spoil_stop(audit)
    spoil_rejected(audit)
    with pytest.raises(DataError) as caught:
        audit.check(data())
    assert "stop token" in caught.value.got
    assert "rejected" in caught.value.got


def test_a_named_validation_source_that_gave_no_row_is_refused() -> None:
    sources = [{"path": "a.jsonl"}, {"path": "held.jsonl", "split": "validation"}]
    with pytest.raises(DataError, match=r"no row is left for validation[\s\S]*held\.jsonl"):
        sound().check(data(sources=sources))


def test_only_the_first_places_are_kept_and_the_rest_is_counted() -> None:
    audit = Audit()
    reject(audit, 9)
    assert (audit.rejected["empty answer"].count, len(audit.rejected["empty answer"].places)) == (9, PLACES)
    assert "and 4 more" in audit.table()


def test_the_table_says_what_was_read_and_trained_on() -> None:
    audit = sound()
    reject(audit, 1, "broken JSON", "data/b.jsonl")
    table = audit.table()
    for words in (
        "read",
        "101",
        "rejected: broken JSON",
        "data/b.jsonl, row 1",
        "assistant",
        "1,000",
        "answers that stop",
        "100.00%",
        "1-64",
        "█",
    ):
        assert words in table, words


def test_the_table_never_sends_control_characters_of_a_row_to_the_terminal() -> None:
    audit = Audit()
    audit.reject(Rejected(Origin("a\x1b[31m.jsonl", 1), "broken JSON", "\x1b]0;owned\x07 \u202egnp.exe \ud800"))
    table = audit.table()
    assert not any(char in table for char in "\x1b\x07\u202e\ud800")
    assert r"\x1b[31m" in table


def test_quantiles_come_from_the_histogram() -> None:
    audit = Audit()
    audit.add_lengths(np.array([10] * 90 + [100] * 9 + [1000]))
    assert (audit.quantile(0.5), audit.quantile(0.99), audit.longest) == (12, 128, 1000)


def test_a_lone_giant_is_warned_about() -> None:
    audit = sound()
    audit.add_lengths(np.array([5000]))
    assert any("5000 tokens" in line for line in audit.warnings(data()))


def test_sound_data_is_not_warned_about() -> None:
    assert sound().warnings(data()) == []


def test_every_role_has_a_line_of_its_own() -> None:
    audit = Audit()
    audit.add_trained(range(1, len(ROLES) + 1))
    assert list(audit.trained) == list(ROLES)
