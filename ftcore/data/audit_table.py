"""The audit as text for a terminal: what was read, kept and refused and where, trained tokens per role, and how long examples are.

In: an Audit. Out: lines of plain text; control characters of rows are shown, never sent to the terminal. Runs in: the driver.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ftcore.data.types import ROLES

if TYPE_CHECKING:
    from ftcore.data.audit import Audit, Tally

BAR = 40
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters, direction marks and lone surrogates written as escapes: safe to print."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def render(audit: Audit) -> str:
    parts = [_rows(audit), _found(audit), _splits(audit), _tokens(audit), _histogram(audit)]
    return printable_lines("\n\n".join(part for part in parts if part))


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _rows(audit: Audit) -> str:
    lines = ["rows", _line("read", audit.read)]
    lines += _reasons("rejected", audit.rejected, audit.read)
    lines += _reasons("dropped", audit.dropped, audit.read)
    lines.append(_line("kept", audit.kept, audit.read))
    return "\n".join(lines + [f"  {note}" for note in audit.notes])


def _found(audit: Audit) -> str:
    groups = (("found", audit.redacted), ("found", audit.duplicates), ("leaked", audit.leaked))
    lines = [line for verb, tallies in groups for line in _reasons(verb, tallies, 0)]
    return "\n".join(["findings", *lines]) if lines else ""


def _splits(audit: Audit) -> str:
    lines = [f"{'split':<14}{'rows':>10}{'examples':>10}{'tokens':>13}{'trained':>13}{'blocks':>9}{'fill':>8}"]
    for name, facts in audit.splits.items():
        share = f"{facts.fill:.1%}" if facts.room else "-"
        counts = f"{facts.rows:>10,}{facts.examples:>10,}{facts.tokens:>13,}{facts.trained:>13,}{facts.blocks:>9,}{share:>8}"
        lines.append(f"  {name:<12}{counts}" + (f"  ({facts.repeats:,} rows repeated by weight)" if facts.repeats else ""))
    return "\n".join(lines) if audit.splits else ""


def _tokens(audit: Audit) -> str:
    total = sum(audit.trained.values())
    lines = ["trained tokens", *(_line(role, audit.trained[role], total) for role in ROLES if role in audit.trained)]
    lines.append(_line("examples truncated", audit.truncated.count, audit.num_examples))
    if audit.answers:
        lines.append(_line("answers that stop", audit.stopped, audit.answers))
    return "\n".join(lines)


def _histogram(audit: Audit) -> str:
    if not audit.lengths:
        return ""
    most, before = max(audit.lengths.values()), 0
    title = f"tokens an example (median {audit.quantile(0.5)}, 99 % {audit.quantile(0.99)}, longest {audit.longest})"
    lines = [title]
    edges = sorted(audit.lengths)
    for edge in edges:
        count = audit.lengths[edge]
        bar = "█" * max(1, round(BAR * count / most))
        lines.append(f"  {f'{before + 1}-{edge}' if before + 1 < edge else edge!s:>13} {count:>9,} {bar}")
        before = edge
    return "\n".join(lines)


def _reasons(verb: str, tallies: dict[str, Tally], total: int) -> list[str]:
    lines = []
    for reason, tally in sorted(tallies.items(), key=lambda pair: (-pair[1].count, pair[0])):
        lines.append(_line(f"{verb}: {reason}", tally.count, total))
        lines += [f"      {place}" for place in tally.places]
        if tally.places and tally.count > len(tally.places):
            lines.append(f"      and {tally.count - len(tally.places):,} more")
    return lines


def _line(name: str, count: int, total: int = 0) -> str:
    share = f"  {count / total:7.2%}" if total else ""
    return f"  {name:<34}{count:>12,}{share}"
