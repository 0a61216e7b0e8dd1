"""answers: each system answers in words, and the words are compared with the references.

In: questions. Out: Given texts. Runs in: workers of an evaluation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation
from ftcore.evals.asked import Asked
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task, question

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.systems import System


@TASKS.register("answers")
@dataclass(frozen=True)
class Answers(Task):
    """Free text."""

    name = "answers"
    gives = ("references",)
    usual = ("exact_match", "token_f1", "rouge_l")

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        said = await asyncio.gather(*(panel.say(system, question(row, shots), max_tokens) for row in rows))
        return [Given(id=row.id, **asdict(answer)) for row, answer in zip(rows, said, strict=True)]
