"""Families of bases in the torch engine: the flat forward pass and transformers' own, both held to plain PEFT."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ftcore.engines.base import Request, Sampling, Token
from ftcore.errors import ModelError
from tests.live_engines import answer, opened, run
from tests.oracles import Truth, make_adapter

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "rope_parameters": LLAMA3}, True),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 7, "head_dim": 16}, True),
    "qwen2-some-windows": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, True),
    "llama-wide": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 1100, "vocab_size": 2100}, True),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}, True),
    "llama-gelu": (LlamaForCausalLM, LlamaConfig, {"hidden_act": "gelu"}, False),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}, False),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"rotary_pct": 0.5, "num_key_value_heads": 4}, False),
}
QUANTISED = (("qwen3", "nf4"), ("qwen3", "int8"), ("gemma", "int8"), ("gpt-neox", "fp4"))

GREEDY = Sampling(0, num_logprobs=0)


def make_base(folder: Path, kind: str) -> tuple[Path, bool]:
    model, config, keys, is_flat = FAMILIES[kind]
    torch.manual_seed(0)
    made = model(config(**{**SMALL, **keys}))
    for name, parameter in made.named_parameters():
        if "norm" in name:  # ones would hide a norm that is left out
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    made.save_pretrained(folder)
    return folder, is_flat


@pytest.mark.parametrize(("kind", "quantise"), [*((kind, "none") for kind in FAMILIES), *QUANTISED])
def test_a_mixed_batch_of_any_family_is_plain_pefts(kind: str, quantise: str, tmp_path: Path) -> None:
    base, is_flat = make_base(tmp_path / "base", kind)
    folders = {f"{number:064x}": make_adapter(base, tmp_path / str(number), number) for number in (1, 9)}
    truth = Truth(base, folders, quantise)

    async def go() -> tuple[bool, list[tuple[Request, list[Token]]]]:
        async with opened(base, quantise=quantise) as engine:
            for digest, folder in folders.items():
                await engine.load_adapter(digest, folder)
            requests = [
                Request(str(row), tuple((11 * row + 5 * i) % 90 + 3 for i in range(9 + 14 * row)), digest, 12, sampling=GREEDY)
                for row, digest in enumerate(("", *folders))
            ]
            answers = await asyncio.gather(*(answer(engine, request) for request in requests))
            return engine._thread.decoder.flat is not None, list(zip(requests, answers, strict=True))

    used_flat, told = run(go())
    assert used_flat == is_flat
    for request, tokens in told:
        ids = [token.id for token in tokens]
        apart = {
            digest: max(
                abs(float(logps[token.id]) - (token.logprob or 0.0))
                for token, logps in zip(tokens, truth.answer_logps(digest, request.prompt, ids), strict=True)
            )
            for digest in ("", *folders)
        }
        assert apart.pop(request.adapter) <= 1e-4
        assert min(apart.values()) > 1e-3


def test_a_family_whose_scores_are_capped_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**{**SMALL, "head_dim": 16})).save_pretrained(tmp_path / "base")

    async def go() -> None:
        async with opened(tmp_path / "base"):
            raise AssertionError("it opened")

    with pytest.raises(ModelError, match="softcap"):
        run(go())
