"""A machine that will be taken away: the run makes a checkpoint at the next step, and goes on elsewhere or can be resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import Interrupted
from pipelines.fit import Outcome, fit
from tests.ray.small_runs import at_step, journal, recipe_of

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]  # Ray warns of its own defaults
FAR = {"checkpoint_every": 1000}
"""So that a checkpoint is the notice's, not one of the many."""


@pytest.mark.proof
def test_sigterm_to_a_worker_with_nowhere_to_go_ends_the_run_with_a_checkpoint_and_code_75(
    uninterrupted: Outcome, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = recipe_of(place, "terminated", output=FAR), list[str]()
    with at_step(12, lambda pids: os.kill(pids[1], signal.SIGTERM), monkeypatch), pytest.raises(Interrupted) as stopped:
        fit(recipe, log=said.append)
    sealed = int(stopped.value.got.removeprefix("sealed and usable: step "))
    assert stopped.value.exit_code == 75 and 12 <= sealed < 60, stopped.value  # the driver hears of step 12 some steps later
    assert [line for line in said if "must go: SIGTERM" in line and "costs no failure" in line], said
    assert journal(fit(recipe, log=said.append)) == journal(uninterrupted)


def test_a_preemption_notice_ends_the_run_with_a_checkpoint_and_code_75(
    uninterrupted: Outcome, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notice, said = tmp_path / "preempted", list[str]()
    recipe = recipe_of(place, "preempted", optim={"max_steps": 3000}, output=FAR)  # a notice is looked for every two seconds
    with monkeypatch.context() as patched:
        patched.setenv("FTCORE_PREEMPTION_FILE", str(notice))
        with at_step(5, lambda pids: notice.touch(), monkeypatch), pytest.raises(Interrupted) as stopped:
            fit(recipe, log=said.append)
    sealed = int(stopped.value.got.removeprefix("sealed and usable: step "))
    assert stopped.value.exit_code == 75 and 5 <= sealed < 3000
    assert [line for line in said if f"must go: {notice} appeared" in line], said
