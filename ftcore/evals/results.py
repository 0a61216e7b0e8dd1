"""Results: what an evaluation came to: a line a system, verdicts against the first one, examples; as text, Markdown and JSON.

In: questions, each system's Given rows. Out: Results. Runs in: the driver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcore.data.audit_table import printable_lines
from ftcore.evals.answered import PRESENT, Answers
from ftcore.evals.asked import Asked
from ftcore.evals.gaps import gap
from ftcore.evals.given import Given, answers_of
from ftcore.evals.kinds import Kind, by_kind, kind_cells
from ftcore.evals.leakage import Leak
from ftcore.evals.metrics.base import METRICS, Measured
from ftcore.evals.tables import as_markdown, as_text
from ftcore.evals.verdict import Verdict, compare
from ftcore.evals.words import Reading, read_as

if TYPE_CHECKING:
    from ftcore.evals.systems import System

EXAMPLES = 5
"""Of each kind, of each system."""
ROWS_AT_ONCE = 256
SIZES = ("model", "adapter", "trained in")
CUT = 1500
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class About:
    """What was judged, and how."""

    origin: str
    task: str
    why: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    num_rows: int
    left_out: Mapping[str, int]
    leaks: tuple[Leak, ...]
    leaks_kept: bool
    support: str = ""
    """Who looked at the answers' consistency: the key of its findings in the folder."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Of the recipe: metric -> the value it aims at."""
    by: str = ""
    """The column that says what kind a row is, where results are told by kind."""


@dataclass(frozen=True)
class Line:
    """One system. Seconds and tokens are medians over its answers, while up to a batch of them were made at once; None: not seen."""

    name: str
    key: str
    measured: Mapping[str, Measured]
    num_failed: int
    failure: str
    """Why the first failed row has no answer."""
    first_token_s: float | None
    answer_s: float | None
    tokens_per_s: float | None
    adapter_bytes: int
    model_bytes: int
    train_s: float | None


@dataclass(frozen=True)
class Example:
    """A row worth looking at. `shown`: system -> (its answer, its score by the first metric)."""

    why: str
    id: str
    question: str
    reference: str
    shown: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Results:
    about: About
    reading: Reading
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...]
    examples: tuple[Example, ...]
    forgetting: tuple[str, ...] = ()
    """Sentences about a general set, where one was judged too."""
    kinds: tuple[Kind, ...] = ()

    def cells(self) -> list[list[str]]:
        """Headings, and a row a system."""
        titles = [METRICS[name].title for name in self.about.metrics]
        rows = [
            ["system", *(cell for title in titles for cell in (title, "95 % interval")), "no answer", "first token", "tokens/s", *SIZES]
        ]
        for line in self.lines:
            values = [_value(line.measured[name]) for name in self.about.metrics]
            sizes = [_mib(line.model_bytes), _mib(line.adapter_bytes), "-" if line.train_s is None else f"{line.train_s:,.0f} s"]
            first = "-" if line.first_token_s is None else f"{line.first_token_s:.2f} s"
            speed = "-" if line.tokens_per_s is None else f"{line.tokens_per_s:,.{0 if line.tokens_per_s >= 10 else 1}f}"
            rows.append([line.name, *(cell for pair in values for cell in pair), str(line.num_failed), first, speed, *sizes])
        return rows

    def by_kind(self) -> list[tuple[str, list[list[str]]]]:
        """(title, cells) of a metric each, where results are told by kind."""
        systems = [line.name for line in self.lines]
        titled = [(f"{METRICS[name].title}, by {self.about.by}", name) for name in self.about.metrics if self.kinds]
        return [(printable_lines(title), kind_cells(name, self.kinds, systems)) for title, name in titled]

    def notes(self) -> list[str]:
        """Everything a reader must know about the numbers, one sentence each."""
        about = self.about
        notes = [f"{about.num_rows:,} rows: {about.origin}", f"task {about.task}: {about.why}", f"read as {self.reading}"]
        notes += [f"{count:,} rows left out: {reason}" for reason, count in about.left_out.items()]
        if about.leaks:
            exact = sum(leak.similarity == 1 for leak in about.leaks)
            done = "kept, as asked for" if about.leaks_kept else "left out"
            first = f"{about.leaks[0].id} = {about.leaks[0].copy_of}"
            notes.append(f"{len(about.leaks):,} rows were trained on too ({exact:,} word for word), {done}: {first}")
        notes += [f"consistency of answers with their sources: {about.support.partition('/')[2]}"] if about.support else []
        for name in about.metrics:
            how = [line.measured[name].how for line in self.lines if line.measured[name].how]
            fewer = min(line.measured[name].num_rows for line in self.lines)
            notes += [f"{METRICS[name].title}: {how[0]}"] if how else []
            notes += [f"{METRICS[name].title}: on the {fewer:,} rows that every system has it for"] if fewer < about.num_rows else []
        unmeasured = [METRICS[name].title for name in about.targets if name not in about.metrics]
        notes += [f"targets that task {about.task} does not measure: {', '.join(unmeasured)}"] if unmeasured else []
        return [printable_lines(note) for note in [*notes, *self.failures()]]

    def failures(self) -> list[str]:
        """How many rows have no answer, and why, of each system that lacks some."""
        return [
            f"{line.name}: {line.num_failed:,} rows without answer count as wrong ({line.failure})"
            for line in self.lines
            if line.num_failed
        ]

    def sentences(self) -> list[str]:
        """Verdicts against the first system, gaps to the targets, and what is forgotten."""
        said = [*(verdict.sentence() for verdict in self.verdicts), *self.gaps(), *self.forgetting]
        return [printable_lines(sentence) for sentence in said]

    def gaps(self) -> list[str]:
        """How far each system is from each target that was measured."""
        targets = {name: value for name, value in self.about.targets.items() if name in self.about.metrics}
        return [gap(line.name, line.measured[name], value) for line in self.lines for name, value in targets.items()]

    def text(self) -> str:
        tables = [line for title, cells in self.by_kind() for line in (title, as_text(cells), "")]
        return "\n".join([*self.notes(), "", as_text(self.cells()), "", *tables, *self.sentences()])

    def markdown(self) -> str:
        notes, sentences = ("\n".join(f"* {marked(line)}" for line in lines) for lines in (self.notes(), self.sentences()))
        tables = [line for title, cells in self.by_kind() for line in (f"## {marked(title)}", "", as_markdown(cells), "")]
        return "\n".join(["# Evaluation", "", notes, "", as_markdown(self.cells()), "", *tables, sentences, ""])

    def to_json(self) -> dict[str, Any]:
        """Values that are not numbers are null."""
        return finite(
            {
                "about": asdict(self.about), "reading": asdict(self.reading), "lines": [asdict(line) for line in self.lines],
                "gaps": self.gaps(), "forgetting": list(self.forgetting), "kinds": [asdict(kind) for kind in self.kinds],
                "verdicts": [{**asdict(one), "better": one.better, "sentence": one.sentence()} for one in self.verdicts],
            }
        )  # fmt: skip


def weigh_up(
    about: About,
    systems: Sequence[System],
    asked: Sequence[Asked],
    given: Mapping[str, Sequence[Given]],
    support: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Results:
    """`given`, `support`: by the systems' names. The first system is the one that others are compared with."""
    labelled = about.task == "labels"
    found = support or {}
    answers = [answers_of(system.name, asked, given[system.name], labelled=labelled, support=found.get(system.name)) for system in systems]
    reading = read_as(answers[0].rows)
    measured: dict[str, dict[str, Measured]] = {system.name: {} for system in systems}
    verdicts = []
    shared = {name: in_common(name, answers) for name in about.metrics}
    for name, rows in shared.items():
        for each in rows:
            measured[each.system][name] = METRICS[name].measure(each.rows, reading.language)
        verdicts += [compare(name, other, rows[0], reading.language) for other in rows[1:]]
    lines = [_line(system, given[system.name], measured[system.name]) for system in systems]
    kinds = by_kind(about.metrics, shared, {row.id: row.kind for row in asked}, reading) if about.by else ()
    examples = _examples(about.metrics[0], asked, answers, reading)
    return Results(about, reading, tuple(lines), tuple(verdicts), tuple(examples), kinds=kinds)


def in_common(metric: str, answers: Sequence[Answers]) -> list[Answers]:
    """The rows that have what the metric needs from every system; all rows where none has, so that the metric says what is missing."""
    needs = METRICS[metric].needs
    whole = [all(PRESENT[fact](row) for row in rows for fact in needs) for rows in zip(*(each.rows for each in answers), strict=True)]
    if not any(whole):
        return list(answers)
    return [Answers(each.system, tuple(row for row, fits in zip(each.rows, whole, strict=True) if fits)) for each in answers]


def _line(system: System, given: Sequence[Given], measured: Mapping[str, Measured]) -> Line:
    failed = [row for row in given if row.error]
    paced = [row.completion_tokens / row.seconds for row in given if row.seconds and row.completion_tokens]
    return Line(
        system.name, system.key, measured, len(failed), failed[0].error if failed else "", _median([row.first_token_s for row in given]),
        _median([row.seconds or None for row in given]), _median(paced), system.num_bytes, system.model_bytes, system.train_s,
    )  # fmt: skip


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes else "-"


def _median(values: Sequence[float | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return median(seen) if seen else None


def _examples(metric: str, asked: Sequence[Asked], answers: Sequence[Answers], reading: Reading) -> list[Example]:
    """By the first metric: of each system the worst rows, and those that changed most against the first system."""
    shared = in_common(metric, answers)
    better = 1 if METRICS[metric].higher_is_better else -1
    scores = [better * _row_scores(metric, each, reading) for each in shared]
    by_id, found = {row.id: row for row in asked}, []

    def example(why: str, at: int) -> Example:
        row = by_id[shared[0].rows[at].id]
        shown = {
            each.system: (cut(each.rows[at].text), METRICS[metric].shown(better * score[at]))
            for each, score in zip(shared, scores, strict=True)
        }
        return Example(why, row.id, cut(row.turns[-1].content if row.turns else ""), cut(row.reference), shown)

    for number, (each, score) in enumerate(zip(shared, scores, strict=True)):
        if number:
            change = np.nan_to_num(score - scores[0])
            order = np.argsort(change, kind="stable")
            found += [example(f"{each.system}: better than {shared[0].system}", at) for at in order[::-1][:EXAMPLES] if change[at] > 0]
            found += [example(f"{each.system}: worse than {shared[0].system}", at) for at in order[:EXAMPLES] if change[at] < 0]
        worst = np.argsort(np.nan_to_num(score, nan=np.inf), kind="stable")[:EXAMPLES]
        found += [example(f"{each.system}: worst", at) for at in worst if score[at] < better * METRICS[metric].best]
    return found


def _row_scores(metric: str, answers: Answers, reading: Reading) -> np.ndarray:
    """The metric of each row alone, [N]; nan where one row has none."""
    score, count = METRICS[metric].prepare(answers.rows, reading.language).score, len(answers.rows)
    return np.concatenate([score(np.eye(count)[at : at + ROWS_AT_ONCE]) for at in range(0, count, ROWS_AT_ONCE)])


def _value(measured: Measured) -> tuple[str, str]:
    metric = METRICS[measured.metric]
    return metric.shown(measured.interval.value), metric.shown_ends(measured.interval)


def cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} [{len(text) - CUT:,} more characters]"


def marked(text: str) -> str:
    """As Markdown that says what the text says: no markup of its own."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|" else character for character in text)


def finite(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
