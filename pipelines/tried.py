"""Tried: what became of the trials of a search, told while it runs and kept beside their runs.

In: what Ray Tune says of its trials. Out: `search.json`, a line or a table in the terminal. Runs in: the driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ray import tune

from ftcore.search import Search
from ftcore.storage import Folder
from pipelines.trial import decoded

FILE = "search.json"


@dataclass(frozen=True)
class Look:
    """A validation of a trial. `share`: percent of its steps."""

    share: float
    step: int
    value: float


@dataclass(frozen=True)
class Tried:
    """One trial, as far as it came. `state`: running, stopped (by the scheduler or the time), done, failed."""

    id: str
    values: dict[str, Any]
    looks: tuple[Look, ...] = ()
    seconds: float = 0.0
    state: str = "running"
    error: str = ""
    run: str = ""
    """Name of its run folder; another one after it went on from another trial's weights."""

    def best(self, mode: str) -> float | None:
        """The best value of any look."""
        values = [look.value for look in self.looks]
        return (min if mode == "min" else max)(values) if values else None

    @property
    def steps(self) -> int:
        return max((look.step for look in self.looks), default=0)

    @property
    def share(self) -> float:
        return max((look.share for look in self.looks), default=0.0)


@dataclass
class Found:
    """All trials of a search, in the order they began."""

    digest: str
    mode: str
    trials: dict[str, Tried] = field(default_factory=dict)
    seconds: float = 0.0
    """Of all sessions together."""

    def ranked(self) -> list[Tried]:
        """Those that were judged and did not fail, the best first."""
        judged = [(trial.best(self.mode), trial) for trial in self.trials.values() if trial.state != "failed"]
        known = [(value if self.mode == "min" else -value, trial) for value, trial in judged if value is not None]
        return [trial for _, trial in sorted(known, key=lambda pair: pair[0])]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all trials together."""
        return sum(trial.steps for trial in self.trials.values())

    def write(self, folder: Folder) -> None:
        folder.write_json(FILE, asdict(self))

    @classmethod
    def read(cls, folder: Folder) -> Found | None:
        if not folder.exists(FILE):
            return None
        held = folder.read_json(FILE)
        trials = {
            key: Tried(**{**each, "looks": tuple(Look(**look) for look in each["looks"])}) for key, each in held["trials"].items()
        }  # fmt: skip
        return cls(**{**held, "trials": trials})


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

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        held = self.found.trials.get(trial.trial_id)
        values = decoded(trial.config, self.wanted)
        if held is None:
            self._say(trial.trial_id, "begins: " + shown(values))
        self._keep(replace(held, state="running", values=values) if held else Tried(trial.trial_id, values))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        held = self.found.trials[trial.trial_id]
        look = Look(float(result["share"]), int(result["step"]), float(result[self.wanted.metric]))
        if look.share > held.share:
            self._say(trial.trial_id, f"{look.share:.0f} %: {self.wanted.metric} {look.value:.4f} at step {look.step}")
            self._keep(replace(held, looks=(*held.looks, look), seconds=float(result.get("seconds", 0.0)), run=str(result["run"])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        held = self.found.trials[trial.trial_id]
        self._keep(replace(held, state="done" if held.share >= 100 else "stopped"))

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

    def _say(self, trial: str, text: str) -> None:
        best = next(iter(self.found.ranked()), None)
        best_text = f"   (best so far: {best.id} {best.best(self.found.mode):.4f})" if best else ""
        print(f"trial {trial}  {text}{best_text}", flush=True)


def shown(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={json.dumps(value)}" for path, value in values.items())


def _cause(trial: Any) -> str:
    """The error's own first line: a trial's traceback is in its log."""
    error = trial.pickled_error_file and trial.get_pickled_error()
    cause = getattr(error, "cause", None) or error
    return next(iter(str(cause).splitlines()), type(cause).__name__) if cause else "unknown"
