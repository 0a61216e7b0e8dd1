"""Gate: whether a new version is good enough for its name to point at it, judged on the recipe's test rows.

In: a published version, the recipe's gate. Out: the name promoted, or left where it was, with the reason; gate.json in the run's folder.
Runs in: the driver, after publishing; the base is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.data.types import Text
from ftcore.engines.torch import Torch
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.results import Results
from ftcore.evals.tasks.base import asking
from ftcore.history import remember
from ftcore.recipe import Gate, Recipe
from ftcore.rundir import RunDir
from pipelines.evaluating import Means
from pipelines.judging import Wanted, evaluate

Log = Callable[[str], None]
RECORD = "gate.json"


@dataclass(frozen=True)
class Judged:
    """Why it passed, or did not."""

    passed: bool
    why: str


def judge_at_gate(run: RunDir, recipe: Recipe, gate: Gate, ref: AdapterRef, log: Log) -> Judged:
    """Judges a version, promotes it where it passes. One that passed is not judged again; one that did not, only against another rival."""
    store = AdapterStore(recipe.output.store)
    targets = store.targets(ref.tenant, ref.name)
    rivals = [version for version in targets if version != ref] if gate.better_than else []
    rival = max(rivals, key=targets.__getitem__, default=None)
    asked: dict[str, Any] = {"ref": ref.full, "gate": gate.model_dump(mode="json"), "rival": rival.full if rival else ""}
    before = run.folder.read_json(RECORD) if run.folder.exists(RECORD) else {}
    if all(before.get(fact) == asked[fact] for fact in asked if fact != "rival" or not before["passed"]):
        log(f"judged before: {before['why']}")
        return Judged(bool(before["passed"]), before["why"])
    systems = [*([rival.full] if rival else []), ref.full]
    task = "documents" if type(recipe.stage).item is Text else asking([gate.metric])
    wanted = Wanted(
        recipe, tuple(systems), f"{run.url}/gate-{ref.digest[:12]}", Torch.reading(recipe.data.max_length), task=task,
        metrics=(gate.metric,), base=recipe.model.path,
    )  # fmt: skip
    results = evaluate(wanted, Means(here=True), log)
    log(f"\n{results.text()}\n")
    passed, why = verdict(gate, results)
    if passed:
        store.promote(ref)
    said = f"{ref.tenant}/{ref.name} now means {ref}: {why}" if passed else f"the gate is shut for {ref}, and {_stays(ref, targets)}: {why}"
    log(said)
    run.folder.write_json(RECORD, {**asked, "passed": passed, "why": said})
    remember(run, "gate", passed=passed, why=why)
    return Judged(passed, said)


def verdict(gate: Gate, results: Results) -> tuple[bool, str]:
    """Whether the last system passes, and why."""
    metric, value = METRICS[gate.metric], results.lines[-1].measured[gate.metric].interval.value
    reasons = []
    if gate.min is not None:
        good = value >= gate.min if metric.higher_is_better else value <= gate.min
        reasons.append((good, f"{metric.title} {metric.shown(value)}, wanted {metric.shown(gate.min)}"))
    if gate.better_than and results.verdicts:
        told = results.verdicts[-1]
        reasons.append((told.better == told.ours, told.sentence()))
    elif gate.better_than:
        reasons.append((True, "there is no other version to beat"))
    return all(good for good, _ in reasons), "; ".join([*(why for _, why in reasons), *results.failures()])


def _stays(ref: AdapterRef, targets: dict[AdapterRef, float]) -> str:
    now = ", ".join(str(version) for version in targets)
    return f"{ref.tenant}/{ref.name} goes on meaning {now}" if now else f"{ref.tenant}/{ref.name} means nothing yet"
