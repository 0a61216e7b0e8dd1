"""Metrics: shares and perplexities of groups of answers, each with a bootstrap interval.

In: hits, log-probabilities and counts, one entry a group (a session, a row). Out: Intervals. Runs in: the driver; numpy only.

Groups are resampled whole, with replacement (Efron & Tibshirani 1993, chapter 13): answers of one session are alike, sessions are
independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval (95 % unless told otherwise)."""

    value: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """The intervals do not touch, and this one lies higher."""
        return self.low > other.high


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Sum over sum, with a percentile bootstrap over the groups. Denominators must not all be zero."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(top) or bottom.sum() <= 0:
        return Interval(math.nan, math.nan, math.nan)
    picks = resamples(len(top), seed)
    drawn = (picks @ top) / np.maximum(picks @ bottom, 1e-300)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def ratio_difference(
    ours: Sequence[float], theirs: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Ours less theirs on the same groups, resampled together (paired)."""
    return ratio(np.asarray(ours, float) - np.asarray(theirs, float), denominators, confidence=confidence, seed=seed)


def perplexity(nlls: Sequence[float], num_tokens: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """exp(negative log-likelihood per token); `nlls` are sums in nats, one a group."""
    mean = ratio(nlls, num_tokens, confidence=confidence, seed=seed)
    return Interval(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high))


def resamples(num_groups: int, seed: int) -> np.ndarray:
    """How often each group is drawn, [NUM_RESAMPLES, num_groups]."""
    return np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), NUM_RESAMPLES)


def closed_share(value: float, floor: float, ceiling: float) -> float:
    """How much of the way from floor to ceiling has been gone; nan where there is no way to go."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else math.nan
