"""Metrics of labels and likelihoods against published values, and against scipy or plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import mannwhitneyu

from ftcore.errors import DataError
from ftcore.evals.answered import Answered
from ftcore.evals.metrics.base import METRICS


def value(name: str, rows: list[Answered]) -> float:
    return float(METRICS[name].prepare(rows, "en").score(np.ones((1, len(rows))))[0])


def labelled(gold: str, chosen: str) -> list[Answered]:
    """One letter a row; `-` for no label."""
    return [Answered(str(i), gold=g, chosen=c.strip("-")) for i, (g, c) in enumerate(zip(gold, chosen, strict=True))]


def scored(gold: list[str], scores: np.ndarray, labels: str) -> list[Answered]:
    return [
        Answered(str(i), gold=g, scores=dict(zip(labels, map(float, s), strict=True)))
        for i, (g, s) in enumerate(zip(gold, scores, strict=True))
    ]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("accuracy", 1 / 3), ("precision_macro", 0.2222), ("recall_macro", 0.3333), ("f1_macro", 0.2667),
        ("precision_micro", 1 / 3), ("recall_micro", 1 / 3), ("f1_micro", 1 / 3),
    ],
)  # fmt: skip
def test_the_example_of_scikit_learns_manual(name: str, published: float) -> None:
    """`f1_score` and its like, documentation: y_true 0 1 2 0 1 2, y_pred 0 2 1 0 0 1."""
    assert value(name, labelled("012012", "021001")) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("seed", range(5))
def test_macro_values_are_those_of_a_plain_loop_over_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, chosen = ("".join(rng.choice(list(letters), 60)) for letters in ("abcd", "abce-"))
    precisions, recalls, f1s = [], [], []
    for label in sorted(set(gold + chosen) - {"-"}):
        hits = sum(g == c == label for g, c in zip(gold, chosen, strict=True))
        precisions.append(hits / max(chosen.count(label), 1))
        recalls.append(hits / max(gold.count(label), 1))
        f1s.append(2 * hits / (chosen.count(label) + gold.count(label)))
    for name, each in (("precision_macro", precisions), ("recall_macro", recalls), ("f1_macro", f1s)):
        assert value(name, labelled(gold, chosen)) == pytest.approx(sum(each) / len(each))


def test_an_answer_without_a_label_is_a_miss_and_no_choice() -> None:
    rows = labelled("aabb", "a-bb")
    assert value("accuracy", rows) == value("recall_micro", rows) == 0.75
    assert value("precision_micro", rows) == value("precision_macro", rows) == 1.0


def test_the_binary_auc_of_scikit_learns_manual() -> None:
    """`roc_auc_score`, documentation: y_true 0 0 1 1, scores 0.1 0.4 0.35 0.8."""
    p = np.array([0.1, 0.4, 0.35, 0.8])
    assert value("auc", scored(list("0011"), np.log(np.stack([1 - p, p], axis=1)), "01")) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_rank_statistic_of_mann_and_whitney(seed: int) -> None:
    """Three labels, each against the rest; few levels, so that many ranks are tied."""
    rng = np.random.default_rng(seed)
    gold, scores = rng.choice(list("abc"), 80), rng.integers(0, 4, (80, 3)).astype(float)
    each = []
    for column, label in enumerate("abc"):
        chance = np.round(softmax(scores, axis=1)[:, column], 12)
        inside, outside = chance[gold == label], chance[gold != label]
        each.append(mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))
    scores -= scores.min(1, keepdims=True)  # up to a constant of the row
    assert value("auc", scored(list(gold), scores, "abc")) == pytest.approx(np.mean(each))


def test_auc_tells_apart_probabilities_that_round_to_one() -> None:
    scores = np.array([[0, 60.0], [0, 50.0], [0, 55.0], [0, 45.0]])
    assert value("auc", scored(list("1010"), scores, "01")) == pytest.approx(1.0)


def test_rows_of_one_label_have_no_auc() -> None:
    with pytest.raises(DataError, match="all rows are of one label"):
        value("auc", scored(list("aa"), np.eye(2), "ab"))


def test_rows_with_other_labels_than_the_first_are_named() -> None:
    rows = [*scored(["a"], np.eye(2)[:1], "ab"), Answered("odd", gold="a", scores={"a": 1.0, "c": 0.0})]
    for name in ("auc", "ece"):
        with pytest.raises(DataError, match="odd"):
            value(name, rows)


@pytest.mark.parametrize("bad", [{"a": math.nan, "b": 0.0}, {"a": -math.inf, "b": -math.inf}, {"a": math.inf, "b": 0.0}])
def test_scores_that_are_no_log_probabilities_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(DataError, match="scores that are numbers"):
        value("ece", [Answered("1", gold="a", scores=bad)])


def test_a_gold_label_without_a_score_is_refused() -> None:
    with pytest.raises(DataError, match="gold: z"):
        value("ece", [Answered("1", gold="z", scores={"a": 0.0, "b": 0.0})])


def test_calibration_is_that_of_a_plain_loop_over_bins() -> None:
    rng = np.random.default_rng(0)
    gold, scores = rng.choice(list("abc"), 300), rng.normal(0, 2, (300, 3))
    chances = softmax(scores, axis=1)
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (chances.max(1) > low) & (chances.max(1) <= low + 1 / 15)
        if inside.any():
            right = (np.array(list("abc"))[chances.argmax(1)] == gold)[inside]
            total += inside.sum() * abs(right.mean() - chances.max(1)[inside].mean())
    assert value("ece", scored(list(gold), scores, "abc")) == pytest.approx(total / 300)


def test_calibration_by_hand() -> None:
    """Four answers at 0.9, three of them right: 0.15 too sure."""
    scores = np.log(np.tile([0.9, 0.1], (4, 1)))
    assert value("ece", scored(list("aaab"), scores, "ab")) == pytest.approx(0.15)


def test_perplexity_is_per_token_of_all_rows_together() -> None:
    rows = [Answered("1", nll=3 * math.log(2), num_tokens=3, num_bytes=12), Answered("2", nll=math.log(4), num_tokens=1, num_bytes=3)]
    assert value("perplexity", rows) == pytest.approx(2 ** (5 / 4))
    assert value("perplexity_byte", rows) == pytest.approx(2 ** (5 / 15))


def test_a_likelihood_of_zero_is_refused_by_id() -> None:
    with pytest.raises(DataError, match="row impossible"):
        value("perplexity", [Answered("impossible", nll=math.inf, num_tokens=3)])
