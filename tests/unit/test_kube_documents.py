"""YAML is read as kubectl reads it, and every value knows its line."""

from __future__ import annotations

import math

import pytest

from cluster.kube.documents import Document, parse
from cluster.kube.flaws import Flaw
from tests.kube_texts import RAY_JOB, changed, documents, flaws_of

BILLIONS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SCALARS = [
    ("1e-4", 1e-4), ("1E3", 1000.0), ("-.5", -0.5), ("1.", 1.0), ("08", 8.0), ("1_000", 1000), ("+3", 3),
    ("017", 15), ("0o17", 15), ("0x1F", 31), ("0b11", 3), ("0", 0), ("-0", 0),
    ("12:30:45", "12:30:45"), ("2026-01-31", "2026-01-31"), ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"), ("1.2.3", "1.2.3"),
    ("y", True), ("N", False), ("on", True), ("Off", False), ("yEs", "yEs"), ("'y'", "y"), ("'1e-4'", "1e-4"),
    ("=", "="), ("~", None), ("null", None), ("NULL", None), (".inf", math.inf), ("1e", "1e"), ("e1", "e1"), ("0x", "0x"), ("1Gi", "1Gi"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "value"), SCALARS)
def test_a_word_without_quotes_is_what_kubectl_takes_it_for(written: str, value: object) -> None:
    (document,) = documents(f"kind: A\na: {written}\n")
    assert document.tree["a"] == value and type(document.tree["a"]) is type(value)


def test_a_learning_rate_without_quotes_is_no_text() -> None:
    (flaw,) = flaws_of(changed(RAY_JOB, '                  value: "1"', "                  value: 1e-4")[0])
    assert (flaw.rule, flaw.got) == ("type", "0.0001") and "in quotes" in flaw.remedy


def test_every_value_knows_its_line_and_what_is_missing_the_place_above() -> None:
    (document,) = documents("kind: A\nmetadata:\n  labels:\n    a.b/c: d\nspec:\n- a: 1\n-\n  b: 2\n")
    assert [document.line(path) for path in ("metadata.labels.a.b/c", "spec[0].a", "spec[1].b", "spec[1].c", "other")] == [4, 6, 8, 8, 1]


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("a: &a {b: *a}\nkind: A\n", "a value that holds itself"),
        (BILLIONS, "more than 200000 values"),
        ("- a\n", "list"),
        ("a: [\n", "expected the node content"),
        ("? [a]\n: b\n", "unhashable"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_flaw_and_no_crash(text: str, got: str) -> None:
    (flaw,) = parse(text, "m.yaml")
    assert isinstance(flaw, Flaw) and flaw.rule == "yaml" and got in flaw.got


def test_documents_before_one_that_cannot_be_read_are_read() -> None:
    first, second = parse(RAY_JOB + "---\na: [\n", "m.yaml")
    assert isinstance(first, Document) and isinstance(second, Flaw) and second.line > RAY_JOB.count("\n")
