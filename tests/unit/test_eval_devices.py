"""Where likelihoods and classifiers are computed. There is no GPU here: `meta`, a device without numbers, stands for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.engines.torch import Torch
from ftcore.evals import classifier as of_answers
from ftcore.evals import entailment as of_pairs
from ftcore.evals.classifier import Classifier
from ftcore.evals.entailment import Entailment
from ftcore.evals.panel import EnginePanel
from ftcore.evals.systems import System
from ftcore.speaker import Voice
from tests.classifiers import make_classifier

THERE = "item.. cannot be called on meta tensors"
"""Transformers looks at a mask of the inputs, which are there."""


def elsewhere() -> str:
    return "meta"


def opened(base: Path, **engine: Any) -> torch.Tensor:
    """A weight of the model that an evaluation weighs with."""
    system = System("base", 0, Voice(str(base), "main", "", None))
    return next(EnginePanel([system], Torch(**engine))._opened_bench().model.model.parameters())


def test_likelihoods_are_weighed_on_the_engines_device_in_fp32_or_the_dtype_asked_for(tiny_model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=THERE):
        opened(tiny_model_dir, device="meta")
    assert opened(tiny_model_dir).dtype == torch.float32
    assert opened(tiny_model_dir, dtype="bf16").dtype == torch.bfloat16


def test_an_entailment_model_computes_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_pairs, "device_here", elsewhere)
    with pytest.raises(RuntimeError, match=THERE):
        Entailment(str(make_classifier(tmp_path / "nli")))([("The cat.", "A cat.")])


def test_a_classifier_of_answers_computes_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_answers, "device_here", elsewhere)
    folder = make_classifier(tmp_path / "moods")
    label = json.loads((folder / "config.json").read_text())["id2label"]["0"]
    with pytest.raises(RuntimeError, match=THERE):
        Classifier.parse(f"{folder}#{label}").probabilities(["It is 4."])
