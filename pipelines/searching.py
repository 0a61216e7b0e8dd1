"""Searching: trials of one recipe on Ray Tune: who draws values, who ends early, how many at once; then the winner, trained and published.

In: a Search, a Recipe. Out: Found (`search.json`), and the winner's run. Runs in: the driver.

A trial of one worker takes that worker's CPUs and GPUs. One of several workers, or one that shares its base, takes a little memory and no
CPU, so that its workers or its host can have all of the cluster; only as many run at once as those have room for. So none waits for what
another holds.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import optuna
import pyarrow.fs
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from cluster.connect import connect
from cluster.resources import alive_nodes, check_fits, fits
from ftcore.data.identity import identity
from ftcore.data.prepared import Prepared
from ftcore.errors import ConfigError, Interrupted, TrainingError
from ftcore.recipe import Recipe, Resources, dump_recipe, parse_recipe
from ftcore.report.search_page import write_search_page
from ftcore.rundir import RunDir
from ftcore.search import NOT_PUBLISHED, Choices, Even, Search, check, data_recipes, settled
from ftcore.storage import Folder, digest_of
from ftcore.trials import Found, shown_values
from pipelines.fit import Outcome, fit
from pipelines.hosting import hosts
from pipelines.prepare import prepare
from pipelines.runs import SEARCHED, Log, same_command
from pipelines.telling import Spent, Teller
from pipelines.trial import Job, Trial, trial_recipe, with_looks

STATE = "tune"
ACTOR_BYTES = 200 * 1024**2
"""What a trial's own process asks of a node's memory where its workers have resources of their own."""


def search_folder(recipe: Recipe) -> Folder:
    """Where a search of this recipe lives, beside its runs."""
    return Folder(recipe.output.runs) / f"{recipe.name}-search"


def find(search: Search, recipe: Recipe, *, log: Log = print) -> Found:
    """Runs all trials, or those that are left of a search that was interrupted. Raises ConfigError for what cannot be searched, before any
    trial; TrainingError when every trial failed; Interrupted on Ctrl-C."""
    shares, search = check(search, recipe), settled(search, recipe)
    folder, digest = search_folder(recipe), _digest(search, recipe)
    found = Found.read(folder)
    if found is not None and found.digest != digest:
        raise ConfigError(
            "this search was begun with another recipe or space", where=folder, wanted="the same ones",
            remedy=f"name={recipe.name}-2 begins another beside it",
        )  # fmt: skip
    prepared = _prepare_all(search, recipe, log)
    if not prepared.num_blocks("validation"):
        raise ConfigError(
            "there are no validation rows to compare trials by", where="data.validation", got=recipe.data.validation, remedy="0.05 or more"
        )
    found = found or Found(digest, search.mode)
    found.minutes = search.minutes
    found.write(folder)
    while _goes_on(search, found, folder, log):
        _run(search, recipe, folder, prepared if shares else None, found, log)
        found = Found.read(folder)
        assert found is not None
        found.parts += 1
        found.write(folder)
    for trial in [trial for trial in found.trials.values() if trial.state == "running"]:  # the minutes ended it: Ray Tune tells nobody
        found.trials[trial.id] = replace(trial, state="stopped")
    found.write(folder)
    write_search_page(folder, search, found)
    if not found.ranked():
        why = next((trial.error for trial in found.trials.values() if trial.error), "none came to its first validation")
        raise TrainingError("no trial of this search could be judged", where=folder, got=why)
    return found


def _digest(search: Search, recipe: Recipe) -> str:
    """What a search is: all but how many trials and how long."""
    return digest_of([search.model_dump(mode="json", exclude={"trials", "minutes"}), recipe.model_dump(mode="json")])


def _goes_on(search: Search, found: Found, folder: Folder, log: Log) -> bool:
    """Whether trials are left to be made, and time for them."""
    if search.minutes is not None and found.seconds >= 60 * search.minutes:
        log(f"the {search.minutes:g} minutes of this search are spent; going on with what was found")
        return False
    place, filesystem = storage_of(folder)
    if not found.parts or Tuner.can_restore(f"{place}/{_state(found)}", storage_filesystem=filesystem):
        return True
    left = search.num_trials - len(found.trials)
    if left > 0 and search.searcher == "grid":
        log(f"{left} trials of this grid were not made in its time, and it cannot go on: another name=... begins another search")
    return left > 0 and search.searcher != "grid"


def _state(found: Found) -> str:
    """Folder of Ray Tune's own state; each part of a search is an experiment to it."""
    return f"{STATE}-{found.parts + 1}" if found.parts else STATE


def _prepare_all(search: Search, recipe: Recipe, log: Log) -> Prepared:
    """The recipe's rows; and those of other tokenizers or data that trials may draw, while the cluster's CPUs are free."""
    prepared, seen = prepare(recipe, log=log), {_rows_of(recipe)}
    for each in data_recipes(search, recipe):
        if _rows_of(each) not in seen:
            seen.add(_rows_of(each))
            prepare(each, log=log)
    return prepared


def _rows_of(recipe: Recipe) -> str:
    return digest_of(identity(recipe, Folder(recipe.data.cache)))


def crown(search: Search, recipe: Recipe, found: Found, *, log: Log = print) -> Outcome:
    """Makes the best trial the recipe's result: trained to its end if it is not, published, with the search in its card."""
    search, best, folder = settled(search, recipe), found.ranked()[0], search_folder(recipe)
    trials = str(folder / "trials")
    run = RunDir(trials, best.run or f"{best.id}.alone")
    if best.run:
        trained = parse_recipe(run.folder.read("recipe.yaml").decode(), plugins=recipe.plugins)
    else:  # it shared its base: trained again alone, it has the same losses, and all its proofs
        trained = trial_recipe(search, recipe, best.values, run.name, trials)
        trained = with_looks(trained, prepare(trained, log=log).num_blocks("train"), search.looks, sealed=False)
        data = trained.data.model_copy(update={"engine": recipe.data.engine})
        trained = trained.model_copy(update={"data": data, "resources": recipe.resources})
    publishes = trained.method.is_adapter
    output = recipe.output.model_copy(update={"runs": trials} | ({} if publishes else NOT_PUBLISHED))
    if recipe.output.adapter is not None and not publishes:
        log(f"the best one is a whole model (method {trained.method.kind}), and the store holds adapters: it stays in its run's folder")
    run.folder.write_json(SEARCHED, search_facts(search, found))
    log(f"the best of {len(found.trials)} trials: {best.id} ({shown_values(best.values)}), {search.metric} {best.best(search.mode):.5g}")
    outcome = fit(trained.model_copy(update={"output": output}), log=log)
    what = f"{outcome.ref}" if outcome.ref else f"{outcome.run.url}/final"
    write_search_page(folder, search, found, f"{best.id}: {shown_values(best.values)} -> {what}")
    return outcome


def contest(outcome: Outcome, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The winner's own recipe, whose base or method may be another than `recipe` has; and who is judged: its base, and the adapter or the
    whole model that it is. Nobody where it cannot be asked."""
    winner = parse_recipe(outcome.run.folder.read("recipe.yaml").decode(), plugins=recipe.plugins)
    if outcome.ref is not None:
        return winner, ("base", outcome.ref.full)
    if winner.method.is_adapter or not outcome.run.folder.is_local:
        return winner, ()
    return winner, ("base", str(outcome.run.folder.path / "final"))


def search_facts(search: Search, found: Found) -> dict[str, int | str]:
    """What an adapter's card says of the search it won."""
    space = "; ".join(f"{path}: {json.dumps(span.model_dump(mode='json'))}" for path, span in search.space.items())
    how = f"{search.searcher}, {search.scheduler.kind}, seed {search.seed}"
    return {
        "search": how,
        "search.space": space[:2000],
        "search.trials": len(found.trials),
        "search.steps": found.num_steps,
        "search.metric": search.metric,
    }


def _run(search: Search, recipe: Recipe, folder: Folder, shared: Prepared | None, found: Found, log: Log) -> None:
    """`shared`: the blocks that trials which share a base learn from."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "0", "TUNE_GLOBAL_CHECKPOINT_S": "5"}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # else it prints a table at every result, whatever `verbose` says
    for name in ("ray.tune", "ray.air"):  # what fails is told by `pipelines.telling`
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connect(log=log)
    asked = recipe.resources.model_copy(update={"workers": 1 if shared else recipe.resources.min_workers})
    check_fits(asked, alive_nodes())
    room = max(1, fits(asked, alive_nodes()) // asked.max_workers)
    at_once = min(room * (search.together if shared else 1), search.most_at_once, search.num_trials)
    num_hosts = min(room, at_once) if shared else 0
    with ExitStack() as held:
        started = held.enter_context(hosts(num_hosts, recipe, shared, asked)) if shared else []
        job = Job(search.model_dump_json(), dump_recipe(recipe), recipe.plugins, str(folder / "trials"), tuple(started))
        trainable = tune.with_resources(tune.with_parameters(Trial, job=job), trial_resources(asked, is_guest=bool(started)))
        tuner = _tuner(search, found, folder, trainable, at_once, asked.max_failures, log)
        sharing = f", {math.ceil(at_once / num_hosts)} to a base" if at_once > num_hosts > 0 else ""
        left = max(0, search.num_trials - len(found.trials))
        log(f"{left} trials, {search.searcher}, {search.scheduler.kind}; {at_once} at once{sharing}")
        grid = tuner.fit()
    if _interrupted(grid):
        raise Interrupted("the search was stopped", where=folder, remedy=f"go on with: {same_command()}")


def _tuner(search: Search, found: Found, folder: Folder, trainable: Any, at_once: int, max_failures: int, log: Log) -> Tuner:
    """Ray Tune's own driver, or that of a search that was interrupted."""
    place, filesystem = storage_of(folder)
    state = f"{place}/{_state(found)}"
    if Tuner.can_restore(state, storage_filesystem=filesystem):
        log(f"going on with the search in {folder}")
        return Tuner.restore(state, trainable, resume_unfinished=True, storage_filesystem=filesystem)
    config = TuneConfig(
        metric=search.metric, mode=search.mode, search_alg=searcher_of(search, at_once, found), scheduler=scheduler_of(search),
        num_samples=1 if search.searcher == "grid" else search.trials - len(found.trials),
        max_concurrent_trials=at_once if search.searcher == "tpe" else None,  # the others hold to it themselves
        reuse_actors=True, trial_dirname_creator=lambda trial: str(trial.trial_id),
    )  # fmt: skip
    run = RunConfig(
        name=_state(found), stop=Spent(str(folder)), storage_path=place, storage_filesystem=filesystem, verbose=0,
        callbacks=[Teller(str(folder), search.model_dump_json())], checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
        failure_config=FailureConfig(max_failures=max_failures),  # of lost actors; see `Trial.step`
    )  # fmt: skip
    return Tuner(trainable, param_space={} if search.searcher == "tpe" else space_of(search), tune_config=config, run_config=run)


def _interrupted(grid: Any) -> bool:
    """Ray Tune returns from Ctrl-C as if all was well."""
    trials = grid._experiment_analysis.trials  # no public name
    return any(trial.status in ("PENDING", "RUNNING", "PAUSED") for trial in trials)


def trial_resources(asked: Resources, *, is_guest: bool) -> PlacementGroupFactory:
    """What one trial's actor holds; its workers or its host hold the rest."""
    if asked.max_workers > 1 or is_guest:
        return PlacementGroupFactory([{"memory": ACTOR_BYTES}])
    return PlacementGroupFactory([{"CPU": asked.cpus_per_worker} | ({"GPU": asked.gpus_per_worker} if asked.gpus_per_worker else {})])


def space_of(search: Search) -> dict[str, Any]:
    """Ray Tune's own domains. Choices travel as JSON, so that a list or a mapping can be one."""
    return {path: _domain(span, grid=search.searcher == "grid") for path, span in search.free.items()}


def _domain(span: Any, *, grid: bool) -> Any:
    if isinstance(span, Choices):
        words = [json.dumps(value) for value in span.choice]
        return tune.grid_search(words) if grid else tune.choice(words)
    low, high = span.bounds()
    if isinstance(span, Even):
        return tune.randint(int(low), int(high) + 1) if span.is_whole else tune.uniform(low, high)
    return tune.lograndint(int(low), int(high) + 1) if span.is_whole else tune.loguniform(low, high)


def searcher_of(search: Search, at_once: int, found: Found) -> Searcher | SearchAlgorithm:
    """One that draws other values than the parts of the search before; tpe knows what those came to."""
    seed, before = search.seed + found.parts, found.ranked()
    if search.searcher == "tpe":
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # `pipelines.telling` tells of trials
        points = [_drawn(search, trial.values) for trial in before]
        losses = [trial.best(search.mode) for trial in before]
        return OptunaSearch(
            space_of(search), metric=search.metric, mode=search.mode, seed=seed,
            points_to_evaluate=points or None, evaluated_rewards=losses or None,
        )  # fmt: skip
    return BasicVariantGenerator(max_concurrent=at_once, random_state=seed)


def _drawn(search: Search, values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values as Ray Tune draws them."""
    return {path: json.dumps(values[path]) if isinstance(span, Choices) else values[path] for path, span in search.free.items()}


def scheduler_of(search: Search) -> TrialScheduler:
    """Time is the share of its own steps that a trial has taken: trials of other lengths compare."""
    how = search.scheduler
    if how.kind == "asha":
        return ASHAScheduler(time_attr="share", max_t=100, grace_period=how.grace, reduction_factor=how.reduction, stop_last_trials=False)
    if how.kind == "median":
        return MedianStoppingRule(time_attr="share", grace_period=how.grace, min_samples_required=3)
    if how.kind == "pbt":
        return PopulationBasedTraining(time_attr="share", perturbation_interval=how.every, hyperparam_mutations=_mutations(search))
    return FIFOScheduler()


def _mutations(search: Search) -> dict[str, Any]:
    """A choice moves to its neighbour in the list; a number is multiplied, or drawn anew."""
    spans, domains = search.free, space_of(search)
    return {
        path: [json.dumps(value) for value in span.choice] if isinstance(span, Choices) else domains[path] for path, span in spans.items()
    }


def storage_of(folder: Folder) -> tuple[str, Any]:
    """Ray's name of a folder, and the file system it is on (None: this machine's)."""
    if folder.is_local:
        return str(Path(folder.path).resolve()), None
    filesystem, path = fsspec.core.url_to_fs(str(folder))
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
