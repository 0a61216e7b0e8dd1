"""Every metric of the registry: perfect answers are best, weights are repetitions, what is missing is told with the row's id."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import Answered, Answers
from ftcore.evals.metrics import base
from ftcore.evals.metrics.base import METRICS, Metric
from ftcore.evals.verdict import compare
from ftcore.evals.words import Language
from tests.answers import imperfect, perfect

REPO = Path(__file__).resolve().parents[2]
LACKING: dict[str, Any] = {
    "references": (), "gold": "", "chosen": None, "scores": {}, "nll": None, "num_tokens": 0, "num_bytes": 0,
    "points": None, "support": None, "harmful": None, "refused": None, "stereotyping": None, "toxicity": None,
}  # fmt: skip
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@pytest.fixture(params=list(METRICS))
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param]


def plain(metric: Metric, rows: list[Answered], language: Language = "en") -> float:
    return float(metric.prepare(rows, language).score(np.ones((1, len(rows))))[0])


@pytest.mark.parametrize("language", LANGUAGES)
def test_perfect_answers_are_best(metric: Metric, language: Language) -> None:
    """METEOR comes to 1 - 0.5 / words**3 at most."""
    assert plain(metric, perfect(language=language), language) == pytest.approx(metric.best, abs=1e-3)


@pytest.mark.parametrize("language", LANGUAGES)
def test_worse_answers_are_worse(metric: Metric, language: Language) -> None:
    best, worse = plain(metric, perfect(language=language), language), plain(metric, imperfect(language=language), language)
    assert (worse < best) if metric.higher_is_better else (worse > best)


@pytest.mark.parametrize("language", LANGUAGES)
def test_whole_weights_are_repetitions(metric: Metric, language: Language) -> None:
    rows = imperfect(language=language)
    weights = np.random.default_rng(1).integers(0, 4, (5, len(rows)))
    weights[:, :3] += 1  # a row of each label
    values = metric.prepare(rows, language).score(weights.astype(float))
    for value, times in zip(values, weights, strict=True):
        repeated = [row for row, count in zip(rows, times, strict=True) for _ in range(count)]
        assert value == pytest.approx(plain(metric, repeated, language), rel=1e-5)


def test_the_order_of_rows_does_not_matter(metric: Metric) -> None:
    assert plain(metric, imperfect()[::-1]) == pytest.approx(plain(metric, imperfect()), rel=1e-6)


def test_the_interval_lies_around_the_value_and_within_what_is_possible(metric: Metric) -> None:
    measured = metric.measure(imperfect(), "en")
    interval = measured.interval
    low, high = base.RANGE[metric.unit]
    assert interval.value == pytest.approx(plain(metric, imperfect()))
    assert low <= interval.low < interval.value < interval.high <= high
    assert (measured.num_rows, measured.num_groups) == (12, 6)


def test_two_systems_read_together_come_to_what_each_does_alone(metric: Metric) -> None:
    ours, theirs = imperfect(seed=1), imperfect(seed=2)
    theirs = [replace(row, references=other.references) for row, other in zip(theirs, ours, strict=True)]
    verdict = compare(metric.name, Answers("a", tuple(ours)), Answers("b", tuple(theirs)), "en")
    assert verdict.our_value == pytest.approx(plain(metric, ours), rel=1e-6)
    assert verdict.their_value == pytest.approx(plain(metric, theirs), rel=1e-6)
    assert verdict.difference.low <= verdict.difference.value <= verdict.difference.high


def test_a_system_cannot_be_told_from_itself(metric: Metric) -> None:
    same = Answers("a", tuple(imperfect()))
    verdict = compare(metric.name, same, same, "en")
    assert (verdict.better, verdict.p_value) == ("", 1.0)
    assert "no difference on 12 rows" in verdict.sentence()


def test_no_rows_are_an_error(metric: Metric) -> None:
    with pytest.raises(DataError, match="there is no row"):
        metric.prepare([], "en")


@pytest.mark.parametrize("name", list(METRICS))
def test_a_row_that_lacks_something_is_named(name: str) -> None:
    for fact in METRICS[name].needs:
        rows = imperfect()
        rows[4] = replace(rows[4], **{fact: LACKING[fact]})
        with pytest.raises(DataError, match="row-4"):
            METRICS[name].prepare(rows, "en")


def test_numbers_are_printed_in_the_unit(metric: Metric) -> None:
    text = metric.shown(0.1234)
    assert text == {"share": "12.3", "points": "0.1", "plain": "0.123"}[metric.unit]
    assert metric.title and metric.amount(0.5).endswith("points") == (metric.unit != "plain")


def test_one_group_has_a_value_and_no_interval(metric: Metric) -> None:
    rows = [replace(row, group="all") for row in imperfect()]
    measured = metric.measure(rows, "en")
    assert measured.interval.value == pytest.approx(plain(metric, rows))
    assert metric.shown_ends(measured.interval) == "-"


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ftcore\[eval\]"):
        METRICS["bleu"].check()
    METRICS["accuracy"].check()


def test_the_registry_is_read_without_what_the_metrics_need() -> None:
    code = (
        "import sys; from ftcore.evals.metrics.base import METRICS; names = list(METRICS);"
        "print([m for m in ('torch', 'sacrebleu', 'nltk', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
