"""Tables: cells as text for a terminal, and as Markdown.

In: rows of cells, the headings first. Out: lines. Runs in: everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def as_text(rows: Cells) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Cells) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
