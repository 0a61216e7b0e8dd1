"""Trial: one run of a search, as Ray Tune asks for it: a look at the validation loss, and another, until it is told to end.

In: drawn values, the search, the recipe. Out: what a validation came to, one result a look. Runs in: a Tune actor; the training itself in a
worker beside it, so that an actor loads no torch and a trial that ends early leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any, Protocol

from ray import tune

from cluster.connect import connect
from cluster.outbox import Message
from ftcore.data.order import Order
from ftcore.errors import TrainingError
from ftcore.journal import read_lines
from ftcore.lease import holding
from ftcore.recipe import Recipe, parse_recipe
from ftcore.rundir import RunDir
from ftcore.search import Search, recipe_of
from pipelines.branch import branch
from pipelines.fit import Start, Task, train_once
from pipelines.hosting import Together
from pipelines.launch import launch, launch_beside
from pipelines.lead import Hear
from pipelines.prepare import prepare
from pipelines.work import PRELOAD

log = logging.getLogger(__name__)
FAILING = "failing"
"""In a result that is none: the trial's error comes next."""
LEAVE_S, LOOK_S = 60.0, 0.05
"""How long workers on a cluster may take to seal a checkpoint and to leave their room."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search have in common; plain text, so that any worker reads it as the driver wrote it."""

    search: str
    recipe: str
    plugins: tuple[str, ...]
    runs: str
    """Folder of the trials' run folders."""
    hosts: tuple[Any, ...] = ()
    """Who trains them together; none: each has its own workers."""


def decoded(config: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """Tune's values as the recipe's: a choice travels as JSON."""
    return {path: json.loads(config[path]) if isinstance(config[path], str) else config[path] for path in search.free}


def trial_recipe(search: Search, recipe: Recipe, values: Mapping[str, Any], name: str, runs: str) -> Recipe:
    """The recipe of one trial: its own values and name; it publishes nothing. A loss does not depend on the number of workers.
    Rows that nobody prepared yet are prepared in its own process: on Ray they would wait for the CPUs that trials hold."""
    drawn = recipe_of(search, recipe, values)
    output = drawn.output.model_copy(update={"runs": runs, "adapter": None, "loggers": (), "checkpoint_every": 10**9})
    resources = drawn.resources.model_copy(update={"workers": drawn.resources.min_workers})
    data = drawn.data.model_copy(update={"engine": "process"})
    return drawn.model_copy(update={"name": name, "data": data, "output": output, "resources": resources})


def with_looks(recipe: Recipe, num_blocks: int, looks: int, *, sealed: bool) -> Recipe:
    """Has a recipe validate `looks` times in all; `sealed`: with a checkpoint each time."""
    optim = recipe.optim
    num_steps = Order(num_blocks, optim.batch_size, optim.seed).num_steps(optim.epochs, optim.max_steps)
    every = max(1, math.ceil(num_steps / looks))
    output = recipe.output.model_copy(update={"checkpoint_every": every, "keep": looks + 1} if sealed else {})
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"every_steps": every}), "output": output})


class Runner(Protocol):
    """What gives a trial's results."""

    def next(self) -> Mapping[str, Any]:
        """Waits for the next validation; `done` is in the last one. Raises what ended the run."""

    def end(self) -> None:
        """It is not wanted any more."""


class Alone:
    """A run of its own, as `fit` has them, with a folder: it goes on from what it sealed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.asked = recipe, threading.Event()
        self.results: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
        self.latest: dict[str, Any] = {}
        self.run = RunDir(recipe.output.runs, recipe.name)
        self.thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self.thread.start()

    def next(self) -> Mapping[str, Any]:
        found = self.results.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        self.asked.set()
        self.thread.join(LEAVE_S)

    def _run(self) -> None:
        """In a thread of its own: the whole run. Its last result says that it is done."""
        try:
            with holding(self.run, log.info):
                train_once(self.run, self.recipe, log=log.info, start=self._start(), also=self._hear)
            self.results.put(self._whole() | {"done": True})
        except BaseException as error:  # handed to `next`
            self.results.put(error)

    def _start(self) -> Start:
        recipe = self.recipe

        def beside(task: Task, hear: Hear) -> None:
            launch_beside(task, recipe.resources, hear=hear, preload=PRELOAD, asked=self.asked)

        def on_train(task: Task, hear: Hear) -> None:
            connection = connect(log=log.info)
            launch(task, recipe.resources, connection, name=recipe.name, hear=hear, preload=PRELOAD, asked=self.asked)

        return beside if recipe.resources.max_workers == 1 else on_train

    def _hear(self, message: Message) -> None:
        if message["event"] == "lines":
            for line in message["lines"]:
                self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        """A journal line; that of a validation is a result, but for the last one, which waits until the run is sealed."""
        self.latest |= {key: value for key, value in line.items() if isinstance(value, int | float)}
        if "validation_loss" in line and line["step"] < self.latest.get("num_steps", math.inf):
            self.results.put(self._result())

    def _result(self) -> dict[str, Any]:
        return self.latest | {"run": self.run.name, "share": round(100 * self.latest["step"] / self.latest["num_steps"], 2)}

    def _whole(self) -> dict[str, Any]:
        """The last result, of a run that may have been finished before."""
        for line in read_lines(self.run):
            self.latest |= {key: value for key, value in line.items() if isinstance(value, int | float)}
        return self._result() | {"share": 100.0}


class Trial(tune.Trainable):
    """Ray Tune's view of a run: each step is the next validation."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # Tune adds what `with_parameters` holds
        self.job = job
        self.search = Search.model_validate_json(job.search)
        self.base = parse_recipe(job.recipe, plugins=job.plugins)
        self.runner: Runner | None = None
        self._new(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same actor takes the next trial: nothing is started anew."""
        self.cleanup()
        self._new(new_config)
        return True

    def _new(self, config: dict[str, Any]) -> None:
        self.values = decoded(config, self.search)
        self.runner = None
        self.told = 0
        """Step of the last result."""
        self.failure: Exception | None = None
        self.origin: tuple[str, int] | None = None
        """Run and step that a checkpoint of Tune's stands for."""
        self.name = str(self.trial_id)
        """Of the run's folder."""

    def step(self) -> dict[str, Any]:
        """The next validation. What ends the training is announced before it is raised: Ray Tune tries again whatever fails, and only an
        actor that was lost should be."""
        if self.failure is not None:
            raise self.failure
        try:
            return self._next()
        except Exception as error:
            self.failure = error
            return {self.search.metric: math.nan, "share": 0.0, "step": 0, FAILING: True}

    def _next(self) -> dict[str, Any]:
        if self.runner is None:
            self.runner = self._opened()
        found = dict(self.runner.next())
        if self.search.metric not in found:
            raise TrainingError(
                "the search's metric is not among what this trial reports", where="metric", got=self.search.metric,
                wanted=", ".join(sorted(key for key, value in found.items() if isinstance(value, float))),
            )  # fmt: skip
        self.told = int(found["step"])
        return found

    def cleanup(self) -> None:
        if self.runner is not None:
            self.runner.end()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A pointer: the checkpoint itself lies sealed in the run's folder, where all of them are kept while values change."""
        run, until = RunDir(self.job.runs, self.name), time.monotonic() + LEAVE_S
        while self.told not in run.checkpoint_steps():
            if time.monotonic() > until:
                raise TrainingError("a trial's checkpoint was not sealed in time", where=run.url, wanted=f"step {self.told}")
            time.sleep(LOOK_S)  # the run's worker seals it aside, and tells nobody when
        return {"run": self.name, "step": self.told}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        assert checkpoint is not None
        self.origin = (checkpoint["run"], checkpoint["step"])

    def _opened(self) -> Runner:
        recipe = trial_recipe(self.search, self.base, self.values, self.name, self.job.runs)
        prepared = prepare(recipe, log=log.info)
        recipe = with_looks(recipe, prepared.num_blocks("train"), self.search.looks, sealed=self.search.scheduler.kind == "pbt")
        if self.job.hosts:
            return Together(list(self.job.hosts), self.name, recipe, recipe.resources.max_failures)
        if self.origin is not None:
            recipe = self._branched(recipe, *self.origin)
        return Alone(recipe)

    def _branched(self, recipe: Recipe, donor: str, step: int) -> Recipe:
        """Goes on in the folder of the run it stood in; with another's weights, or other values, in a new one."""
        runs = self.job.runs
        if donor.split(".")[0] == self.name:
            before = parse_recipe(RunDir(runs, donor).folder.read("recipe.yaml").decode(), plugins=self.job.plugins)
            self.name = donor
            recipe = recipe.model_copy(update={"name": donor})
            if before == recipe:
                return recipe
        number = next(number for number in count(1) if not RunDir(runs, f"{self.trial_id}.{number}").folder.exists("recipe.yaml"))
        self.name = f"{self.trial_id}.{number}"
        recipe = recipe.model_copy(update={"name": self.name})
        branch(RunDir(runs, donor), step, RunDir(runs, self.name), recipe)
        return recipe
