"""likelihood: how likely the right answer is to each system, whatever it would say itself.

In: questions. Out: Given likelihoods. Runs in: workers of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Conversation
from ftcore.errors import ConfigError
from ftcore.evals.answered import LIKELIHOODS
from ftcore.evals.asked import Asked
from ftcore.evals.given import Given
from ftcore.evals.tasks.base import TASKS, Task, solved

if TYPE_CHECKING:
    from ftcore.evals.panel import Panel
    from ftcore.evals.predictors import Forecast
    from ftcore.evals.systems import System


@TASKS.register("likelihood")
@dataclass(frozen=True)
class Likelihood(Task):
    """Perplexity of the references, their stop token counted."""

    name = "likelihood"
    in_words = False
    gives = ("references",)
    weighed = LIKELIHOODS
    usual = ("perplexity", "perplexity_byte")

    def check(self, rows: Sequence[Asked], *, weighs: bool) -> None:
        super().check(rows, weighs=weighs)
        if not weighs:
            raise ConfigError(
                "an endpoint does not tell how likely a given answer is", where="--systems", remedy="leave it out, or --task answers"
            )

    async def answer(
        self, panel: Panel, system: System, rows: Sequence[Asked], shots: Sequence[Conversation], max_tokens: int
    ) -> list[Given]:
        weighed = panel.weigh(system, [solved(row, shots, row.reference) for row in rows])
        return [_given(row, forecast) for row, forecast in zip(rows, weighed, strict=True)]


def _given(row: Asked, forecast: Forecast | str) -> Given:
    if isinstance(forecast, str):
        return Given("", id=row.id, error=forecast)
    num_bytes = len(row.reference.encode("utf-8", "replace"))
    return Given("", id=row.id, nll=float(forecast.nlls.sum()), num_tokens=int(forecast.tokens.sum()), num_bytes=num_bytes)
