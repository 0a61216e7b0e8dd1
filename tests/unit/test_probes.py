"""Probes: what passes, and that wrong, half-bound and zero adapters do not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftcore import probes
from ftcore.errors import IntegrityError, ModelError
from ftcore.layers import varlen


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def with_lora(model: nn.Module, *, seed: int = 0, scale: float = 0.5) -> PeftModel:
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return tuned


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tuned(tiny_model_dir: Path) -> PeftModel:
    return with_lora(load(tiny_model_dir))


@pytest.fixture(scope="module")
def recorded(tuned: PeftModel, tokenizer) -> probes.Probes:
    return probes.record(tuned, tokenizer, tuned.disable_adapter)


def dropped(tuned: PeftModel, part: str) -> PeftModel:
    """The adapter with the B matrices whose name holds `part` left at zero, as a loader that misses keys leaves them."""
    half = copy.deepcopy(tuned)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if "lora_B" in name and part in name:
                parameter.zero_()
    return half


def test_the_same_adapter_passes_in_fp32(tuned, tokenizer, recorded) -> None:
    report = probes.check(tuned, tokenizer, recorded, without=tuned.disable_adapter)
    assert report.passed, report.reason
    assert report.limit == probes.ABSOLUTE
    assert report.effect is not None and report.effect > 0.5


def test_an_adapter_of_another_seed_fails(tiny_model_dir, tokenizer, recorded) -> None:
    wrong = with_lora(load(tiny_model_dir), seed=1)
    report = probes.check(wrong, tokenizer, recorded, without=wrong.disable_adapter)
    assert not report.passed and not report.inconclusive
    assert "another adapter" in report.reason


@pytest.mark.parametrize("part", ["layers.0.", "layers.1.", "v_proj", "down_proj"])
def test_a_half_bound_adapter_fails(tuned, tokenizer, recorded, part) -> None:
    half = dropped(tuned, part)
    assert not probes.check(half, tokenizer, recorded, without=half.disable_adapter).passed


def test_an_adapter_that_was_not_applied_fails(tuned, tokenizer, recorded) -> None:
    with tuned.disable_adapter():
        report = probes.check(tuned, tokenizer, recorded)
    assert not report.passed
    assert report.max_abs_error == pytest.approx(report.effect)


def test_recording_an_adapter_without_effect_is_refused(tiny_model_dir, tokenizer) -> None:
    zero = with_lora(load(tiny_model_dir), scale=0.0)
    with pytest.raises(ModelError, match="does nothing"):
        probes.record(zero, tokenizer, zero.disable_adapter)


def test_another_base_is_named_as_the_likely_cause(tiny_model_dir, tokenizer, recorded) -> None:
    base = load(tiny_model_dir)
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(0.05)
    other = with_lora(base)
    report = probes.check(other, tokenizer, recorded, without=other.disable_adapter)
    assert not report.passed and "another base" in report.reason


def test_bf16_is_judged_by_a_share_of_the_effect(tiny_model_dir, tokenizer, recorded) -> None:
    tuned = with_lora(load(tiny_model_dir, torch.bfloat16))
    report = probes.check(tuned, tokenizer, recorded, without=tuned.disable_adapter)
    assert report.precision == "bf16" and report.compared_with == "fp32"
    assert report.passed, report.reason
    assert report.limit == pytest.approx(probes.SHARE * report.effect)
    assert report.max_abs_error > probes.ABSOLUTE


def test_a_precision_too_noisy_for_a_faint_adapter_says_verify_in_fp32(tiny_model_dir, tokenizer) -> None:
    faint = with_lora(load(tiny_model_dir), scale=0.0005)
    recorded = probes.record(faint, tokenizer, faint.disable_adapter)
    rounded = with_lora(load(tiny_model_dir, torch.bfloat16), scale=0.0005)
    report = probes.check(rounded, tokenizer, recorded, without=rounded.disable_adapter)
    assert not report.passed and report.inconclusive
    assert "verify in fp32" in report.reason


def test_the_nearest_record_is_of_weights_held_so_then_of_full_precision(recorded) -> None:
    [record] = recorded.by_precision.values()

    def nearest(precision: str, *names: str) -> str:
        return probes.Probes(recorded.prompts, dict.fromkeys(names, record)).nearest_name(precision)

    assert nearest("nf4 in fp32", "fp32", "nf4", "nf4 in fp32") == "nf4 in fp32"
    assert nearest("nf4 in fp32", "fp32", "nf4") == "nf4" and nearest("nf4", "fp32", "nf4 in fp32") == "nf4 in fp32"
    assert nearest("int8 in fp32", "fp32", "nf4 in fp32", "nf4") == "fp32" and nearest("fp32", "bf16") == "bf16"


def test_the_absolute_limit_never_exceeds_a_tenth_of_a_faint_effect(tiny_model_dir, tokenizer) -> None:
    faint = with_lora(load(tiny_model_dir), scale=1e-5)
    recorded = probes.record(faint, tokenizer, faint.disable_adapter)
    assert recorded.effect() < 1e-3
    with faint.disable_adapter():
        assert not probes.check(faint, tokenizer, recorded).passed


def test_saved_probes_load_again_as_they_were(tmp_path, tuned, tokenizer, recorded) -> None:
    recorded.save(tmp_path)
    loaded = probes.Probes.load(tmp_path)
    assert loaded.prompts == recorded.prompts and loaded.facts() == recorded.facts()
    assert probes.check(tuned, tokenizer, loaded, without=tuned.disable_adapter).passed


def test_saving_twice_writes_the_same_bytes(tmp_path, recorded) -> None:
    recorded.save(tmp_path / "a")
    recorded.save(tmp_path / "b")
    for name in (probes.TENSORS, probes.FACTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_probes_with_a_missing_tensor_are_refused(tmp_path, recorded) -> None:
    recorded.save(tmp_path)
    facts = (tmp_path / probes.FACTS).read_text().replace('"fp32"', '"bf16"')
    (tmp_path / probes.FACTS).write_text(facts)
    with pytest.raises(IntegrityError, match="cannot be read"):
        probes.Probes.load(tmp_path)


def test_logits_that_are_not_finite_are_refused(tiny_model_dir, tokenizer) -> None:
    broken = with_lora(load(tiny_model_dir), scale=float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        probes.record(broken, tokenizer, broken.disable_adapter)


def test_nan_never_compares_as_near(recorded) -> None:
    tuned = torch.full((8, 400), float("nan"))
    assert not probes.compare(recorded, tuned, None, "fp32", "cpu").passed


def test_log_probabilities_are_held_to_the_rule_as_logits_are(tuned, recorded) -> None:
    own, half = (probes.last_logits(model, recorded.prompts).log_softmax(-1) for model in (tuned, dropped(tuned, "layers.0.")))
    with tuned.disable_adapter():
        bare = probes.last_logits(tuned, recorded.prompts).log_softmax(-1)
    assert not probes.compare(recorded, own, bare, "fp32", "cpu").passed  # they are no logits
    report = probes.compare(recorded, own, bare, "fp32", "cpu", logprobs=True)
    assert report.passed and report.noise < 1e-4 and report.effect > 100 * report.limit
    for wrong in (half, bare, own * 1.01):
        assert not probes.compare(recorded, wrong, bare, "fp32", "cpu", logprobs=True).passed


def test_another_tokenizer_fails_before_any_logit(tuned, tokenizer, recorded) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["capital"])
    report = probes.check(tuned, other, recorded)
    assert not report.passed and "tokenizer" in report.reason


def test_recording_leaves_a_training_model_as_it_was(tuned, tokenizer) -> None:
    model = copy.deepcopy(tuned).train()
    module = next(m for m in model.modules() if "cast_input_dtype_enabled" in vars(m))
    module.cast_input_dtype_enabled = False
    model.set_attn_implementation(varlen.register())
    probes.record(model, tokenizer, model.disable_adapter)
    assert model.training and module.cast_input_dtype_enabled is False
    assert model.config._attn_implementation == varlen.NAME


def test_two_precisions_can_be_kept_side_by_side(tmp_path, tiny_model_dir, tokenizer, recorded) -> None:
    tuned = with_lora(load(tiny_model_dir, torch.bfloat16))
    both = recorded.merged(probes.record(tuned, tokenizer, tuned.disable_adapter))
    both.save(tmp_path)
    assert sorted(probes.Probes.load(tmp_path).by_precision) == ["bf16", "fp32"]
    assert probes.check(tuned, tokenizer, both).compared_with == "bf16"
