"""The invariance suite: it passes where ours hold, and it finds what somebody's stage or method breaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import ftcore.invariants as invariants_module
from ftcore.invariants import FewBlocks, Finding, few_blocks, invariants
from ftcore.methods.base import METHODS
from ftcore.probes import ProbeReport
from ftcore.recipe import Recipe, parse_recipe
from ftcore.recipe_file import dump_yaml
from ftcore.stages.base import STAGES
from pipelines import invariants as program
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.ray.small_runs import write_rows

BLOCKS = MemoryBlocks(packed_blocks(14, per_block=3, seed=3))
PACKAGE = "acme_broken"
STAGE = '''
"""Stages that break an invariance each."""
from dataclasses import replace

import torch
import torch.distributed as dist

from ftcore.stages.base import STAGES, Loss
from ftcore.stages.sft import Sft


@STAGES.register("mean_of_means")
class MeanOfMeans(Sft):
    """The classic: the loss averaged in each micro-batch, and the averages averaged."""

    kind: str = "mean_of_means"

    def weight(self, batch):
        return 1.0 if batch.num_trained else 0.0

    def loss(self, models, batch):
        return Loss(models.policy.cross_entropy(batch) / max(1, batch.num_trained))


@STAGES.register("leaky")
class Leaky(Sft):
    """Segments see each other."""

    kind: str = "leaky"

    def loss(self, models, batch):
        if batch.ids.shape[0] == 1:
            positions = torch.arange(batch.ids.shape[1])[None]
            batch = replace(batch, segment_lengths=(batch.ids.shape[1],), positions=positions)
        return super().loss(models, batch)


@STAGES.register("summed_over_ranks")
class SummedOverRanks(Sft):
    """Divides by the weight of its own rank, so to say."""

    kind: str = "summed_over_ranks"

    def loss(self, models, batch):
        loss = super().loss(models, batch)
        return Loss(loss.total * (dist.get_world_size() if dist.is_initialized() else 1))
'''
METHOD = '''
"""forgetful: LoRA whose load leaves a layer's B at what it was."""
from ftcore.methods.base import METHODS
from ftcore.methods.lora import Lora


@METHODS.register("forgetful")
class Forgetful(Lora):
    """LoRA that loads all but one layer."""

    kind: str = "forgetful"

    def load(self, model, folder):
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if "layers.0" in name and "lora_B" in name}
        super().load(model, folder)
        for name, p in model.named_parameters():
            if name in kept:
                p.data = kept[name]
'''


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somebody's package, allowed by name; the registries are as before afterwards."""
    folder = tmp_path / "elsewhere" / PACKAGE
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("method", METHOD), ("stage", STAGE)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("FTCORE_PLUGINS", PACKAGE)
    for registry in (METHODS, STAGES):
        registry.fill()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    yield PACKAGE
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def recipe_for(base: Path, home: Path, plugins: tuple[str, ...] = (), **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "mine", "model": {"path": str(base), "dtype": "fp32"}, "data": {"sources": "unused.jsonl"}, "stage": "sft",
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1}, "optim": {"lr": 1e-2}, "plugins": [f"{PACKAGE}.{name}" for name in plugins],
        "output": {"runs": str(home / "runs"), "store": str(home / "store"), "adapter": "acme/mine"},
    }  # fmt: skip
    return parse_recipe(dump_yaml(tree | changes), "mine.yaml")


def tried(recipe: Recipe, home: Path, only: str = "") -> dict[str, Finding]:
    found = invariants(recipe, BLOCKS, home / "scratch", steps=3, num_tokens=64, only=only, log=lambda line: None)
    assert not (home / "runs").exists() and not (home / "store").exists()
    return {finding.check: finding for finding in found}


def test_our_own_stage_method_and_backend_pass_every_check(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = tried(recipe_for(tiny_model_dir, tmp_path), tmp_path)
    assert {name: finding.outcome for name, finding in found.items()} == dict.fromkeys(
        ["packed = unpacked", "accumulation", "1 = 2 workers", "1 = 3 workers", "checkpoint -> resume", "save -> reload",
         "merged = adapter on base"], "PASS",
    ), found  # fmt: skip
    assert "(dropout set to 0)" in found["accumulation"].text and "dropout 0.1 on" in found["checkpoint -> resume"].text
    assert found["checkpoint -> resume"].text.startswith("losses identical")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("full", id="full"),
        pytest.param({"kind": "qlora", "rank": 4}, id="nf4"),
        pytest.param({"kind": "qlora", "bits": 8}, id="int8", marks=pytest.mark.proof),
    ],
)
def test_other_methods_pass_too(tiny_model_dir: Path, tmp_path: Path, method: Any) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, method=method, model={"path": str(tiny_model_dir), "dtype": "bf16"}, output={})
    recipe = recipe.model_copy(update={"output": recipe_for(tiny_model_dir, tmp_path).output}) if method != "full" else recipe
    for only, checks in (("->", ["checkpoint -> resume", "save -> reload"]), ("merged", ["merged = adapter on base"])):
        found = tried(recipe, tmp_path / only[0], only)
        assert list(found) == checks
        assert {finding.outcome for finding in found.values()} == {"SKIP" if (method, only) == ("full", "merged") else "PASS"}, found


@pytest.mark.parametrize(
    ("stage", "check"),
    [("mean_of_means", "accumulation"), ("leaky", "packed = unpacked"), ("summed_over_ranks", "1 = 2 workers")],
)
def test_a_stage_that_breaks_an_invariance_is_found(broken: str, tiny_model_dir: Path, tmp_path: Path, stage: str, check: str) -> None:
    [finding] = tried(recipe_for(tiny_model_dir, tmp_path, ("stage",), stage=stage), tmp_path, check).values()
    assert finding.outcome == "FAIL" and "differ by" in finding.text, str(finding)


@pytest.mark.parametrize("check", ["checkpoint -> resume", "save -> reload"])
def test_a_method_that_forgets_what_it_saved_is_found(broken: str, tiny_model_dir: Path, tmp_path: Path, check: str) -> None:
    method = {"kind": "forgetful", "rank": 4}
    [finding] = tried(recipe_for(tiny_model_dir, tmp_path, ("method",), method=method), tmp_path, check).values()
    assert finding.outcome == "FAIL", str(finding)


def test_a_merge_that_changes_the_logits_is_found(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_merged(self: PeftModel, **options: Any) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.5)
        return self

    monkeypatch.setattr(PeftModel, "merge_and_unload", half_merged, raising=False)
    [finding] = tried(recipe_for(tiny_model_dir, tmp_path), tmp_path, "merged").values()
    assert finding.outcome == "FAIL", str(finding)


def test_a_check_that_cannot_run_fails_and_says_why(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_merge(self: PeftModel, **options: Any) -> torch.nn.Module:
        raise KeyError("no such layer")

    monkeypatch.setattr(PeftModel, "merge_and_unload", broken_merge, raising=False)
    [finding] = tried(recipe_for(tiny_model_dir, tmp_path), tmp_path, "merged").values()
    assert finding.outcome == "FAIL" and "no such layer" in finding.text


def test_rows_that_are_not_packed_skip_the_packing_check_and_say_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = {"sources": "unused.jsonl", "pack": False}
    [finding] = tried(recipe_for(tiny_model_dir, tmp_path, data=data), tmp_path, "packed").values()
    assert (finding.outcome, finding.text) == ("SKIP", "data.pack is off, or the stage never packs")


def test_few_blocks_are_short_keep_answers_and_hold_several_segments() -> None:
    few = few_blocks(MemoryBlocks(packed_blocks(20, per_block=1, seed=1)), 16, packs=True)
    assert isinstance(few, FewBlocks) and len(few.blocks) == 12
    assert all(len(block.lengths) == 2 and block.num_tokens <= 16 and block.mask.any() for block in few.blocks)


def test_the_command_prints_a_line_a_check_and_exits_with_3_when_one_failed(
    broken: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, recipe = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "mine.yaml"
    tree = {
        "name": "mine", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "method": "lora", "plugins": [f"{PACKAGE}.stage"],
        "data": {"sources": str(rows), "max_length": 64, "cache": str(tmp_path / "cache")}, "stage": "sft", "optim": {"lr": 1e-2},
    }  # fmt: skip
    recipe.write_text(dump_yaml(tree))
    arguments = [str(recipe), "--steps", "2", "--tokens", "64", "--only", "accumulation"]
    assert program.main(arguments) == 0
    assert "PASS  accumulation" in capsys.readouterr().out
    assert program.main([*arguments, "stage=mean_of_means"]) == 3
    assert "FAIL  accumulation" in capsys.readouterr().out


def test_a_wrong_adapter_is_not_hidden_by_what_bf16_rounds(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, model={"path": str(tiny_model_dir), "dtype": "bf16"})
    report = ProbeReport(False, 1e-4, 1e-3, None, 5e-5, "bf16", "bf16", False, "another adapter")
    monkeypatch.setattr(invariants_module, "check", lambda *_: report)
    assert tried(recipe, tmp_path, "save -> reload")["save -> reload"].outcome == "FAIL"
