"""documents: how likely whole documents are to each system: what continued pre-training is judged by, and plain text a system may forget.

In: documents, as training reads them or rows {text}. Out: Given likelihoods. Runs in: workers of an evaluation.

A document longer than the context is cut into windows of it, each from its own beginning: its first tokens are foretold from less than they
have in the document, for every system alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation, Row, Text
from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import LIKELIHOODS
from ftcore.evals.asked import Asked, asked_of
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.systems import System


@TASKS.register("documents")
@dataclass(frozen=True)
class Documents(Task):
    """Perplexity of all that they say."""

    name = "documents"
    item = Text
    in_words = False
    gives = ()
    weighed = LIKELIHOODS
    usual = ("perplexity", "perplexity_byte")
    rows = "{text: a document}"

    @classmethod
    def read(cls, row: Row) -> Asked:
        text = row.value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError("this row is no document", where=row.origin, got=", ".join(map(str, row.value)), wanted=cls.rows)
        return asked_of(Text(text, row.origin))

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        super().check(rows, weighs=weighs)
        if not weighs:
            raise ConfigError("an endpoint does not tell how likely a document is", where="--systems", remedy="leave it out")

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        if shots:
            raise ConfigError("documents have no examples in front", where=system.name, remedy="leave +k out")
        found = panel.weigh_texts(system, [row.reference for row in rows])
        return [
            Given(
                "", id=row.id, nll=float(forecast.nlls.sum()), num_tokens=int(forecast.tokens.sum()),
                num_bytes=len(row.reference.encode("utf-8", "replace")),
            )
            for row, forecast in zip(rows, found, strict=True)
        ]  # fmt: skip
