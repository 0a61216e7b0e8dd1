"""Verdict: is one system better than another on the same rows, by one metric? A plain sentence, also where nobody can tell.

In: a metric, two systems' answers. Out: a Verdict. Runs in: the driver; numpy only.

The difference has a paired interval (both systems on the same draws of groups) and a p-value by approximate randomisation (Noreen 1989;
Riezler & Maxwell 2005): how many of 2000 random exchanges of whole groups between the systems give a difference as large. It is the one
test here because it asks only that without a difference the two answers to a group could be exchanged. So it holds for any metric,
those over a whole corpus too, and for any number of rows; where rows are right or wrong it is McNemar's exact test.

A system is called better only where the interval leaves out 0 and p is small: on few rows a bootstrap alone is too sure of itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ftcore.errors import DataError
from ftcore.evals.answered import Answers, group_codes
from ftcore.evals.intervals import Interval, from_draws, resampled, swap_weights
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.words import Language

POWER = 0.8
"""How often a difference is to be found when rows are counted for it."""
NOISE = 1e-12
"""Differences of less than this share of the values are rounding: the same rows, added up in another order."""


@dataclass(frozen=True)
class Verdict:
    """`difference` is ours less theirs, as the metric counts; `spread` its standard error."""

    metric: str
    ours: str
    theirs: str
    our_value: float
    their_value: float
    difference: Interval
    spread: float
    p_value: float
    confidence: float
    num_rows: int
    num_groups: int

    @property
    def told_apart(self) -> bool:
        return not self.difference.holds(0.0) and self.p_value <= 1 - self.confidence

    @property
    def better(self) -> str:
        """The better system's name; "" where nobody can tell, and where neither more nor less is better."""
        if not self.told_apart or not METRICS[self.metric].ranks:
            return ""
        return self.ours if (self.difference.value > 0) == METRICS[self.metric].higher_is_better else self.theirs

    def sentence(self) -> str:
        metric, gap = METRICS[self.metric], self.difference
        digits = metric.digits(self.spread)
        rows = f"on {self.num_rows:,} rows" + (f" in {self.num_groups:,} groups" if self.num_groups < self.num_rows else "")
        level = f"{100 * self.confidence:.0f} % interval"
        if self.told_apart:
            size = gap if gap.value > 0 else Interval(-gap.value, -gap.high, -gap.low)
            amount = f"{metric.amount(size.value, digits)} ({metric.title})"
            if not metric.ranks:
                side = "above" if gap.value > 0 else "below"
                return f"{self.ours} lies {side} {self.theirs} by {amount}, {level} {metric.shown_ends(size, digits)}, {rows}"
            word = "better" if self.better == self.ours else "worse"
            return f"{self.ours} is {word} than {self.theirs} by {amount}, {level} {metric.shown_ends(size, digits)}, {rows}"
        begin = f"cannot tell {self.ours} from {self.theirs} ({metric.title}): "
        amount = ("+" if gap.value > 0 else "") + metric.amount(gap.value, digits)
        if not self.spread > 0:
            return begin + (f"{amount} {rows}, which are too few" if gap.value else f"no difference {rows}")
        why = "holds 0" if gap.holds(0.0) else f"leaves out 0, but p = {self.p_value:.3f} by randomisation"
        return f"{begin}{amount}, and the {level} of the difference, {metric.shown_ends(gap, digits)}, {why}, {rows}; {self.outlook()}"

    def outlook(self) -> str:
        """What these rows could show, and how many would show the difference that was seen."""
        metric, seen = METRICS[self.metric], abs(self.difference.value)
        digits, needed = metric.digits(self.spread), self.rows_needed(seen)
        text = f"as many rows show a difference of {metric.amount(self.visible(), digits)} {100 * POWER:.0f} times in 100"
        return text + (f", one of {metric.amount(seen, digits)} takes about {_rounded(needed):,}" if needed > self.num_rows else "")

    def visible(self, power: float = POWER) -> float:
        """The smallest difference that as many rows find with this chance (normal approximation)."""
        return (NormalDist().inv_cdf((1 + self.confidence) / 2) + NormalDist().inv_cdf(power)) * self.spread

    def rows_needed(self, difference: float, power: float = POWER) -> int:
        """How many such rows would find a difference of this size with this chance; 0 for a difference of 0, which no number finds."""
        return math.ceil(self.num_rows * (self.visible(power) / difference) ** 2) if difference else 0


def compare(metric: str, ours: Answers, theirs: Answers, language: Language, *, confidence: float = 0.95, seed: int = 0) -> Verdict:
    """Ours against theirs. Raises DataError unless both answered the same rows, and where the metric has no value on them."""
    _same_rows(ours, theirs)
    chosen, num_rows = METRICS[metric], len(ours.rows)
    both = chosen.prepare((*ours.rows, *theirs.rows), language).score  # read together, so that any mix of the two has a value
    codes, num_groups = group_codes(ours.rows)

    def difference(weights: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """Of the mix that takes a group `weights` times from ours and `rest` times from theirs, and its mirror image."""
        one, other = weights[:, codes], rest[:, codes]
        return both(np.concatenate([one, other], axis=1)) - both(np.concatenate([other, one], axis=1))

    our_value, their_value = (float(value) for value in both(np.repeat(np.eye(2), num_rows, axis=1)))
    if not math.isfinite(our_value - their_value):
        raise DataError(
            f"`{metric}` has no value on these rows", where=theirs.system if math.isfinite(our_value) else ours.system,
            got=f"{num_rows} rows", remedy="look at its answers, or take another metric",
        )  # fmt: skip
    noise = NOISE * max(abs(our_value), abs(their_value))
    seen = our_value - their_value if abs(our_value - their_value) > noise else 0.0
    drawn = resampled(lambda w: difference(w, 0 * w), num_groups, width=2 * num_rows, halves=chosen.halves, seed=seed)
    drawn[np.abs(drawn) <= noise] = 0.0
    swapped = np.concatenate([difference(w, 1 - w) for w in swap_weights(num_groups, seed + 1, 2 * num_rows)])
    as_large = np.abs(swapped[np.isfinite(swapped)]) >= abs(seen) - 1e-12
    finite = drawn[np.isfinite(drawn)]
    return Verdict(
        metric=metric, ours=ours.system, theirs=theirs.system, our_value=our_value, their_value=their_value,
        difference=from_draws(seen, drawn, confidence), spread=float(finite.std()) if len(finite) else math.nan,
        p_value=float((1 + as_large.sum()) / (1 + len(as_large))), confidence=confidence, num_rows=num_rows, num_groups=num_groups,
    )  # fmt: skip


def _same_rows(ours: Answers, theirs: Answers) -> None:
    for number, (one, other) in enumerate(zip(ours.rows, theirs.rows, strict=False), start=1):
        if (one.id, one.group, one.references, one.gold) != (other.id, other.group, other.references, other.gold):
            raise DataError(
                f"{ours.system} and {theirs.system} did not answer the same rows", where=f"row {number}",
                got=f"{one.id} and {other.id}", wanted="one id, group, references and gold label", remedy="judge both on one test set",
            )  # fmt: skip
    if len(ours.rows) != len(theirs.rows):
        raise DataError(
            f"{ours.system} and {theirs.system} did not answer the same rows", got=f"{len(ours.rows)} and {len(theirs.rows)} rows",
            wanted="as many", remedy="judge both on one test set",
        )  # fmt: skip


def _rounded(count: int) -> int:
    """To two digits: it is an estimate."""
    step = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step
