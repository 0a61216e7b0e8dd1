"""Kinds: results told apart by a column of the rows: which language, which topic, which bias is it that a system is bad at?

In: each system's answers, the rows' kinds. Out: a table a metric. Runs in: the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftcore.errors import DataError
from ftcore.evals.answered import Answers
from ftcore.evals.metrics.base import METRICS, Measured
from ftcore.evals.words import Reading

NO_KIND = "(none)"


@dataclass(frozen=True)
class Kind:
    """The rows of one kind. `measured`: metric -> system -> its value on them, where they have one."""

    name: str
    num_rows: int
    measured: Mapping[str, Mapping[str, Measured]]


def by_kind(
    metrics: Sequence[str], shared: Mapping[str, Sequence[Answers]], kinds: Mapping[str, str], reading: Reading
) -> tuple[Kind, ...]:
    """`shared`: by metric, the answers that every system has; `kinds`: of rows, by their ids. The largest kind first."""
    names = sorted(set(kinds.values()), key=lambda name: (-sum(kind == name for kind in kinds.values()), name))
    found = []
    for name in names:
        measured: dict[str, dict[str, Measured]] = {metric: {} for metric in metrics}
        for metric in metrics:
            for each in shared[metric]:
                rows = tuple(row for row in each.rows if kinds[row.id] == name)
                try:
                    measured[metric][each.system] = METRICS[metric].measure(rows, reading.language)
                except DataError:  # nothing to compute it from: a precision without a row of that label, say
                    continue
        found.append(Kind(name or NO_KIND, sum(kind == name for kind in kinds.values()), measured))
    return tuple(found)


def kind_cells(metric: str, kinds: Sequence[Kind], systems: Sequence[str]) -> list[list[str]]:
    """Headings, and a row a kind."""
    found = METRICS[metric]
    rows = [["kind", "rows", *(cell for system in systems for cell in (system, "95 % interval"))]]
    for kind in kinds:
        row = [kind.name, f"{kind.num_rows:,}"]
        for system in systems:
            one = kind.measured[metric].get(system)
            row += [found.shown(one.interval.value), found.shown_ends(one.interval)] if one else ["-", "-"]
        rows.append(row)
    return rows
