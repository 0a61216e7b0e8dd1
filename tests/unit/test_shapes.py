"""Models are counted from their config.json as published, and as transformers builds them."""

from __future__ import annotations

from typing import Any

import pytest

from ftcore.errors import ModelError
from ftcore.shapes import KNOWN, shape_of_config

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_72B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "count"),
    [(LLAMA_8B, 8_030_261_248), (QWEN2_72B, 72_706_203_648), (QWEN3_30B_A3B, 30_532_122_624), (MIXTRAL_8X7B, 46_702_792_704)],
)
def test_published_models_have_the_published_number_of_parameters(config: dict[str, Any], count: int) -> None:
    shape = shape_of_config(config)
    assert (shape.num_parameters, sum(shape.parts().values())) == (count, count)


def test_a_mixture_of_experts_is_counted_as_by_hand() -> None:
    attention = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048
    experts = 128 * 3 * 2048 * 768 + 128 * 2048
    by_hand = 48 * (attention + experts + 2 * 2048 + 2 * 128) + 2 * 151936 * 2048 + 2048
    shape = shape_of_config(QWEN3_30B_A3B)
    assert shape.num_parameters == by_hand
    idle = 48 * 120 * 3 * 2048 * 768
    assert shape.num_active == by_hand - idle - 151936 * 2048


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("tied", [True, False])
def test_every_known_architecture_is_counted_as_transformers_builds_it(model_type: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_local_experts": 4} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(model_type, **SMALL, **experts, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of_config(config.to_dict())
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    for index, layer in enumerate(shape.layers):
        place = f"layers.{index}."
        names = {name.split(place)[1] for name, module in model.named_modules() if place in name and isinstance(module, torch.nn.Linear)}
        assert {linear.name for linear in layer.linears} == names


def test_an_unknown_architecture_says_what_it_is_taken_for() -> None:
    shape = shape_of_config(LLAMA_8B | {"model_type": "brandnew"})
    assert shape.num_parameters == 8_030_261_248
    assert "brandnew is not known here: counted as a Llama-like decoder" in shape.assumed


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"n_routed_experts": 64}, "experts of another kind"),
        ({"hidden_size": None}, "no hidden_size"),
    ],
)
def test_what_cannot_be_counted_is_refused(extra: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match="cannot be counted") as caught:
        shape_of_config(LLAMA_8B | {"model_type": "brandnew"} | extra)
    assert why in caught.value.got


@pytest.mark.parametrize("value", [None, 0, "32", True, 1.5])
def test_a_size_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match="lacks a size") as caught:
        shape_of_config(LLAMA_8B | {"num_hidden_layers": value})
    assert "num_hidden_layers" in caught.value.got
