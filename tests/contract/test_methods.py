"""Every method of the registry: something moves and nothing else; the saved result gives the trained logits without our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from ftcore.backends.base import World
from ftcore.data.collate import collate
from ftcore.lean_imports import bnb
from ftcore.loop import Training
from ftcore.methods.base import METHODS, Method
from ftcore.models import CausalModel
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from tests.memory_blocks import MemoryBlocks, packed_blocks

BLOCKS = MemoryBlocks(packed_blocks(12, seed=3))
VARIANTS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in METHODS),
    {"kind": "lora", "targets": "all-linear", "dropout": 0.1},
    {"kind": "lora", "targets": r".*\.(q|v)_proj", "rslora": True},
    {"kind": "lora", "dora": True},
    {"kind": "lora", "modules_to_save": ["lm_head"]},
    {"kind": "lora", "modules_to_save": ["embed_tokens"]},
    {"kind": "qlora", "bits": 8, "targets": "all-linear"},
    {"kind": "qlora", "dora": True, "rslora": True, "quant_type": "fp4", "double_quant": False},
    {"kind": "qlora", "bits": 8, "modules_to_save": ["lm_head"]},
]


def trained(base: Path, runs: Path, method: dict[str, Any], dtype: str = "fp32") -> Training:
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": str(base), "dtype": dtype},
            "data": {"sources": "unused.jsonl"},
            "method": method,
            "stage": "sft",
            "backend": {"kind": "plain", "micro_batch": 4},
            "optim": {"lr": 2e-2, "batch_size": 4, "max_steps": 4, "epochs": 9},
            "output": {"runs": str(runs)},
        }
    )
    training = Training(recipe, World(), BLOCKS, RunDir(runs, "run"), None, None)
    training.restore()
    training.run_steps()
    training.finish()
    return training


def plain_base(folder: Path, method: Method) -> nn.Module:
    """As plain transformers loads it; quantised where the method holds it so.

    In evaluation on a processor with bf16, bitsandbytes would round the scales of 4-bit layers, and refuse layers as narrow as these.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **method.load_options())
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_the_saved_result_gives_the_trained_logits_without_our_code(tiny_model_dir: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    training = trained(tiny_model_dir, tmp_path, method)
    ids = torch.arange(3, 20)[None]
    training.model.eval()
    kind, final = METHODS[method["kind"]], tmp_path / "run" / "final"
    plain = plain_base(tiny_model_dir if kind.is_adapter else final, training.recipe.method)
    base = plain(input_ids=ids).logits.detach()
    reloaded = PeftModel.from_pretrained(plain, final).eval() if kind.is_adapter else plain
    reloaded.train(method.get("bits") == 8)  # bitsandbytes itself: in evaluation it quantises activations too, on a CPU not in training
    with torch.no_grad():
        batch = collate([BLOCKS.block("train", 0)], padded=False)
        ours = CausalModel(training.model, training.layout).logits(batch)[:, : batch.segment_lengths[0]]
        theirs = reloaded(input_ids=batch.ids[:, : batch.segment_lengths[0]]).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if kind.is_adapter:
        assert float((reloaded(input_ids=ids).logits - base).abs().max()) > 1e-2
    training.close()


@pytest.mark.parametrize("kind", list(METHODS))
def test_only_what_the_method_trains_is_changed(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    training = trained(tiny_model_dir, tmp_path, {"kind": kind})
    base = plain_base(tiny_model_dir, training.recipe.method).state_dict()
    frozen = {name: p for name, p in training.model.named_parameters() if not p.requires_grad}
    trainable = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
    assert trainable
    for name, parameter in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, base[plain]), name
    training.close()


@pytest.mark.parametrize("kind", [kind for kind, cls in METHODS.items() if cls.is_adapter])
def test_switched_off_the_model_is_the_base(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    training = trained(tiny_model_dir, tmp_path, {"kind": kind})
    batch = collate([BLOCKS.block("train", 1)], padded=False)
    training.model.eval()
    with torch.no_grad(), training.recipe.method.without(training.model):
        off = CausalModel(training.model, training.layout).logits(batch)[:, : batch.segment_lengths[0]]
        base = plain_base(tiny_model_dir, training.recipe.method)(input_ids=batch.ids[:, : batch.segment_lengths[0]]).logits
    torch.testing.assert_close(off, base, rtol=0, atol=1e-5)
    training.close()


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_bf16_bases_train_in_fp32(tiny_model_dir: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    training = trained(tiny_model_dir, tmp_path, method, dtype="bf16")
    assert {p.dtype for p in training.model.parameters() if p.requires_grad} == {torch.float32}
    training.close()
