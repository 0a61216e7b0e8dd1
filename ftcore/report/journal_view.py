"""Journal view: the lines of metrics.jsonl as series to draw and figures to show.

In: a run's folder. Out: Series and Figures. Runs in: the driver, after a run; no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ftcore.storage import Folder

MAX_POINTS = 400
"""A curve on screen is about this many pixels wide."""


@dataclass(frozen=True)
class Series:
    """One quantity over steps; only finite values, steps ascending."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def thinned(self, num_points: int = MAX_POINTS) -> Series:
        """At most about `num_points`: each bucket keeps its smallest and largest value, so spikes stay visible."""
        if len(self.steps) <= num_points:
            return self
        size = math.ceil(2 * len(self.steps) / num_points)
        kept: list[int] = []
        for start in range(0, len(self.steps), size):
            bucket = range(start, min(start + size, len(self.steps)))
            kept += sorted({min(bucket, key=self.values.__getitem__), max(bucket, key=self.values.__getitem__)})
        kept = sorted({0, *kept, len(self.steps) - 1})
        return Series(tuple(self.steps[i] for i in kept), tuple(self.values[i] for i in kept))

    def smoothed(self) -> Series:
        """Centred moving mean over about 4 % of the curve."""
        half = len(self.values) // 50
        if half == 0:
            return self
        sums = [0.0]
        for value in self.values:
            sums.append(sums[-1] + value)
        means = []
        for i in range(len(self.values)):
            low, high = max(0, i - half), min(len(self.values), i + half + 1)
            means.append((sums[high] - sums[low]) / (high - low))
        return Series(self.steps, tuple(means))


def read_journal(folder: Folder) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line that a kill cut short is left out."""
    if not folder.exists("metrics.jsonl"):
        return []
    *whole, _cut = folder.read("metrics.jsonl").decode("utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in whole if line.strip()]


def series(lines: Iterable[Mapping[str, Any]], key: str) -> Series:
    """`key` over steps. A step written twice (a restart repeats what it lost) counts once, the last time."""
    points: dict[int, float] = {}
    for line in lines:
        value = line.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points[int(line["step"])] = float(value)
    steps = sorted(points)
    return Series(tuple(steps), tuple(points[step] for step in steps))


def figures(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The run in a few numbers, as people read them. Empty when nothing was trained yet."""
    train = [line for line in lines if "loss" in line]
    if not train:
        return {}
    last = train[-1]
    loss, validation = series(lines, "loss"), series(lines, "validation_loss")
    tail = loss.values[-max(1, len(loss.values) // 20) :]
    shown = {"steps": f"{last['step']:,}", "final loss": f"{sum(tail) / len(tail):.4g}" if tail else "not finite"}
    if validation:
        best = min(range(len(validation.values)), key=validation.values.__getitem__)
        shown[f"best validation loss (step {validation.steps[best]:,})"] = f"{validation.values[best]:.4g}"
        shown["its perplexity"] = f"{math.exp(min(validation.values[best], 700)):.4g}"
    if "trained_tokens" in last:
        shown["trained tokens"] = f"{last['trained_tokens']:,}"
    speed = series(lines, "tokens_per_s")
    if speed:
        shown["tokens/s (median)"] = f"{median(speed.values):,.0f}"
    if "seconds" in last:
        shown["time"] = duration(float(last["seconds"]))
    return shown


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 14 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
