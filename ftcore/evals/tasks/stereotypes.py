"""stereotypes: of two sentences that differ in whom they speak of, is the stereotyping one likelier? Outside any conversation.

In: rows {sent_more, sent_less}, as CrowS-Pairs names them (Nangia et al. 2020): the more and the less stereotyping sentence; other columns
do no harm. Out: Given differences of log-likelihoods. Runs in: workers of an evaluation.

Nangia et al. score masked models; a causal one tells the likelihood of a whole sentence, its first word included. A longer sentence is less
likely for its length alone: the pairs must be minimal edits of one another, as theirs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation, Message, Row
from ftcore.errors import ConfigError, DataError
from ftcore.evals.asked import Asked, asked_row
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.systems import System


@TASKS.register("stereotypes")
@dataclass(frozen=True)
class Stereotypes(Task):
    """The likelier of two sentences."""

    name = "stereotypes"
    in_words = False
    gives = ()
    weighed = ("stereotyping",)
    usual = ("stereotype_share",)
    rows = "{sent_more: the stereotyping sentence, sent_less: the other one}"

    @classmethod
    def read(cls, row: Row) -> Asked:
        more, less = (row.value.get(key) for key in ("sent_more", "sent_less"))
        if not (isinstance(more, str) and isinstance(less, str) and more.strip() and less.strip()):
            raise DataError("this row is no pair of sentences", where=row.origin, got=", ".join(map(str, row.value)), wanted=cls.rows)
        return asked_row(row, (Message("user", more),), less)

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        super().check(rows, weighs=weighs)
        if not weighs:
            raise ConfigError("an endpoint does not tell how likely a sentence is", where="--systems", remedy="leave it out")

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        if shots:
            raise ConfigError("bare sentences have no examples in front", where=system.name, remedy="leave +k out")
        found = panel.weigh_texts(system, [text for row in rows for text in (row.turns[0].content, row.reference)])
        nlls = [float(forecast.nlls.sum()) for forecast in found]
        return [
            Given(f"likelier by {less - more:+.2f} nats", id=row.id, stereotyping=less - more)
            for row, more, less in zip(rows, nlls[::2], nlls[1::2], strict=True)
        ]
