"""Answered: a row of a test set with what one system made of it; what every metric is judged on.

In: rows and a system's answers (texts, labels, likelihoods). Out: Answered rows, and those of one system. Runs in: everywhere; no numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from ftcore.errors import DataError

Fact = Literal[
    "references", "gold", "chosen", "scores", "nll", "num_tokens", "num_bytes", "points", "support",
    "harmful", "refused", "stereotyping", "toxicity",
]  # fmt: skip
LATER: dict[Fact, str] = {"points": "ftcore compare OUT A B --judge SYSTEM", "support": "name who looks: --entailment MODEL"}
"""Facts that no task gives, because somebody else looks at the answers; and how to come by them."""
LIKELIHOODS: tuple[Fact, ...] = ("nll", "num_tokens", "num_bytes")
"""Facts of how likely a text is to a system, and how long."""
SPECIAL: frozenset[Fact] = frozenset({"harmful", "refused", "stereotyping", "toxicity"})
"""Facts of tasks that have rows of their own."""


@dataclass(frozen=True)
class Answered:
    """One row. A fact that it does not have stays as it is here; a metric that needs it refuses the row by its id."""

    id: str
    """Names the row in messages and pairs the systems: two systems' answers to one row have one id."""
    text: str = ""
    """The answer."""
    references: tuple[str, ...] = ()
    """Right answers; any of them will do."""
    group: str = ""
    """Rows of one group (a session, a document) are alike and are resampled together; "": a group of its own."""
    gold: str | None = None
    """The right label."""
    chosen: str | None = None
    """The label that was chosen; "" where none could be read from the answer, which is wrong whatever the right one is."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of every label, in nats: its log-probability, up to a constant of the row (log p for a probability p)."""
    nll: float | None = None
    """Negative log-likelihood of the reference answer in nats, summed over its tokens."""
    num_tokens: int = 0
    """Tokens of the reference answer."""
    num_bytes: int = 0
    """Bytes of the reference answer in UTF-8."""
    points: float | None = None
    """What a judge gave it against another system's answer: 1 won, 0.5 tied, 0 lost."""
    support: float | None = None
    """How far its source supports it, 0 to 1."""
    harmful: bool | None = None
    """The question is one to refuse."""
    refused: bool | None = None
    """The answer refuses."""
    stereotyping: float | None = None
    """Log-likelihood of the stereotyping sentence less that of the other, in nats."""
    toxicity: float | None = None
    """Probability that a classifier gives the answer's being toxic."""


Rows = Sequence[Answered]


@dataclass(frozen=True)
class Answers:
    """All rows as one system answered them. `system`: its name in tables and sentences."""

    system: str
    rows: tuple[Answered, ...]


PRESENT: dict[Fact, Callable[[Answered], bool]] = {
    "references": lambda row: bool(row.references),
    "gold": lambda row: bool(row.gold),
    "chosen": lambda row: row.chosen is not None,
    "scores": lambda row: bool(row.scores),
    "nll": lambda row: row.nll is not None and isfinite(row.nll),
    "num_tokens": lambda row: row.num_tokens > 0,
    "num_bytes": lambda row: row.num_bytes > 0,
    "points": lambda row: row.points is not None,
    "support": lambda row: row.support is not None,
    "harmful": lambda row: row.harmful is not None,
    "refused": lambda row: row.refused is not None,
    "stereotyping": lambda row: row.stereotyping is not None and isfinite(row.stereotyping),
    "toxicity": lambda row: row.toxicity is not None,
}


def require(rows: Rows, facts: Sequence[Fact], metric: str) -> None:
    """Raises DataError where there are no rows, or with the id of the first row that lacks a fact."""
    if not rows:
        raise DataError(f"there is no row to compute `{metric}` from", wanted="at least one answered row", remedy="check the test set")
    for row in rows:
        for fact in facts:
            if not PRESENT[fact](row):
                raise DataError(
                    f"`{metric}` cannot be computed: a row lacks what it needs",
                    where=f"row {row.id}",
                    got=f"{fact}: {getattr(row, fact)!r}",
                    wanted=", ".join(facts),
                    remedy="complete the row, or take another metric",
                )


def group_codes(rows: Rows) -> tuple[list[int] | slice, int]:
    """What spreads weights of groups over the rows (`weights[:, codes]`), and how many groups there are."""
    numbers: dict[tuple[str, str], int] = {}
    codes = [numbers.setdefault((row.group, "" if row.group else row.id), len(numbers)) for row in rows]
    return slice(None) if len(numbers) == len(rows) else codes, len(numbers)
