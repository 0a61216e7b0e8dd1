"""Diversity: distinct-1 and distinct-2, and self-BLEU: how much the answers of one system repeat each other.

In: answers. Out: shares; points. Runs in: the driver; scipy is imported inside functions.

A row drawn twice brings no new word, and repeats itself: a bootstrap would call every set of answers poorer than it is. So intervals come
from halves. These values go down and up with the number of answers: compare systems on the same rows only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftcore.errors import DataError
from ftcore.evals.answered import Rows
from ftcore.evals.intervals import Score
from ftcore.evals.metrics.base import Prepared, metric, quotient
from ftcore.evals.words import Language, words_and_marks

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_ORDER = 4
CELLS = 1 << 22
"""Numbers of a draw times draws held at once."""


@metric("distinct_1", "distinct-1", halves=True, package="scipy")
def distinct_1(rows: Rows, language: Language) -> Prepared:
    return _distinct(rows, 1)


@metric("distinct_2", "distinct-2", halves=True, package="scipy")
def distinct_2(rows: Rows, language: Language) -> Prepared:
    return _distinct(rows, 2)


def _distinct(rows: Rows, order: int) -> Prepared:
    """Different n-grams over all n-grams (Li et al. 2016, section 5.3, who divide by words: the same for one word)."""
    texts = [words_and_marks(row.text) for row in rows]
    totals = num_ngrams(texts, order)
    if not totals.any():
        raise DataError(
            f"`distinct_{order}` has no value: no answer has {order} words or more", where=f"rows {rows[0].id} to {rows[-1].id}",
            got=f"{len(rows)} answers", wanted="answers with words", remedy="look at the answers",
        )  # fmt: skip
    holders = incidence(texts, order, repeats=False).T.tocsr()

    def score(weights: np.ndarray) -> np.ndarray:
        return quotient((holders @ (weights.T > 0).astype(np.float32) > 0).sum(0), weights @ totals)

    return Prepared(in_portions(score, holders.shape[0]), f"different over all, on {len(rows)} answers")


@metric("self_bleu", "self-BLEU", unit="points", higher_is_better=False, best=0.0, halves=True, package="scipy")
def self_bleu(rows: Rows, language: Language) -> Prepared:
    """Each answer's BLEU with all others as its references, mean over answers (Zhu et al. 2018, section 3.4); BLEU of a sentence as
    sacreBLEU has it, with effective order and exponential smoothing.

    sacreBLEU would count anew for every draw. Here an n-gram's t-th copy in an answer is a hit where the answers drawn that hold it at
    least t times are two or more, this one among them: the same clipped counts, by two products with a sparse matrix.
    """
    if len(rows) < 2:
        raise DataError("`self_bleu` compares answers with each other", where=f"row {rows[0].id}", got="1 answer", wanted="2 or more")
    texts = [words_and_marks(row.text) for row in rows]
    held = [incidence(texts, order, repeats=True) for order in range(1, MAX_ORDER + 1)]
    holders = [matrix.T.tocsr() for matrix in held]
    lengths = num_ngrams(texts, 1)
    totals = np.stack([num_ngrams(texts, order) for order in range(1, MAX_ORDER + 1)])

    def score(weights: np.ndarray) -> np.ndarray:
        drawn = weights.T.astype(np.float32)
        hits = np.stack([(has @ (by @ drawn >= 2).astype(np.float32)).T for has, by in zip(held, holders, strict=True)])
        bleu = sentence_bleu(hits, totals[:, None], lengths, closest_lengths(weights, lengths))
        return quotient((weights * bleu).sum(1), np.where(weights.sum(1) < 2, 0, weights.sum(1)))

    width = max(MAX_ORDER * len(rows), *(matrix.shape[1] for matrix in held))
    return Prepared(in_portions(score, width), f"orders 1 to {MAX_ORDER}, on {len(rows)} answers")


def num_ngrams(texts: Sequence[Sequence[str]], order: int) -> np.ndarray:
    """Of each text, [N]."""
    return np.array([max(len(text) - order + 1, 0) for text in texts])


def incidence(texts: Sequence[Sequence[str]], order: int, *, repeats: bool) -> csr_array:
    """1 where a text holds an n-gram, [texts, n-grams]; with `repeats`, a column also for its second copy in a text, its third..."""
    from scipy.sparse import csr_array

    columns: dict[tuple[tuple[str, ...], int], int] = {}
    places = [
        (row, columns.setdefault((gram, copy), len(columns)))
        for row, text in enumerate(texts)
        for gram, count in Counter(zip(*(text[i:] for i in range(order)), strict=False)).items()
        for copy in range(count if repeats else 1)
    ]
    rows, cols = np.array(places, np.int64).reshape(-1, 2).T
    return csr_array((np.ones(len(places), np.float32), (rows, cols)), shape=(len(texts), len(columns)))


def closest_lengths(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The length of another drawn text that is nearest to each text's own, the shorter of two, [R, N]; 0 where there is no other."""
    order = np.argsort(lengths, kind="stable")
    sizes, drawn = lengths[order].astype(float), weights[:, order] > 0
    before = np.maximum.accumulate(np.where(drawn, sizes, -np.inf), axis=1)
    after = np.minimum.accumulate(np.where(drawn, sizes, np.inf)[:, ::-1], axis=1)[:, ::-1]
    edge = np.full((len(weights), 1), np.inf)
    below, above = np.concatenate([-edge, before[:, :-1]], axis=1), np.concatenate([after[:, 1:], edge], axis=1)
    nearest = np.where(sizes - below <= above - sizes, below, above)
    nearest = np.where(weights[:, order] >= 2, sizes, np.where(np.isfinite(nearest), nearest, 0))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return nearest[:, back]


def sentence_bleu(hits: np.ndarray, totals: np.ndarray, lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """BLEU of each sentence in points, over the orders it has n-grams of. hits and totals: [orders, R, N]; the lengths: [R, N].

    An order without a hit counts as 1 / (2**k * total), k the number of such orders so far (Chen & Cherry 2014, method 3).
    """
    misses = np.cumsum((hits == 0) & (totals > 0), axis=0)
    precision = np.where(hits > 0, hits, 0.5**misses) / np.maximum(totals, 1)
    mean = np.where(totals > 0, np.log(precision), 0).sum(0) / np.maximum((totals > 0).sum(0), 1)
    penalty = np.minimum(0, 1 - reference_lengths / np.maximum(lengths, 1))
    return np.where(hits.sum(0) > 0, 100 * np.exp(mean + penalty), 0.0)


def in_portions(score: Score, width: int) -> Score:
    """The same score, over as many draws at a time as memory allows when each takes `width` numbers."""
    step = max(1, CELLS // max(width, 1))
    return lambda weights: np.concatenate([score(weights[i : i + step]) for i in range(0, len(weights), step)])
