"""Evaluation on one CUDA device: likelihoods and classifiers say what they say on the CPU. Skipped, and saying so, where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
TEXTS = ["The dog jumps.", "Open the file.", "It is 4. " * 20]


def nlls(base: Path, **engine: Any) -> list[float]:
    system = System("base", 0, Voice(str(base), "main", "", None))
    return [float(found.nlls.sum()) for found in EnginePanel([system], Torch(**engine)).weigh_texts(system, TEXTS)]


def test_likelihoods_on_the_device_are_those_of_the_cpu(tiny_model_dir: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    exact = nlls(tiny_model_dir, device="cpu")
    assert not torch.cuda.max_memory_allocated()
    assert nlls(tiny_model_dir) == pytest.approx(exact, abs=1e-2)
    assert torch.cuda.max_memory_allocated()
    assert nlls(tiny_model_dir, dtype="bf16") == pytest.approx(exact, rel=0.05)


def test_classifiers_say_on_the_device_what_they_say_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_classifier(tmp_path / "nli")
    label = json.loads((folder / "config.json").read_text())["id2label"]["0"]
    named, pairs = Classifier.parse(f"{folder}#{label}"), [("The cat sleeps.", "A cat."), ("The shop.", "It opens at nine.")]
    there = named.probabilities(TEXTS), Entailment(str(folder))(pairs)
    for module in (of_answers, of_pairs):
        monkeypatch.setattr(module, "device_here", lambda: "cpu")
    of_answers._opened.cache_clear()
    here = named.probabilities(TEXTS), Entailment(str(folder))(pairs)
    assert np.allclose(there[0], here[0], atol=1e-4) and np.allclose(there[1], here[1], atol=1e-4)
