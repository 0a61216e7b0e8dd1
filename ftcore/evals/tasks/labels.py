"""labels: each system chooses among a few labels: the likeliest where it tells likelihoods, else the one its answer names.

In: questions whose references are labels. Out: Given choices, and scores of every label. Runs in: workers of an evaluation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation
from ftcore.errors import ConfigError, DataError
from ftcore.evals.asked import Asked
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task, question, solved
from ftcore.evals.words import words

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.predictors import Forecast
    from ftcore.evals.systems import System


@TASKS.register("labels")
@dataclass(frozen=True)
class Labels(Task):
    """One of a few labels."""

    name = "labels"
    gives = ("references", "gold", "chosen")
    weighed = ("scores",)
    usual = ("accuracy", "f1_macro", "auc", "ece")

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        super().check(rows, weighs=weighs)
        if len(self.labels) < 2:
            raise ConfigError(
                "a choice needs two labels or more",
                where="--labels",
                got=", ".join(self.labels) or "none",
                remedy="name them all: --labels A B",
            )
        for row in rows:
            if row.reference.strip() not in self.labels:
                raise DataError(
                    "a row's reference is none of the labels", where=row.id, got=row.reference.strip()[:200],
                    wanted=" | ".join(self.labels), remedy="name every label with --labels, or judge the texts: --task answers",
                )  # fmt: skip

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        if not panel.weighs:
            said = await asyncio.gather(*(panel.say(system, question(row, shots), max_tokens) for row in rows))
            return [
                Given(id=row.id, chosen=named(answer.text, self.labels), **asdict(answer)) for row, answer in zip(rows, said, strict=True)
            ]
        weighed = iter(panel.weigh(system, [solved(row, shots, label) for row in rows for label in self.labels]))
        return [self._chosen(row, list(islice(weighed, len(self.labels)))) for row in rows]

    def _chosen(self, row: Asked, weighed: Sequence[Forecast | str]) -> Given:
        scores: dict[str, float] = {}
        for label, forecast in zip(self.labels, weighed, strict=True):
            if isinstance(forecast, str):
                return Given("", id=row.id, chosen="", error=forecast)
            scores[label] = -float(forecast.nlls.sum())
        chosen = max(scores, key=scores.__getitem__)
        return Given(chosen, id=row.id, chosen=chosen, scores=scores)


def named(text: str, labels: Sequence[str]) -> str:
    """The label that the text is, else the only one that it holds as whole words (a label within a longer one that is there does not
    count); "" where it names none, or several."""
    if text.strip() in labels:
        return text.strip()
    said = words(text)
    found = [label for label in labels if _holds(said, words(label))]
    outer = [label for label in found if not any(other != label and _holds(words(other), words(label)) for other in found)]
    return outer[0] if len(outer) == 1 else ""


def _holds(text: Sequence[str], part: Sequence[str]) -> bool:
    return bool(part) and any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))
