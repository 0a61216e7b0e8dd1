"""Next operation: how often predictors foretell what a user does next, side by side on the same held-out sessions.

In: predictors, conversations (a session each). Out: a Table with intervals, as text, Markdown or JSON. Runs in: the driver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ftcore.data.types import Conversation
from ftcore.evals.intervals import Interval, closed_share, perplexity, ratio, ratio_difference
from ftcore.evals.predictors import Forecast, Predictor
from ftcore.evals.tables import as_markdown, as_text

HEADINGS = ("predictor", "exact match %", "95 % interval", "perplexity", "95 % interval")


@dataclass(frozen=True)
class Line:
    """One predictor. exact_match: share of operations of which every token was foretold; perplexity: per token of the operations."""

    name: str
    exact_match: Interval
    perplexity: Interval

    def cells(self) -> tuple[str, ...]:
        exact, ppl = self.exact_match, self.perplexity
        hit = (f"{100 * exact.value:.1f}", f"{100 * exact.low:.1f} .. {100 * exact.high:.1f}")
        return (self.name, *hit, *(("-", "-") if math.isnan(ppl.value) else (f"{ppl.value:.3f}", f"{ppl.low:.3f} .. {ppl.high:.3f}")))


@dataclass(frozen=True)
class Table:
    """What some predictors came to on one set of sessions. `hits`: per predictor, the hits of every session (for paired tests)."""

    title: str
    num_sessions: int
    num_operations: int
    lines: tuple[Line, ...]
    hits: dict[str, tuple[float, ...]]
    counts: tuple[int, ...]
    """Operations of every session."""

    def __getitem__(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def lead(self, ours: str, theirs: str) -> Interval:
        """How many exact matches `ours` is ahead, as a share, paired by session."""
        return ratio_difference(self.hits[ours], self.hits[theirs], self.counts)

    def closed(self, ours: str, floor: str, ceiling: str) -> float:
        """How much of the way from `floor` to `ceiling` is gone."""
        return closed_share(self[ours].exact_match.value, self[floor].exact_match.value, self[ceiling].exact_match.value)

    def text(self) -> str:
        return f"{self.caption()}\n{as_text(self._cells())}"

    def caption(self) -> str:
        return f"{self.title} ({self.num_sessions} sessions, {self.num_operations} operations)"

    def markdown(self) -> str:
        return f"**{self.caption()}**\n\n{as_markdown(self._cells())}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [HEADINGS, *(line.cells() for line in self.lines)]

    def to_json(self) -> dict[str, object]:
        lines = [{key: value for key, value in asdict(line).items() if not _is_nan(value)} for line in self.lines]
        return {"title": self.title, "num_sessions": self.num_sessions, "num_operations": self.num_operations, "lines": lines}


def judge(title: str, predictors: Sequence[Predictor], conversations: Sequence[Conversation]) -> Table:
    """Forecasts every conversation with every predictor. One without tokens of its own (n-gram, ceiling) takes the first's counts."""
    forecasts = {predictor.name: predictor.forecast(conversations) for predictor in predictors}
    first = next(iter(forecasts.values()))
    tokens = [float(forecast.tokens.sum()) for forecast in first]
    counts = tuple(len(forecast.hits) for forecast in first)
    hits = {name: tuple(float(f.hits.sum()) for f in made) for name, made in forecasts.items()}
    lines = tuple(Line(name, ratio(hits[name], counts), _perplexity(made, tokens)) for name, made in forecasts.items())
    return Table(title, len(conversations), sum(counts), lines, hits, counts)


def _perplexity(forecasts: Sequence[Forecast], tokens: Sequence[float]) -> Interval:
    own = [float(f.tokens.sum()) for f in forecasts]
    nlls = [float(np.sum(f.nlls)) for f in forecasts]
    if any(math.isnan(nll) for nll in nlls):
        return Interval(math.nan, math.nan, math.nan)
    return perplexity(nlls, own if sum(own) else tokens)


def _is_nan(value: object) -> bool:
    return isinstance(value, dict) and math.isnan(float(value.get("value", 0.0)))
