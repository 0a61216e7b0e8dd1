"""The default LoRA targets of a family name real linear layers of the architecture, for those transformers implements itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftcore.data.families import family_of, template_names

MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "glm4", "bloom", "falcon", "gemma2", "phi3", "olmo2", "gpt_neox", "gpt2"]
SMALL = {"num_hidden_layers": 1, "n_layer": 1}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_default_target_is_a_layer_of_the_model(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    for name in SMALL.keys() & set(dir(config)):
        setattr(config, name, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")]
    family = family_of(model_type)
    assert [target for target in family.targets if not any(name.endswith(f".{target}") for name in modules)] == []
    assert family.template in template_names()
