"""The main job on Ray Train: rows to a published adapter on two workers; a killed worker, a wrong recipe, Ctrl-C, a run that goes on."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.connect import connect
from ftcore.adapters import AdapterStore
from ftcore.errors import ClusterError, ConfigError, Interrupted, ModelError, TrainingError
from ftcore.recipe import Resources
from ftcore.storage import explain_oserror
from pipelines.causes import would_happen_again
from pipelines.fit import Outcome, fit
from pipelines.launch import launch
from tests.ray.small_runs import SLOW_STEPS, at_step, journal, recipe_of, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]  # Ray warns of its own defaults


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


@pytest.mark.proof  # in the suite a kill in mid-checkpoint, test_chaos.py
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
        fit(recipe_of(place, "lost", resources={"max_failures": 0}, optim={"max_steps": 400}), log=lambda line: None)
    assert "ActorDiedError" not in str(failed.value)


@pytest.mark.proof  # the command itself is interrupted in test_script.py
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
