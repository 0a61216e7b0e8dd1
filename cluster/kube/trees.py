"""Trees: a place in a manifest that knows its path, whatever stands there, so that no rule trips over a wrong type.

In: a Document. Out: Places, numbers out of quantities, durations and versions. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw, Level

_QUANTITY = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))([eE][+-]?\d+|[KMGTPE]i|[numkMGTPE])?$")
_FACTORS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", 1)
}
_GO_DURATION = re.compile(r"^([+-]?)((?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+|0)$")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_VERSION = re.compile(r"^\s*v?((?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*))+)")


@dataclass(frozen=True)
class Place:
    """A value in a document, there or not. What is of another type than asked for counts as not there: the schemas speak about types."""

    document: Document
    path: str
    value: Any
    """None where nothing stands: the API server drops nulls too."""

    def __getitem__(self, key: str | int) -> Place:
        if isinstance(key, int):
            inside = self.value[key] if isinstance(self.value, list) and -1 < key < len(self.value) else None
            return Place(self.document, f"{self.path}[{key}]", inside)
        inside = self.value.get(key) if isinstance(self.value, dict) else None
        return Place(self.document, f"{self.path}.{key}" if self.path else key, inside)

    def down(self, *keys: str | int) -> Place:
        place = self
        for key in keys:
            place = place[key]
        return place

    def __iter__(self) -> Iterator[Place]:
        """The items of a list."""
        return (self[number] for number in range(len(self.value) if isinstance(self.value, list) else 0))

    def entries(self) -> Iterator[tuple[str, Place]]:
        """The keys and values of an object."""
        return ((key, self[key]) for key in (list(self.value) if isinstance(self.value, dict) else []) if isinstance(key, str))

    @property
    def given(self) -> bool:
        return self.value is not None

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else ""

    @property
    def number(self) -> int | None:
        return self.value if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    @property
    def on(self) -> bool:
        return self.value is True

    @property
    def amount(self) -> float | None:
        """Of a quantity like `500m`, `8Gi` or 2."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float, str)):
            return None
        return quantity(str(self.value))

    def named(self, name: str, key: str = "name") -> Place:
        """The item of a list whose `name` is this; a place with nothing in it if there is none."""
        return next((item for item in self if name and item[key].text == name), Place(self.document, self.path, None))

    def flaw(self, wanted: str, remedy: str = "", *, got: object = None, level: Level = "error") -> Flaw:
        """A flaw here; its rule is set by the rulebook."""
        return self.document.flaw("", self.path, got=shown(self.value) if got is None else got, wanted=wanted, remedy=remedy, level=level)

    def warning(self, wanted: str, remedy: str = "", *, got: object = None) -> Flaw:
        return self.flaw(wanted, remedy, got=got, level="warning")


def root(document: Document) -> Place:
    return Place(document, "", document.tree)


def shown(value: object) -> str:
    """What stands there, in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, list(value)[:4])) + (", …}" if len(value) > 4 else "}")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = str(value).strip().replace("\n", " ")
    return (text if len(text) <= 60 else text[:57] + "…") or "an empty text"


def quantity(text: str) -> float | None:
    """Kubernetes' quantities, as a number of the base unit (cores, bytes)."""
    found = _QUANTITY.match(text.strip())
    if not found:
        return None
    number, suffix = float(found[1]), found[2] or ""
    exponent = suffix[:1] in "eE" and suffix[1:].lstrip("+-").isdigit()
    amount = float(found[0]) if exponent else number * _FACTORS.get(suffix, 1.0)
    return amount if math.isfinite(amount) else None


def go_duration_s(text: str) -> float | None:
    """`5m`, `1h30m`, `-5m` in seconds; None where Go's time.ParseDuration would refuse."""
    found = _GO_DURATION.match(text)
    if not found:
        return None
    total = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", found[2]))
    return -total if found[1] == "-" else total


def version(text: str) -> tuple[int, ...] | None:
    """The numbers of `2.52.0` or `v2.53.0rc1`, at least two; None for what KubeRay cannot read as a version."""
    found = _VERSION.match(text)
    return tuple(int(part) for part in found[1].split(".")) if found else None
