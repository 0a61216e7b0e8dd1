"""Telling: what becomes of the trials of a search, told while it runs and written down.

In: what Ray Tune says of its trials. Out: Found in `search.json`, lines in the terminal. Runs in: the driver.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ftcore.search import Search
from ftcore.storage import Folder
from ftcore.trials import Found, Look, Tried, shown_values, table
from pipelines.trial import FAILING, decoded

TABLE_EVERY = 20.0
"""Seconds between two tables while trials run."""


class Teller(tune.Callback):
    """Writes down and tells what happens. Ray Tune keeps it with the search's state, so it holds plain values and reads the rest anew."""

    def __init__(self, url: str, search: str) -> None:
        self.url, self.search = url, search

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "search": self.search}

    def setup(self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any) -> None:
        self.folder = Folder(self.url)
        self.wanted = Search.model_validate_json(self.search)
        found = Found.read(self.folder)
        assert found is not None, "the driver writes it first"
        self.found, self.began, self.before = found, time.monotonic(), found.seconds
        self.shown = self.began

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        held = self.found.trials.get(trial.trial_id)
        values = decoded(trial.config, self.wanted)
        if held is None:
            self._say(trial.trial_id, "begins: " + shown_values(values))
        self._keep(replace(held, state="running", values=values) if held else Tried(trial.trial_id, values))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        if FAILING in result:
            trial.max_failures = 0
            return
        held = replace(self.found.trials[trial.trial_id], run=str(result["run"]))
        look = Look(float(result["share"]), int(result["step"]), float(result[self.wanted.metric]), held.run)
        if look.share > held.share:
            self._keep(replace(held, looks=(*held.looks, look), seconds=float(result.get("seconds", 0.0))))
            self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        held = self.found.trials[trial.trial_id]
        self._keep(replace(held, state="done" if held.share >= 100 else "stopped"))
        if held.looks:
            how = "done" if held.share >= 100 else f"stopped at {held.share:.0f} %"
            self._say(trial.trial_id, f"{how}: {self.wanted.metric} {held.looks[-1].value:.4f} at step {held.looks[-1].step}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial.trial_id, "its process was lost: it goes on from what it sealed")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        held = self.found.trials.get(trial.trial_id) or Tried(trial.trial_id, decoded(trial.config, self.wanted))
        cause = _cause(trial)
        self._say(trial.trial_id, f"failed: {cause}")
        self._keep(replace(held, state="failed", error=cause))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._keep(None)

    def _keep(self, trial: Tried | None) -> None:
        if trial is not None:
            self.found.trials[trial.id] = trial
        self.found.seconds = self.before + time.monotonic() - self.began
        self.found.write(self.folder)

    def _show(self) -> None:
        """The best so far and how many do what, every so often."""
        now = time.monotonic()
        if now - self.shown < TABLE_EVERY:
            return
        self.shown = now
        counts = Counter(trial.state for trial in self.found.trials.values())
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        minutes, seconds = divmod(round(self.found.seconds), 60)
        how_far = (
            f"{counts.total()} of {self.wanted.num_trials} trials begun ({states}), {self.found.num_steps} steps, {minutes}:{seconds:02}"
        )
        print("", how_far, table(self.found, self.wanted.metric, most=5), "", sep="\n", flush=True)

    def _say(self, trial: str, text: str) -> None:
        best = next(iter(self.found.ranked()), None)
        best_text = f"   (best so far: {best.id} {best.best(self.found.mode):.4f})" if best else ""
        print(f"trial {trial}  {text}{best_text}", flush=True)


class Spent(tune.Stopper):
    """Ends all trials when the search has had its time, sessions before this one counted. Ray Tune keeps it with the search's state."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if "until" not in self.__dict__:
            found = Found.read(Folder(self.url))
            assert found is not None, "the driver writes it first"
            self.until = math.inf if found.minutes is None else time.monotonic() + 60 * found.minutes - found.seconds
        return time.monotonic() >= self.until


def _cause(trial: Any) -> str:
    """The error's own first line; the rest of it is in the trial's log. Ray Tune's own reader looks where the file is copied to later."""
    if not trial.pickled_error_file:
        return "unknown"
    error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    cause = getattr(error, "cause", None) or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)
