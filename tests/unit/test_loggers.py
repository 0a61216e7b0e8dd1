"""Loggers and the progress line: what they write, what they refuse."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftcore.errors import ConfigError
from ftcore.loggers import KINDS, Kind, Loggers, MLflow, WeightsAndBiases, check_loggers
from ftcore.progress import ProgressLine, clock
from ftcore.rundir import RunDir


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "epoch": 0.1, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100 * step, "tokens_per_s": 50.0}
    return {**values, "seconds": 2.0 * step, "time": 1e9 + step, "num_steps": 200, **changes}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "night")


def test_a_logger_that_is_not_installed_is_refused_with_what_to_install(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "wandb", Kind("no_such_module_here", "wandb", WeightsAndBiases))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_loggers(("wandb",), run)


def test_tensorboard_needs_a_local_run_folder() -> None:
    with pytest.raises(ConfigError, match="local run folder"):
        check_loggers(("tensorboard",), RunDir("memory://bucket", "night"))


def test_tensorboard_files_hold_every_number_of_every_step(run: RunDir) -> None:
    loggers = Loggers(("tensorboard",), run, {"name": "night", "optim": {"lr": 1e-4}})
    for step in (1, 2, 3):
        loggers.log(step_line(step))
    loggers.log({"step": 3, "validation_loss": 0.9, "perplexity": 2.46, "time": 1e9})
    loggers.close()
    [file] = (run.folder.path / "tensorboard").iterdir()
    found = scalars(file)
    assert found[("loss", 3)] == pytest.approx(1 / 3)
    assert found[("validation_loss", 3)] == pytest.approx(0.9)
    assert {step for name, step in found if name == "tokens_per_s"} == {1, 2, 3}


def scalars(file: Path) -> dict[tuple[str, int], float]:
    """Reads a TensorBoard event file back: length-prefixed records, each a protocol-buffer Event."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 12 + size + 4
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value if value.simple_value}
    return found


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def log(self, step: int, numbers: Any, unix_time: float) -> None:
        self.calls.append(("log", step, sorted(numbers)))

    def close(self) -> None:
        self.calls.append(("close", None, None))


def test_steps_that_a_restart_repeats_are_written_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(KINDS, "wandb", Kind("json", "wandb", lambda run, recipe: recorder))
    loggers = Loggers(("wandb",), run, {})
    for step in (1, 2, 3, 2, 3, 4):
        loggers.log(step_line(step))
    assert [step for _, step, _ in recorder.calls] == [1, 2, 3, 4]


def test_a_validation_of_a_step_is_not_taken_for_a_repeat_of_it(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(KINDS, "wandb", Kind("json", "wandb", lambda run, recipe: recorder))
    loggers = Loggers(("wandb",), run, {})
    loggers.log(step_line(5))
    loggers.log({"step": 5, "validation_loss": 1.0, "perplexity": 2.7, "time": 0.0})
    assert recorder.calls[1] == ("log", 5, ["perplexity", "validation_loss"])


def test_mlflow_gets_flat_parameters_and_metrics(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    module = ModuleType("mlflow")
    module.start_run = lambda run_name: said.append(run_name)
    module.log_params = said.append
    module.log_metrics = lambda numbers, step: said.append((numbers, step))
    module.end_run = lambda: said.append("end")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    logger = MLflow(run, {"optim": {"lr": 0.1}})
    logger.log(3, {"loss": 0.5}, 0.0)
    logger.close()
    assert said == ["night", {"optim.lr": "0.1"}, ({"loss": 0.5}, 3), "end"]


def test_the_line_shows_step_loss_speed_and_time_left() -> None:
    line = ProgressLine(lambda text: None, stream=io.StringIO())
    for step in range(1, 41):
        line.show(step_line(step))
    assert line.text(step_line(40)) == "step 40/200  loss 0.0250  50 tokens/s  left 5:20"


def test_a_log_gets_a_line_now_and_then_and_always_the_last() -> None:
    said: list[str] = []
    line = ProgressLine(said.append, stream=io.StringIO(), log_every_s=3600)
    for step in range(1, 201):
        line.show(step_line(step))
    assert [text.split()[1] for text in said] == ["1/200", "200/200"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_rewrites_itself_and_covers_what_was_longer() -> None:
    terminal = Terminal()
    line = ProgressLine(lambda text: None, stream=terminal)
    line.show(step_line(99, loss=123456.0))
    line.show(step_line(100, loss=1.0))
    line.close()
    first, second = terminal.getvalue().removesuffix("\n").split("\r")[1:]
    assert len(second) >= len(first.rstrip())


def test_after_a_restart_the_old_speed_is_forgotten() -> None:
    line = ProgressLine(lambda text: None, stream=io.StringIO())
    line.show(step_line(50, tokens_per_s=1e6))
    line.restart()
    line.show(step_line(41))
    assert "  50 tokens/s" in line.text(step_line(41))


def test_time_left_reads_like_a_clock() -> None:
    assert [clock(seconds) for seconds in (0, 42, 725, 12000)] == ["0:00", "0:42", "12:05", "3:20:00"]
