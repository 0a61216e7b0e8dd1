"""Columns: what rows of a test set tell beside question and answer: what kind they are (`--by`), and which of them are alike (`--group`).

In: raw rows. Out: Asked rows with both. Runs in: the driver; no torch.

Rows of one group (a session, a document, a passage with five questions) are no independent draws: intervals that take them for such are too
narrow (Miller 2024, "Adding Error Bars to Evals", section 2.2). Groups are resampled whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from ftcore.data.types import Row
from ftcore.errors import ConfigError
from ftcore.evals.asked import Asked

MOST_KINDS = 50


@dataclass(frozen=True)
class Columns:
    """Names of columns; "": none. `meta.topic`: one inside another."""

    kind: str = ""
    group: str = ""
    seen: set[str] = field(default_factory=set, compare=False)
    """What columns the rows have."""

    def put(self, asked: Asked, row: Row) -> Asked:
        """The question with its row's kind and group."""
        if not (self.kind or self.group):
            return asked
        self.seen.update(map(str, row.value))
        return replace(asked, kind=_entry(row, self.kind), group=_entry(row, self.group))

    def check(self, rows: Sequence[Asked]) -> None:
        """Raises ConfigError for a column that no row has, or that has too many kinds."""
        kinds = {row.kind for row in rows}
        self._check("--by", self.kind, kinds)
        self._check("--group", self.group, {row.group for row in rows})
        if len(kinds) > MOST_KINDS:
            raise ConfigError(
                "there are too many kinds to tell apart", where=f"--by {self.kind}", got=f"{len(kinds):,} different values",
                wanted=f"at most {MOST_KINDS}", remedy="another column",
            )  # fmt: skip

    def _check(self, option: str, column: str, values: set[str]) -> None:
        if column and values == {""}:
            near = get_close_matches(column, self.seen, n=1)
            raise ConfigError(
                "no test row has this column", where=option, got=column, wanted=" | ".join(sorted(self.seen)),
                remedy=f"did you mean `{near[0]}`?" if near else "",
            )  # fmt: skip


def _entry(row: Row, column: str) -> str:
    value: object = row.value.get(column) if column else None
    if value is None and "." in column:
        value = row.value
        for name in column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
