"""Gaps: how far a system is from the values that a recipe aims at.

In: what was measured, targets. Out: sentences. Runs in: the driver.
"""

from __future__ import annotations

import math

from ftcore.evals.metrics.base import METRICS, Measured


def gap(system: str, measured: Measured, target: float) -> str:
    """Reached, missed, or nobody can tell: by the interval, which says it where it lies on one side of the target."""
    metric, interval = METRICS[measured.metric], measured.interval
    way = target - interval.value if metric.higher_is_better else interval.value - target
    aim = f"the target of {metric.amount(target)} ({metric.title})"
    if math.isnan(interval.low):
        ends = "no interval"
    else:
        ends = f"95 % interval {metric.shown_ends(interval)}"
    rows = f"{metric.shown(interval.value)}, {ends}, on {measured.num_rows:,} rows"
    worst, best = (interval.low, interval.high) if metric.higher_is_better else (-interval.high, -interval.low)
    aimed = target if metric.higher_is_better else -target
    if worst >= aimed:
        return f"{system} reaches {aim}: {rows}"
    if best < aimed:
        return f"{system} misses {aim} by {metric.amount(way)}: {rows}"
    side = f"{metric.amount(abs(way))} {'short' if way > 0 else 'beyond'}"
    return f"cannot tell whether {system} reaches {aim}: {rows}; {side}"
