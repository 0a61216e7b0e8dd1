"""Chart: a curve as inline SVG that needs no script and follows the page's colours; and the same curves as one PNG.

In: Series. Out: SVG markup, PNG bytes. Runs in: the driver, after a run.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ftcore.report.journal_view import Series

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26


NOTHING = Series((), ())


@dataclass(frozen=True)
class Curve:
    """A chart's worth: a noisy line with its smoothed form, and points measured now and then (validation)."""

    title: str
    line: Series
    points: Series = NOTHING
    unit: str = ""
    noisy: bool = True

    @property
    def trend(self) -> Series:
        return self.line.smoothed() if self.noisy else self.line

    def __bool__(self) -> bool:
        return bool(self.line) or bool(self.points)


def svg(curve: Curve) -> Markup:
    """The chart as `<svg>`; classes `raw`, `line`, `dots`, `grid`, `tick` are the page's to colour."""
    steps = [*curve.line.steps, *curve.points.steps]
    values = [*curve.line.values, *curve.points.values]
    ticks = nice_ticks(*_visible_range(values))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return TOP + (1 - min(max(share, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{Markup.escape(curve.title)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        number = _number(tick, ticks[1] - ticks[0])
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number}</text>')
    for step in sorted({first, (first + last) // 2, last}):
        anchor = "start" if step == first else "end" if step == last else "middle"
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,}</text>')
    if curve.trend is not curve.line:
        parts.append(f'<polyline class="raw" points="{_path(curve.line.thinned(), x, y)}"/>')
    if curve.line:
        parts.append(f'<polyline class="line" points="{_path(curve.trend.thinned(), x, y)}"/>')
    if curve.points:
        parts.append(f'<polyline class="dots-line" points="{_path(curve.points, x, y)}"/>')
        for step, value in zip(curve.points.steps, curve.points.values, strict=True):
            title = f"<title>step {step}: {value:.5g}</title>"
            parts.append(f'<circle class="dots" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5">{title}</circle>')
    return Markup("".join([*parts, "</svg>"]))


def png(curves: list[Curve]) -> bytes:
    """All curves on one sheet."""
    rows = max(1, math.ceil(len(curves) / 2))
    figure = Figure(figsize=(11, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(rows, 2, index + 1)
        trend = curve.trend
        if trend is not curve.line:
            axes.plot(curve.line.steps, curve.line.values, color="#3b6fd4", alpha=0.25, linewidth=1)
        axes.plot(trend.steps, trend.values, color="#3b6fd4", linewidth=1.6, label="training")
        if curve.points:
            axes.plot(curve.points.steps, curve.points.values, "o-", color="#d9822b", markersize=4, linewidth=1, label="validation")
            axes.legend(frameon=False)
        axes.set_title(curve.title + (f" ({curve.unit})" if curve.unit else ""), fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round values that enclose [low, high]: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / (num - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _visible_range(values: list[float]) -> tuple[float, float]:
    """The range of all values but the rarest spikes, so that one exploding step does not flatten the curve."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    return ordered[0], ordered[-1 - cut]


def _path(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(series.steps, series.values, strict=True))


def _number(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
