"""Clearly different LoRA adapters of one small base, saved by plain PEFT, and what plain PEFT says with each: an engine's truth."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftcore.lean_imports import LoraConfig, PeftModel, get_peft_model

ATTENTION, ALL = ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"
KINDS: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    {"r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]},
    {"r": 16, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    {"r": 1, "lora_alpha": 2, "target_modules": ["gate_proj", "up_proj"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 24}},
    {"r": 3, "lora_alpha": 9, "target_modules": r".*layers\.1\..*(o_proj|up_proj)"},
    {"r": 8, "lora_alpha": 32, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [0]},
)

BITSANDBYTES: dict[str, BitsAndBytesConfig] = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "fp4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
"""How bitsandbytes itself is told to hold a base."""


def make_adapter(base: Path, folder: Path, number: int, strength: float = 0.3) -> Path:
    """Adapter `number`: one of KINDS, with weights of its own."""
    torch.manual_seed(1000 + number)
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base), **KINDS[number % len(KINDS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=strength / config.r**0.5)
    model.save_pretrained(folder)
    return folder


class Truth:
    """Plain PEFT over the base, one adapter at a time."""

    def __init__(self, base: Path, folders: dict[str, Path], quantise: str = "none") -> None:
        """`folders`: digest -> adapter folder. `quantise`: over bitsandbytes' own layers, loaded and run without a line of ours.

        In evaluation on a CPU bitsandbytes quantises the inputs of 8-bit layers, and where the processor has bf16 rounds the scales of
        4-bit ones; in training it multiplies by the weights as they are.
        """
        config = BITSANDBYTES.get(quantise)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config).eval()
        self.model: Any = plain
        self.digests = tuple(folders)
        for digest, folder in folders.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, adapter_name=digest)
            else:
                self.model = PeftModel.from_pretrained(plain, folder, adapter_name=digest)
        self.model.train(config is not None)

    @torch.no_grad()
    def logps(self, digest: str, tokens: Sequence[int]) -> Tensor:
        """[T, V] log-probabilities of the next token after each of `tokens`."""
        ids = torch.tensor([list(tokens)])
        if digest:
            self.model.set_adapter(digest)
            return self.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with self.model.disable_adapter():
            return self.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)

    @torch.no_grad()
    def embedding(self, digest: str, tokens: Sequence[int]) -> Tensor:
        """[H], of length 1: the final hidden state of the last token."""
        ids = torch.tensor([list(tokens)])
        with self.model.disable_adapter() if not digest else nullcontext():
            if digest:
                self.model.set_adapter(digest)
            return normalize(self.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1], dim=0)

    def answer_logps(self, digest: str, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """[len(answer), V]: what each token of the answer was drawn from."""
        return self.logps(digest, [*prompt, *answer])[len(prompt) - 1 : -1]
