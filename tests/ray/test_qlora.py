"""QLoRA on Ray Train: two workers, in 4 and in 8 bits, from rows to a published adapter that verifies on the full-precision base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftcore.adapter_commands import main as adapters_main
from ftcore.adapters import AdapterStore
from ftcore.recipe import Recipe
from pipelines.fit import fit
from tests.ray.small_runs import write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]  # Ray warns of its own defaults


@pytest.mark.parametrize(("bits", "kind", "held"), [(4, "adamw", "nf4"), pytest.param(8, "adamw_8bit", "int8", marks=pytest.mark.proof)])
def test_two_workers_train_a_quantised_base_to_a_verified_adapter(
    local_ray: None, tiny_model_dir: Path, tmp_path: Path, bits: int, kind: str, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree: dict[str, Any] = {
        "name": f"qlora-{bits}",
        "model": {"path": str(tiny_model_dir), "dtype": "bf16"},
        "data": {"sources": [str(write_rows(tmp_path / "rows.jsonl"))], "max_length": 64, "cache": str(tmp_path / "prepared")},
        "method": {"kind": "qlora", "bits": bits, "rank": 8, "dropout": 0.1},
        "stage": "sft",
        "optim": {"kind": kind, "batch_size": 4, "lr": 1e-2, "max_steps": 12, "epochs": 100},
        "resources": {"workers": 2},
        "output": {"runs": str(tmp_path / "runs"), "store": str(tmp_path / "store"), "adapter": "acme/support"},
    }
    said: list[str] = []
    outcome = fit(Recipe.model_validate(tree), log=said.append)
    card = AdapterStore(tree["output"]["store"]).verify(outcome.ref)
    assert card.world_size == 2 and card.method.kind == "qlora"
    assert set(card.probes) == {held, f"{held} in fp32", "fp32"}
    assert card.quantisation is not None and card.quantisation.how.startswith(held) and card.quantisation.difference_bare > 0
    assert [line for line in said if line.startswith(f"proof in {held} in fp32: error")]
    assert adapters_main(["verify", str(outcome.ref), "--probes", "--store", tree["output"]["store"]]) == 0
    assert "every tensor binds, and the probes agree" in capsys.readouterr().out
