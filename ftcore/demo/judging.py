"""Judging: the demo's predictors over one base, its adapters loaded side by side, and the sentences under the table.

In: a base, adapter folders, conversations. Out: predictors for `ftcore.evals`; goals met or missed. Runs in: the driver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftcore.data.types import Conversation
from ftcore.evals.bench import Bench
from ftcore.evals.ngram import BackoffNgram, user_of
from ftcore.evals.predictors import Predictor
from ftcore.evals.tasks.next_operation import Table

BASE, OWN, OTHER, NGRAM = "base", "own adapter", "other tenant's adapter", "per-user n-gram"
NUM_EXAMPLES = 3
SHOTS = f"base, {NUM_EXAMPLES} examples"
LEAD = 0.10
"""Exact match the own adapter must be ahead of the base and of the other adapter."""
CLOSED = 0.60
"""Share of the way from base to ceiling it must go."""


def lineup(bench: Bench, train: Sequence[Conversation], own: str, other: str | None) -> list[Predictor]:
    """Everybody who is judged, best guess last: base, base with examples, n-gram, the other tenant's adapter, the own one."""
    predictors: list[Predictor] = [
        bench.predictor(BASE),
        bench.predictor(SHOTS, examples=first_of_each(train, NUM_EXAMPLES)),
        BackoffNgram(NGRAM).fit(train),
    ]
    if other is not None:
        predictors.append(bench.predictor(OTHER, other))
    return [*predictors, bench.predictor(OWN, own)]


def first_of_each(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """The first `count` sessions of every user."""
    by_user: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_user.setdefault(user_of(conversation), []).append(conversation)
    return [conversation for mine in by_user.values() for conversation in mine[:count]]


@dataclass(frozen=True)
class Goal:
    """Something the own adapter is to achieve: whether it did, what was seen, what was wanted."""

    met: bool
    fact: str
    wanted: str

    def __str__(self) -> str:
        return f"  {'met   ' if self.met else 'MISSED'}  {self.fact} (goal: {self.wanted})"


def goals(table: Table, ceiling: str | None) -> list[Goal]:
    """The demo's goals for one table; those that need the ceiling only where there is one."""
    own = table[OWN].exact_match
    names = [line.name for line in table.lines]
    found = []
    for rival in [name for name in (BASE, OTHER) if name in names]:
        theirs = table[rival].exact_match
        lead, apart = own.value - theirs.value, own.above(theirs)
        fact = f"{100 * lead:+.1f} points over {rival}, 95 % intervals {'apart' if apart else 'touch'}"
        found.append(Goal(lead >= LEAD and apart, fact, f"+{100 * LEAD:.0f}, apart"))
    lead = own.value - table[NGRAM].exact_match.value
    found.append(Goal(lead > 0, f"{100 * lead:+.1f} points over the {NGRAM}", "ahead"))
    if ceiling:
        closed = table.closed(OWN, BASE, ceiling)
        fact = f"{100 * closed:.0f} % of the way from base to ceiling"
        found.append(Goal(not math.isnan(closed) and closed >= CLOSED, fact, f"{100 * CLOSED:.0f} %"))
    return found
