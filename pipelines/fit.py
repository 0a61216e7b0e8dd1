"""Fit: one recipe, from rows to a published adapter: prepare, check, connect, train, publish, report.

In: a Recipe. Out: an Outcome; the run folder, the adapter. Runs in: the driver (a script, a Ray job, the demo, a search).

Safe to repeat: the same recipe goes on from what is sealed, a finished run is only published and reported where that is missing, and a
recipe that changed under the same name is refused unless the change cannot make the run's record a lie.

The driver of a run on Ray loads neither transformers nor peft before its workers do: what needs them is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.connect import connect
from cluster.outbox import Message
from cluster.resources import needs_ray
from cluster.runtime_env import keep_memory
from ftcore.adapters import AdapterRef
from ftcore.data.prepared import Prepared
from ftcore.errors import Interrupted
from ftcore.history import remember
from ftcore.lease import holding
from ftcore.loggers import Loggers, check_loggers
from ftcore.nursery import Post
from ftcore.places import check_places
from ftcore.progress import ProgressLine
from ftcore.recipe import Recipe, dump_recipe
from ftcore.rundir import RunDir
from pipelines.launch import launch, launch_here
from pipelines.lead import Hear
from pipelines.prepare import prepare
from pipelines.runs import at_home, began_with, begin, move_aside, parent_into, publish_once, recognise, same_command
from pipelines.same_base import recording_base
from pipelines.work import PRELOAD, work

Log = Callable[[str], None]
Task = Callable[[Post], None]
Start = Callable[[Task, Hear], object]
"""Runs a task on the workers of a run, and hands on what they say."""
HISTORIC = ("failure", "going", "growing", "group")


@dataclass(frozen=True)
class Outcome:
    """What `fit` made. `ref` is None when the recipe publishes nothing; `store` is where it was published."""

    run: RunDir
    ref: AdapterRef | None
    store: str
    metrics: dict[str, Any]
    report: str
    shut: str = ""
    """Why the gate is shut for `ref`; empty where it is not."""


def fit(recipe: Recipe, *, log: Log = print, resume: bool = True) -> Outcome:
    """Trains and publishes. Raises FtcoreErrors: what is wrong with recipe, data or cluster before any worker starts where possible.

    `resume=False` begins the run again from nothing; what its folder held is kept under another name.
    """
    recipe = at_home(recipe, log)
    run = RunDir(recipe.output.runs, recipe.name)
    check_loggers(recipe.output.loggers, run)
    check_places(recipe)
    if not resume:
        prepare(recipe, log=log)  # what is wrong with the rows is found before the old run is moved; the blocks are kept
        with holding(run, log):
            pass  # nobody else trains it now
        move_aside(run, log)
    with holding(run, log):
        train_once(run, recipe, log=log, start=start_for(recipe, log))
        ref, shut = publish_once(run, recipe, log), ""
        if ref is not None and recipe.output.gate is not None:
            from pipelines.gate import judge_at_gate  # loads torch

            judged = judge_at_gate(run, recipe, recipe.output.gate, ref, log)
            shut = "" if judged.passed else judged.why

    from ftcore.report import write_report

    metrics = run.folder.read_json("final/result.json")["metrics"]
    return Outcome(run, ref, recipe.output.store, metrics, write_report(run), shut)


def start_for(recipe: Recipe, log: Log) -> Start:
    """On Ray Train workers; one CPU worker with no cluster in sight trains in this process."""
    if needs_ray(recipe.resources):
        return lambda task, hear: launch(task, recipe.resources, connect(log=log), name=recipe.name, hear=hear, preload=PRELOAD)

    def here(task: Task, hear: Hear) -> None:
        log("training in this process (one worker, no Ray cluster)")
        keep_memory()
        launch_here(task, hear=hear)

    return here


def train_once(run: RunDir, recipe: Recipe, *, log: Log, start: Start, also: Hear | None = None) -> None:
    """Trains a run to its end unless it is there; the run must be held. `also` hears what the driver hears."""
    finished, changed = recognise(run, recipe)
    if finished:
        log(f"run {recipe.name}: already finished ({run.url}); nothing to train")
        return
    prepared = began_with(run, recipe, log) or prepare(recipe, log=log)
    begin(run, recipe, prepared, changed, log)
    parent_into(run, recipe, log)
    with recording_base(run, recipe):
        _train(run, recipe, prepared, log, start, also)


def _train(run: RunDir, recipe: Recipe, prepared: Prepared, log: Log, start: Start, also: Hear | None) -> None:
    task = partial(work, dump_recipe(recipe), recipe.plugins, prepared.url, run)
    ear = _Ear(run, recipe, log)

    def hear(message: Message) -> None:
        ear.hear(message)
        if also is not None:
            also(message)

    try:
        start(task, hear)
    except (Interrupted, KeyboardInterrupt) as error:
        sealed = run.checkpoint_steps()
        raise Interrupted(
            error.what if isinstance(error, Interrupted) else "stopped at once, without a checkpoint", where=run.url,
            got=f"sealed and usable: step {sealed[-1]}" if sealed else "no checkpoint was sealed yet",
            remedy=f"go on with: {same_command()}",
        ) from error  # fmt: skip
    finally:
        ear.close()


class _Ear:
    """What the driver does with what workers say: the progress line, the loggers, a sentence when something happens."""

    def __init__(self, run: RunDir, recipe: Recipe, log: Log) -> None:
        self.run, self.allowed = run, recipe.resources.max_failures
        self.line = ProgressLine(log)
        self.loggers = Loggers(recipe.output.loggers, run, recipe.model_dump(mode="json"))
        self.num_failures = 0
        self.steps_seen = 0

    def hear(self, message: Message) -> None:
        if message["event"] in HISTORIC:
            remember(self.run, message["event"], **{key: value for key, value in message.items() if key != "event"})
        if message["event"] == "lines":
            for line in message["lines"]:
                if line["step"] > 1 and not self.steps_seen:
                    self.line.say(f"going on after step {line['step'] - 1}")
                self.steps_seen = line["step"]
                self.line.show(line)
                self.loggers.log(line)
        elif message["event"] == "failure":
            self.num_failures += 1
            self.steps_seen = 0
            self.line.restart()
            allowed = "no limit" if self.allowed < 0 else f"{self.allowed} allowed"
            then = "" if message["final"] else f"; restarting from the newest sealed checkpoint (failure {self.num_failures}, {allowed})"
            self.line.say(f"worker {message['rank']} failed: {message['cause']}{then}")
        elif message["event"] == "stopping":
            self.line.say("stopping after this step, with a checkpoint (again: at once, without)")
        else:
            self._tell(message)

    def _tell(self, message: Message) -> None:
        """What happens to the group of workers, in a sentence."""
        event = message["event"]
        if event in ("waiting", "note"):
            self.line.say(message["text"])
        elif event == "going":
            who = ", ".join(map(str, message["ranks"])) or "unknown"
            self.line.say(
                f"worker {who} must go: {message['why']}; a checkpoint after this step, then on without that node (costs no failure)"
            )
        elif event == "growing":
            self.line.say(f"there is room again: a checkpoint after this step, then on with {message['to']} workers")
        elif event == "group":
            self.steps_seen = 0
            self.line.restart()
            self.line.say(f"going on with {message['size']} worker{'s' * (message['size'] != 1)}, from the newest sealed checkpoint")

    def close(self) -> None:
        self.line.close()
        self.loggers.close()
