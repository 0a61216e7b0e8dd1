"""Judgement: what a judge's verdicts on two systems come to: who wins, how sure that is, how far the judge can be trusted; as text.

In: a pairing, bouts, what it cost. Out: a Judgement. Runs in: the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ftcore.data.audit_table import printable_lines
from ftcore.evals.intervals import Interval, ratio
from ftcore.evals.kappa import Agreement, Label, agreement
from ftcore.evals.metrics.base import METRICS, Measured
from ftcore.evals.pairs import Bout, Outcome, Pairing, told
from ftcore.evals.results import EXAMPLES, cut, finite, marked
from ftcore.evals.spending import Spent
from ftcore.evals.tables import as_markdown, as_text
from ftcore.evals.verdict import Verdict, compare

METRIC = "win_rate"
PLACES = {
    "first place": "the first place won both times",
    "second place": "the second place won both times",
    "one tie": "a tie in one order",
}


@dataclass(frozen=True)
class About:
    """Who judged, by what, at what cost. `stopped`: why before the end, or ""."""

    judge: str
    rubric: str
    rubric_digest: str
    spent: Spent
    money: float | None
    stopped: str
    most_unjudged: float
    confidence: float
    place: str
    """The folder of the replies."""


@dataclass(frozen=True)
class Sample:
    """A row to look at. `reasons`: the judge's, with ours in the first place and with theirs."""

    why: str
    id: str
    question: str
    reference: str
    answers: tuple[str, str]
    reasons: tuple[str, str]


@dataclass(frozen=True)
class Judgement:
    """`verdict` and `measured` are None where too few rows were judged to say anything."""

    ours: str
    theirs: str
    about: About
    num_rows: int
    outcomes: dict[Outcome, int]
    hows: dict[str, int]
    measured: Measured | None
    verdict: Verdict | None
    by_order: Interval
    """Share of the rows asked in both orders where the order decided."""
    people: Agreement | None
    people_decided: Agreement | None
    """The same where the judge preferred one."""
    num_labels_missed: int
    """Labels of rows without a judgement."""
    samples: tuple[Sample, ...]

    @property
    def num_missing(self) -> int:
        return self.hows.get("missing", 0)

    @property
    def num_asked(self) -> int:
        """Rows that the judge was asked about, in both orders."""
        return self.num_rows - self.num_missing - self.hows.get("same text", 0)

    @property
    def num_unread(self) -> int:
        return self.hows.get("unread", 0)

    @property
    def unread_share(self) -> float:
        """Of the rows asked."""
        return self.num_unread / self.num_asked if self.num_asked else 0.0

    @property
    def is_trusted(self) -> bool:
        return self.unread_share <= self.about.most_unjudged

    def sentence(self) -> str:
        begin = f"cannot tell {self.ours} from {self.theirs}: the judge"
        if not self.is_trusted:
            share = f"{100 * self.unread_share:.1f} %, more than {100 * self.about.most_unjudged:g} %"
            return printable_lines(f"{begin} gave no verdict that can be read on {self.num_unread:,} of {self.num_asked:,} rows ({share})")
        if self.verdict is None:
            return printable_lines(f"{begin} was asked about no row")
        return printable_lines(self.verdict.sentence())

    def notes(self) -> list[str]:
        """Everything a reader must know about the numbers, one sentence each."""
        about, count = self.about, self.outcomes
        notes = [f"judged by {about.judge}, rubric {about.rubric} ({about.rubric_digest[:12]}), each row in both orders"]
        if about.judge in (self.ours, self.theirs):
            notes.append("the judge is one of the two: judges favour their own answers")
        notes.append(
            f"{self.ours} wins {count.get('ours', 0):,}, {count.get('tie', 0):,} ties, {self.theirs} wins {count.get('theirs', 0):,}, "
            f"{self.num_unread:,} unjudged, of {self.num_rows:,} rows"
        )
        if self.hows.get("same text"):
            notes.append(f"{self.hows['same text']:,} rows have the same answer twice: ties, and nobody was asked")
        if self.num_asked > self.num_unread:
            parts = "; ".join(f"{self.hows[how]:,}: {said}" for how, said in PLACES.items() if self.hows.get(how))
            notes.append(f"the order decided {_share(self.by_order)} of the rows asked{f' ({parts})' if parts else ''}: ties")
        if self.num_unread:
            share = f"{100 * self.unread_share:.1f} % of the rows asked"
            notes.append(f"{self.num_unread:,} rows are unjudged ({share}): no verdict could be read, asked twice")
        notes += self._about_people()
        if about.stopped:
            left = f"{self.num_missing:,} of {self.num_rows:,} rows are not judged yet, the others are a sample of all"
            notes.append(f"stopped: {about.stopped}; {left}")
        money = "" if about.money is None else f", {about.money:.4f} in money"
        uncounted = (
            f" ({about.spent.uncounted:,} replies were not counted by the endpoint: taken at their most)" if about.spent.uncounted else ""
        )
        notes.append(f"cost: {about.spent.calls:,} calls, {about.spent.tokens:,} tokens{money}{uncounted}")
        return [printable_lines(note) for note in notes]

    def _about_people(self) -> list[str]:
        notes = []
        for found, what in ((self.people, "with people"), (self.people_decided, "with people where both preferred one")):
            if found is not None:
                kappa = f"{found.kappa.value:.2f} ({found.kappa.low:.2f}..{found.kappa.high:.2f})"
                ties = f", {found.num_ties:,} of them ties" if found.num_ties else ""
                labels = f"{found.num_labels:,} labels{ties}, of {found.num_rows:,} rows"
                notes.append(f"agreement {what}: {_share(found.share)}, Cohen's kappa {kappa}, {labels}")
        return notes + ([f"{self.num_labels_missed:,} labels are of rows without a judgement"] if self.num_labels_missed else [])

    def cells(self) -> list[list[str]]:
        rows = [["system", "win rate", f"{100 * self.about.confidence:.0f} % interval", "wins", "ties", "losses"]]
        if self.measured is None:
            return rows
        metric, value = METRICS[METRIC], self.measured.interval
        wins, losses, ties = self.outcomes.get("ours", 0), self.outcomes.get("theirs", 0), self.outcomes.get("tie", 0)
        mirrored = Interval(1 - value.value, 1 - value.high, 1 - value.low)
        for name, shown, counts in ((self.ours, value, (wins, ties, losses)), (self.theirs, mirrored, (losses, ties, wins))):
            rows.append([name, metric.shown(shown.value), metric.shown_ends(shown), *(f"{count:,}" for count in counts)])
        return rows

    def text(self) -> str:
        table = [as_text(self.cells()), ""] if self.measured else []
        return "\n".join([*self.notes(), "", *table, self.sentence()])

    def markdown(self) -> str:
        notes = "\n".join(f"* {marked(note)}" for note in self.notes())
        lines = [f"# {marked(self.ours)} against {marked(self.theirs)}", "", marked(self.sentence()), ""]
        lines += [as_markdown(self.cells()), ""] if self.measured else []
        return "\n".join([*lines, notes, "", *(_as_markdown(sample, self.ours, self.theirs) for sample in self.samples)])

    def to_json(self) -> dict[str, Any]:
        """Values that are not numbers are null."""
        return finite({**asdict(self), "sentence": self.sentence(), "notes": self.notes(), "unjudged_share": self.unread_share})


def weigh(pairing: Pairing, bouts: Sequence[Bout], about: About, labels: Sequence[Label]) -> Judgement:
    """`labels`: what people said, if they were asked."""
    confidence = about.confidence
    ours, theirs = pairing.points(bouts)
    hows = Counter(str(bout.how) for bout in bouts)
    asked = [bout for bout in bouts if bout.how not in ("missing", "same text", "unread")]
    judged = {bout.id: bout.outcome for bout in bouts if bout.outcome != "unjudged"}
    said = [(row, side, judged[row]) for row, side in labels if row in judged]
    decided = [each for each in said if "tie" not in each[1:]]
    found = Judgement(
        ours.system, theirs.system, about, len(bouts), dict(Counter(bout.outcome for bout in bouts)), dict(hows),
        None, None, ratio([float(bout.by_order) for bout in asked], [1.0] * len(asked), confidence=confidence),
        agreement(said, confidence=confidence) if said else None, agreement(decided, confidence=confidence) if decided else None,
        len(labels) - len(said), tuple(_samples(pairing, bouts)),
    )  # fmt: skip
    if not found.is_trusted or not ours.rows:
        return found
    measured = METRICS[METRIC].measure(ours.rows, "en", confidence=confidence)
    return replace(found, measured=measured, verdict=compare(METRIC, ours, theirs, "en", confidence=confidence))


def _samples(pairing: Pairing, bouts: Sequence[Bout]) -> list[Sample]:
    """The first rows of each kind."""
    texts = {one.id: (cut(one.text), cut(other.text)) for one, other in zip(pairing.ours.rows, pairing.theirs.rows, strict=True)}
    kinds = {
        f"{pairing.ours.system} wins": [bout for bout in bouts if bout.outcome == "ours"],
        f"{pairing.theirs.system} wins": [bout for bout in bouts if bout.outcome == "theirs"],
        "the order decided": [bout for bout in bouts if bout.by_order],
        "unjudged": [bout for bout in bouts if bout.how == "unread"],
    }
    return [
        Sample(why, bout.id, cut(told(row.turns)), cut(row.reference), texts[bout.id], (cut(bout.reasons[0]), cut(bout.reasons[1])))
        for why, found in kinds.items()
        for bout in found[:EXAMPLES]
        for row in (pairing.asked[bout.id],)
    ]


def _as_markdown(sample: Sample, ours: str, theirs: str) -> str:
    told = {
        "asked": sample.question, "right": sample.reference, ours: sample.answers[0], theirs: sample.answers[1],
        f"the judge, {ours} first": sample.reasons[0], f"the judge, {theirs} first": sample.reasons[1],
    }  # fmt: skip
    lines = [f"* {marked(what)}: {marked(printable_lines(' '.join(text.split())))}" for what, text in told.items()]
    return "\n".join([f"## {marked(sample.why)}: {marked(sample.id)}", "", *lines, ""])


def _share(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % ({100 * interval.low:.1f}..{100 * interval.high:.1f})"
