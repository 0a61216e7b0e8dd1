"""The gate: a version that is not good enough is published and not promoted; its name means what it meant before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, Interrupted
from ftcore.publish import import_adapter
from ftcore.recipe import Model, Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir
from pipelines import judging, sft
from pipelines.evaluating import Evaluation
from pipelines.gate import judge_at_gate
from tests.oracles import make_adapter

MORE = " one two three four five" * 100


def recipe_of(tmp_path: Path, base: Path, *, more: str = "", max_length: int = 128, stage: str = "sft", **gate: Any) -> Recipe:
    rows = [{"instruction": f"What is {n} plus {n}?{more}", "output": f"It is {2 * n}.{more}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "gated", "model": {"path": str(base), "dtype": "fp32"}, "method": "lora", "stage": stage,
        "data": {
            "sources": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache"), "max_length": max_length, "validation": 0,
            "test": 0.3, "engine": "process", "near_duplicates": "keep",
        },
        "optim": {"max_steps": 2, "warmup": 0, "batch_size": 2},
        "output": {"runs": str(tmp_path / "runs"), "store": str(tmp_path / "store"), "adapter": "acme/sums", "gate": gate},
    }  # fmt: skip
    return parse_recipe(json.dumps(values))


@pytest.fixture
def versions(tiny_model_dir: Path, tmp_path: Path) -> tuple[AdapterRef, AdapterRef]:
    """(a faint one, one that garbles what the base says)."""
    store = AdapterStore(tmp_path / "store")
    made = [make_adapter(tiny_model_dir, tmp_path / f"made-{strength}", 1, strength) for strength in (0.02, 3.0)]
    faint, garbled = (import_adapter(folder, "acme/sums", Model(path=str(tiny_model_dir)), store, log=lambda _: None) for folder in made)
    return faint, garbled


def judged(recipe: Recipe, ref: AdapterRef, said: list[str]) -> bool:
    assert recipe.output.gate is not None
    return judge_at_gate(RunDir(recipe.output.runs, recipe.name), recipe, recipe.output.gate, ref, said.append).passed


def test_only_a_version_told_better_than_the_current_one_takes_its_place(
    versions: tuple[AdapterRef, AdapterRef], tiny_model_dir: Path, tmp_path: Path
) -> None:
    faint, garbled = versions
    store, said = AdapterStore(tmp_path / "store"), list[str]()
    recipe = recipe_of(tmp_path, tiny_model_dir, metric="perplexity", better_than="current")
    store.promote(faint)
    assert not judged(recipe, garbled, said)
    assert store.resolve("acme/sums") == faint and f"goes on meaning {faint}: {garbled.full} is worse than {faint.full}" in said[-1]
    assert not judged(recipe, garbled, said) and said[-1].startswith("judged before")
    store.promote(garbled)
    assert judged(recipe, faint, said)
    assert store.resolve("acme/sums") == faint
    store.promote(garbled)
    assert judged(recipe, faint, said) and said[-1].startswith("judged before") and store.resolve("acme/sums") == garbled


def test_a_version_that_was_shut_out_is_judged_again_where_its_name_means_another_one(
    versions: tuple[AdapterRef, AdapterRef], tiny_model_dir: Path, tmp_path: Path
) -> None:
    faint, garbled = versions
    store, said = AdapterStore(tmp_path / "store"), list[str]()
    recipe = recipe_of(tmp_path, tiny_model_dir, metric="perplexity", better_than="current")
    folder = make_adapter(tiny_model_dir, tmp_path / "worst", 1, 9.0)
    worst = import_adapter(folder, "acme/sums", Model(path=str(tiny_model_dir)), store, log=lambda _: None)
    store.promote(faint)
    assert not judged(recipe, garbled, said)
    store.promote(worst)
    judged(recipe, garbled, said)
    assert not said[-1].startswith("judged before") and worst.full in said[-1]


def test_a_run_whose_version_misses_the_least_value_publishes_it_promotes_nothing_and_says_so_last(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = recipe_of(tmp_path, tiny_model_dir, metric="exact_match", min=0.99), tmp_path / "gated.yaml"
    file.write_text(dump_recipe(recipe))
    store = AdapterStore(tmp_path / "store")
    for _ in range(2):
        assert sft.main([str(file), "--no-plan"]) == sft.GATE_SHUT
        said = capsys.readouterr().out.strip().splitlines()
        assert said[-1].startswith("the gate is shut for acme/sums@")
        assert said[-1].endswith("acme/sums means nothing yet: exact match 0.0, wanted 99.0")
    assert len(store.list("acme")) == 1 and not store.targets("acme", "sums")
    assert "shut" in (tmp_path / "runs" / "gated" / "report.html").read_text()


def test_rows_that_no_context_holds_are_told_in_the_gates_reason(
    versions: tuple[AdapterRef, AdapterRef], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Torch, "reading", lambda num_tokens: Torch(max_context=128))
    recipe = recipe_of(tmp_path, tiny_model_dir, more=MORE, max_length=5000, metric="exact_match", min=0.99)
    assert not judged(recipe, versions[0], said)
    assert "rows without answer count as wrong" in said[-1] and any("exact match" in line and "interval" in line for line in said[:-1])


def test_a_gate_reads_as_far_as_training_does_and_cuts_no_right_answer(
    versions: tuple[AdapterRef, AdapterRef], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, tiny_model_dir, more=MORE, max_length=5000, metric="exact_match", min=0.5)
    asked: list[Evaluation] = []

    def stopped(work: Evaluation, *_: object) -> None:
        asked.append(work)
        raise Interrupted("seen enough")

    monkeypatch.setattr(judging, "answer_all", stopped)
    with pytest.raises(Interrupted):
        judged(recipe, versions[0], [])
    assert asked[0].engine.max_context == 5000 and 500 < asked[0].max_tokens < 5000
    assert asked[0].engine.max_batch * 5000 <= Torch().max_batch * Torch().max_context


@pytest.mark.parametrize(
    ("gate", "what"),
    [({"metric": "exact_mach", "min": 1}, "did you mean exact_match"), ({"metric": "exact_match"}, "a gate needs `min`"),
     ({"metric": "bleu", "min": 1, "better": "x"}, "better")],
)  # fmt: skip
def test_a_gate_that_says_nothing_is_refused(gate: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=what):
        recipe_of(tmp_path, tmp_path, **gate)


def test_a_gate_on_answers_of_documents_is_refused_with_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"documents \(stage `pretrain`\) have no answers"):
        recipe_of(tmp_path, tmp_path, stage="pretrain", metric="exact_match", min=1)
    assert recipe_of(tmp_path, tmp_path, stage="pretrain", metric="perplexity", min=2).output.gate


@pytest.mark.parametrize("metric", ["win_rate", "consistency"])
def test_a_gate_on_what_only_a_judge_finds_is_refused_with_the_recipe(tmp_path: Path, metric: str) -> None:
    with pytest.raises(ConfigError, match="a gate asks no judge"):
        recipe_of(tmp_path, tmp_path, metric=metric, min=0.5)
