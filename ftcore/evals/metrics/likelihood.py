"""Perplexity of the reference answers, per token and per byte.

In: negative log-likelihoods and counts. Out: plain numbers from 1. Runs in: the driver.

Per token it compares models with one tokenizer only; per byte any two.
"""

from __future__ import annotations

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, metric, quotient, sums
from ftcore.evals.words import Language


@metric("perplexity", "perplexity per token", needs=("nll", "num_tokens"), unit="plain", higher_is_better=False)
def perplexity(rows: Rows, language: Language) -> Prepared:
    """exp(all log-likelihood over all tokens): long answers count more."""
    return _per(rows, [row.num_tokens for row in rows])


@metric("perplexity_byte", "perplexity per byte", needs=("nll", "num_bytes"), unit="plain", higher_is_better=False)
def perplexity_byte(rows: Rows, language: Language) -> Prepared:
    return _per(rows, [row.num_bytes for row in rows])


def _per(rows: Rows, counts: list[int]) -> Prepared:
    stats = np.array([[row.nll, count] for row, count in zip(rows, counts, strict=True)], float)
    return sums(stats, lambda total: np.exp(quotient(total[:, 0], total[:, 1])))
