"""Sharded and quantised runs over three nodes with their own addresses: each ends in a verified adapter, or in a whole model that loads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from cluster.bridge import why_not
from cluster.netns import NetnsCluster
from ftcore.adapters import AdapterStore
from tests.ray.small_runs import write_rows

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.ray,
    pytest.mark.proof,
    pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}"),
]
ZERO3: dict[str, Any] = {"backend": {"kind": "deepspeed", "zero": 3}}


@pytest.fixture(scope="module")
def nodes() -> Iterator[NetnsCluster]:
    everywhere = {"PYTHONPATH": str(REPO), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1"}
    with NetnsCluster(3, everywhere=everywhere) as cluster:
        yield cluster


def train(nodes: NetnsCluster, folder: Path, base: Path, name: str, workers: int, changes: dict[str, Any]) -> Path:
    """The run's folder; its workers sat on as many nodes."""
    rows = folder / "rows.jsonl"
    recipe = {
        "name": name, "model": {"path": str(base), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 4}, "stage": "sft",
        "data": {"sources": [str(rows if rows.exists() else write_rows(rows))], "max_length": 64, "cache": str(folder / "prepared")},
        "optim": {"batch_size": 6, "lr": 1e-2, "max_steps": 12}, "resources": {"workers": workers, "placement": "STRICT_SPREAD"},
        "output": {"runs": str(folder / "runs"), "store": str(folder / "store"), "adapter": f"acme/{name}", "checkpoint_every": 5},
    } | changes  # fmt: skip
    if changes.get("method") == "full":
        del recipe["output"]["adapter"]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    done = nodes.run([sys.executable, "pipelines/sft.py", str(folder / f"{name}.yaml")], cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{workers} workers on {workers} nodes: " in done.stdout
    return folder / "runs" / name


@pytest.mark.parametrize("workers", [2, 3])
def test_zero_3_shards_a_lora_run_over_nodes(nodes: NetnsCluster, tiny_model_dir: Path, tmp_path: Path, workers: int) -> None:
    train(nodes, tmp_path, tiny_model_dir, "sharded", workers, ZERO3)
    store = AdapterStore(tmp_path / "store")
    assert store.verify(store.resolve("acme/sharded")).world_size == workers


@pytest.mark.parametrize("workers", [2, 3])
def test_zero_3_shards_full_training_over_nodes(nodes: NetnsCluster, tiny_model_dir: Path, tmp_path: Path, workers: int) -> None:
    run = train(nodes, tmp_path, tiny_model_dir, "whole", workers, {**ZERO3, "method": "full"})
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model_dir, run / "final"))
    assert before.keys() == after.keys() and all(not before[name].equal(after[name]) for name in before if "weight" in name)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_over_two_nodes(nodes: NetnsCluster, tiny_model_dir: Path, tmp_path: Path, bits: int) -> None:
    train(nodes, tmp_path, tiny_model_dir, "quantised", 2, {"method": {"kind": "qlora", "bits": bits, "rank": 4}})
    store = AdapterStore(tmp_path / "store")
    assert ("nf4" if bits == 4 else "int8") in store.verify(store.resolve("acme/quantised")).base.quantisation


@pytest.mark.parametrize("words", [("backend.kind=deepspeed", "backend.zero=3"), ("method.kind=qlora",)])
def test_the_demo_ends_in_verified_adapters(tmp_path: Path, words: tuple[str, ...]) -> None:
    options = [option for word in words for option in ("--set", word)]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.demo", "--out", str(tmp_path), *options], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    store = AdapterStore(tmp_path / "adapters")
    for name in ("acme/desktop", "globex/desktop"):
        card = store.verify(store.resolve(name))
        assert card.recipe is not None and all(
            str(value) in str(card.recipe.resolved) for value in ("deepspeed", "qlora") if value in words[0]
        )
