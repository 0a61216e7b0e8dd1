"""Overlap: exact match and token F1, of short answers with their references.

In: answers and references. Out: shares. Runs in: the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric
from ftcore.evals.words import Language, answer_words

HOW: dict[Language, str] = {"en": "normalised as SQuAD", "zh": "normalised as CMRC 2018, by characters"}


@metric("exact_match", "exact match", needs=("references",))
def exact_match(rows: Rows, language: Language) -> Prepared:
    """The share of answers that are one of their references, after normalisation (`answer_words`)."""
    hits = [any(answer_words(row.text, language) == answer_words(right, language) for right in row.references) for row in rows]
    return mean(np.array(hits, float), HOW[language])


@metric("token_f1", "token F1", needs=("references",))
def token_f1(rows: Rows, language: Language) -> Prepared:
    """F1 of the answer's bag of words and the best reference's (Rajpurkar et al. 2016, section 6.1; empty ones as in SQuAD 2.0).

    In Chinese the same over characters; CMRC's own F1 counts the longest common run in place of the bag.
    """
    best = [max(bag_f1(answer_words(row.text, language), answer_words(right, language)) for right in row.references) for row in rows]
    return mean(np.array(best), f"{HOW[language]}, bags")


def bag_f1(ours: Sequence[str], right: Sequence[str]) -> float:
    if not ours or not right:
        return float(not ours and not right)
    return 2 * (Counter(ours) & Counter(right)).total() / (len(ours) + len(right))
