"""Trials: what a search has tried so far, and what each came to.

In: what the driver hears. Out: `search.json` beside the trials' runs. Runs in: the driver; read by reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftcore.storage import Folder

FILE = "search.json"


@dataclass(frozen=True)
class Look:
    """A validation of a trial. `share`: percent of its steps; `run`: which of its run folders it was in."""

    share: float
    step: int
    value: float
    run: str = ""


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

    @property
    def present(self) -> tuple[Look, ...]:
        """The looks of the run it is in: those before it took over another trial's weights are of weights it has no more."""
        return tuple(look for look in self.looks if look.run == self.run)

    def best(self, mode: str) -> float | None:
        """The best value of any look at what it is now."""
        values = [look.value for look in self.present]
        return (min if mode == "min" else max)(values) if values else None

    @property
    def steps(self) -> int:
        return max((look.step for look in self.looks), default=0)

    @property
    def share(self) -> float:
        return max((look.share for look in self.present), default=0.0)


@dataclass
class Found:
    """All trials of a search, in the order they began."""

    digest: str
    mode: str
    trials: dict[str, Tried] = field(default_factory=dict)
    seconds: float = 0.0
    """Of all sessions together."""
    minutes: float | None = None
    """How long it may take, as it was asked for last."""
    parts: int = 0
    """How often it came to its end; each time more trials or minutes were asked for than before, another part is begun."""

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


def table(found: Found, metric: str, most: int = 10) -> str:
    """The best trials, a line each."""
    ranked = found.ranked()
    lines = [f"{'trial':<10}{'state':<9}{metric:>18}{'came to':>10}{'steps':>8}  values"]
    for trial in ranked[:most]:
        figures = f"{trial.best(found.mode):>18.5g}{trial.share:>8.0f} %{trial.steps:>8}"
        lines.append(f"{trial.id:<10}{trial.state:<9}{figures}  {shown_values(trial.values)}")
    left = len(found.trials) - min(most, len(ranked))
    return "\n".join(lines) + (f"\n... and {left} more" if left else "")


def shown_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {value_text(value)}" for path, value in values.items())


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
