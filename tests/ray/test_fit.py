"""The main job on Ray Train: rows to a published adapter on two workers; a killed worker, a wrong recipe, Ctrl-C, a run that goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.connect import connect
from cluster.relay import Message
from ftcore.adapters import AdapterStore
from ftcore.errors import ClusterError, ConfigError, Interrupted, ModelError, TrainingError
from ftcore.recipe import Recipe, Resources
from ftcore.storage import explain_oserror
from pipelines import fit as fit_module
from pipelines.causes import would_happen_again
from pipelines.fit import Outcome, fit
from pipelines.launch import launch

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]  # Ray warns of its own defaults
WORDS = ["open", "close", "file", "report", "folder", "move", "rename", "archive", "quick", "fox", "jumps", "name", "answer", "question"]
SLOW_STEPS = 60


def write_rows(path: Path, count: int = 120) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            question, answer = f"{index} {' '.join(draw.choices(WORDS, k=6))}", " ".join(draw.choices(WORDS, k=8))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Any]:
    """What all recipes of this file share: base, rows, and where things land."""
    root = tmp_path_factory.mktemp("fit")
    return {
        "model": {"path": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"sources": [str(write_rows(root / "rows.jsonl"))], "max_length": 64, "validation": 0.1, "cache": str(root / "prepared")},
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "stage": "sft",
        "optim": {"batch_size": 4, "lr": 1e-2, "max_steps": SLOW_STEPS, "epochs": 100},
        "resources": {"workers": 2, "max_failures": 1},
        "output": {"runs": str(root / "runs"), "store": str(root / "store"), "checkpoint_every": 5},
    }


def recipe_of(place: dict[str, Any], name: str, **changes: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**place, "name": name, **{key: {**place[key], **value} for key, value in changes.items()}})


def journal(outcome: Outcome) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in outcome.run.folder.read("metrics.jsonl").decode().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@contextmanager
def at_step(step: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls `act(pids by rank)` in this process, once, when the driver hears of `step`."""
    hear, pids = fit_module._Ear.hear, {}

    def heard(ear: Any, message: Message) -> None:
        hear(ear, message)
        if message["event"] == "worker":
            pids[message["rank"]] = message["pid"]
        if message["event"] == "lines" and message["lines"][-1]["step"] >= step and "done" not in pids:
            pids["done"] = 0
            act(pids)

    with monkeypatch.context() as patched:
        patched.setattr(fit_module._Ear, "hear", heard)
        yield


@pytest.fixture(scope="session")
def uninterrupted(local_ray: None, place: dict[str, Any]) -> Outcome:
    return fit(recipe_of(place, "whole", output={"adapter": "acme/support"}), log=lambda line: None)


def test_two_workers_train_from_rows_to_a_promoted_adapter(uninterrupted: Outcome, place: dict[str, Any]) -> None:
    store = AdapterStore(place["output"]["store"])
    assert uninterrupted.ref == store.resolve("acme/support")
    assert store.verify(uninterrupted.ref).world_size == 2


def test_the_loss_falls_and_no_step_is_missing_from_the_journal(uninterrupted: Outcome) -> None:
    lines = journal(uninterrupted)
    assert [step for step, _ in lines] == list(range(1, SLOW_STEPS + 1))
    assert lines[-1][1] < 0.8 * lines[0][1]


def test_recipe_audit_and_report_lie_beside_the_run(uninterrupted: Outcome) -> None:
    folder = uninterrupted.run.folder
    assert {"recipe.yaml", "audit.json", "metrics.jsonl", "report.html", "curves.png", "final"} <= set(folder.names())
    assert "acme/support" in folder.read("report.html").decode()


def test_a_finished_run_is_recognised_and_not_trained_or_published_again(uninterrupted: Outcome, place: dict[str, Any]) -> None:
    said: list[str] = []
    again = fit(recipe_of(place, "whole", output={"adapter": "acme/support"}), log=said.append)
    assert again.ref == uninterrupted.ref
    assert [line.split(":")[0] for line in said] == ["run whole", "already published"]


def test_a_finished_run_can_be_published_under_another_name(uninterrupted: Outcome, place: dict[str, Any]) -> None:
    other = fit(recipe_of(place, "whole", output={"adapter": "acme/second"}), log=lambda line: None)
    assert other.ref is not None and other.ref.name == "second"


def test_another_recipe_under_the_same_name_is_refused_with_what_changed(uninterrupted: Outcome, place: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.01 became 0.5") as refused:
        fit(recipe_of(place, "whole", optim={"lr": 0.5}), log=lambda line: None)
    assert "name=whole-2" in refused.value.remedy


def test_other_rows_under_the_same_name_are_refused(uninterrupted: Outcome, place: dict[str, Any], tmp_path: Path) -> None:
    rows = Path(place["data"]["sources"][0])
    before = rows.read_bytes()
    try:
        write_rows(rows, count=121)
        with pytest.raises(ConfigError, match="the rows or the data section"):
            fit(recipe_of(place, "whole"), log=lambda line: None)
    finally:
        rows.write_bytes(before)


def test_a_killed_worker_continues_to_the_same_losses(
    uninterrupted: Outcome, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with at_step(12, lambda pids: os.kill(pids[1], signal.SIGKILL), monkeypatch):
        killed = fit(recipe_of(place, "killed"), log=said.append)
    assert [line for line in said if line.startswith("worker 1 failed: its process died")], said
    assert journal(killed) == journal(uninterrupted)


def test_a_worker_that_dies_too_often_ends_the_run_and_names_worker_and_logs(
    local_ray: None, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        at_step(7, lambda pids: os.kill(pids[1], signal.SIGKILL), monkeypatch),
        pytest.raises(TrainingError, match=r"(?s)worker 1, pid \d+ on .*its process died.*logs") as failed,
    ):
        fit(recipe_of(place, "lost", resources={"max_failures": 0}), log=lambda line: None)
    assert "ActorDiedError" not in str(failed.value)


def test_ctrl_c_seals_a_checkpoint_and_the_same_command_goes_on(
    uninterrupted: Outcome, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(place, "stopped", output={"checkpoint_every": 1000})
    with at_step(12, lambda pids: signal.raise_signal(signal.SIGINT), monkeypatch), pytest.raises(Interrupted) as stopped:
        fit(recipe, log=lambda line: None)
    sealed = int(stopped.value.got.removeprefix("sealed and usable: step "))
    assert sealed >= 12 and stopped.value.remedy.startswith("go on with: ") and stopped.value.exit_code == 75
    said: list[str] = []
    gone_on = fit(recipe, log=said.append)
    assert f"going on after step {sealed}" in said
    assert journal(gone_on) == journal(uninterrupted)


def test_an_error_that_would_only_repeat_is_not_retried_and_comes_out_as_itself(local_ray: None, place: dict[str, Any]) -> None:
    said: list[str] = []
    recipe = recipe_of(place, "nothing-moves", method={"targets": ["no_such_module"]})
    with pytest.raises(ModelError, match="no_such_module"):
        fit(recipe, log=said.append)
    assert not [line for line in said if "restarting" in line]


def test_a_full_disk_is_not_worth_a_retry_and_a_storage_that_stumbles_is() -> None:
    full = explain_oserror(OSError(errno.ENOSPC, "No space left on device"), "write a checkpoint", "runs/full/checkpoints")
    stumble = explain_oserror(OSError(errno.EIO, "503 Slow Down"), "write a checkpoint", "s3://runs")
    assert (would_happen_again(full), would_happen_again(stumble)) == (True, False)


def _silent(_: object) -> None:
    pass


def test_more_workers_than_the_cluster_has_are_refused_before_any_is_launched(local_ray: None) -> None:
    with pytest.raises(ClusterError, match="9 workers x 1 CPU"):
        launch(partial(int, 1), Resources(workers=9), connect(log=_silent), name="wide", hear=_silent)
