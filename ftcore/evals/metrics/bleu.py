"""BLEU and chrF, over the whole corpus, as sacreBLEU computes them.

In: answers and references. Out: points, with sacreBLEU's signature. Runs in: the driver; sacrebleu is imported inside functions.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, metric
from ftcore.evals.words import Language

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as Sacre


@metric("bleu", "BLEU", needs=("references",), unit="points", best=100.0, package="sacrebleu")
def bleu(rows: Rows, language: Language) -> Prepared:
    """Papineni et al. 2002; cut into words by sacreBLEU's `13a`, Chinese by its `zh`."""
    from sacrebleu.metrics.bleu import BLEU

    return _corpus(rows, BLEU(tokenize="zh" if language == "zh" else "13a", force=True))


@metric("chrf", "chrF", needs=("references",), unit="points", best=100.0, package="sacrebleu")
def chrf(rows: Rows, language: Language) -> Prepared:
    """chrF2 of Popović 2016: F of characters in runs of 1 to 6, recall counting twice."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus(rows, CHRF())


def _corpus(rows: Rows, sacre: Sacre) -> Prepared:
    """By the two doors that sacreBLEU's own significance tests take: counts a row, and the score of summed counts."""
    streams = list(zip_longest(*(row.references for row in rows)))  # None where a row has fewer references than another
    counts = np.array(sacre._extract_corpus_statistics([row.text for row in rows], streams), float)

    def score(weights: np.ndarray) -> np.ndarray:
        return np.array([sacre._compute_score_from_stats(total.tolist()).score for total in weights @ counts])

    return Prepared(score, f"{sacre.get_signature().format()}")
