"""Merging: the folder written is a plain model that gives the adapter's logits, or nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.export import merge
from ftcore.export.merge import merge_adapter
from ftcore.models import load_base
from ftcore.probes import last_logits
from ftcore.publish import import_adapter
from ftcore.recipe import Model

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "head saved, embeddings shared": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embeddings trained as one": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embeddings and head trained as one": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on shared embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def publish(base: Path, home: Path, **options: Any) -> tuple[AdapterRef, Path, torch.nn.Module]:
    """A made-up adapter in a store; returns its ref, its fetched folder and the adapter on the base."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(home / "peft", save_embedding_layers=False)
    store = AdapterStore(home / "store")
    ref = import_adapter(home / "peft", "acme/support", Model(path=str(base)), store, log=lambda line: None)
    return ref, store.fetch(ref, home / "cache"), model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_merged_model_gives_the_adapter_s_logits(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    ref, folder, tuned = publish(tiny_model_dir, tmp_path, **CONFIGS[kind])
    lines: list[str] = []
    merged = merge_adapter(ref, folder, tmp_path / "out", log=lines.append)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompts = [[1, 5, 9, 30, 200], [7, 8]]
    assert torch.allclose(last_logits(plain, prompts), last_logits(tuned, prompts), atol=1e-4)
    assert merged.dtype == "fp32" and merged.difference <= 1e-4 < merged.effect
    assert f"differ by {merged.difference:.3g}" in lines[0]
    assert plain.config.use_cache is True


def test_the_tokenizer_and_a_card_lie_beside_the_merged_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    merge_adapter(ref, folder, tmp_path / "out", log=lambda line: None)
    text = "open /home/ada/report.txt"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(tiny_model_dir)(text)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and ref.digest in card


def test_large_models_are_written_in_shards(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SHARD_BYTES", "30KB")
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    merge_adapter(ref, folder, tmp_path / "out", log=lambda line: None)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_saved_in_bf16_it_is_judged_by_a_share_of_the_effect(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    merged = merge_adapter(ref, folder, tmp_path / "out", dtype="bf16", log=lambda line: None)
    assert 1e-4 < merged.difference <= merged.limit == pytest.approx(0.1 * merged.effect)


def test_a_merge_above_the_tolerance_is_refused_and_leaves_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    with pytest.raises(IntegrityError, match="does not give the adapter's logits"):
        merge_adapter(ref, folder, tmp_path / "out", dtype="bf16", tolerance=1e-6, log=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "peft", "store"]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_what_peft_itself_merges_wrongly_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """LoRA on a tied embedding and head: PEFT adds the update to the shared matrix twice."""
    ref, folder, _ = publish(tiny_model_dir, tmp_path, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(IntegrityError, match="does not give the adapter's logits"):
        merge_adapter(ref, folder, tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="taken"):
        merge_adapter(ref, folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()


def test_an_empty_folder_may_be_used(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    (tmp_path / "out").mkdir()
    merge_adapter(ref, folder, tmp_path / "out", log=lambda line: None)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_another_base_is_refused_before_any_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    ref, folder, _ = publish(tiny_model_dir, tmp_path, **CONFIGS["lora"])
    other = load_base(Model(path=str(tiny_model_dir)), dtype="fp32")
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="not the base"):
        merge_adapter(ref, folder, tmp_path / "out", base=str(tmp_path / "other"))
