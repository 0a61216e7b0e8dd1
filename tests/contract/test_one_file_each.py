"""A method, a stage and a format of one's own: one file each, outside this repository, allowed by name; nothing else is touched."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcore.backends.base import World
from ftcore.data.formats.base import FORMATS
from ftcore.errors import ConfigError
from ftcore.loop import train
from ftcore.methods.base import METHODS
from ftcore.models import load_base
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir
from ftcore.stages.base import STAGES
from pipelines.prepare import prepare

METHOD = '''
"""scales: only the weights of normalisation layers move."""
from contextlib import contextmanager
from ftcore.errors import IntegrityError
from ftcore.methods.base import METHODS, Method


@METHODS.register("scales")
class Scales(Method):
    """Only the scales of normalisation layers."""

    kind: str = "scales"

    def apply(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        model.untouched = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return model

    @contextmanager
    def without(self, model):
        scales = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = {name: p.data for name, p in scales.items()}
        for name, p in scales.items():
            p.data = model.untouched[name]  # the tensor is exchanged, not written into: graphs made before stay valid
        try:
            yield
        finally:
            for name, p in scales.items():
                p.data = trained[name]

    def save(self, model, weights, folder):
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "scales.safetensors")

    def load(self, model, folder):
        from safetensors.torch import load_file

        saved = load_file(folder / "scales.safetensors")
        if saved.keys() != model.untouched.keys():
            raise IntegrityError("the saved scales are not this model's", where=folder)
        model.load_state_dict(saved, strict=False)
'''

STAGE = '''
"""duel: direct preference (Rafailov et al. 2023, eq. 7); the reference is the policy with its method switched off."""
from typing import ClassVar

from ftcore.data.types import Conversation, Preference
from ftcore.stages.base import STAGES, Loss, Stage


@STAGES.register("duel")
class Duel(Stage):
    """Learns which of two answers is better."""

    kind: str = "duel"
    packs: ClassVar[bool] = False
    item: ClassVar[type] = Preference
    needs_reference: ClassVar[bool] = True
    beta: float = 0.5
    """How far the policy may move from the base."""

    def encode(self, item, chat):
        return [chat.encode(Conversation((*item.prompt, answer), item.origin)) for answer in (item.chosen, item.rejected)]

    def weight(self, batch):
        return len(batch.segment_lengths) / 2 if batch.num_trained else 0.0

    def loss(self, models, batch):
        import torch

        gain = models.policy.logps(batch) - models.reference.logps(batch)
        per_answer = torch.zeros(len(batch.segment_lengths), device=gain.device).index_add(0, batch.target_segments, gain.float())
        margin = self.beta * (per_answer[0::2] - per_answer[1::2])
        learnt = 1.0 if batch.num_trained else 0.0
        return Loss(learnt * -torch.nn.functional.logsigmoid(margin).sum(), {"margin": margin.detach().sum() * learnt})
'''

FORMAT = '''
"""verdicts: {question, good, bad}."""
from ftcore.data.formats.base import format
from ftcore.data.types import Message, Preference


@format("verdicts", item=Preference, recognises=lambda value: "has good and bad" if {"good", "bad"} <= value.keys() else "")
def verdicts(row):
    value = row.value
    question, good, bad = (Message(role, value[key]) for role, key in (("user", "question"), ("assistant", "good"), ("assistant", "bad")))
    return Preference((question,), good, bad, row.origin)
'''

PACKAGE = "acme_one_file_each"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somebody else's package, allowed by name; the registries are as before afterwards."""
    folder = tmp_path / "elsewhere" / PACKAGE
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("method", METHOD), ("stage", STAGE), ("format", FORMAT)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("FTCORE_PLUGINS", PACKAGE)
    for registry in (METHODS, STAGES, FORMATS):
        registry.fill()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    yield PACKAGE
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {n} and {n}?", "good": f"It is {n + n}.", "bad": f"Fish {n}."} for n in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(base: Path, rows: Path, tmp_path: Path, method: str, stage: str, form: str, *plugins: str) -> Recipe:
    values: dict[str, Any] = {
        "name": "ours", "model": {"path": str(base), "dtype": "fp32"}, "method": method, "stage": stage,
        "data": {
            "sources": [{"path": str(rows), "format": form}], "max_length": 128, "validation": 0,
            "cache": str(tmp_path / "cache"), "engine": "process",
        },
        "optim": {"lr": 5e-2, "batch_size": 8, "max_steps": 3, "warmup": 0}, "output": {"runs": str(tmp_path / "runs")},
        "plugins": [f"{PACKAGE}.{name}" for name in plugins],
    }  # fmt: skip
    return parse_recipe(json.dumps(values), "ours.yaml")


def trained(recipe: Recipe, tmp_path: Path) -> list[dict[str, Any]]:
    """Three steps; the journal's lines."""
    prepared = prepare(recipe, log=lambda _: None)
    lines: list[dict[str, Any]] = []
    done = train(recipe, World(), prepared, RunDir(str(tmp_path / "runs"), recipe.name), lines.append)
    assert done.steps == 3
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("method", ["lora", "scales"])
def test_all_three_together_train_from_the_base_on(method: str, package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_dir, rows, tmp_path, method, "duel", "verdicts", "method", "stage", "format")
    lines = trained(recipe, tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is its own reference before the first update
    assert lines[-1]["loss"] < lines[0]["loss"] - 1e-2


def test_what_a_method_of_ones_own_trained_is_saved_and_nothing_else(
    package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_model_dir, rows, tmp_path, "scales", "duel", "verdicts", "method", "stage", "format")
    trained(recipe, tmp_path)
    saved = load_file(tmp_path / "runs" / "ours" / "final" / "scales.safetensors")
    base = dict(load_base(recipe.model).named_parameters())
    assert saved.keys() == {name for name in base if "norm" in name}
    assert any(not torch.equal(saved[name], base[name]) for name in saved)


def test_a_stage_of_ones_own_has_its_keys_checked_like_ours(package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_dir, rows, tmp_path, "lora", "duel", "verdicts", "stage", "format")
    text = dump_recipe(recipe).replace("beta:", "bita:")
    with pytest.raises(ConfigError, match=r"stage\.bita  unknown key; got 0\.5; did you mean stage\.beta\?"):
        parse_recipe(text)


def test_a_format_of_ones_own_is_recognised_by_looking(package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_dir, rows, tmp_path, "lora", "duel", "auto", "stage", "format")
    assert prepare(recipe, log=lambda _: None).num_blocks("train") > 0


def test_a_method_that_keeps_no_base_cannot_be_its_own_reference(package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage `duel` compares with the untouched base, which method `full` overwrites"):
        recipe_of(tiny_model_dir, rows, tmp_path, "full", "duel", "verdicts", "stage", "format")


def test_without_the_allow_list_none_of_it_is_there(
    package: str, tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTCORE_PLUGINS")
    with pytest.raises(ConfigError, match="does not allow that plugin"):
        recipe_of(tiny_model_dir, rows, tmp_path, "scales", "duel", "verdicts", "method", "stage", "format")
