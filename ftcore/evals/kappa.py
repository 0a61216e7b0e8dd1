"""Kappa: how far a judge agrees with people who were shown the same two answers.

In: preference rows by people, or the folder of their labels with its ties; a judge's outcomes. Out: the share of agreement and Cohen's
kappa, with intervals. Runs in: a person's terminal; numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ftcore.data.formats.base import to_item
from ftcore.data.read import plan, read
from ftcore.data.types import Message, Preference, Rejected, Row
from ftcore.errors import DataError
from ftcore.evals.intervals import Interval, Score, from_draws, resampled
from ftcore.evals.metrics.base import quotient
from ftcore.evals.pairs import Pairing
from ftcore.feedback.agreement import cohen
from ftcore.feedback.judgements import RATERS, read_judgements
from ftcore.feedback.pairs import written_pairs
from ftcore.recipe import Source
from ftcore.storage import Folder

Side = Literal["ours", "theirs", "tie"]
Label = tuple[str, Side]
"""A row's id, and whose answer somebody preferred."""
Words = tuple[tuple[str, str], ...]
Said = tuple[Words, str, str, Literal["a", "b", "tie"]]
"""What was asked, two answers, and which of them somebody preferred."""


@dataclass(frozen=True)
class Agreement:
    """On labels of people; a row may have several. `kappa`: 1 is perfect, 0 what chance would give; nan where both always say one thing."""

    num_labels: int
    num_ties: int
    """Of the labels."""
    num_rows: int
    share: Interval
    kappa: Interval


def agreement(said: Sequence[tuple[str, str, str]], *, confidence: float = 0.95, seed: int = 0) -> Agreement:
    """`said`: (row, what a person said, what the judge said). Rows are resampled whole."""
    rows = {row: number for number, row in enumerate(dict.fromkeys(row for row, _, _ in said))}
    words = sorted({word for _, *both in said for word in both})
    tables = np.zeros((len(rows), len(words), len(words)))
    for row, person, judge in said:
        tables[rows[row], words.index(person), words.index(judge)] += 1

    def measured(score: Score) -> Interval:
        drawn = resampled(lambda weights: score(np.tensordot(weights, tables, axes=1)), len(rows), seed=seed)
        return from_draws(float(score(tables.sum(0)[None])[0]), drawn, confidence)

    ties = sum(person == "tie" for _, person, _ in said)
    return Agreement(len(said), ties, len(rows), measured(_share), measured(lambda tables: cohen(tables, 1.0 - np.eye(len(words)))))


def _share(tables: np.ndarray) -> np.ndarray:
    """tables: [D, C, C] counts, a person's word by the judge's."""
    return quotient(np.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))


def people(place: str, pairing: Pairing) -> list[Label]:
    """Labels of the rows that both systems answered with exactly these words. `place`: a file of preference rows, or a folder of
    `ftcore label`, where each rater's judgement is a label, ties too.

    Raises DataError for a row that is no preference, and where none is about these answers.
    """
    texts = {}
    for one, other in zip(pairing.ours.rows, pairing.theirs.rows, strict=True):
        texts[_words(pairing.asked[one.id].turns)] = (one.id, one.text.strip(), other.text.strip())
    found: list[Label] = []
    num_said = 0
    for prompt, a, b, choice in _raters(place) if (Path(place) / RATERS).is_dir() else _preferences(place):
        num_said += 1
        id, ours, theirs = texts.get(prompt, ("", "", ""))
        if id and (a, b) in ((ours, theirs), (theirs, ours)):
            preferred = {"a": a, "b": b}.get(choice)
            found.append((id, "tie" if preferred is None else "ours" if preferred == ours else "theirs"))
    if not found:
        raise DataError(
            "nobody was asked about these answers", where=place, got=f"{num_said} preferences, none between these two answers",
            wanted="the questions of the evaluation, with the answers of both systems as `chosen` and `rejected`; or ftcore label's folder",
        )  # fmt: skip
    return found


def _preferences(file: str) -> Iterator[Said]:
    for row in (row for piece in plan([Source(path=file)]) for row in read(piece)):
        item = _preference(row)
        yield _words(item.prompt), item.chosen.content.strip(), item.rejected.content.strip(), "a"


def _raters(folder: str) -> Iterator[Said]:
    pairs = {pair.id: pair for pair in written_pairs(Folder(folder)).pairs}
    for judgements in read_judgements([folder]).values():
        for each in judgements:
            if each.choice != "skip" and (pair := pairs.get(each.pair)) is not None:
                prompt = tuple((turn["role"], turn["content"].strip()) for turn in pair.prompt)
                yield prompt, pair.a.strip(), pair.b.strip(), each.choice


def _preference(row: Row | Rejected) -> Preference:
    if isinstance(row, Rejected):
        raise DataError(f"this row cannot be read: {row.reason}", where=row.origin, got=row.detail)
    try:
        item = to_item(row, "preference")
    except DataError as error:
        wanted = "prompt, chosen, rejected"
        raise DataError(f"this is no preference: {error.what}", where=row.origin, got=error.got, wanted=wanted) from error
    assert isinstance(item, Preference)
    return item


def _words(turns: Sequence[Message]) -> Words:
    return tuple((turn.role, turn.content.strip()) for turn in turns)
