"""`tune` forecasts its largest trials, as many as will run at once, before any of them begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.worker_memory import Share
from ftcore.errors import ConfigError
from ftcore.forecast import forecast
from ftcore.memory import GIB
from ftcore.recipe import Resources, load_recipe
from ftcore.search import check, load_search
from pipelines import search_room, tune
from pipelines.search_room import require_search_room
from tests.unit.test_forecast import GPU, recipe_file
from tests.unit.test_shapes import LLAMA_8B

RANKS = "method.rank={choice: [256, 4]}"


@pytest.fixture(autouse=True)
def _one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("FTCORE_LOCAL_CPUS", "1")


def has(monkeypatch: pytest.MonkeyPatch, gib: float | None) -> None:
    """A machine with so much memory."""

    def share(asked: Resources, log: object) -> Share:
        return Share(None if gib is None else gib / asked.max_workers, "free here")

    monkeypatch.setattr(search_room, "share_for", share)


def test_candidates_in_one_pass_count_and_fewer_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(recipe_file(tmp_path, LLAMA_8B))
    search = load_search(None, ["optim.lr={log: [1e-5, 1e-3]}", RANKS])
    need = forecast(load_recipe(tmp_path / "recipe.yaml", ["method.rank=256"])).need
    base = next(part.bytes for part in need.parts if part.name == "base")
    assert need.of_trials(1, 4).held("load") < 2 * need.held("load") and need.of_trials(1, 4).peak > base + 3 * (need.peak - base)
    has(monkeypatch, need.of_trials(1, 3).peak / GIB)
    with pytest.raises(ConfigError, match="this search needs more memory than there is") as caught:
        require_search_room(search, recipe, check(search, recipe), print)
    assert caught.value.remedy.startswith("--concurrent 3 ")
    assert "4 trials at once, 4 to a base" in str(caught.value) and "method.rank 256" in str(caught.value)
    three = load_search(None, ["optim.lr={log: [1e-5, 1e-3]}", RANKS], {"concurrent": "3"})
    require_search_room(three, recipe, check(three, recipe), print)


def test_trials_beside_each_other_share_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTCORE_LOCAL_CPUS", "4")
    recipe = load_recipe(recipe_file(tmp_path, LLAMA_8B))
    search = load_search(None, [RANKS], {"shared": "off"})
    peak = forecast(load_recipe(tmp_path / "recipe.yaml", ["method.rank=256"])).need.peak / GIB
    has(monkeypatch, 4.1 * peak)
    require_search_room(search, recipe, check(search, recipe), print)
    assert "4 trials at once, 1 to a base" in capsys.readouterr().out
    has(monkeypatch, 2.1 * peak)
    with pytest.raises(ConfigError) as caught:
        require_search_room(search, recipe, check(search, recipe), print)
    assert caught.value.remedy.startswith("--concurrent 2 ")
    has(monkeypatch, 0.5 * peak)
    with pytest.raises(ConfigError, match="out of the space"):
        require_search_room(search, recipe, check(search, recipe), print)


def test_tune_refuses_as_sft_does_and_can_be_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Begun(Exception):
        pass

    def begin() -> None:
        raise Begun

    monkeypatch.setattr(tune, "connect_early", begin)
    command = [str(recipe_file(tmp_path, LLAMA_8B)), RANKS, f"output.runs={tmp_path}/runs"]
    has(monkeypatch, 8)
    assert tune.main(command) == 3
    assert "this search needs more memory" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    for words, gib in ((["--no-plan"], 8), ([], 4096), ([GPU], None)):
        has(monkeypatch, gib)
        with pytest.raises(Begun):
            tune.main([*command, *words])
