"""Held out: the rows that systems are judged on: a recipe's own test split, exactly as its training left it out, or whole files.

In: a recipe and its prepared folder, or paths. Out: a TestSet; items of any split. Runs in: the driver, all test rows in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ftcore.data.duplicates import content_hash
from ftcore.data.formats.base import to_item
from ftcore.data.items import format_of, head_of
from ftcore.data.prepared import Prepared
from ftcore.data.read import plan, read
from ftcore.data.redact import redact_item
from ftcore.data.types import Conversation, Item, Rejected, Row
from ftcore.errors import ConfigError, DataError
from ftcore.evals.asked import Asked, asked_of
from ftcore.evals.columns import Columns
from ftcore.recipe import Recipe, Source
from ftcore.storage import digest_of

CONVERSATIONS = "conversations whose last answer is the right one"
PLAIN = Columns()


@dataclass(frozen=True)
class TestSet:
    """`origin`: what the rows are, in words; `left_out`: how many were, by reason."""

    __test__ = False
    """No test of pytest's."""
    origin: str
    rows: tuple[Asked, ...]
    left_out: dict[str, int]

    @property
    def digest(self) -> str:
        return digest_of([[row.id, row.content, row.reference] for row in self.rows])

    def limited(self, most: int) -> TestSet:
        """At most so many rows: those with the smallest content hashes, whatever order they lie in."""
        if len(self.rows) <= most:
            return self
        chosen = {row.id for row in sorted(self.rows, key=lambda row: (row.content, row.id))[:most]}
        left_out = {**self.left_out, "beyond --limit": len(self.rows) - most}
        return replace(self, rows=tuple(row for row in self.rows if row.id in chosen), left_out=left_out)

    def without(self, ids: set[str], reason: str) -> TestSet:
        kept = tuple(row for row in self.rows if row.id not in ids)
        return replace(self, rows=kept, left_out={**self.left_out, reason: len(self.rows) - len(kept)} if ids else self.left_out)


def held_out(recipe: Recipe, prepared: Prepared, columns: Columns = PLAIN) -> TestSet:
    """The recipe's test split. Raises ConfigError where the recipe holds none out, DataError where none of it can be asked."""
    kept = prepared.rows("test")
    if not len(kept):
        raise ConfigError(
            "this recipe holds no test rows out", where="data.test", got=f"{recipe.data.test:g}, and no source with split: test",
            wanted="a share, like data.test=0.1, or a source of its own",
            remedy="set it before training (what was trained on is no test), or name other rows with --rows FILE",
        )  # fmt: skip
    return _test_set(f"the test split of {recipe.name}", _asked(_kept(recipe, kept, prepared.origins), columns), columns)


def whole_files(
    paths: Sequence[str],
    read_row: Callable[[Row], Asked] | None = None,
    wanted: str = CONVERSATIONS,
    columns: Columns = PLAIN,
) -> TestSet:
    """Every row of the files. `read_row`: of rows that are no conversations; `wanted`: what they are instead, for people."""
    sources = [Source(path=path) for path in paths]
    rows = _asked(_items(sources, Conversation), columns) if read_row is None else _own_rows(sources, read_row, columns)
    return _test_set(", ".join(paths), rows, columns, wanted)


def items_of(recipe: Recipe, kept: np.ndarray, origins: Sequence[str]) -> Iterator[Item]:
    """The items of KEPT records, read again as they were prepared."""
    return (item for _, item in _kept(recipe, kept, origins))


def _kept(recipe: Recipe, kept: np.ndarray, origins: Sequence[str]) -> Iterator[tuple[Row, Item]]:
    wanted = {(origins[record["file"]], int(record["row"])): int(record["hash"]) for record in kept}
    files = {file for file, _ in wanted}
    data = recipe.data
    for row, item in _items(data.sources, recipe.stage.item, files):
        if isinstance(row, Rejected) or isinstance(item, Rejected) or (item.origin.file, item.origin.row) not in wanted:
            continue
        if data.redact == "mask":
            item, _ = redact_item(item, masked=True)
        if content_hash(item)[0] == wanted[item.origin.file, item.origin.row]:
            del wanted[item.origin.file, item.origin.row]
            yield row, item
    if wanted:
        (file, number), *_ = wanted
        raise DataError(
            "a row that was prepared is not there any more", where=f"{file}, row {number}", remedy="give the rows of the recipe back"
        )


def _items(sources: Sequence[Source], item: type, files: set[str] | None = None) -> Iterator[tuple[Row | Rejected, Item | Rejected]]:
    """Rows, each with what it is."""
    for piece in plan(sources):
        if files is not None and piece.label not in files:
            continue
        source, rows = sources[piece.source], read(piece)
        head = head_of(rows)
        name, _ = format_of(source, head, item)
        for row in chain(head, rows):
            yield row, _item(row, name)


def _own_rows(sources: Sequence[Source], read_row: Callable[[Row], Asked], columns: Columns) -> Iterator[Asked | Rejected]:
    for piece in plan(sources):
        for row in read(piece):
            try:
                yield row if isinstance(row, Rejected) else columns.put(read_row(row), row)
            except DataError as error:
                yield Rejected(row.origin, error.what, error.got)


def _item(row: Row | Rejected, name: str) -> Item | Rejected:
    if isinstance(row, Rejected):
        return row
    try:
        return to_item(row, name)
    except DataError as error:
        return Rejected(row.origin, error.what, error.got)


def _asked(items: Iterable[tuple[Row | Rejected, Item | Rejected]], columns: Columns) -> Iterator[Asked | Rejected]:
    for row, item in items:
        if isinstance(item, Rejected):
            yield item
            continue
        assert isinstance(row, Row)
        try:
            yield columns.put(asked_of(item), row)
        except DataError as error:
            yield Rejected(item.origin, error.what, error.remedy)


def _test_set(origin: str, rows: Iterator[Asked | Rejected], columns: Columns, wanted: str = CONVERSATIONS) -> TestSet:
    found = list(rows)
    rejected = [row for row in found if isinstance(row, Rejected)]
    asked = tuple(row for row in found if isinstance(row, Asked))
    if not asked:
        first = f"{rejected[0].origin}: {rejected[0].reason}" if rejected else "no rows"
        raise DataError(
            "there is nothing to judge by: no row has a question and an answer", where=origin, got=first,
            wanted=wanted, remedy="check the rows",
        )  # fmt: skip
    columns.check(asked)
    return TestSet(origin, asked, dict(Counter(row.reason for row in rejected)))
