"""Gate: whether a new version is good enough for its name to point at it, judged on the recipe's test rows.

In: a published version, the recipe's gate. Out: the name promoted, or left where it was, with the reason; gate.json in the run's folder.
Runs in: the driver, after publishing; the base is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftcore.adapters import AdapterRef, AdapterStore
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


def judge_at_gate(run: RunDir, recipe: Recipe, gate: Gate, ref: AdapterRef, log: Log) -> bool:
    """Judges a version once, promotes it where it passes. Whether it passed."""
    asked: dict[str, Any] = {"ref": ref.full, "gate": gate.model_dump(mode="json")}
    before = run.folder.read_json(RECORD) if run.folder.exists(RECORD) else {}
    if {**before, **asked} == before:
        log(f"judged before: {before['why']}")
        return bool(before["passed"])
    store = AdapterStore(recipe.output.store)
    targets = store.targets(ref.tenant, ref.name)
    rivals = [version for version in targets if version != ref] if gate.better_than else []
    systems = [*(version.full for version in sorted(rivals, key=targets.__getitem__)[-1:]), ref.full]
    wanted = Wanted(
        recipe, tuple(systems), f"{run.url}/gate-{ref.digest[:12]}", Torch.reading(recipe.data.max_length), task=asking([gate.metric]),
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
    return passed


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
