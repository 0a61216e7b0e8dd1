"""Items: the rows of a piece of one format, recognised at the piece's head; the one way for training and evaluation.

In: a source, its rows. Out: the rows of the head; the format's name, and why. Runs in: Ray Data actors, the driver;
no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftcore.data.formats.base import recognise
from ftcore.data.types import Rejected, Row

if TYPE_CHECKING:
    from ftcore.recipe import Source

HEAD_ROWS = 32
"""Good rows a format is recognised by, at the beginning of each piece."""


def head_of(rows: Iterator[Row | Rejected]) -> list[Row | Rejected]:
    """The first rows, up to and with HEAD_ROWS good ones."""
    head: list[Row | Rejected] = []
    num_good = 0
    while num_good < HEAD_ROWS and (row := next(rows, None)) is not None:
        head.append(row)
        num_good += isinstance(row, Row)
    return head


def format_of(source: Source, head: Sequence[Row | Rejected], item: type) -> tuple[str, str]:
    """The format's name, and why it was recognised; "" where the source names it, or nothing here gets as far as a format."""
    rows = [row for row in head if isinstance(row, Row)]
    if source.format != "auto" or not rows:
        return source.format, ""
    return recognise(rows, item)
