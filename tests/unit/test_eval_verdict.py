"""Verdicts: intervals and p-values against scipy, sentences, and simulated pairs of systems whose difference is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from ftcore.errors import DataError
from ftcore.evals.answered import Answered, Answers
from ftcore.evals.intervals import Interval, bootstrap_weights, half_weights, resampled, swap_weights
from ftcore.evals.verdict import Verdict, compare


def hits(name: str, right: np.ndarray, groups: np.ndarray | None = None) -> Answers:
    """Two rows of three have label a, so that classes are unequal; a wrong one gets the other label."""
    gold = np.where(np.arange(len(right)) % 3 == 0, "b", "a")
    other = {"a": "b", "b": "a"}
    rows = [
        Answered(str(i), group="" if groups is None else str(groups[i]), gold=g, chosen=g if hit else other[g])
        for i, (g, hit) in enumerate(zip(gold.tolist(), right.tolist(), strict=True))
    ]
    return Answers(name, tuple(rows))


def correlated(rng: np.random.Generator, num_rows: int, ours: float, theirs: float, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether two systems are right, with these chances; on a share of rows they are right or wrong for one reason, which makes the
    correlation of two equal systems equal to it."""
    one = rng.random(num_rows)
    other = np.where(rng.random(num_rows) < shared, one, rng.random(num_rows))
    return one < ours, other < theirs


def verdicts(metric: str, pairs: int, num_rows: int, gap: float, shared: float, group_size: int = 1) -> list[Verdict]:
    """Of `pairs` simulated pairs, the worse system right on 60 %. With a group size, a group's rows are all alike."""
    rng, found = np.random.default_rng(0), []
    groups = np.arange(num_rows) // group_size
    for number in range(pairs):
        ours, theirs = correlated(rng, groups[-1] + 1, 0.6 + gap, 0.6, shared)
        found.append(compare(metric, hits("v4", ours[groups], groups), hits("v3", theirs[groups], groups), "en", seed=number))
    return found


UNIT = Verdict("distinct_1", "a", "b", 0.5, 0.4996, Interval(0.0, 0.0, 0.0), 0.0, 0.001, 0.95, 500, 500)


def share_told_apart(found: list[Verdict]) -> float:
    return sum(verdict.told_apart for verdict in found) / len(found)


@pytest.mark.parametrize(("metric", "group_size"), [("accuracy", 1), ("accuracy", 2), ("f1_macro", 1)])
def test_systems_without_a_difference_are_rarely_told_apart(metric: str, group_size: int) -> None:
    assert share_told_apart(verdicts(metric, 100, 40 * group_size, gap=0.0, shared=0.5, group_size=group_size)) <= 0.07


def test_a_difference_that_is_there_is_found() -> None:
    found = verdicts("accuracy", 20, 300, gap=0.1, shared=0.6)
    assert share_told_apart(found) >= 0.8 and {verdict.better for verdict in found} <= {"v4", ""}


@pytest.mark.proof
@pytest.mark.parametrize(("metric", "num_rows", "group_size"), [("accuracy", 800, 1), ("accuracy", 400, 8), ("f1_macro", 100, 1)])
def test_a_thousand_pairs_without_a_difference_give_few_false_alarms(metric: str, num_rows: int, group_size: int) -> None:
    share = share_told_apart(verdicts(metric, 1000, num_rows, gap=0.0, shared=0.6, group_size=group_size))
    print(f"\n{metric}, {num_rows} rows in groups of {group_size}: {100 * share:.1f} % of 1000 pairs told apart")
    assert share <= 0.07


@pytest.mark.proof
def test_a_gap_of_five_points_is_found_on_800_rows() -> None:
    """60 and 65 % right, correlation 0.6."""
    found = verdicts("accuracy", 1000, 800, gap=0.05, shared=0.6)
    print(f"\n5 points on 800 rows, correlation 0.6: found in {100 * share_told_apart(found):.1f} % of 1000 pairs")
    assert share_told_apart(found) >= 0.8 and "v3" not in {verdict.better for verdict in found}


@pytest.mark.proof
def test_as_many_rows_as_are_said_to_be_needed_find_the_difference() -> None:
    """Said after 200 rows, for 8 points, by ten pairs; then seen on so many."""
    said = [verdict.rows_needed(0.08) for verdict in verdicts("accuracy", 10, 200, gap=0.08, shared=0.5)]
    share = share_told_apart(verdicts("accuracy", 300, round(float(np.median(said))), gap=0.08, shared=0.5))
    print(f"\n8 points: {round(float(np.median(said)))} rows said to be needed; found in {100 * share:.1f} % of 300 pairs")
    assert 0.7 <= share <= 0.9


@pytest.fixture(scope="module")
def clear() -> Verdict:
    rng = np.random.default_rng(0)
    ours, theirs = correlated(rng, 400, 0.8, 0.6, 0.5)
    return compare("accuracy", hits("v4", ours), hits("v3", theirs), "en")


@pytest.fixture(scope="module")
def unclear() -> Verdict:
    rng = np.random.default_rng(3)
    ours, theirs = correlated(rng, 400, 0.62, 0.6, 0.5)
    return compare("accuracy", hits("v4", ours), hits("v3", theirs), "en")


def test_the_better_one_is_named_in_a_sentence(clear: Verdict) -> None:
    ends = f"{100 * clear.difference.low:.1f}..{100 * clear.difference.high:.1f}"
    points = f"{100 * clear.difference.value:.1f}"
    assert clear.sentence() == f"v4 is better than v3 by {points} points (accuracy), 95 % interval {ends}, on 400 rows"
    assert clear.better == "v4" and clear.difference.value == pytest.approx(clear.our_value - clear.their_value)


def test_the_worse_one_is_told_by_the_same_numbers(clear: Verdict) -> None:
    low, high = clear.difference.low, clear.difference.high
    mirrored = replace(
        clear, ours="v3", theirs="v4", difference=replace(clear.difference, value=-clear.difference.value, low=-high, high=-low)
    )
    assert mirrored.sentence() == clear.sentence().replace("v4 is better than v3", "v3 is worse than v4")


def test_who_cannot_be_told_apart_is_told_so_with_the_rows_it_takes(unclear: Verdict) -> None:
    begin, end = unclear.sentence().split(" holds 0, on 400 rows; ")
    assert begin.startswith("cannot tell v4 from v3 (accuracy): +") and "95 % interval of the difference" in begin
    assert "points 80 times in 100, one of " in end and unclear.better == ""
    assert unclear.rows_needed(unclear.difference.value) > 400
    assert unclear.rows_needed(unclear.visible()) == pytest.approx(400, abs=1)


def test_less_is_better_where_the_metric_says_so() -> None:
    rng = np.random.default_rng(0)
    nll = rng.uniform(5, 20, 60)
    low, high = (
        Answers(name, tuple(Answered(str(i), nll=float(n), num_tokens=8) for i, n in enumerate(nll + more)))
        for name, more in (("low", 0.0), ("high", 1 + rng.random(60)))
    )
    verdict = compare("perplexity", high, low, "en")
    assert verdict.better == "low" and verdict.sentence().startswith("high is worse than low by 1.") and "points" not in verdict.sentence()


def test_a_few_rows_tell_nothing_however_clear_they_are() -> None:
    """Five of five against none: a bootstrap knows no doubt, chance does it once in sixteen."""
    verdict = compare("accuracy", hits("v4", np.ones(5, bool)), hits("v3", np.zeros(5, bool)), "en")
    assert verdict.p_value == pytest.approx(1 / 16, abs=0.02) and verdict.better == ""
    assert verdict.sentence() == "cannot tell v4 from v3 (accuracy): +100.0 points on 5 rows, which are too few"


def test_the_interval_alone_does_not_decide(clear: Verdict) -> None:
    sentence = replace(clear, p_value=0.06).sentence()
    assert "cannot tell" in sentence and "leaves out 0, but p = 0.060 by randomisation" in sentence


def test_small_differences_have_digits_enough() -> None:
    tiny = replace(UNIT, difference=replace(UNIT.difference, value=0.0004, low=0.0003, high=0.0005), spread=0.00005)
    assert "by 0.040 points (distinct-1), 95 % interval 0.030..0.050" in tiny.sentence()


def test_groups_are_told() -> None:
    right = np.array([True, False] * 20)
    groups = np.arange(40) // 4
    assert compare("accuracy", hits("a", right, groups), hits("b", right, groups), "en").sentence().endswith("on 40 rows in 10 groups")


def test_where_rows_are_right_or_wrong_the_test_is_mcnemars() -> None:
    for seed in range(4):
        ours, theirs = correlated(np.random.default_rng(seed), 120, 0.7, 0.6, 0.5)
        exact = binomtest(int((ours & ~theirs).sum()), int((ours != theirs).sum())).pvalue
        assert compare("accuracy", hits("a", ours), hits("b", theirs), "en").p_value == pytest.approx(exact, abs=0.035)


def test_the_paired_interval_is_the_normal_one_where_rows_are_many() -> None:
    ours, theirs = correlated(np.random.default_rng(0), 2000, 0.65, 0.6, 0.6)
    verdict = compare("accuracy", hits("a", ours), hits("b", theirs), "en")
    gaps = ours.astype(float) - theirs
    error = gaps.std() / np.sqrt(2000)
    assert verdict.spread == pytest.approx(error, rel=0.05)
    assert (verdict.difference.low, verdict.difference.high) == pytest.approx(
        (gaps.mean() - 1.96 * error, gaps.mean() + 1.96 * error), abs=0.003
    )
    assert verdict.visible() == pytest.approx(2.8 * error, rel=0.05)


def test_only_answers_to_the_same_rows_are_compared() -> None:
    ours = hits("a", np.ones(4, bool))
    renamed = Answers("b", (*ours.rows[:2], replace(ours.rows[2], id="other"), ours.rows[3]))
    with pytest.raises(DataError, match=r"did not answer the same rows\n  where:  row 3"):
        compare("accuracy", ours, renamed, "en")
    with pytest.raises(DataError, match="4 and 3 rows"):
        compare("accuracy", ours, Answers("b", ours.rows[:3]), "en")


def test_a_system_whose_answers_give_no_value_is_named() -> None:
    ours = Answers("wordy", (Answered("1", "one two"), Answered("2", "three")))
    mute = Answers("mute", (Answered("1"), Answered("2")))
    with pytest.raises(DataError, match=r"has no value on these rows\n  where:  mute"):
        compare("distinct_1", ours, mute, "en")


def test_draws_are_whole_and_as_many_whatever_is_held_at_once() -> None:
    for width in (0, 300_000):
        drawn, halved, swapped = (np.concatenate(list(draw(7, 0, width))) for draw in (bootstrap_weights, half_weights, swap_weights))
        assert drawn.shape == halved.shape == swapped.shape == (2000, 7)
        assert set(drawn.sum(1)) == {7} and set(halved.sum(1)) == {3} and set(swapped.ravel()) == {0, 1}
        assert np.concatenate([drawn, 2 * halved, 2 * swapped]).mean(0) == pytest.approx(np.full(7, 2.86 / 3), abs=0.06)


@pytest.mark.parametrize("num_groups", [50, 51])
def test_halves_scatter_a_mean_as_a_bootstrap_does(num_groups: int) -> None:
    values = np.random.default_rng(0).normal(size=num_groups)
    plain, halved = (resampled(lambda w: w @ values / w.sum(1), num_groups, halves=halves) for halves in (False, True))
    assert halved.mean() == pytest.approx(values.mean()) and halved.std() == pytest.approx(plain.std(), rel=0.06)


def test_rounding_of_sums_is_no_difference() -> None:
    rows = tuple(Answered(f"row-{n}", text="open mail", references=(f"open door {n}",)) for n in range(19))
    other = tuple(replace(row, text="mail open") for row in rows)
    told = compare("token_f1", Answers("a", rows), Answers("b", other), "en")
    assert told.difference.value == told.spread == 0 and told.sentence().endswith("no difference on 19 rows")
