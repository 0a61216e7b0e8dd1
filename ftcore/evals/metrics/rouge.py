"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F1 of the best reference, mean over rows.

In: answers and references. Out: shares. Runs in: the driver.

Words are `words()`: on ASCII text those of ROUGE-1.5.5 without stems, in Chinese the characters. An answer is one sentence to ROUGE-L.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric
from ftcore.evals.words import Language, words

HOW = "F1, no stems, Chinese by characters"


@metric("rouge_1", "ROUGE-1", needs=("references",))
def rouge_1(rows: Rows, language: Language) -> Prepared:
    return _best(rows, lambda ours, right: ngram_f1(ours, right, 1))


@metric("rouge_2", "ROUGE-2", needs=("references",))
def rouge_2(rows: Rows, language: Language) -> Prepared:
    return _best(rows, lambda ours, right: ngram_f1(ours, right, 2))


@metric("rouge_l", "ROUGE-L", needs=("references",))
def rouge_l(rows: Rows, language: Language) -> Prepared:
    return _best(rows, subsequence_f1)


def _best(rows: Rows, f1: Callable[[Sequence[str], Sequence[str]], float]) -> Prepared:
    return mean(np.array([max(f1(words(row.text), words(right)) for right in row.references) for row in rows]), HOW)


def ngram_f1(ours: Sequence[str], right: Sequence[str], order: int) -> float:
    """0 where either is shorter than `order`."""
    counts = [Counter(zip(*(text[i:] for i in range(order)), strict=False)) for text in (ours, right)]
    total = counts[0].total() + counts[1].total()
    return 2 * (counts[0] & counts[1]).total() / total if total else 0.0


def subsequence_f1(ours: Sequence[str], right: Sequence[str]) -> float:
    return 2 * common_subsequence(ours, right) / (len(ours) + len(right)) if ours and right else 0.0


def common_subsequence(ours: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at once as bits of an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(right)) - 1
    row = full
    for word in ours:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(right) - row.bit_count()
