"""`sft` forecasts first: what cannot fit is refused before anything is started, and nothing else is."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import node_facts, worker_memory
from cluster.resources import Node
from cluster.worker_memory import NodeMemory, Share, share_of_nodes
from ftcore.errors import ConfigError
from ftcore.forecast import forecast
from ftcore.memory import GIB, Host
from ftcore.recipe import Resources, load_recipe
from ftcore.rundir import RunDir
from pipelines import fit, sft
from pipelines.room import judge, require_room
from tests.unit.test_forecast import recipe_file
from tests.unit.test_shapes import LLAMA_8B, QWEN2_72B

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "transformers", "peft")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recipes that came through to training."""
    names: list[str] = []

    def stop(recipe: Any, **_: Any) -> None:
        names.append(recipe.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", stop)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return names


def test_a_run_that_cannot_fit_is_refused_within_three_seconds_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, QWEN2_72B, "full")
    code = (
        f"import sys; from pipelines.sft import main; code = main([{str(path)!r}, 'output.runs={tmp_path}/runs', 'resources.workers=2']);"
        f"print([name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )

    def taken() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 3, done.stderr
        assert done.stdout.strip() == "[]"
        assert "more memory than a worker has" in done.stderr and "--no-plan" in done.stderr
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "recipe.yaml"]
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(taken() < 3 for _ in range(3))  # processor time, which takes more on a busy machine too


def test_the_refusal_can_be_pasted_and_overridden(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(recipe_file(tmp_path, LLAMA_8B, "full"))
    monkeypatch.setattr("pipelines.room.share_here", lambda asked: Share(20.0, "free on this machine, by 1 worker"))
    assert sft.main([path]) == 3
    told = capsys.readouterr().err
    overrides = shlex.split(told.split("remedy: ")[1].split("   (")[0])
    assert overrides and trained == []
    with pytest.raises(KeyboardInterrupt):
        sft.main([path, *overrides])
    assert "forecast: a worker takes" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        sft.main([path, "--no-plan"])
    assert trained == ["planned", "planned"]


def test_a_run_that_its_host_cannot_hold_is_refused(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(recipe_file(tmp_path, LLAMA_8B, "full"))
    away = ["resources.gpus_per_worker=1", "backend.kind=deepspeed", "backend.zero=3", "backend.offload_optimizer=cpu"]
    facts = replace(node_facts.node_facts(), gpus=("NVIDIA H100, 81559 MiB",), memory_free_gib=64.0)
    monkeypatch.setattr(worker_memory, "node_facts", lambda: facts)
    assert sft.main([path, *away]) == 3
    told = capsys.readouterr().err
    assert "its workers' host has" in told and "64.0 GiB by 1 worker(s) (free on this machine)" in told and trained == []
    monkeypatch.setattr(worker_memory, "node_facts", lambda: replace(facts, memory_free_gib=256.0))
    require_room(load_recipe(path, away), print)
    assert "(the smallest GPU of this machine); on its host 120.29 of 256.00 GiB" in capsys.readouterr().out


def test_the_readme_shows_a_refusal_as_it_is_printed(tmp_path: Path) -> None:
    recipe_file(tmp_path, LLAMA_8B)
    overrides = [f"model.path={tmp_path}/base", f"data.sources.0.path={tmp_path}/rows.jsonl", f"data.cache={tmp_path}"]
    known = forecast(load_recipe(REPO / "pipelines" / "recipes" / "sft-full.yaml", overrides))
    with pytest.raises(ConfigError) as caught:
        judge(known, Share(10.1, "free on this machine, by 2 workers"), print)
    assert f"\nerror: {caught.value}\n" in (REPO / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "unknown"}, "there is no forecast for this method (unknown)"),
        ({"config": {"model_type": "mamba", "state_size": 16}}, "cannot be counted from its config.json (mamba: a state-space model)"),
        ({"config": {}}, "there is no config.json to count the model from"),
        ({"share": Share(None, "no GPU here to ask")}, "not judged: no GPU here to ask"),
    ],
)
def test_what_nobody_can_forecast_is_trained_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    recipe = load_recipe(recipe_file(tmp_path, change.get("config", LLAMA_8B)))
    if "method" in change:
        monkeypatch.setattr("ftcore.forecast.moved", lambda shape, method: refuse(change["method"]))
    if change.get("config") == {}:
        (tmp_path / "base" / "config.json").unlink()
    monkeypatch.setattr("pipelines.room.share_here", lambda asked: change.get("share", Share(GIB, "plenty")))
    require_room(recipe, print)
    assert said in capsys.readouterr().out


def refuse(kind: str) -> None:
    raise ConfigError("there is no forecast for this method", got=kind)


def test_a_finished_run_needs_no_room(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(recipe_file(tmp_path, QWEN2_72B, "full"))
    with RunDir(tmp_path / "runs", "planned").sealing("final") as building:
        (building / "result.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        sft.main([path, f"output.runs={tmp_path}/runs"])
    assert trained == ["planned"]


def share(placement: str, workers: int, *nodes: tuple[float, float]) -> float | None:
    asked = Resources.model_validate({"workers": workers, "placement": placement})
    here = [NodeMemory(f"n{index}", gib, Node("", cpus, 0).holds(asked)) for index, (cpus, gib) in enumerate(nodes)]
    return share_of_nodes(asked, here).gib


def test_workers_share_the_memory_of_the_node_that_gives_least() -> None:
    assert share("PACK", 4, (8, 64.0)) == 16
    assert share("PACK", 4, (2, 64.0), (2, 16.0)) == 8
    assert share("SPREAD", 4, (8, 64.0), (8, 64.0)) == 32
    assert share("STRICT_SPREAD", 2, (8, 64.0), (8, 32.0)) == 32
    assert share("PACK", 1, (0, 1.0), (8, 64.0)) == 64, "a head without CPUs holds no worker"
    assert share("PACK", 1, (8, 0.0)) is None


def test_the_smallest_gpu_that_a_worker_may_get_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Resources(workers=2, gpus_per_worker=1)
    h100 = ("NVIDIA H100, 81559 MiB",)
    nodes = [NodeMemory("a", 0, 1, h100), NodeMemory("b", 0, 1, ("NVIDIA L4, 23034 MiB", "NVIDIA L4, 23034 MiB"))]
    assert share_of_nodes(asked, nodes) == Share(23034 / 1024, "the smallest GPU of b")
    assert share_of_nodes(Resources(gpus_per_worker=0.5), nodes).gib == 23034 / 2048
    spread = asked.model_copy(update={"placement": "SPREAD"})
    assert share_of_nodes(spread, [NodeMemory("a", 500, 8, h100), NodeMemory("b", 60, 1, h100)]).hosts == (
        Host("node a", 500, 8, 2),
        Host("node b", 60, 1, 2),
    )
    facts = node_facts.node_facts()
    monkeypatch.setattr(worker_memory, "node_facts", lambda: facts)
    here = worker_memory.share_here(Resources(workers=2))
    assert here.gib == facts.memory_free_gib / 2 and "2 workers" in here.source


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, (float("inf"), 0)),
        ({"memory.max": "max"}, (float("inf"), 0)),
        ({"memory.max": str(4 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 5\ninactive_file {GIB}"}, (4, 2)),
        (
            {"memory/memory.limit_in_bytes": str(4 * GIB), "memory/memory.usage_in_bytes": str(3 * GIB),
             "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GIB}"},
            (4, 1),
        ),
    ],
)  # fmt: skip
def test_a_container_has_what_it_may_take_not_what_the_machine_has(
    tmp_path: Path, files: dict[str, str], told: tuple[float, float]
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert node_facts.container_gib(tmp_path) == told
