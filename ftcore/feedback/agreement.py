"""Agreement: how far raters agree beyond chance: Cohen's and Fleiss' kappa, Krippendorff's alpha, each with a bootstrap interval.

In: what each rater said of each unit. Out: Agreements, with intervals over units. Runs in: a person's terminal; numpy only.

Each measure is a formula of sums over units, so that units can be drawn again and again (Zapf et al. 2016, BMC Medical Research Methodology
16:93, compare such intervals for Fleiss' kappa and Krippendorff's alpha). Legend: U units, R raters, K categories, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftcore.evals.intervals import Interval, from_draws, resampled
from ftcore.evals.metrics.base import Prepared, quotient, sums
from ftcore.feedback.judgements import HIGHEST, LOWEST, Judgement

MISSING = -1
PREFERENCES = ("a", "tie", "b")
Measure = Callable[[np.ndarray, int], Prepared]
"""codes [U, R], number of categories -> a score of weighted units."""


@dataclass(frozen=True)
class Agreement:
    """One measure. 1: they always agree; 0: as often as chance would have it (but for raw agreement, a share)."""

    name: str
    interval: Interval
    num_units: int

    def cells(self) -> tuple[str, ...]:
        value, ends = self.interval, "-" if math.isnan(self.interval.low) else f"{self.interval.low:.3f}..{self.interval.high:.3f}"
        return (self.name, "-" if math.isnan(value.value) else f"{value.value:.3f}", ends, f"{self.num_units:,}")


def codes_of(judgements: Mapping[str, Sequence[Judgement]], *, scored: bool) -> np.ndarray:
    """[U, R] of category numbers, MISSING where a rater said nothing or skipped. A unit is a pair; of scores, each of its answers."""
    raters, units = sorted(judgements), dict[tuple[str, int], int]()
    found: list[tuple[int, int, int]] = []
    for column, rater in enumerate(raters):
        for judgement in judgements[rater]:
            if judgement.choice == "skip" or (scored and judgement.scores is None):
                continue
            said = [score - LOWEST for score in judgement.scores or ()] if scored else [PREFERENCES.index(judgement.choice)]
            for part, code in enumerate(said):
                found.append((units.setdefault((judgement.pair, part), len(units)), column, code))
    codes = np.full((len(units), len(raters)), MISSING)
    for unit, column, code in found:
        codes[unit, column] = code
    return codes


def agreements(codes: np.ndarray, *, scored: bool) -> list[Agreement]:
    """Those that fit: Cohen's for two raters, Fleiss' for more; for scores both alpha and Cohen's weigh how far apart two are."""
    num_categories = HIGHEST - LOWEST + 1 if scored else len(PREFERENCES)
    rated = (codes != MISSING).sum(1)
    shared, whole = codes[rated >= 2], codes[rated == codes.shape[1]]
    found = [_measured("raw agreement", raw, shared, num_categories)]
    if codes.shape[1] == 2:
        name = "Cohen's kappa, quadratic weights" if scored else "Cohen's kappa"
        found.append(_measured(name, squared_kappa if scored else cohen_kappa, whole, num_categories))
    elif not scored:
        found.append(_measured("Fleiss' kappa", fleiss_kappa, whole, num_categories))
    alpha = ordinal_alpha if scored else nominal_alpha
    return [*found, _measured(f"Krippendorff's alpha, {'ordinal' if scored else 'nominal'}", alpha, shared, num_categories)]


def _measured(name: str, measure: Measure, codes: np.ndarray, num_categories: int) -> Agreement:
    """Interval ends are nan below two units, the value where there are none or all said the same one thing."""
    if not len(codes):
        return Agreement(name, Interval(math.nan, math.nan, math.nan), 0)
    score = measure(codes, num_categories).score
    value = float(score(np.ones((1, len(codes))))[0])
    drawn = resampled(score, len(codes)) if len(codes) > 1 else np.full(1, math.nan)
    return Agreement(name, from_draws(value, drawn), len(codes))


def raw(codes: np.ndarray, num_categories: int) -> Prepared:
    """The share of pairs of judgements of one unit that are the same."""
    counts = _counts(codes, num_categories)
    size = counts.sum(1)
    same = (counts * (counts - 1)).sum(1)
    return sums(np.stack([same, size * (size - 1)], axis=1), lambda total: quotient(total[:, 0], total[:, 1]))


def cohen_kappa(codes: np.ndarray, num_categories: int) -> Prepared:
    """1 - observed over expected disagreement of two raters, each with a habit of their own (Cohen 1960). codes: [U, 2]."""
    return _kappa(codes, 1.0 - np.eye(num_categories))


def squared_kappa(codes: np.ndarray, num_categories: int) -> Prepared:
    """The same, where two scores disagree by their distance squared (Cohen 1968)."""
    scale = np.arange(num_categories)
    return _kappa(codes, (scale[:, None] - scale) ** 2.0)


def _kappa(codes: np.ndarray, apart: np.ndarray) -> Prepared:
    num = len(apart)
    cells = np.eye(num * num)[codes[:, 0] * num + codes[:, 1]]

    return sums(cells, lambda total: cohen(total.reshape(-1, num, num), apart))


def cohen(tables: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """1 - observed over expected disagreement of two who each have a habit of their own (Cohen 1960; weighted by `apart`: Cohen 1968).

    tables: [D, C, C] counts, one's word by the other's; apart: [C, C], 0 on the diagonal. nan where chance leaves no disagreement.
    """
    expected = np.einsum("dk,dl,kl->d", tables.sum(2), tables.sum(1), apart)
    return 1 - quotient(np.einsum("dkl,kl->d", tables, apart) * tables.sum((1, 2)), expected)


def fleiss_kappa(codes: np.ndarray, num_categories: int) -> Prepared:
    """Any number of raters who all judged every unit (Fleiss 1971)."""
    counts, num_raters = _counts(codes, num_categories), codes.shape[1]
    agreeing = ((counts * counts).sum(1) - num_raters) / (num_raters * (num_raters - 1))

    def formula(total: np.ndarray) -> np.ndarray:
        num_units = total[:, 1:].sum(1) / num_raters
        shares = total[:, 1:] / (num_units * num_raters)[:, None]
        chance = (shares**2).sum(1)
        return quotient(total[:, 0] / num_units - chance, 1 - chance)

    return sums(np.concatenate([agreeing[:, None], counts], axis=1), formula)


def nominal_alpha(codes: np.ndarray, num_categories: int) -> Prepared:
    """Any number of raters, any missing (Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C)."""
    return _alpha(codes, num_categories, ordinal=False)


def ordinal_alpha(codes: np.ndarray, num_categories: int) -> Prepared:
    """The same, where two scores disagree by how many judgements lie between them (the same paper, section E)."""
    return _alpha(codes, num_categories, ordinal=True)


def _alpha(codes: np.ndarray, num_categories: int, *, ordinal: bool) -> Prepared:
    counts = _counts(codes, num_categories)
    together = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(num_categories)  # [U, K, K], pairs within a unit
    coincidences = together / (counts.sum(1) - 1)[:, None, None]

    def formula(total: np.ndarray) -> np.ndarray:
        table = total.reshape(-1, num_categories, num_categories)
        sizes = table.sum(2)  # [D, K]
        apart = _between(sizes) if ordinal else np.broadcast_to(1.0 - np.eye(num_categories), table.shape)
        observed = (table * apart).sum((1, 2))
        expected = np.einsum("dk,dl,dkl->d", sizes, sizes, apart)
        return 1 - quotient((sizes.sum(1) - 1) * observed, expected)

    return sums(coincidences.reshape(len(codes), -1), formula)


def _between(sizes: np.ndarray) -> np.ndarray:
    """Squared ordinal distances [D, K, K]: judgements from one category to the other, half of those at either end."""
    reached = np.cumsum(sizes, axis=1) - sizes / 2
    return (reached[:, :, None] - reached[:, None, :]) ** 2


def _counts(codes: np.ndarray, num_categories: int) -> np.ndarray:
    """How many raters chose each category, [U, K]."""
    return (codes[:, :, None] == np.arange(num_categories)).sum(1).astype(float)
