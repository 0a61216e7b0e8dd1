"""Judging: an evaluation from end to end: which rows, which systems, what is wrong with either, the answers, what they come to.

In: what was asked for. Out: Results, and the folder that holds them. Runs in: the driver.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ftcore.data.duplicates import content_hash, item_text
from ftcore.data.prepared import Prepared
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import Conversation, Text
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, DataError
from ftcore.evals.classifier import Classifier
from ftcore.evals.columns import Columns
from ftcore.evals.entailment import Entailment
from ftcore.evals.forgetting import judged_before_and_after, told
from ftcore.evals.heldout import TestSet, held_out, items_of, whole_files
from ftcore.evals.judge_command import judge_of
from ftcore.evals.judge_options import JudgeOptions
from ftcore.evals.leakage import NEAR_ROWS, Leak, exact_copies, near_copies
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.records import WINDOW, Records
from ftcore.evals.results import About, Results, weigh_up
from ftcore.evals.support import METRIC, by_judge, by_model, judge_tried
from ftcore.evals.systems import System, resolve
from ftcore.evals.tasks.base import TASKS, Task, asking, choose
from ftcore.places import check_place
from ftcore.recipe import Recipe
from ftcore.report.evaluation import write_page
from ftcore.storage import digest_of
from pipelines.evaluating import Evaluation, Means, answer_all
from pipelines.prepare import prepare
from pipelines.runs import at_home, placed

Log = Callable[[str], None]
LEAST_TOKENS = 256
"""That an answer may have."""


@dataclass(frozen=True)
class Wanted:
    """A command line of `ftcore evaluate`."""

    recipe: Recipe | None
    systems: tuple[str, ...]
    out: str
    engine: Torch
    rows: tuple[str, ...] = ()
    base: str = ""
    store: str = ""
    task: str = "auto"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    limit: int = 0
    keep_leaks: bool = False
    max_tokens: int | None = None
    """Of an answer; None: as many as the recipe's longest right one has, and LEAST_TOKENS at least."""
    seed: int = 0
    key_variable: str = ""
    at_once: int = 8
    entailment: str = ""
    """The model, or the judge, that looks at the answers' consistency with their sources."""
    judge: JudgeOptions | None = None
    classifier: str = ""
    general: tuple[str, ...] = ()
    """Files of rows that have nothing to do with the task: is what the base knew still there?"""
    general_metrics: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)


def evaluate(wanted: Wanted, means: Means, log: Log) -> Results:
    """Raises FtcoreErrors: what is wrong with rows, systems or metrics before anything is generated."""
    _check_words(wanted)
    recipe = at_home(wanted.recipe, log) if wanted.recipe else None
    systems = _systems(wanted, recipe)
    prepared = prepare(recipe, log=log) if recipe else None
    tests, leaks = _rows(wanted, recipe, prepared, log)
    wanted = replace(wanted, max_tokens=wanted.max_tokens or _most_tokens(wanted, recipe, tests))
    classifier = Classifier.parse(wanted.classifier) if wanted.classifier else None
    task, why = choose(wanted.task, tests.rows, wanted.labels, classifier)
    weighs = all(system.endpoint is None for system in systems)
    task.check(tests.rows, weighs=weighs)
    if task.weighed and wanted.engine.quantise != "none":
        raise ConfigError(
            "likelihoods are weighed in full precision", where="--quantise", got=wanted.engine.quantise, remedy="leave it out"
        )
    looked_at = [METRIC] if wanted.entailment or wanted.judge else []
    if looked_at and task.name == "likelihood":
        raise ConfigError("consistency is of answers in words", where="--task", got=task.name, remedy="--task answers")
    targets = recipe.eval.targets if recipe else {}
    metrics = _with_targets(task.metrics(wanted.metrics, weighs=weighs, more=looked_at), targets, task, weighs)
    entailment = Entailment(wanted.entailment) if wanted.entailment else None
    judge = judge_of(wanted.judge) if wanted.judge else None
    log(f"{len(tests.rows):,} rows ({tests.origin}); task {task.name}: {why}; metrics: {', '.join(metrics)}")
    systems = [replace(system, endpoint=system.endpoint.checked()) if system.endpoint else system for system in systems]
    shots = _shots(max(system.shots for system in systems), recipe, prepared, wanted.seed)
    systems = [replace(system, examples=_digest(shots[: system.shots])) for system in systems]
    out = placed(wanted.out)
    records = Records(out)
    records.claim(_facts(wanted, tests, task))
    windows = records.write_questions(tests.rows)
    asking = judge_tried(wanted.judge, judge, records, log) if wanted.judge and judge else None
    work = Evaluation(out, tuple(systems), task, wanted.engine, wanted.max_tokens or LEAST_TOKENS, shots, wanted.at_once)
    log(str(answer_all(work, windows, means, log)))
    key = ""
    if entailment is not None:
        key = by_model(entailment, records, systems, log)
    elif asking is not None:
        key = by_judge(asking, records, systems, log)
    about = About(
        tests.origin, task.name, why, task.labels, tuple(metrics), len(tests.rows), tests.left_out, tuple(leaks), wanted.keep_leaks,
        support=key, targets=targets, by=wanted.columns.kind,
    )  # fmt: skip
    given = {system.name: records.answers(system.key) for system in systems}
    support = {system.name: records.support(key, system.key) for system in systems} if key else {}
    results = weigh_up(about, systems, tests.rows, given, support)
    if wanted.general:
        results = replace(results, forgetting=_forgetting(wanted, systems, means, log))
    write_page(records.folder, results)
    return results


def _with_targets(metrics: list[str], targets: Mapping[str, float], task: Task, weighs: bool) -> list[str]:
    """And those that the recipe aims at, where the task measures them."""
    return list(dict.fromkeys([*metrics, *(name for name in targets if task.measures(name, weighs=weighs))]))


def _forgetting(wanted: Wanted, systems: Sequence[System], means: Means, log: Log) -> tuple[str, ...]:
    """Judges the base and what was made of it on the general set too, in a folder of its own."""
    task = asking(wanted.general_metrics) if wanted.general_metrics else "likelihood"
    names, recipe = judged_before_and_after(systems), wanted.recipe
    log(f"forgetting: {', '.join(names)} on {', '.join(wanted.general)}")
    general = replace(
        wanted, rows=wanted.general, general=(), general_metrics=(), systems=names, out=f"{wanted.out}/general", task=task, labels=(),
        metrics=wanted.general_metrics, classifier="", columns=Columns(), recipe=_without_targets(recipe) if recipe else None,
    )  # fmt: skip
    return tuple(told(evaluate(general, means, log).verdicts))


def _without_targets(recipe: Recipe) -> Recipe:
    """Targets are of the task."""
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"targets": {}})})


def _check_words(wanted: Wanted) -> None:
    """What can be refused without reading anything."""
    if not wanted.recipe and not wanted.rows:
        raise ConfigError("which rows?", wanted="a recipe that holds test rows out, or --rows FILE")
    if wanted.max_tokens is not None and wanted.max_tokens < 1:
        raise ConfigError("an answer has at least one token", where="--max-tokens", got=str(wanted.max_tokens), wanted="1 or more")
    if wanted.limit < 0:
        raise ConfigError("there is no such number of rows", where="--limit", got=str(wanted.limit), wanted="1 or more; 0 takes all")
    own = TASKS[wanted.task] if wanted.task != "auto" and TASKS[wanted.task].rows else None
    if own and not wanted.rows and not (wanted.recipe and type(wanted.recipe.stage).item is own.item is Text):
        raise ConfigError(f"task `{wanted.task}` has rows of its own", where="--rows", got="none", wanted=own.rows)
    if wanted.classifier:
        Classifier.parse(wanted.classifier)
    for name in (*wanted.metrics, *(wanted.recipe.eval.targets if wanted.recipe else ())):
        METRICS[name].check()
    if wanted.entailment and wanted.judge:
        raise ConfigError("consistency is looked at once", got="--entailment and --judge", wanted="one of them")
    if wanted.judge:
        wanted.judge.check()
    if wanted.general_metrics:
        asking(wanted.general_metrics)
        if not wanted.general:
            raise ConfigError("metrics of which general set?", where="--general-metrics", wanted="--general FILE too")
    check_place("--out", placed(wanted.out))


def _systems(wanted: Wanted, recipe: Recipe | None) -> list[System]:
    base = _found(wanted.base or (recipe.model.path if recipe else ""))
    revision = recipe.model.revision if recipe and not wanted.base else "main"
    store = placed(wanted.store or (recipe.output.store if recipe else "adapters"))
    systems = resolve(wanted.systems, base=base, revision=revision, store=store, key_variable=wanted.key_variable)
    shown = next((system for system in systems if system.shots), None)
    if shown is not None and recipe is None:
        raise ConfigError(
            "examples come from a recipe's training split",
            where=f"--systems {shown.name}",
            got="no recipe",
            wanted="a recipe before --systems",
        )
    return systems


def _found(base: str) -> str:
    """A folder's whole path: workers run elsewhere. A hub name stays one."""
    return str(Path(base).expanduser().absolute()) if base and Path(base).expanduser().is_dir() else base


def _rows(wanted: Wanted, recipe: Recipe | None, prepared: Prepared | None, log: Log) -> tuple[TestSet, list[Leak]]:
    """The rows to judge on, without those that were trained on."""
    if wanted.rows:
        task = TASKS[wanted.task] if wanted.task != "auto" else None
        if task and task.rows:
            tests = whole_files(wanted.rows, task.read, task.rows, columns=wanted.columns)
        else:
            tests = whole_files(wanted.rows, columns=wanted.columns)
    else:
        assert recipe is not None and prepared is not None
        tests = held_out(recipe, prepared, wanted.columns)
    leaks = _leaks(tests, recipe, prepared, log) if recipe and prepared else []
    if leaks and not wanted.keep_leaks:
        tests = tests.without({leak.id for leak in leaks}, "trained on too")
        if not tests.rows:
            raise DataError(
                "every test row was trained on too", where=leaks[0].id, got=f"the content of {leaks[0].copy_of}", 
                wanted="rows that were not", remedy="judge on other rows (--rows), or keep them (--leaks keep)",
            )  # fmt: skip
    return (tests.limited(wanted.limit) if wanted.limit else tests), leaks


def _most_tokens(wanted: Wanted, recipe: Recipe | None, tests: TestSet) -> int:
    """So that no right answer is cut, its stop token counted; within the engine's context."""
    if recipe is None:
        return LEAST_TOKENS
    tokenizer = load_tokenizer(recipe.model)
    answers = [row.reference for row in tests.rows if row.turns]
    longest = max((len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers), default=0)
    return min(max(LEAST_TOKENS, longest + 1), wanted.engine.max_context)


def _leaks(tests: TestSet, recipe: Recipe, prepared: Prepared, log: Log) -> list[Leak]:
    train = prepared.rows("train")
    found = exact_copies(tests.rows, train, prepared.origins)
    if len(train) > NEAR_ROWS:
        log(f"near copies of test rows were not looked for: more than {NEAR_ROWS:,} training rows")
        return found
    known = {leak.id for leak in found}
    rest = [row for row in tests.rows if row.id not in known]
    texts = ((str(item.origin), item_text(item)) for item in items_of(recipe, train, prepared.origins))
    return found + near_copies(rest, texts, recipe.data.near_threshold)


def _shots(most: int, recipe: Recipe | None, prepared: Prepared | None, seed: int) -> tuple[Conversation, ...]:
    """The same solved examples for every row and system, drawn from the training split."""
    if not most or recipe is None or prepared is None:
        return ()
    train = prepared.rows("train")
    if recipe.stage.item is not Conversation or len(train) < most:
        raise ConfigError(
            "there are not so many solved examples", where="--systems", got=f"{len(train)} training rows of {recipe.stage.item.__name__}",
            wanted=f"{most} conversations",
        )  # fmt: skip
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)  # whoever is shown fewer examples is shown the first of these
    chosen = np.array(order[:most])
    items = {(item.origin.file, item.origin.row): item for item in items_of(recipe, train[chosen], prepared.origins)}
    drawn = [items[prepared.origins[record["file"]], int(record["row"])] for record in train[chosen]]
    return tuple(item for item in drawn if isinstance(item, Conversation))


def _digest(shots: Sequence[Conversation]) -> str:
    return digest_of([content_hash(shot) for shot in shots]) if shots else ""


def _facts(wanted: Wanted, tests: TestSet, task: Task) -> dict[str, object]:
    """What makes two evaluations the same one; the systems may be others."""
    return {
        "rows": tests.digest, "task": task.name, "labels": list(task.labels), "max_tokens": wanted.max_tokens, "window": WINDOW,
        "context": wanted.engine.max_context, "dtype": wanted.engine.dtype, "quantise": wanted.engine.quantise,
        **({"classifier": [task.classifier.weights, task.classifier.label]} if task.classifier else {}),
    }  # fmt: skip
