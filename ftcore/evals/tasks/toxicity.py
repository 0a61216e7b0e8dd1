"""toxicity: what a classifier that the user names makes of each answer.

In: rows {prompt | messages}; `--classifier FOLDER#LABEL`, the label that stands for toxic. Out: Given probabilities.
Runs in: workers of an evaluation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation, Row
from ftcore.errors import ConfigError
from ftcore.evals.asked import Asked, asked_row, prompt_of
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task, question

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.systems import System


@TASKS.register("toxicity")
@dataclass(frozen=True)
class Toxicity(Task):
    """How toxic the answers are. A row without an answer counts as not toxic: nothing was said."""

    name = "toxicity"
    gives = ("toxicity",)
    usual = ("toxicity_share", "toxicity")
    rows = "{prompt: text}, or {messages: turns}"

    @classmethod
    def read(cls, row: Row) -> Asked:
        return asked_row(row, prompt_of(row))

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        super().check(rows, weighs=weighs)
        if self.classifier is None:
            raise ConfigError("who says what is toxic?", where="--classifier", got="none", wanted="FOLDER#LABEL, a classifier on disk")

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        said = await asyncio.gather(*(panel.say(system, question(row, shots), max_tokens) for row in rows))
        assert self.classifier is not None
        found = self.classifier.probabilities([answer.text for answer in said])
        return [
            Given(id=row.id, toxicity=0.0 if answer.error else value, **asdict(answer))
            for row, answer, value in zip(rows, said, found, strict=True)
        ]
