"""Label scores: how well the scores of the labels rank (AUC), and whether they mean what they say (calibration).

In: gold labels and a score of every label. Out: shares. Runs in: the driver.
"""

from __future__ import annotations

import numpy as np

from ftcore.errors import DataError
from ftcore.evals.answered import Rows
from ftcore.evals.intervals import Score
from ftcore.evals.metrics.base import Prepared, metric, quotient, sums
from ftcore.evals.words import Language

NUM_BINS = 15


@metric("auc", "AUC", needs=("gold", "scores"))
def auc(rows: Rows, language: Language) -> Prepared:
    """The chance that a row of a label has higher odds of it than a row of another (ties count half), mean of the labels against the rest.

    With two labels both come to the same: the usual binary AUC. Labels that no row has are left out.
    """
    labels, logits, gold = _label_scores(rows, "auc")
    found = np.unique(gold)
    if len(found) < 2:
        raise DataError(
            "`auc` has no value: all rows are of one label", where=f"rows {rows[0].id} to {rows[-1].id}",
            got=labels[found[0]], wanted="rows of two labels or more", remedy="add rows of another label, or take accuracy",
        )  # fmt: skip
    scores = [_auc(_log_odds(logits, label), gold == label) for label in found]

    def score(weights: np.ndarray) -> np.ndarray:
        each = np.stack([one(weights) for one in scores])
        seen = np.isfinite(each)
        return quotient(np.where(seen, each, 0).sum(0), seen.sum(0))

    return Prepared(score, "binary" if len(labels) == 2 else f"mean of {len(found)} labels, each against the rest")


@metric("ece", "expected calibration error", needs=("gold", "scores"), higher_is_better=False, best=0.0, halves=True)
def ece(rows: Rows, language: Language) -> Prepared:
    """How far the likeliest label's probability is from how often it is right, mean over rows in bins of equal width (Guo et al. 2017,
    equation 3)."""
    _, logits, gold = _label_scores(rows, "ece")
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    confidence = shifted.max(1) / shifted.sum(1)
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    inside = np.eye(NUM_BINS)[bins]
    gap = (logits.argmax(1) == gold) - confidence
    stats = np.concatenate([inside * gap[:, None], np.ones((len(rows), 1))], axis=1)
    return sums(stats, lambda total: quotient(np.abs(total[:, :-1]).sum(1), total[:, -1]), f"{NUM_BINS} bins of equal width")


def _label_scores(rows: Rows, name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The labels, their scores [N, labels] and the number of each row's gold label [N]. Raises DataError with the id of an odd row."""
    labels = sorted(rows[0].scores)
    for row in rows:
        wanted = f"a score of each of: {', '.join(labels)}"
        if sorted(row.scores) != labels:
            raise DataError(f"`{name}` needs the same labels in every row", where=f"row {row.id}", got=", ".join(row.scores), wanted=wanted)
        values = list(row.scores.values())
        if row.gold not in row.scores:
            raise DataError(f"`{name}` needs a score of the right label", where=f"row {row.id}", got=f"gold: {row.gold}", wanted=wanted)
        if max(values) == -np.inf or not all(value < np.inf for value in values):
            raise DataError(f"`{name}` needs scores that are numbers", where=f"row {row.id}", got=values, wanted="log-probabilities")
    logits = np.array([[row.scores[label] for label in labels] for row in rows])
    return labels, logits, np.array([labels.index(str(row.gold)) for row in rows])


def _log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """Of a label against all others, [N]: ranks as its probability does, without running out of digits near 1."""
    return logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)


def _auc(odds: np.ndarray, positive: np.ndarray) -> Score:
    """The rank statistic of Mann and Whitney over weighted rows; nan where a side is empty."""
    order = np.argsort(odds)
    odds, positive = odds[order], positive[order]
    ties = np.flatnonzero(np.concatenate([[True], odds[1:] != odds[:-1]]))

    def score(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        above = np.add.reduceat(weights * positive, ties, axis=1)
        beside = np.add.reduceat(weights * ~positive, ties, axis=1)
        wins = (above * (np.cumsum(beside, axis=1) - beside / 2)).sum(1)
        return quotient(wins, above.sum(1) * beside.sum(1))

    return score
