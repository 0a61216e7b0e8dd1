"""Pairs: two systems' answers to each row, shown to a judge in both orders, and what the two verdicts come to.

In: two systems' answers to the same rows, the questions. Out: cases for a judge; a Bout a row; points for the statistics.
Runs in: a person's terminal; no torch.

Judges favour a place (Zheng et al. 2023, section 3.3), so a system wins a row only where both orders say so; else it is a tie, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ftcore.data.types import Message
from ftcore.evals.answered import Answers
from ftcore.evals.asked import Asked
from ftcore.evals.judge import Case
from ftcore.evals.replies import Reply
from ftcore.evals.rubric import FIRST, TIE, Part

Outcome = Literal["ours", "theirs", "tie", "unjudged"]
How = Literal["agreed", "same text", "first place", "second place", "one tie", "unread", "missing"]
"""agreed: both orders say the same; same text: nobody had to be asked; first/second place: whoever stood there won both times; one tie: a
tie in one order only; unread: no verdict in one order at least; missing: not asked yet."""


@dataclass(frozen=True)
class Bout:
    """A row. `reasons`: what the judge said, with ours in the first place and with theirs."""

    id: str
    outcome: Outcome
    how: How
    reasons: tuple[str, str] = ("", "")

    @property
    def by_order(self) -> bool:
        """The order decided: the two verdicts were not the same."""
        return self.how in ("first place", "second place", "one tie")


@dataclass(frozen=True)
class Pairing:
    """Answers to the same rows in one order. Turns are named by who stands first, so that A against B is B against A."""

    ours: Answers
    theirs: Answers
    asked: Mapping[str, Asked]
    """By the answers' ids."""

    def cases(self) -> list[Case]:
        """Both orders of a row beside each other; rows by their content, so that those judged before a limit are a sample of all."""
        found = []
        for one, other in sorted(zip(self.ours.rows, self.theirs.rows, strict=True), key=lambda pair: self.asked[pair[0].id].content):
            if one.text.strip() == other.text.strip():
                continue
            question = self.asked[one.id]
            about = (("question", told(question.turns)), ("reference", question.reference))
            for name, first, second in ((self.ours.system, one, other), (self.theirs.system, other, one)):
                found.append(Case(one.id, name, (*about, _answer(1, first.text), _answer(2, second.text))))
        return found

    def bouts(self, replies: Mapping[tuple[str, str], Reply]) -> list[Bout]:
        return [self._bout(one.id, one.text.strip() == other.text.strip(), replies)
                for one, other in zip(self.ours.rows, self.theirs.rows, strict=True)]  # fmt: skip

    def _bout(self, id: str, same: bool, replies: Mapping[tuple[str, str], Reply]) -> Bout:
        if same:
            return Bout(id, "tie", "same text")
        both = [replies.get((id, system)) for system in (self.ours.system, self.theirs.system)]
        seen = [reply for reply in both if reply is not None]
        if len(seen) < 2:
            return Bout(id, "unjudged", "missing")
        reasons = (seen[0].error or seen[0].text, seen[1].error or seen[1].text)
        return Bout(id, *settled(seen[0].verdict, seen[1].verdict), reasons)

    def points(self, bouts: Sequence[Bout]) -> tuple[Answers, Answers]:
        """The judged rows, with what each side got."""
        worth = {"ours": 1.0, "tie": 0.5, "theirs": 0.0}
        got = {bout.id: worth[bout.outcome] for bout in bouts if bout.outcome != "unjudged"}
        ours = tuple(replace(row, points=got[row.id]) for row in self.ours.rows if row.id in got)
        theirs = tuple(replace(row, points=1 - got[row.id]) for row in self.theirs.rows if row.id in got)
        return Answers(self.ours.system, ours), Answers(self.theirs.system, theirs)


def settled(ours_first: str, theirs_first: str) -> tuple[Outcome, How]:
    """Of the verdict with ours in the first place, and of that with theirs there; "" where none could be read."""
    if not ours_first or not theirs_first:
        return "unjudged", "unread"
    if TIE in (ours_first, theirs_first):
        return "tie", "agreed" if ours_first == theirs_first else "one tie"
    if ours_first == theirs_first:
        return "tie", "first place" if ours_first == FIRST else "second place"
    return ("ours" if ours_first == FIRST else "theirs"), "agreed"


def told(turns: Sequence[Message]) -> str:
    """Everything that was said before an answer."""
    return turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _answer(number: int, text: str) -> Part:
    return f"answer {number}", text.strip() or "(nothing)"
