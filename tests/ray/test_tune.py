"""Searches on real Ray Tune: trials that share a base, and of their own; one that fails, one that takes over another's weights; a kill."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftcore.adapters import AdapterStore
from ftcore.errors import TrainingError
from ftcore.recipe import Recipe, dump_recipe
from ftcore.rundir import RunDir
from ftcore.search import Search, load_search
from ftcore.storage import Folder
from ftcore.trials import Found
from pipelines.searching import crown, find, search_folder
from pipelines.telling import Spent
from tests.ray.small_runs import write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
SPACE = ("optim.lr={log: [1e-3, 3e-2]}", "method.rank={choice: [2, 8]}", "method.alpha={equals: 2 * method.rank}")


def recipe_in(folder: Path, base: Path, name: str, **changes: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, count=80)
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"path": str(base), "dtype": "fp32"},
            "data": {"sources": [str(rows)], "max_length": 128, "validation": 0.2, "redact": "off", "cache": str(folder / "prepared")},
            "method": {"kind": "lora", "rank": 4, "targets": "all-linear"},
            "stage": "sft",
            "optim": {"lr": 1e-5, "batch_size": 2, "max_steps": 12},
            "output": {"runs": str(folder / "runs"), "store": str(folder / "adapters"), "adapter": "acme/best"},
            **changes,
        }
    )


def searched(recipe: Recipe, *words: str, **options: Any) -> tuple[Search, Found, list[str]]:
    said: list[str] = []
    search = load_search(None, words or SPACE, {"trials": 4, "looks": 3, **options})
    return search, find(search, recipe, log=said.append), said


def test_trials_that_share_a_base_end_in_a_published_winner(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tiny_model_dir, "together", resources={"cpus_per_worker": 4})
    search, found, said = searched(recipe, **{"scheduler.kind": "none"})
    assert any("4 at once, 2 to a base" in line for line in said)
    best = found.ranked()[0]
    assert [trial.state for trial in found.trials.values()] == ["done"] * 4
    outcome = crown(search, recipe, found, log=said.append)
    assert outcome.ref is not None
    card = AdapterStore(recipe.output.store).card(outcome.ref)
    assert (card.method.rank, card.method.alpha) == (best.values["method.rank"], 2 * best.values["method.rank"])
    assert card.metrics["search.trials"] == 4 and "optim.lr" in str(card.metrics["search.space"])
    assert outcome.metrics["validation_loss"] == pytest.approx(best.best("min"), abs=1e-5), "trained alone it is what it was with others"
    page = (search_folder(recipe).path / "report.html").read_text()
    assert best.id in page and "<svg" in page and "<script" not in page


def test_a_trial_that_fails_does_not_end_the_rest(
    local_ray: None, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target that no layer of this model has is only seen when the model is there."""
    recipe = recipe_in(tmp_path, tiny_model_dir, "one-fails")
    targets = "method.targets={choice: [all-linear, [no_such_layer]]}"
    _, found, _ = searched(recipe, targets, searcher="grid", shared="off", concurrent=1)
    assert sorted(trial.state for trial in found.trials.values()) == ["done", "failed"]
    told = [
        line.split("  ")[1].split(" ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("trial ") and "  " in line
    ]
    assert [word for word in told if word == "begins:" or word in ("failed:", "done:")][1] != "begins:", "not more at once than asked for"
    failed = next(trial for trial in found.trials.values() if trial.state == "failed")
    assert "no_such_layer" in str(failed.values) and "matches no linear layer" in failed.error
    assert found.ranked()[0].run, "a trial of its own has a run folder to go on from"


@pytest.mark.proof
def test_a_trial_whose_process_is_lost_goes_on_from_what_it_sealed(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tiny_model_dir, "lost", optim={"lr": 1e-5, "batch_size": 2, "max_steps": 200})
    killed: list[int] = []

    def kill() -> None:
        """The trial's own process, one of this test's, when its first look is known."""
        until = time.monotonic() + 120
        while not killed and time.monotonic() < until:
            time.sleep(0.05)
            found = Found.read(search_folder(recipe))
            if found is not None and any(trial.looks for trial in found.trials.values()):
                mine = [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::Trial")]
                killed.extend(each.pid for each in mine)
                for each in mine:
                    each.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    _, found, _ = searched(recipe, "optim.lr={choice: [1e-3]}", searcher="grid", shared="off", looks=10)
    killer.join()
    [trial] = found.trials.values()
    assert killed and trial.state == "done" and trial.steps == 200


@pytest.mark.proof
def test_when_every_trial_fails_the_search_says_why(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tiny_model_dir, "all-fail", method={"kind": "lora", "targets": ["no_such_layer"]})
    with pytest.raises(TrainingError, match=r"(?s)no trial of this search could be judged.*matches no linear layer"):
        searched(recipe, "optim.lr={choice: [1e-3]}", searcher="grid")


def test_a_search_that_is_given_more_trials_makes_those_that_are_new(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tiny_model_dir, "more", resources={"cpus_per_worker": 8})
    _, first, _ = searched(recipe, trials=2)
    _, more, said = searched(recipe, trials=4, minutes=30.0)
    assert len(first.trials) == 2 and len(more.trials) == 4 and first.trials.items() <= more.trials.items()
    assert len({str(trial.values) for trial in more.trials.values()}) == 4, "the new ones are drawn anew"
    assert any(line.startswith("2 trials") for line in said)
    _, again, _ = searched(recipe, trials=3)
    assert again.trials == more.trials


def test_time_that_earlier_sessions_took_counts(tmp_path: Path) -> None:
    for seconds, minutes, over in ((59.0, 1.0, False), (61.0, 1.0, True), (61.0, 2.0, False), (61.0, None, False)):
        Found("", "min", seconds=seconds, minutes=minutes).write(Folder(str(tmp_path)))
        assert pickle.loads(pickle.dumps(Spent(str(tmp_path)))).stop_all() is over, (seconds, minutes)


@pytest.mark.proof
def test_a_search_whose_minutes_are_spent_keeps_what_it_found(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    few = {"cpus_per_worker": 4}  # as many processes as this machine can start within the minute
    recipe = recipe_in(tmp_path, tiny_model_dir, "timed", optim={"lr": 1e-3, "batch_size": 2, "max_steps": 60}, resources=few)
    _, found, _ = searched(recipe, trials=400, minutes=1.0, looks=20, **{"scheduler.kind": "none"})
    assert len(found.trials) < 400 and {trial.state for trial in found.trials.values()} <= {"done", "stopped"}
    assert 60 <= found.seconds < 150 and found.ranked()
    _, again, said = searched(recipe, trials=400, minutes=1.0, looks=20, **{"scheduler.kind": "none"})
    assert len(again.trials) == len(found.trials) and "spent" in " ".join(said)


@pytest.mark.proof
def test_the_worst_goes_on_from_the_best(local_ray: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Population based training: a trial takes over another's weights and optimizer state, with another rate from there on."""
    recipe = recipe_in(tmp_path, tiny_model_dir, "population", optim={"lr": 1e-3, "batch_size": 2, "max_steps": 24})
    rates = "optim.lr={choice: [1e-6, 3e-6, 1e-2, 2e-2]}"
    _, found, _ = searched(recipe, rates, searcher="random", trials=4, looks=8, **{"scheduler.kind": "pbt", "scheduler.every": 25})
    branched = [trial for trial in found.trials.values() if "." in trial.run]
    assert branched, {trial.id: trial.values for trial in found.trials.values()}
    for trial in branched:
        run = RunDir(str(search_folder(recipe) / "trials"), trial.run)
        [event] = [each for each in run.folder.read_json("history.json") if each["what"] == "branched"]
        assert event["donor"].split(".")[0] != trial.id


@pytest.mark.proof
def test_a_search_that_is_killed_goes_on_with_what_is_left(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tiny_model_dir, "killed", optim={"lr": 1e-5, "batch_size": 2, "max_steps": 30})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "pipelines.tune", str(file), *SPACE, "--trials", "12", "--scheduler", "none", "--concurrent", "1"]
    environment = {**os.environ, "FTCORE_LOCAL_CPUS": "2"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    folder, until = search_folder(recipe), time.monotonic() + 120
    while time.monotonic() < until:
        found = Found.read(folder)
        if found is not None and [trial.state for trial in found.trials.values()].count("done") >= 2:
            break
        time.sleep(0.2)
    time.sleep(6)  # Ray Tune keeps its own state every five seconds
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = Found.read(folder)
    assert before is not None and not before.parts, "the search was over before it was killed"
    done = {name for name, trial in before.trials.items() if trial.state == "done"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on with the search" in again.stdout and "acme/best" in again.stdout
    after = Found.read(folder)
    assert after is not None
    states = [trial.state for trial in after.trials.values()]
    assert states.count("done") >= 12 and len(states) <= 12 + 5, states  # beside: those of the seconds since Ray Tune last kept its state
    assert all(after.trials[name].looks == before.trials[name].looks for name in done), "what was done is not done again"


@pytest.mark.proof
def test_trials_of_two_workers_on_two_cores_wait_for_nobody(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A trial's actor holds no core that its workers need, and a trial that ends early leaves none of them held."""
    recipe = recipe_in(tmp_path, tiny_model_dir, "wide", resources={"workers": 2}, optim={"lr": 1e-5, "batch_size": 2, "max_steps": 12})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    options = ["--trials", "4", "--shared", "off", "--searcher", "random", "--concurrent", "4"]
    command = [sys.executable, "-m", "pipelines.tune", str(file), "optim.lr={choice: [1e-7, 1e-2]}", *options]
    done = subprocess.run(command, env={**os.environ, "FTCORE_LOCAL_CPUS": "2"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 at once" in done.stdout
    found = Found.read(search_folder(recipe))
    assert found is not None
    assert {trial.state for trial in found.trials.values()} <= {"done", "stopped"} and len(found.trials) == 4
