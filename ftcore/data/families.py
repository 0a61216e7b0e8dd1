"""Families: what is usual for a model's architecture: which linear layers LoRA goes on, and which chat template it was taught.

In: `model_type` of a config.json. Out: a Family. Runs in: everywhere; no torch, no transformers.

A tokenizer's own chat template always wins over the one named here. Templates are files of `ftcore/data/templates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftcore.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a LLaMA-like block: the stronger default, at little cost."""


@dataclass(frozen=True, slots=True)
class Family:
    """`targets`: module names LoRA goes on by default (one element "all-linear": PEFT's word for every linear layer but the head)."""

    name: str
    targets: tuple[str, ...]
    template: str
    model_types: tuple[str, ...] = ()


GENERIC = Family("generic", ("all-linear",), "chatml")
"""What the table does not know: all linear layers; ChatML where the tokenizer has its tokens, else alpaca, which is plain text."""

FAMILIES: tuple[Family, ...] = (
    Family("llama", LLAMA_LINEAR, "llama3", ("llama",)),
    Family("llama2", LLAMA_LINEAR, "llama2"),
    Family("llama4", LLAMA_LINEAR, "llama4", ("llama4", "llama4_text")),
    Family("mistral", LLAMA_LINEAR, "mistral", ("mistral", "mistral3", "ministral", "ministral3")),
    Family("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj"), "mistral", ("mixtral",)),
    Family("internlm", LLAMA_LINEAR, "chatml", ("internlm", "internlm3")),
    Family("internlm2", ("wqkv", "wo", "w1", "w2", "w3"), "chatml", ("internlm2",)),
    Family("xverse", LLAMA_LINEAR, "human_assistant", ("xverse",)),
    Family("yi", LLAMA_LINEAR, "chatml", ("yi", "Yi")),
    Family("qwen", ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"), "chatml", ("qwen",)),
    Family("qwen2", LLAMA_LINEAR, "chatml", ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")),
    Family("qwen-moe", ("q_proj", "k_proj", "v_proj", "o_proj"), "chatml", ("qwen2_moe", "qwen3_moe")),
    Family("qwen3-next", ("all-linear",), "chatml", ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe")),
    Family("baichuan", ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"), "baichuan2", ("baichuan",)),
    Family("chatglm", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "chatglm3", ("chatglm",)),
    Family("glm4", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"), "glm4", ("glm", "glm4")),
    Family("glm4-moe", ("q_proj", "k_proj", "v_proj", "o_proj"), "glm4", ("glm4_moe",)),
    Family("bloom", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "alpaca", ("bloom",)),
    Family("falcon", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "alpaca", ("falcon", "RefinedWeb", "RefinedWebModel")),
    Family("gemma", LLAMA_LINEAR, "gemma", ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")),
    Family("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "phi3", ("phi3", "phi4_multimodal")),
    Family("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), "alpaca", ("phi",)),
    Family("minicpm", LLAMA_LINEAR, "minicpm", ("minicpm",)),
    Family("minicpm3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "chatml", ("minicpm3",)),
    Family("deepseek", LLAMA_LINEAR, "deepseek", ("deepseek",)),
    Family("deepseek2", ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "deepseek", ("deepseek_v2",)),
    Family("deepseek3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "deepseek3", ("deepseek_v3",)),
    Family("kimi", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "kimi", ("kimi_k2", "kimi")),
    Family("openelm", ("qkv_proj", "out_proj", "proj_1", "proj_2"), "alpaca", ("openelm",)),
    Family("olmo", LLAMA_LINEAR, "tulu", ("olmo", "olmo2", "olmo3")),
    Family("pythia", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "alpaca", ("gpt_neox",)),
    Family("gpt2", ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), "alpaca", ("gpt2",)),
    Family("yuan2", LLAMA_LINEAR, "yuan2", ("yuan",)),
    Family("transnormer", ("qkvu_proj", "out_proj", "l1", "l2", "l3"), "alpaca", ("transnormer",)),
    Family("bluelm", LLAMA_LINEAR, "bluelm", ("BlueLM", "bluelm")),
    Family("hunyuan", LLAMA_LINEAR, "hunyuan", ("hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe")),
    Family("spatiallm", LLAMA_LINEAR, "chatml", ("spatiallm_llama", "spatiallm_qwen")),
    Family("bert", ("query", "key", "value", "dense"), "alpaca", ("bert", "roberta", "xlm-roberta", "electra")),
    Family("bart", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), "alpaca", ("bart", "mbart")),
    Family("t5", ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"), "alpaca", ("t5", "mt5", "umt5")),
)

_BY_NAME = {name: family for family in FAMILIES for name in (family.name, *family.model_types)}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type` (or a family's own name); GENERIC for one the table does not know."""
    return _BY_NAME.get(model_type, GENERIC)


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(name: str) -> str:
    """The Jinja text of a named template."""
    if name not in template_names():
        raise ConfigError(
            "unknown chat template", got=repr(name), wanted=f"auto | {' | '.join(template_names())} | a path ending in .jinja"
        )
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
