"""Audit: what happened to the rows on their way to tokens, as tallies that merge, a table for people, and a gate before any worker starts.

In: rejected rows, dropped rows, findings, and the facts of every kept item. Out: `table()`, `check()` (DataError), JSON. Runs in: Ray Data
tasks (tally), the driver (merge, show, refuse).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcore.data.audit_table import render
from ftcore.data.types import ROLES, Origin, Rejected
from ftcore.errors import DataError

if TYPE_CHECKING:
    from ftcore.recipe import Data

PLACES = 5
"""First places (file and row) shown for each reason."""
EXTREME_TAIL = 20
"""A longest example this many times the median is worth a word: it alone may decide the memory of a step."""


@dataclass
class Tally:
    """How often, and where first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str = "", count: int = 1) -> None:
        self.count += count
        if place and len(self.places) < PLACES and place not in self.places:
            self.places.append(place)

    def merge(self, other: Tally) -> None:
        self.count += other.count
        self.places = (self.places + other.places)[:PLACES]


@dataclass
class SplitFacts:
    """What one split holds. `room`: tokens its blocks could hold (0 when nothing is packed); `repeats`: rows read again by weight > 1."""

    rows: int = 0
    repeats: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    blocks: int = 0
    room: int = 0

    def merge(self, other: SplitFacts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def fill(self) -> float:
        return self.tokens / self.room if self.room else 1.0


@dataclass
class Audit:
    """Tallies over rows and examples; `merge` adds another part's, in the order of the rows.

    rejected, dropped, redacted, leaked: reason or kind -> Tally. trained: role -> trained tokens. lengths: upper edge -> examples.
    """

    read: int = 0
    rejected: dict[str, Tally] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    redacted: dict[str, Tally] = field(default_factory=dict)
    duplicates: dict[str, Tally] = field(default_factory=dict)
    leaked: dict[str, Tally] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    longest: int = 0
    truncated: Tally = field(default_factory=Tally)
    answers: int = 0
    stopped: int = 0
    notes: list[str] = field(default_factory=list)
    """One line per decision with its reason (which format was recognised, which template taken)."""

    def reject(self, rejected: Rejected) -> None:
        place = f"{rejected.origin}" + (f": {rejected.detail}" if rejected.detail else "")
        self.rejected.setdefault(rejected.reason, Tally()).add(place)

    def drop(self, reason: str, place: Origin | str, count: int = 1) -> None:
        self.dropped.setdefault(reason, Tally()).add(str(place), count)

    def redact(self, kinds: Iterable[str], origin: Origin) -> None:
        for kind in kinds:
            self.redacted.setdefault(kind, Tally()).add(str(origin))

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Token counts of examples, into bins of at most 1.5x in width."""
        if len(lengths):
            edges, counts = np.unique(_upper_edges(lengths), return_counts=True)
            for edge, count in zip(edges.tolist(), counts.tolist(), strict=True):
                self.lengths[edge] = self.lengths.get(edge, 0) + count
            self.longest = max(self.longest, int(lengths.max()))

    def add_trained(self, by_role: Iterable[int]) -> None:
        """Trained tokens per role, in the order of ROLES."""
        for role, count in zip(ROLES, by_role, strict=True):
            if count:
                self.trained[role] = self.trained.get(role, 0) + int(count)

    def split(self, name: str) -> SplitFacts:
        return self.splits.setdefault(name, SplitFacts())

    def merge(self, other: Audit) -> None:
        for name in ("read", "answers", "stopped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _TALLIES:
            mine = getattr(self, name)
            for reason, tally in getattr(other, name).items():
                mine.setdefault(reason, Tally()).merge(tally)
        for split, facts in other.splits.items():
            self.split(split).merge(facts)
        for edge, count in other.lengths.items():
            self.lengths[edge] = self.lengths.get(edge, 0) + count
        self.add_trained(other.trained.get(role, 0) for role in ROLES)
        self.longest = max(self.longest, other.longest)
        self.truncated.merge(other.truncated)
        for line in other.notes:
            self.note(line)

    @property
    def kept(self) -> int:
        return sum(facts.rows for facts in self.splits.values())

    @property
    def num_examples(self) -> int:
        return sum(self.lengths.values())

    @property
    def num_rejected(self) -> int:
        return sum(tally.count for tally in self.rejected.values())

    def quantile(self, share: float) -> int:
        """Length of the example at `share` of the sorted lengths, to the upper edge of its bin."""
        reached, wanted = 0, share * self.num_examples
        for edge in sorted(self.lengths):
            reached += self.lengths[edge]
            if reached >= wanted:
                return min(edge, self.longest)
        return 0

    def warnings(self, data: Data) -> list[str]:
        """What a person should know and need not stop for."""
        found = []
        if self.answers and self.stopped < self.answers:
            found.append(f"{self.answers - self.stopped} of {self.answers} trained answers do not end in a trained stop token")
        median = self.quantile(0.5)
        if median and self.longest >= EXTREME_TAIL * median and self.num_examples >= EXTREME_TAIL:
            times = self.longest // median
            found.append(f"the longest example has {self.longest} tokens, {times} times the median: look at it, or lower max_length")
        for kind, tally in self.leaked.items():
            found.append(f"{tally.count} {kind}: {_places(tally)}")
        if self.redacted and data.redact == "report":
            found.append("secrets or personal data were found and left in (data.redact: mask replaces them)")
        return found

    def check(self, data: Data) -> None:
        """The gate: raises DataError that lists everything over the recipe's thresholds."""
        problems = self._problems(data)
        if problems:
            raise DataError(
                "the data audit refuses these rows" if len(problems) > 1 else f"the data audit refuses these rows: {problems[0][0]}",
                where=", ".join(source.path for source in data.sources),
                got="; ".join(problem for problem, _ in problems) if len(problems) > 1 else "",
                remedy="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
            )

    def _problems(self, data: Data) -> list[tuple[str, str]]:
        """(what is wrong, what to do about it)."""
        found: list[tuple[str, str]] = []
        train = self.splits.get("train", SplitFacts())
        rejected = self.num_rejected / self.read if self.read else 0.0
        cut = self.truncated.count / self.num_examples if self.num_examples else 0.0
        if not self.read:
            found.append(("there is no row in any source", "check data.sources"))
        if rejected > data.max_rejected:
            reasons = "; ".join(f"{reason} {tally.count}x ({_places(tally)})" for reason, tally in _by_count(self.rejected))
            limit = f"{rejected:.2%} of rows rejected, allowed are {data.max_rejected:.2%} (data.max_rejected): {reasons}"
            found.append((limit, "repair the rows or raise data.max_rejected"))
        if self.read and not self.kept:
            found.append(("no row is left", "see the table for where the rows went"))
        elif self.kept and not train.trained:
            what = "no row is left to train on" if not train.rows else "not one trained token in the train split"
            found.append((what, "check data.train_on, message weights, data.max_length and the shares of data.validation and data.test"))
        if self.answers and not self.stopped:
            found.append(("no answer ends in a trained stop token", "choose a model.chat_template whose stop token this tokenizer has"))
        if cut > data.max_truncated:
            limit = f"{cut:.2%} of examples lose labels to data.max_length {data.max_length}"
            limit += f", allowed are {data.max_truncated:.2%} (data.max_truncated): {_places(self.truncated)}"
            found.append((limit, "raise data.max_length, set data.overlong to split or drop, or raise data.max_truncated"))
        for name in ("validation", "test"):
            asked = [source.path for source in data.sources if source.split == name]
            if asked and self.kept and not self.splits.get(name, SplitFacts()).rows:
                found.append((f"no row is left for {name}", f"check {', '.join(asked)}"))
        return found

    def table(self) -> str:
        return render(self)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Audit:
        tallies = {name: {reason: Tally(**tally) for reason, tally in value[name].items()} for name in _TALLIES}
        splits = {split: SplitFacts(**facts) for split, facts in value["splits"].items()}
        lengths = {int(edge): count for edge, count in value["lengths"].items()}
        rest = {"splits": splits, "lengths": lengths, "truncated": Tally(**value["truncated"])}
        return cls(**{**value, **tallies, **rest})


_TALLIES = ("rejected", "dropped", "redacted", "duplicates", "leaked")


def _upper_edges(lengths: np.ndarray) -> np.ndarray:
    """1, 2, 3, 4, 6, 8, 12, 16, ...: the smallest edge that is not below each length."""
    powers = 1 << np.arange(40, dtype=np.int64)
    edges = np.unique(np.concatenate([powers, powers[1:] * 3 // 2]))
    return edges[np.searchsorted(edges, lengths)]


def _by_count(tallies: dict[str, Tally]) -> list[tuple[str, Tally]]:
    return sorted(tallies.items(), key=lambda pair: (-pair[1].count, pair[0]))


def _places(tally: Tally) -> str:
    more = tally.count - len(tally.places)
    return "; ".join(tally.places) + (f"; and {more} more" if more > 0 and tally.places else "")
