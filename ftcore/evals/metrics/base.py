"""Metric: what an answer is judged by. One idea a file in this folder, each metric one decorated function.

In: Answered rows. Out: a value with its bootstrap interval; values under any weights, for every statistic. Runs in: the driver; numpy only.

A metric says its value for rows that count 0, 1, 2... times, for many such weightings at once. Most are sums over rows, put into a
formula: what is read from the texts is read once, however often the rows are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import Fact, Rows, group_codes, require
from ftcore.evals.intervals import Interval, Score, all_alike, from_draws, resampled
from ftcore.evals.words import Language
from ftcore.registry import Registry

METRICS: Registry[Metric] = Registry("metric", "ftcore.evals.metrics")

Unit = Literal["share", "points", "plain"]
"""share: 0 to 1, printed in points of a hundred; points: 0 to 100; plain: a number without a unit."""
SCALE: dict[Unit, float] = {"share": 100, "points": 1, "plain": 1}
RANGE: dict[Unit, tuple[float, float]] = {"share": (0, 1), "points": (0, 100), "plain": (-np.inf, np.inf)}


@dataclass(frozen=True)
class Prepared:
    """A metric on given rows. `how`: what a reader must know to compare the number with another's (BLEU's signature, for one)."""

    score: Score
    how: str = ""
    counted: np.ndarray | None = None
    """Of a mean of numbers from 0 to 1: which rows are in it, [N]."""


@dataclass(frozen=True)
class Measured:
    """A metric's value on one system's answers."""

    metric: str
    interval: Interval
    how: str
    num_rows: int
    num_groups: int


@dataclass(frozen=True)
class Metric:
    """A metric's facts, and `make`, which reads the rows. Interval ends are nan where all rows are of one group, or came out alike
    (but for means that are 0 or 1: see `intervals.all_alike`)."""

    name: str
    title: str
    """As sentences and tables call it."""
    make: Callable[[Rows, Language], Prepared]
    needs: tuple[Fact, ...]
    """What every row must have, beside its text."""
    unit: Unit
    higher_is_better: bool
    best: float
    """What perfect answers come to."""
    halves: bool
    """It changes with how many answers there are, or with one that stands there twice: resampled as `intervals.resampled` says."""
    package: str
    """The module it needs beside ours; part of the extra `eval`."""

    @property
    def ranks(self) -> bool:
        """Whether more, or less, is better: not where the best lies between the ends."""
        low, high = RANGE[self.unit]
        return self.unit == "plain" or not low < self.best < high

    def check(self) -> None:
        """Raises ConfigError where its package is not installed; asks nothing else, so it may be called before anything runs."""
        if self.package and find_spec(self.package) is None:
            raise ConfigError(
                f"metric `{self.name}` needs a package that is not installed", got=f"no {self.package}", remedy="pip install 'ftcore[eval]'"
            )

    def prepare(self, rows: Rows, language: Language) -> Prepared:
        """Raises DataError for no rows, a row that lacks what is needed, and rows that give it no value."""
        self.check()
        require(rows, self.needs, self.name)
        prepared = self.make(rows, language)
        if not np.isfinite(prepared.score(np.ones((1, len(rows))))[0]):
            raise DataError(
                f"`{self.name}` has no value on these rows", got=f"{len(rows)} rows", remedy="see what it needs, or take another metric"
            )
        return prepared

    def measure(self, rows: Rows, language: Language, *, confidence: float = 0.95, seed: int = 0) -> Measured:
        """The value and its interval, over whole groups."""
        prepared = self.prepare(rows, language)
        codes, num_groups = group_codes(rows)
        value = float(prepared.score(np.ones((1, len(rows))))[0])
        if num_groups < 2:
            return Measured(self.name, Interval(value, np.nan, np.nan), prepared.how, len(rows), num_groups)
        drawn = resampled(lambda w: prepared.score(w[:, codes]), num_groups, width=len(rows), halves=self.halves, seed=seed)
        interval = from_draws(value, np.clip(drawn, *RANGE[self.unit]), confidence)
        if math.isclose(interval.low, interval.high, rel_tol=1e-9, abs_tol=1e-12):  # rows that came out alike say nothing of others
            interval = Interval(value, np.nan, np.nan)
            if prepared.counted is not None and value in (0, 1):
                counted = np.arange(num_groups)[codes][prepared.counted > 0]
                interval = all_alike(value, len(np.unique(counted)), confidence)
        return Measured(self.name, interval, prepared.how, len(rows), num_groups)

    def digits(self, error: float = np.nan) -> int:
        """Behind the point: as many as tell values apart that differ by this standard error."""
        usual, error = 3 if self.unit == "plain" else 1, error * SCALE[self.unit]
        return max(usual, math.ceil(-math.log10(error))) if error > 0 else usual

    def shown(self, value: float, digits: int | None = None) -> str:
        return f"{value * SCALE[self.unit]:.{self.digits() if digits is None else digits}f}"

    def shown_ends(self, interval: Interval, digits: int | None = None) -> str:
        return "-" if np.isnan(interval.low) else f"{self.shown(interval.low, digits)}..{self.shown(interval.high, digits)}"

    def amount(self, value: float, digits: int | None = None) -> str:
        """A difference, with its unit."""
        return self.shown(value, digits) + ("" if self.unit == "plain" else " points")


def metric(
    name: str,
    title: str,
    *,
    needs: tuple[Fact, ...] = (),
    unit: Unit = "share",
    higher_is_better: bool = True,
    best: float = 1.0,
    halves: bool = False,
    package: str = "",
) -> Callable[[Callable[[Rows, Language], Prepared]], Callable[[Rows, Language], Prepared]]:
    """Decorator: registers a function (rows, language) -> Prepared as a metric."""

    def add(make: Callable[[Rows, Language], Prepared]) -> Callable[[Rows, Language], Prepared]:
        METRICS.register(name)(Metric(name, title, make, needs, unit, higher_is_better, best, halves, package))
        return make

    return add


def sums(stats: np.ndarray, formula: Callable[[np.ndarray], np.ndarray], how: str = "") -> Prepared:
    """A formula of weighted sums. stats: [N, K]; formula: [R, K] -> [R]."""
    return Prepared(lambda weights: formula(weights @ stats), how)


def mean(values: np.ndarray, how: str = "") -> Prepared:
    """The mean over rows; values: [N], from 0 to 1."""
    return Prepared(lambda weights: quotient(weights @ values, weights.sum(1)), how, np.ones(len(values)))


def quotient(top: np.ndarray, bottom: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """top / bottom, and `empty` where there is nothing below."""
    return np.divide(top, bottom, out=np.full(np.shape(top), empty), where=bottom > 0)
