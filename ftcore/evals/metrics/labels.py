"""Labels: accuracy, and precision, recall and F1 over labels, macro and micro.

In: chosen and gold labels. Out: shares. Runs in: the driver.

Macro is the mean over the labels that occur, as gold or as chosen; micro pools them. A row for which no label could be read ("") misses its
gold label and chooses none: so micro precision and recall differ from accuracy only there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric, quotient, sums
from ftcore.evals.words import Language

Part = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""hits, chosen, gold -> a share; all [R], or [R, labels]."""


@metric("accuracy", "accuracy", needs=("gold", "chosen"))
def accuracy(rows: Rows, language: Language) -> Prepared:
    """The share of rows whose label was chosen."""
    return mean(np.array([row.chosen == row.gold for row in rows], float))


def precision(hits: np.ndarray, chosen: np.ndarray, gold: np.ndarray) -> np.ndarray:
    return quotient(hits, chosen, empty=0.0)


def recall(hits: np.ndarray, chosen: np.ndarray, gold: np.ndarray) -> np.ndarray:
    return quotient(hits, gold, empty=0.0)


def f1(hits: np.ndarray, chosen: np.ndarray, gold: np.ndarray) -> np.ndarray:
    return quotient(2 * hits, chosen + gold, empty=0.0)


@metric("precision_macro", "macro precision", needs=("gold", "chosen"))
def precision_macro(rows: Rows, language: Language) -> Prepared:
    return macro(rows, precision)


@metric("recall_macro", "macro recall", needs=("gold", "chosen"))
def recall_macro(rows: Rows, language: Language) -> Prepared:
    return macro(rows, recall)


@metric("f1_macro", "macro F1", needs=("gold", "chosen"))
def f1_macro(rows: Rows, language: Language) -> Prepared:
    """The mean of the labels' F1 (not the F1 of mean precision and mean recall)."""
    return macro(rows, f1)


@metric("precision_micro", "micro precision", needs=("gold", "chosen"))
def precision_micro(rows: Rows, language: Language) -> Prepared:
    return micro(rows, precision)


@metric("recall_micro", "micro recall", needs=("gold", "chosen"))
def recall_micro(rows: Rows, language: Language) -> Prepared:
    return micro(rows, recall)


@metric("f1_micro", "micro F1", needs=("gold", "chosen"))
def f1_micro(rows: Rows, language: Language) -> Prepared:
    return micro(rows, f1)


def macro(rows: Rows, part: Part) -> Prepared:
    counts, labels = _counts(rows)

    def formula(total: np.ndarray) -> np.ndarray:
        hits, chosen, gold = np.split(total, 3, axis=1)
        return quotient(part(hits, chosen, gold).sum(1), (chosen + gold > 0).sum(1))

    return sums(counts, formula, f"mean of {len(labels)} labels")


def micro(rows: Rows, part: Part) -> Prepared:
    counts, labels = _counts(rows)
    pooled = np.stack([block.sum(1) for block in np.split(counts, 3, axis=1)], axis=1)
    return sums(pooled, lambda total: part(*total.T), f"{len(labels)} labels pooled")


def _counts(rows: Rows) -> tuple[np.ndarray, list[str]]:
    """Hits, choices and golds of each label, side by side, [N, 3 * labels]; and the labels."""
    labels = sorted({label for row in rows for label in (row.gold, row.chosen) if label})
    column = {label: at for at, label in enumerate(labels)}
    hits, chosen, gold = (np.zeros((len(rows), len(labels))) for _ in range(3))
    for i, row in enumerate(rows):
        gold[i, column[str(row.gold)]] = 1
        if row.chosen:
            chosen[i, column[row.chosen]] = 1
            hits[i, column[row.chosen]] = row.chosen == row.gold
    return np.concatenate([hits, chosen, gold], axis=1), labels
