"""Intervals hold what they say: over simulated test sets, how often the interval holds what such sets come to on average."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ftcore.evals.answered import Answered
from ftcore.evals.metrics.base import METRICS

Draw = Callable[[np.random.Generator, int], list[Answered]]
VOCABULARY = 300
FREQUENCIES = 1 / np.arange(1, VOCABULARY + 1) / (1 / np.arange(1, VOCABULARY + 1)).sum()
FRAMES = np.random.default_rng(0).choice(VOCABULARY, (20, 10), p=FREQUENCIES)


def texts(rng: np.random.Generator, num_rows: int) -> list[Answered]:
    """Twenty frames, of which 40 % of the words are others (Zipf); the reference has the frame."""
    frames = FRAMES[rng.integers(0, len(FRAMES), num_rows)]
    others = rng.choice(VOCABULARY, frames.shape, p=FREQUENCIES)
    said = np.where(rng.random(frames.shape) < 0.4, others, frames)
    return [
        Answered(str(i), " ".join(f"w{word}" for word in ours), (" ".join(f"w{word}" for word in right),))
        for i, (ours, right) in enumerate(zip(said, frames, strict=True))
    ]


def scores(rng: np.random.Generator, num_rows: int) -> list[Answered]:
    """Two labels whose odds are a little too sure."""
    odds = rng.normal(0, 2, num_rows)
    gold = np.where(rng.random(num_rows) < 1 / (1 + np.exp(-0.8 * odds)), "a", "b")
    return [Answered(str(i), gold=g, scores={"a": float(o), "b": 0.0}) for i, (g, o) in enumerate(zip(gold.tolist(), odds, strict=True))]


def coverage(metric: str, draw: Draw, num_rows: int, num_sets: int) -> float:
    rng, judge = np.random.default_rng(1), METRICS[metric]
    ones = np.ones((1, num_rows))
    truth = np.mean([judge.prepare(draw(rng, num_rows), "en").score(ones)[0] for _ in range(4 * num_sets)])
    return sum(judge.measure(draw(rng, num_rows), "en").interval.holds(float(truth)) for _ in range(num_sets)) / num_sets


@pytest.mark.parametrize(("metric", "draw"), [("rouge_1", texts), ("auc", scores), ("distinct_2", texts), ("ece", scores)])
def test_intervals_of_small_sets_hold_the_truth_mostly(metric: str, draw: Draw) -> None:
    assert coverage(metric, draw, 40, 40) >= 0.85


@pytest.mark.proof
@pytest.mark.parametrize(
    ("metric", "draw"),
    [
        ("bleu", texts),
        ("rouge_l", texts),
        ("distinct_1", texts),
        ("distinct_2", texts),
        ("self_bleu", texts),
        ("auc", scores),
        ("ece", scores),
    ],
)
def test_intervals_hold_the_truth_nine_times_in_ten(metric: str, draw: Draw) -> None:
    share = coverage(metric, draw, 150, 100)
    print(f"\n{metric}, 150 rows: the 95 % interval holds the truth in {100 * share:.1f} % of 100 sets")
    assert share >= 0.9
