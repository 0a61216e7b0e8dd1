"""Going on with a run: what may change under its name, who may lead it, and beginning again without losing the old one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import ConfigError, Interrupted
from ftcore.history import recall, remember
from ftcore.lease import holding
from ftcore.recipe import Recipe
from ftcore.rundir import LEASE, RunDir
from pipelines import changes, runs
from pipelines.changes import other_past, refuse_changes
from pipelines.sft import main


def recipe_of(**changed: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "run", "model": {"path": "base"}, "data": {"sources": "rows.jsonl"}, "method": "lora", "stage": "sft",
        "optim": {"max_steps": 100, "schedule": "constant", "warmup": 0},
    }  # fmt: skip
    for path, value in changed.items():
        section, _, key = path.partition("__")
        tree[section] = {**tree.get(section, {}), key: value} if key else value
    return Recipe.model_validate(tree)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with a sealed checkpoint of step 40."""

    class Blocks:
        def num_blocks(self, split: str) -> int:
            return 80

    monkeypatch.setattr(changes.Prepared, "open", lambda url: Blocks())
    folder = RunDir(tmp_path, "run")
    with folder.sealing("checkpoints/step-000040") as building:
        (building / "state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("resources__workers", 3), ("resources__workers", {"min": 1, "max": 3}), ("output__checkpoint_every", 7),
        ("output__log_every", 5), ("data__cache", "x"), ("backend__micro_batch", 4),
        ("eval__every_steps", 9), ("eval__patience", 3), ("eval__choose", "last"),
        ("optim__max_steps", 200), ("optim__max_steps", 50),
    ],
)  # fmt: skip
def test_what_says_where_how_fast_and_how_long_may_change(run: RunDir, path: str, value: Any) -> None:
    before = recipe_of()
    changed = refuse_changes(run, before, recipe_of(**{path: value}), "", "another name")
    assert changed and all(key.startswith(path.replace("__", ".")) for key in changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim__lr", 0.5), ("optim__seed", 1), ("optim__batch_size", 4), ("optim__schedule", "linear"), ("model__path", "other"),
        ("model__dtype", "fp32"), ("data__sources", "other.jsonl"), ("data__max_length", 64), ("method", {"kind": "lora", "rank": 4}),
        ("eval__max_blocks", 3), ("stage", "pretrain"), ("optim__max_steps", 39),
    ],
)  # fmt: skip
def test_what_would_make_the_record_a_lie_is_refused_by_name(run: RunDir, path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=path.split("__")[0]) as refused:
        refuse_changes(run, recipe_of(), recipe_of(**{path: value}), "", "another name")
    assert "became" in refused.value.got and refused.value.remedy == "another name"


def test_a_longer_run_is_refused_when_the_steps_taken_would_have_had_another_learning_rate(run: RunDir) -> None:
    short, long = recipe_of(optim__schedule="cosine"), recipe_of(optim__schedule="cosine", optim__max_steps=200)
    with pytest.raises(ConfigError, match="step 2 would have had another learning rate"):
        refuse_changes(run, short, long, "", "another name")
    assert other_past(short, short, 40, 80) == ""


def test_of_a_finished_run_only_places_may_change(run: RunDir) -> None:
    with run.sealing("final") as building:
        (building / "x").write_text("x")
    assert refuse_changes(run, recipe_of(), recipe_of(output__adapter="a/b"), "", "")
    for path, value in (("optim__max_steps", 200), ("eval__patience", 3)):
        with pytest.raises(ConfigError, match="this run is finished"):
            refuse_changes(run, recipe_of(), recipe_of(**{path: value}), "", "")


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path) -> None:
    assert refuse_changes(RunDir(tmp_path, "run"), recipe_of(), recipe_of(optim__lr=0.5), "", "") == {"optim.lr": (2e-4, 0.5)}


def test_history_keeps_what_changed_and_when_oldest_first(run: RunDir) -> None:
    remember(run, "began", step=0, changed={})
    remember(run, "went on", step=40, changed={"resources.workers": (2, 3)})
    assert [(event["what"], event["step"]) for event in recall(run)] == [("began", 0), ("went on", 40)]
    assert recall(run)[1]["changed"] == {"resources.workers": [2, 3]} and recall(run)[1]["time"] <= time.time()


def test_beginning_again_keeps_the_old_run_under_a_name_that_says_when(run: RunDir) -> None:
    said: list[str] = []
    run.folder.write("recipe.yaml", b"name: run\n")
    runs.move_aside(run, said.append)
    [kept] = list(run.folder.path.parent.iterdir())
    assert kept.name.startswith(f"run.before-{time.strftime('%Y%m')}") and RunDir(kept.parent, kept.name).checkpoint_steps() == [40]
    assert str(kept) in said[0] and not run.checkpoint_steps()


def test_a_remote_run_is_not_moved_aside_but_refused() -> None:
    run = RunDir("memory://resume-tests", "run")
    run.folder.write("recipe.yaml", b"name: run\n")
    with pytest.raises(ConfigError, match="cannot be moved aside"):
        runs.move_aside(run, print)


def test_the_command_that_goes_on_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", "r.yaml", "--no-resume", "optim.lr=1"])
    assert runs.same_command() == "python sft.py r.yaml optim.lr=1"


def test_no_resume_may_stand_anywhere_on_the_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words in (
        ["--no-resume", "r.yaml", "optim.lr=x"],
        ["r.yaml", "--no-resume", "optim.lr=x"],
        ["r.yaml", "optim.lr=x", "--no-resume"],
    ):
        with pytest.raises(ConfigError):  # the file is not there; the line was read
            main(words)


def test_what_a_driver_that_was_replaced_still_writes_is_not_sealed(run: RunDir) -> None:
    with holding(run):
        run.folder.write_json(LEASE, {**json.loads(run.folder.read(LEASE)), "token": "another"})
        with pytest.raises(Interrupted, match="taken this run over"), run.sealing("checkpoints/step-000050") as building:
            (building / "state.json").write_text("{}")
    assert run.checkpoint_steps() == [40]
