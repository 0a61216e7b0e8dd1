"""Task: how systems are asked: to answer in words, to choose a label, or how likely the right answer is to them. One file each.

In: a Panel, questions. Out: Given rows. Runs in: workers (asking), the driver (choosing and checking); no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ftcore.data.types import Conversation, Item, Message, Origin, Row, Text
from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import LATER, Fact
from ftcore.evals.asked import Asked
from ftcore.evals.classifier import Classifier
from ftcore.evals.given import Given
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.shots import prompted
from ftcore.registry import Registry

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.systems import System

TASKS: Registry[type[Task]] = Registry("task", "ftcore.evals.tasks")
MOST_LABELS, LABEL_CHARACTERS, ROWS_A_LABEL = 20, 40, 3
"""References are read as labels where they are few, short, and each stands there about so often."""


@dataclass(frozen=True)
class Task(ABC):
    """`labels`: what may be chosen, where that is what is asked."""

    name: ClassVar[str]
    gives: ClassVar[tuple[Fact, ...]]
    """Facts that its rows have, beside the text."""
    weighed: ClassVar[tuple[Fact, ...]] = ()
    """Facts that they have only of a panel that weighs."""
    usual: ClassVar[tuple[str, ...]]
    """Metrics, where none are asked for."""
    in_words: ClassVar[bool] = True
    """Answers are texts, so that what needs only texts and references can be computed."""
    rows: ClassVar[str] = ""
    """What its rows look like, where they are no conversations with their right answer."""
    item: ClassVar[type[Item]] = Conversation
    """What a recipe's own test rows must be."""
    labels: tuple[str, ...] = ()
    classifier: Classifier | None = None
    """Looks at answers, where a task asks for one."""

    @classmethod
    def read(cls, row: Row) -> Asked:
        """A row of its own shape: of every task that has `rows`, of no other. Raises DataError: `what` is the reason it is left out for."""
        raise NotImplementedError(cls.name)

    @abstractmethod
    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        """What the system makes of some questions, in their order."""

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        """Raises ConfigError or DataError for rows or systems that cannot be asked so."""
        if not rows:
            raise DataError("there is no row to judge by", where=f"task {self.name}")
        if self.item is not Text and not all(row.turns for row in rows):
            raise ConfigError("documents ask nothing", where="--task", got=self.name, remedy="--task documents")

    def measures(self, metric: str, *, weighs: bool) -> bool:
        """Whether a metric that was not asked for would say something."""
        needs, weighed = set(METRICS[metric].needs), {*self.weighed} if weighs else set()
        return needs <= {*self.gives, *weighed} and (self.in_words or bool(needs & weighed))

    def metrics(self, asked: Sequence[str], *, weighs: bool, more: Sequence[str] = ()) -> list[str]:
        """Those asked for, else the usual ones. Raises ConfigError for one that does not exist, is not installed, or that no row has the
        facts for. `weighs`: every system tells how likely an answer is; `more`: metrics that somebody looks at the answers for."""
        facts = {*self.gives, *(self.weighed if weighs else ()), *(need for name in more for need in METRICS[name].needs)}
        chosen = [*(asked or [name for name in self.usual if facts.issuperset(METRICS[name].needs)]), *more]
        for name in chosen:
            metric = METRICS[name]
            metric.check()
            lacking = [need for need in metric.needs if need not in facts]
            if lacking:
                others = [other for other, task in TASKS.items() if {*task.gives, *task.weighed}.issuperset(metric.needs)]
                remedy = "an endpoint does not tell how likely labels are: leave it out" if self.name in others else ""
                remedy = next((LATER[need] for need in lacking if need in LATER), remedy)
                raise ConfigError(
                    f"metric `{name}` cannot be computed from task `{self.name}`", where="--metrics", got=f"no {', '.join(lacking)}",
                    wanted=" | ".join(other for other in METRICS if facts.issuperset(METRICS[other].needs)),
                    remedy=remedy or (f"--task {others[0]}" if others else ""),
                )  # fmt: skip
        return list(dict.fromkeys(chosen))


def asking(metrics: Sequence[str]) -> str:
    """The task whose rows have the facts for all of these: `auto` where answers in words do. Raises ConfigError where none has them."""
    needs = {need for name in metrics for need in METRICS[name].needs}
    tasks = [name for name, task in TASKS.items() if needs <= {*task.gives, *task.weighed} and not task.rows]
    if not tasks:
        raise ConfigError("no task gives what these metrics need from one set of rows", got=", ".join(metrics), remedy="judge them apart")
    return "auto" if "answers" in tasks else tasks[0]


def question(row: Asked, shots: Sequence[Conversation]) -> Conversation:
    """What a system is asked, after its examples."""
    return prompted(Conversation(row.turns, Origin(row.id, 0), row.tools), shots)


def solved(row: Asked, shots: Sequence[Conversation], answer: str) -> Conversation:
    """The same with an answer, of which alone the likelihood counts."""
    asked = question(row, shots)
    return replace(asked, messages=(*(replace(turn, weight=0) for turn in asked.messages), Message("assistant", answer, weight=1)))


def choose(name: str, rows: Sequence[Asked], labels: Sequence[str], classifier: Classifier | None = None) -> tuple[Task, str]:
    """The task, and why it was chosen. `auto` looks at the references."""
    distinct = sorted({row.reference.strip() for row in rows})
    if name != "auto":
        task = TASKS[name]
        return task(tuple(labels) or (tuple(distinct) if name == "labels" else ()), classifier), "as asked for"
    if not any(row.turns for row in rows):
        return TASKS["documents"](), "documents, that ask nothing"
    if labels:
        return TASKS["labels"](labels=tuple(labels)), "labels are given"
    short = max(len(label) for label in distinct) <= LABEL_CHARACTERS
    if short and 2 <= len(distinct) <= MOST_LABELS and len(rows) >= ROWS_A_LABEL * len(distinct):
        return TASKS["labels"](labels=tuple(distinct)), f"{len(distinct)} different references, all short"
    return TASKS["answers"](), f"{len(distinct):,} different references"
