"""Loggers: the journal's numbers, also in TensorBoard, Weights & Biases or MLflow, when asked for and installed.

In: journal lines, the recipe. Out: what each of those programs writes. Runs in: the driver; nothing is imported unless asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from ftcore.errors import ConfigError
from ftcore.rundir import RunDir

NOT_CURVES = {"step", "time", "num_steps", "skipped"}


class Logger(Protocol):
    """One program that draws curves. `numbers` are finite or not, as they were measured."""

    def log(self, step: int, numbers: Mapping[str, float], unix_time: float) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A program we can write for: the module it needs, what to install, and how it is opened for a run."""

    module: str
    package: str
    open: Callable[[RunDir, Mapping[str, Any]], Logger]


class TensorBoard:
    """Event files in the run's `tensorboard/` folder."""

    def __init__(self, run: RunDir, recipe: Mapping[str, Any]) -> None:
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(logdir=str(run.folder.path / "tensorboard"))
        self._writer.add_text("recipe", "\n".join(f"    {path}: {value}" for path, value in flat(recipe).items()))

    def log(self, step: int, numbers: Mapping[str, float], unix_time: float) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=unix_time)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named like ours, continued when ours is (`resume`)."""

    def __init__(self, run: RunDir, recipe: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            name=run.name, id=run.name, resume="allow", config=dict(recipe), dir=str(run.folder.path) if run.folder.is_local else None
        )

    def log(self, step: int, numbers: Mapping[str, float], unix_time: float) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in the tracking server that MLFLOW_TRACKING_URI names, or beside the working directory."""

    def __init__(self, run: RunDir, recipe: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=run.name)
        self._mlflow.log_params({path: str(value)[:500] for path, value in flat(recipe).items()})

    def log(self, step: int, numbers: Mapping[str, float], unix_time: float) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


KINDS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", "tensorboardX", TensorBoard),
    "wandb": Kind("wandb", "wandb", WeightsAndBiases),
    "mlflow": Kind("mlflow", "mlflow", MLflow),
}


def check_loggers(names: Sequence[str], run: RunDir) -> None:
    """Raises ConfigError, before any worker starts, for a logger that cannot work."""
    for name in names:
        kind = KINDS[name]
        if find_spec(kind.module) is None:
            raise ConfigError(
                f"`{name}` is asked for but not installed", where="output.loggers", got=f"no module {kind.module}",
                remedy=f"pip install {kind.package}, or take it off output.loggers (metrics.jsonl and the report are always written)",
            )  # fmt: skip
        if name == "tensorboard" and not run.folder.is_local:
            raise ConfigError(
                "TensorBoard files need a local run folder", where="output.loggers", got=run.url,
                remedy="set output.runs to a local folder, or take tensorboard off output.loggers",
            )  # fmt: skip


class Loggers:
    """All loggers of a run as one. A step that a restart repeats is written once."""

    def __init__(self, names: Sequence[str], run: RunDir, recipe: Mapping[str, Any]) -> None:
        check_loggers(names, run)
        self._loggers = [KINDS[name].open(run, recipe) for name in names]
        self._last: dict[bool, int] = {True: 0, False: 0}

    def log(self, line: Mapping[str, Any]) -> None:
        """`line` as the journal has it."""
        is_validation, step = "validation_loss" in line, int(line["step"])
        if step <= self._last[is_validation]:
            return
        self._last[is_validation] = step
        numbers = {name: float(value) for name, value in line.items() if name not in NOT_CURVES and isinstance(value, int | float)}
        for logger in self._loggers:
            logger.log(step, numbers, float(line["time"]))

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted paths."""
    paths: dict[str, Any] = {}
    for name, value in tree.items():
        paths |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return paths
