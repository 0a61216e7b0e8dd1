"""Search page: what a search tried, as one self-contained HTML page: parallel coordinates, learning curves, importance, cost, a table.

In: a Search, its trials. Out: report.html in the search's folder. Runs in: the driver, after a search or in the middle of one.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

import ftcore
from ftcore.card import utc_now
from ftcore.report import HTML, page_environment
from ftcore.report.chart import nice_ticks
from ftcore.search import Log, Search
from ftcore.storage import Folder
from ftcore.trials import Found, Tried, shown_values, value_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1040, 300, 60, 60, 28, 20
FEWEST = 4
"""Trials from which on it is worth saying which key mattered."""


@dataclass(frozen=True)
class Axis:
    """One key's values over the height of the chart, 0 at the bottom and 1 at the top."""

    name: str
    places: dict[str, float]
    """JSON of each value -> its place."""
    marks: tuple[tuple[float, str], ...]


def write_search_page(folder: Folder, search: Search, found: Found, winner: str = "") -> str:
    """Writes the page and returns where it is. `winner`: what became of the best trial, in a line."""
    ranked, failed = found.ranked(), [trial for trial in found.trials.values() if trial.state == "failed"]
    page = page_environment().get_template("search.html.jinja").render(
        name=str(folder).rstrip("/").rsplit("/", 1)[-1], place=str(folder), made=utc_now(), tool=f"ftcore {ftcore.__version__}",
        metric=search.metric, mode=search.mode, found=found, ranked=ranked, failed=failed,
        figures=figures(search, found), parallel=parallel(search, ranked), curves=curves(ranked), importance=importance(search, ranked),
        winner=winner, shown=shown_values, space={path: span.model_dump(mode="json") for path, span in search.space.items()},
    )  # fmt: skip
    folder.write(HTML, page.encode("utf-8", errors="replace"))
    return f"{folder}/{HTML}"


def figures(search: Search, found: Found) -> dict[str, str]:
    ranked = found.ranked()
    best = f"{ranked[0].best(search.mode):.5g}" if ranked else "none"
    states = [trial.state for trial in found.trials.values()]
    whole = sum(trial.steps / max(trial.share, 1e-9) * 100 for trial in found.trials.values() if trial.share)
    return {
        f"best {search.metric}": best, "trials": str(len(states)), "run to their ends": str(states.count("done")),
        "ended early": str(states.count("stopped")), "failed": str(states.count("failed")), "steps of all": f"{found.num_steps:,}",
        "steps without ending early": f"{whole:,.0f}", "minutes": f"{found.seconds / 60:.1f}",
    }  # fmt: skip


def axes(search: Search, trials: Sequence[Tried]) -> list[Axis]:
    """One for each key that was drawn, and one for what decides (the best at the top)."""
    found = []
    for path, span in search.free.items():
        values = [trial.values[path] for trial in trials if path in trial.values]
        found.append(_axis(path, values, logarithmic=isinstance(span, Log)))
    bests = [trial.best(search.mode) for trial in trials]
    last = _axis(search.metric, [best for best in bests if best is not None], logarithmic=False)
    return [*found, _turned(last) if search.mode == "min" else last]


def _axis(name: str, values: Sequence[Any], *, logarithmic: bool) -> Axis:
    distinct = {json.dumps(value): value for value in values}
    numbers = all(type(value) in (int, float) for value in distinct.values())
    if numbers:
        ordered = sorted(distinct, key=lambda key: distinct[key])
    else:
        ordered = sorted(distinct)
    if numbers and len(distinct) > 6:
        scale = [math.log(distinct[key]) if logarithmic else float(distinct[key]) for key in ordered]
        low, high = scale[0], max(scale[-1], scale[0] + 1e-300)
        places = {key: (at - low) / (high - low) for key, at in zip(ordered, scale, strict=True)}
        ends = [ordered[0], ordered[-1]]
    else:
        places = {key: (number + 0.5) / len(ordered) for number, key in enumerate(ordered)}
        ends = ordered
    return Axis(name, places, tuple((places[key], value_text(distinct[key])) for key in ends))


def _turned(axis: Axis) -> Axis:
    return Axis(axis.name, {key: 1 - at for key, at in axis.places.items()}, tuple((1 - at, text) for at, text in axis.marks))


def parallel(search: Search, ranked: Sequence[Tried]) -> Markup | None:
    """A line a trial through one axis a key; the better, the stronger."""
    if not ranked:
        return None
    drawn = axes(search, ranked)
    xs = [LEFT + index * (WIDTH - LEFT - RIGHT) / (len(drawn) - 1) for index in range(len(drawn))]

    def y(at: float) -> float:
        return TOP + (1 - at) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="parallel coordinates">']
    for place, trial in reversed(list(enumerate(ranked))):
        values = [*(trial.values.get(axis.name) for axis in drawn[:-1]), trial.best(search.mode)]
        points = [
            f"{x:.1f},{y(axis.places[json.dumps(value)]):.1f}"
            for x, axis, value in zip(xs, drawn, values, strict=True)
            if json.dumps(value) in axis.places
        ]
        strength = 1 - place / len(ranked)
        style = 'class="best"' if place == 0 else f'class="line" style="opacity:{0.12 + 0.6 * strength:.2f}"'
        title = Markup.escape(f"{trial.id}: {shown_values(trial.values)} -> {trial.best(search.mode):.5g}")
        parts.append(f'<polyline {style} points="{" ".join(points)}"><title>{title}</title></polyline>')
    for x, axis in zip(xs, drawn, strict=True):
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="14" text-anchor="middle">{Markup.escape(axis.name)}</text>')
        parts += [f'<text class="tick" x="{x + 5:.1f}" y="{y(at) + 4:.1f}">{Markup.escape(text)}</text>' for at, text in axis.marks]
    return Markup("".join([*parts, "</svg>"]))


def curves(ranked: Sequence[Tried]) -> Markup | None:
    """What decides over the share of a trial, a line a trial; the best one stands out."""
    values = sorted(look.value for trial in ranked for look in trial.present if math.isfinite(look.value))
    if not values:
        return None
    low, high = values[0], values[min(len(values) - 1, int(0.95 * len(values)))]
    ticks = nice_ticks(low, high)

    def x(share: float) -> float:
        return LEFT + share / 100 * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        at = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return TOP + (1 - min(max(at, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="learning curves">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for share in (0, 25, 50, 75, 100):
        parts.append(f'<text class="tick" x="{x(share):.1f}" y="{HEIGHT - 4}" text-anchor="middle">{share} %</text>')
    for place, trial in reversed(list(enumerate(ranked))):
        points = [(x(look.share), y(look.value)) for look in trial.present if math.isfinite(look.value)]
        style = 'class="best"' if place == 0 else 'class="line" style="opacity:.35"'
        title = f"<title>{Markup.escape(trial.id)}</title>"
        parts.append(f'<polyline {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}">{title}</polyline>')
        parts += [f'<circle class="end" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points[-1:]]
    return Markup("".join([*parts, "</svg>"]))


def importance(search: Search, ranked: Sequence[Tried]) -> Mapping[str, float]:
    """Each key's share in telling good trials from the others (PED-ANOVA, Watanabe et al. 2023; Optuna's); empty for too few trials."""
    if len(ranked) < FEWEST or len(search.free) < 2:
        return {}
    import optuna  # a second to import, for this page alone

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if search.mode == "min" else "maximize")
    ranges = {path: _distribution(span) for path, span in search.free.items()}
    for trial in ranked:
        values = {path: json.dumps(value) if hasattr(search.free[path], "choice") else value for path, value in trial.values.items()}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=ranges, value=trial.best(search.mode)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return dict(found)


def _distribution(span: Any) -> Any:
    from optuna import distributions

    if hasattr(span, "choice"):
        return distributions.CategoricalDistribution([json.dumps(value) for value in span.choice])
    low, high = span.bounds()
    kind = distributions.IntDistribution if span.is_whole else distributions.FloatDistribution
    return kind(low, high, log=isinstance(span, Log))
