"""Intervals: shares and perplexities of groups of answers, each with a bootstrap interval, and the draws that all statistics are made of.

In: hits, log-probabilities and counts, one entry a group (a session, a row); or any score of weighted groups. Out: Intervals, draws.
Runs in: the driver; numpy only.

Groups are resampled whole, with replacement (Efron & Tibshirani 1993, chapter 13): answers of one session are alike, sessions are
independent. Where that would mislead (a row drawn twice is no second answer to a count of different words), halves are drawn instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CELLS = 1 << 17
"""Weights held at once: 1 MiB, which stays in a core's cache (1.6x faster than 8 MiB)."""

Score = Callable[[np.ndarray], np.ndarray]
"""weights [R, N] -> [R]: the value where group (or row) i counts weights[r, i] times, a whole number from 0; nan where it has none."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval (95 % unless told otherwise)."""

    value: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """The intervals do not touch, and this one lies higher."""
        return self.low > other.high

    def holds(self, value: float) -> bool:
        """Also where there is no interval."""
        return not (value < self.low or value > self.high)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Sum over sum, with a percentile bootstrap over the groups. Denominators must not all be zero."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(top) or bottom.sum() <= 0:
        return Interval(math.nan, math.nan, math.nan)
    drawn = resampled(lambda weights: (weights @ top) / np.maximum(weights @ bottom, 1e-300), len(top), seed=seed)
    return from_draws(float(top.sum() / bottom.sum()), drawn, confidence)


def ratio_difference(
    ours: Sequence[float], theirs: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Ours less theirs on the same groups, resampled together (paired)."""
    return ratio(np.asarray(ours, float) - np.asarray(theirs, float), denominators, confidence=confidence, seed=seed)


def perplexity(nlls: Sequence[float], num_tokens: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """exp(negative log-likelihood per token); `nlls` are sums in nats, one a group."""
    mean = ratio(nlls, num_tokens, confidence=confidence, seed=seed)
    return Interval(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high))


def closed_share(value: float, floor: float, ceiling: float) -> float:
    """How much of the way from floor to ceiling has been gone; nan where there is no way to go."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else math.nan


def from_draws(value: float, drawn: np.ndarray, confidence: float = 0.95) -> Interval:
    """The percentile interval. Draws without a value (a class that was not drawn, for one) are left out; without any: nan."""
    seen = drawn[np.isfinite(drawn)]
    if not len(seen):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(seen, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def all_alike(value: float, num_groups: int, confidence: float = 0.95) -> Interval:
    """Of a share that is 0 or 1 in every group: Clopper and Pearson's (1934), which no bootstrap of such groups gives.

    It holds for a mean of numbers from 0 to 1 too: of all with a mean of m, at most a share of m is 1.
    """
    missed = 1 - ((1 - confidence) / 2) ** (1 / num_groups)
    return Interval(value, 1 - missed, 1.0) if value else Interval(value, 0.0, missed)


def resampled(score: Score, num_groups: int, *, width: int = 0, halves: bool = False, seed: int = 0) -> np.ndarray:
    """Values that scatter around the score as it would over other test sets, [NUM_RESAMPLES]; their quantiles are the interval.

    `width`: the entries of a row of weights where the score spreads groups over rows (what is held at once goes by it). `halves`:
    halves of the groups without replacement (the delete-d jackknife, Shao & Tu 1995, section 2.3), for a score that changes with how
    many answers there are or with answers that stand there twice; its draws are moved onto the score of all.
    """
    if not halves:
        return np.concatenate([score(weights) for weights in bootstrap_weights(num_groups, seed, width)])
    if num_groups < 2:
        return np.full(NUM_RESAMPLES, math.nan)
    drawn = np.concatenate([score(weights) for weights in half_weights(num_groups, seed, width)])
    kept = num_groups // 2
    scale = math.sqrt(kept / (num_groups - kept))
    return score(np.ones((1, num_groups)))[0] + scale * (drawn - np.nanmean(drawn))


def bootstrap_weights(num_groups: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """How often each group is drawn, [r, num_groups] at a time, NUM_RESAMPLES in all."""
    rng = np.random.default_rng(seed)
    for num in _portions(width or num_groups):
        picks = rng.integers(0, num_groups, (num, num_groups)) + num_groups * np.arange(num)[:, None]
        yield np.bincount(picks.ravel(), minlength=num * num_groups).reshape(num, num_groups).astype(float)


def half_weights(num_groups: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """1 for half of the groups (rounded down) and 0 for the others, [r, num_groups] at a time."""
    rng, kept = np.random.default_rng(seed), num_groups // 2
    for num in _portions(width or num_groups):
        order = rng.random((num, num_groups), dtype=np.float32).argpartition(kept, axis=1)
        weights = np.zeros((num, num_groups))
        np.put_along_axis(weights, order[:, :kept], 1.0, axis=1)
        yield weights


def swap_weights(num_groups: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """A fair coin for each group: 0 or 1, [r, num_groups] at a time."""
    rng = np.random.default_rng(seed)
    for num in _portions(width or num_groups):
        yield rng.integers(0, 2, (num, num_groups), dtype=np.int8).astype(float)


def _portions(width: int) -> Iterator[int]:
    step = max(1, min(NUM_RESAMPLES, CELLS // max(width, 1)))
    for start in range(0, NUM_RESAMPLES, step):
        yield min(step, NUM_RESAMPLES - start)
