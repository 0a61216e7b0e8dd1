"""Flaws: what is wrong with a manifest, each with its place, what is there, what is wanted and what to do; and their table.

In: what the checks found. Out: text, or JSON. Runs in: a person's terminal, CI; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning"]
ORDER: tuple[Level, ...] = ("error", "warning")


@dataclass(frozen=True)
class Flaw:
    """One finding. An error is what is refused, or runs other than it reads; a warning is against practice."""

    level: Level
    rule: str
    """Its name, like `name-length`: what `--ignore` takes."""
    file: str
    line: int
    """From 1; 0 where a file as a whole is meant."""
    document: str
    """Like `RayJob/sft`; empty where the file could not be read."""
    path: str
    """Like `spec.rayClusterSpec.workerGroupSpecs[0].minReplicas`."""
    got: str
    wanted: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        place = " ".join(part for part in (self.document, self.path) if part)
        lines = [f"{self.level:<7} {where}  {place}  [{self.rule}]", f"        got {self.got}; wanted {self.wanted}"]
        return "\n".join([*lines, f"        -> {self.remedy}"] if self.remedy else lines)


def in_order(flaws: Iterable[Flaw]) -> list[Flaw]:
    """Errors first, then by place; what was found twice, once."""
    return sorted(dict.fromkeys(flaws), key=lambda flaw: (ORDER.index(flaw.level), flaw.file, flaw.line, flaw.path, flaw.rule))


def as_json(flaws: Sequence[Flaw]) -> list[dict[str, Any]]:
    return [asdict(flaw) for flaw in flaws]
