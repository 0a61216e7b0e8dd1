"""METEOR without synonyms: words match exactly or by their stem; the best reference counts, mean over rows.

In: answers and references. Out: a share. Runs in: the driver; nltk is imported inside functions (seconds).

It goes by a name of its own because the full METEOR matches WordNet's synonyms too, which nltk would have to download.
"""

from __future__ import annotations

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric
from ftcore.evals.words import Language, words_and_marks


class NoSynonyms:
    """Stands where nltk looks for WordNet."""

    def synsets(self, word: str) -> list[object]:
        return []


@metric("meteor_stem", "METEOR (exact and stem)", needs=("references",), package="nltk")
def meteor_stem(rows: Rows, language: Language) -> Prepared:
    """Lavie and Agarwal 2007 as nltk has it (alpha 0.9, beta 3, gamma 0.5). A perfect answer of m words comes to 1 - 0.5 / m**3."""
    from nltk.translate.meteor_score import meteor_score

    best = [meteor_score([*map(words_and_marks, row.references)], words_and_marks(row.text), wordnet=NoSynonyms()) for row in rows]
    return mean(np.array(best, float), "nltk without synonyms, Porter stems, Chinese by characters")
