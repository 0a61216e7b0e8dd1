"""Agreement between raters against published examples, a second implementation, and plain loops over the definitions."""

from __future__ import annotations

import math
from itertools import permutations

import krippendorff
import numpy as np
import pytest

from ftcore.evals.metrics.base import Prepared
from ftcore.feedback.agreement import (
    MISSING,
    agreements,
    cohen_kappa,
    fleiss_kappa,
    nominal_alpha,
    ordinal_alpha,
    raw,
    squared_kappa,
)

# Krippendorff (2011), section C: four observers, twelve units, values missing. nominal 0.743, ordinal 0.815.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
# Fleiss, Levin & Paik (2003), Statistical Methods for Rates and Proportions, chapter 18: two raters, a hundred patients; kappa 0.676.
PATIENTS = [[75, 1, 4], [5, 4, 1], [0, 0, 10]]
# The worked example of Fleiss' kappa that encyclopedias carry: ten subjects, fourteen raters, five categories; 0.210.
SUBJECTS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def value(prepared: Prepared, codes: np.ndarray) -> float:
    return float(prepared.score(np.ones((1, len(codes))))[0])


def observed() -> np.ndarray:
    """Units that two or more observers judged, [U, R]."""
    codes = np.array(OBSERVERS).T - 1
    return codes[(codes != MISSING).sum(1) >= 2]


def two_raters() -> np.ndarray:
    return np.array([(i, j) for i, row in enumerate(PATIENTS) for j, count in enumerate(row) for _ in range(count)])


def random_codes(num_units: int, num_raters: int, seed: int, missing: float = 0.0) -> np.ndarray:
    """Raters who agree more than by chance."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, num_units)
    codes = np.clip(truth[:, None] + rng.integers(-1, 2, (num_units, num_raters)), 0, 4)
    return np.where(rng.random(codes.shape) < missing, MISSING, codes)


def test_alpha_is_krippendorffs_own_example() -> None:
    codes = observed()
    assert value(nominal_alpha(codes, 5), codes) == pytest.approx(0.743, abs=5e-4)
    assert value(ordinal_alpha(codes, 5), codes) == pytest.approx(0.815, abs=5e-4)


def test_cohens_kappa_is_the_textbooks() -> None:
    assert value(cohen_kappa(two_raters(), 3), two_raters()) == pytest.approx(0.676, abs=5e-4)


def test_fleiss_kappa_is_the_encyclopedias() -> None:
    codes = np.array([[category for category, count in enumerate(row) for _ in range(count)] for row in SUBJECTS])
    assert value(fleiss_kappa(codes, 5), codes) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("measure", "level"), [(nominal_alpha, "nominal"), (ordinal_alpha, "ordinal")])
def test_alpha_is_another_programs_too(measure: type[nominal_alpha], level: str, seed: int) -> None:
    codes = random_codes(60, 4, seed, missing=0.3)
    data = np.where(codes == MISSING, np.nan, codes).T
    other = krippendorff.alpha(reliability_data=data, level_of_measurement=level, value_domain=[0, 1, 2, 3, 4])
    codes = codes[(codes != MISSING).sum(1) >= 2]
    assert value(measure(codes, 5), codes) == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [0, 2])
def test_kappa_is_the_disagreement_of_all_rows_paired_with_all_rows(seed: int, power: int) -> None:
    """The definition in a loop: chance pairs every judgement of one rater with every one of the other."""
    codes = random_codes(40, 2, seed)
    apart = (lambda i, j: float(i != j)) if power == 0 else (lambda i, j: float((i - j) ** 2))
    seen = np.mean([apart(i, j) for i, j in codes])
    chance = np.mean([apart(i, j) for i in codes[:, 0] for j in codes[:, 1]])
    measure = squared_kappa if power else cohen_kappa
    assert value(measure(codes, 5), codes) == pytest.approx(1 - seen / chance)


def test_fleiss_kappa_is_the_agreement_of_all_pairs_of_raters() -> None:
    codes = random_codes(30, 3, 7)
    seen = np.mean([[row[i] == row[j] for i, j in permutations(range(3), 2)] for row in codes])
    chance = np.mean(codes.ravel()[:, None] == codes.ravel())  # any judgement with any, itself too (Scott's chance)
    assert value(fleiss_kappa(codes, 5), codes) == pytest.approx((seen - chance) / (1 - chance))
    assert value(raw(codes, 5), codes) == pytest.approx(seen)


@pytest.mark.parametrize("measure", [raw, cohen_kappa, squared_kappa, fleiss_kappa, nominal_alpha, ordinal_alpha])
def test_a_unit_drawn_twice_counts_as_two_units(measure: type[raw]) -> None:
    codes = random_codes(20, 2, 3)
    weights = np.random.default_rng(0).integers(0, 3, len(codes))
    drawn = float(measure(codes, 5).score(weights[None].astype(float))[0])
    repeated = np.repeat(codes, weights, axis=0)
    assert drawn == pytest.approx(value(measure(repeated, 5), repeated))


def test_agreement_by_chance_is_nothing_and_full_agreement_is_one() -> None:
    rng = np.random.default_rng(5)
    strangers = rng.integers(0, 3, (4000, 2))
    twins = np.repeat(rng.integers(0, 3, (50, 1)), 2, axis=1)
    for measure in agreements(strangers, scored=False)[1:]:
        assert abs(measure.interval.value) < 0.05 and measure.interval.holds(0.0)
    assert [measure.interval.value for measure in agreements(twins, scored=False)] == pytest.approx([1, 1, 1])


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Two raters who agree by coin: kappa of many rows is 0.5; 95 % intervals of 150 rows hold it 88 to 100 times of 100."""
    rng, held = np.random.default_rng(11), 0
    for _ in range(100):
        first = rng.integers(0, 2, 150)
        second = np.where(rng.random(150) < 0.5, first, rng.integers(0, 2, 150))
        kappa = agreements(np.stack([first, second], axis=1), scored=False)[1]
        held += kappa.interval.holds(0.5)
    assert 88 <= held <= 100


def test_three_raters_get_fleiss_on_the_rows_all_judged_and_alpha_on_every_row_two_judged() -> None:
    codes = random_codes(30, 3, 1, missing=0.3)
    codes = np.where(codes == MISSING, MISSING, codes % 3)
    found = {measure.name: measure for measure in agreements(codes, scored=False)}
    rated = (codes != MISSING).sum(1)
    assert found["Fleiss' kappa"].num_units == (rated == 3).sum() < (rated >= 2).sum()
    assert found["Krippendorff's alpha, nominal"].num_units == (rated >= 2).sum()


def test_raters_without_a_row_in_common_have_no_agreement_and_no_crash() -> None:
    codes = np.array([[0, MISSING], [MISSING, 1]])
    for measure in agreements(codes, scored=False):
        assert math.isnan(measure.interval.value) and measure.num_units == 0 and measure.cells()[1] == "-"
