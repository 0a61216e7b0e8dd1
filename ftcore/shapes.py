"""Shapes: what a decoder is made of, counted from its config.json alone.

In: config.json as a dictionary. Out: a Shape: its layers, their linear layers, how many parameters each part has. Runs in: the driver; no
torch, no transformers, no weights.

Counts are exact for the architectures of KNOWN (a test holds them against transformers' own modules). Another one is taken for a Llama-like
decoder, and `Shape.assumed` says so; what is plainly something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ftcore.errors import ModelError

HEAD_EXTRAS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration keys of a head that is more than a linear layer, unless they are 1."""
Reads = Literal["attention", "context", "mlp", "product"]
"""Which tensor a linear layer multiplies; layers that read the same one share what is kept of it."""


@dataclass(frozen=True)
class Traits:
    """Where an architecture differs from Llama's."""

    qkv_bias: str | bool = "attention_bias"
    """Whether queries, keys and values have biases, or the key of config.json that says so."""
    out_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = "mlp_bias"
    fused: bool = False
    """One layer makes queries, keys and values, another both halves of the gated MLP."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Queries and keys are normed over each head, or over their whole width."""
    num_norms: int = 2
    """Norms of the hidden width in each layer."""
    experts: str = ""
    """The key of config.json that holds the width of one expert, where layers have experts."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys that published config.json files leave out."""


KNOWN: dict[str, Traits] = {
    "llama": Traits(),
    "mistral": Traits(qkv_bias=False, out_bias=False, mlp_bias=False),
    "qwen2": Traits(qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen3": Traits(mlp_bias=False, qk_norm="head"),
    "gemma": Traits(mlp_bias=False, defaults={"tie_word_embeddings": True, "head_dim": 256}),
    "gemma2": Traits(mlp_bias=False, num_norms=4, defaults={"tie_word_embeddings": True, "head_dim": 256, "final_logit_softcapping": 30.0,
                                                            "attn_logit_softcapping": 50.0}),
    "gemma3_text": Traits(mlp_bias=False, num_norms=4, qk_norm="head", defaults={
        "tie_word_embeddings": True, "head_dim": 256, "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "phi3": Traits(qkv_bias=False, out_bias=False, mlp_bias=False, fused=True),
    "granite": Traits(),
    "smollm3": Traits(defaults={"tie_word_embeddings": True}),
    "olmo2": Traits(mlp_bias=False, qk_norm="width"),
    "mixtral": Traits(qkv_bias=False, out_bias=False, mlp_bias=False, experts="intermediate_size"),
    "qwen2_moe": Traits(qkv_bias="qkv_bias", out_bias=False, mlp_bias=False, experts="moe_intermediate_size", defaults={"qkv_bias": True}),
    "qwen3_moe": Traits(mlp_bias=False, qk_norm="head", experts="moe_intermediate_size", defaults={"head_dim": 128}),
}  # fmt: skip
STRANGE = {
    "is_encoder_decoder": "an encoder with a decoder", "kv_lora_rank": "attention over latent keys",
    "n_routed_experts": "experts of another kind",
    "num_experts": "experts of another kind", "num_local_experts": "experts of another kind", "ssm_cfg": "a state-space model",
    "state_size": "a state-space model", "linear_num_key_heads": "linear attention", "layers_block_type": "layers of several kinds",
}  # fmt: skip
"""Keys of config.json that say: this is no Llama-like decoder."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a decoder layer."""

    name: str
    inputs: int
    outputs: int
    reads: Reads
    bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def num_parameters(self) -> int:
        return self.num_weights + self.bias * self.outputs


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: gated MLPs of one width, of which a token passes through some. Held as two tensors, not as linear layers."""

    count: int
    per_token: int
    hidden: int
    width: int

    @property
    def num_parameters(self) -> int:
        """With the router, a matrix of its own."""
        return self.count * 3 * self.hidden * self.width + self.router

    @property
    def router(self) -> int:
        return self.count * self.hidden


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `width` is that of its dense MLP (of the shared expert, beside experts); 0 without one."""

    linears: tuple[Linear, ...]
    norms: int
    """Elements of all norms' weights."""
    width: int
    experts: Experts | None = None

    @property
    def num_parameters(self) -> int:
        return self.norms + sum(linear.num_parameters for linear in self.linears) + (self.experts.num_parameters if self.experts else 0)


@dataclass(frozen=True)
class Shape:
    """A decoder with its embedding and head."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    num_norms: int = 2
    qk_norm: bool = False
    stored: str = "bf16"
    """What the weights are on disk, as recipes name it."""
    plain_head: bool = True
    """The head is a linear layer and nothing else (no soft cap, no scale): the loss is computed without the whole logits."""
    isolates: bool = True
    """Its attention can be run segment by segment (no soft cap)."""
    assumed: str = ""
    """What was taken for granted, in a sentence."""

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    def parts(self) -> dict[str, int]:
        """Parameters by part; they add up to the model's."""
        linears = [linear for layer in self.layers for linear in layer.linears]
        found = {
            "embedding": self.embedding,
            "attention": sum(x.num_parameters for x in linears if x.reads in ("attention", "context")),
            "mlp": sum(x.num_parameters for x in linears if x.reads not in ("attention", "context")),
            "experts": sum(layer.experts.num_parameters for layer in self.layers if layer.experts),
            "norms": sum(layer.norms for layer in self.layers) + self.hidden,
            "head": 0 if self.tied else self.embedding,
        }
        return {name: count for name, count in found.items() if count}

    @property
    def num_parameters(self) -> int:
        return sum(self.parts().values())

    @property
    def num_active(self) -> int:
        """Parameters that one token is multiplied with: without the embedding's table and the experts it does not pass through."""
        experts = [layer.experts for layer in self.layers if layer.experts]
        idle = sum((each.count - each.per_token) * 3 * self.hidden * each.width for each in experts)
        return self.num_parameters - idle - (0 if self.tied else self.embedding)


def shape_of_config(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """Raises ModelError for what is no decoder of text, or lacks a size."""
    said = []
    if "text_config" in config:
        said.append("the text part of a model with other inputs is counted, nothing else")
        config = {**config["text_config"], "torch_dtype": config.get("torch_dtype", config.get("dtype"))}
    model_type = str(config.get("model_type", ""))
    traits = KNOWN.get(model_type)
    if traits is None:
        _refuse_strange(config, model_type, where)
        traits = Traits(mlp_bias="mlp_bias")
        said.append(f"architecture {model_type or 'without a name'} is not known here: counted as a Llama-like decoder")
    config = {**traits.defaults, **{key: value for key, value in config.items() if value is not None}}
    sizes = {key: _size(config, key, where) for key in NEEDED if key != "intermediate_size"}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    attention = _attention(config, traits, hidden, heads * head_dim, kv_heads * head_dim)
    norms = traits.num_norms * hidden + {"none": 0, "head": 2 * head_dim, "width": (heads + kv_heads) * head_dim}[traits.qk_norm]
    layers = tuple(_layer(config, traits, index, attention, norms, where) for index in range(sizes["num_hidden_layers"]))
    return Shape(
        model_type, hidden, heads, kv_heads, head_dim, sizes["vocab_size"], bool(config.get("tie_word_embeddings", False)), layers,
        num_norms=traits.num_norms, qk_norm=traits.qk_norm != "none", stored=_stored(config),
        plain_head=head_extra(config) is None,
        isolates=config.get("attn_logit_softcapping") is None and not config.get("attention_chunk_size"), assumed="; ".join(said),
    )  # fmt: skip


def head_extra(config: Mapping[str, Any]) -> str | None:
    """What makes a config.json's head more than a linear layer: its key; None where nothing does."""
    config = config.get("text_config", config)
    held = {**KNOWN.get(str(config.get("model_type", "")), Traits()).defaults, **config}
    return next((key for key in HEAD_EXTRAS if held.get(key) not in (None, 1, 1.0)), None)


def _refuse_strange(config: Mapping[str, Any], model_type: str, where: str) -> None:
    found = [text for key, text in STRANGE.items() if config.get(key)]
    missing = [key for key in NEEDED if not config.get(key)]
    if found or missing:
        raise ModelError(
            "this architecture cannot be counted from its config.json", where=where,
            got=f"{model_type or 'no model_type'}: {found[0] if found else 'no ' + ', '.join(missing)}", wanted=" | ".join(KNOWN),
            remedy="train without a forecast, watching the first steps; or take one of these architectures",
        )  # fmt: skip


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            "config.json lacks a size of the model",
            where=where,
            got=f"{key}: {value}",
            wanted="a whole number above 0",
            remedy="copy it again",
        )
    return value


def _stored(config: Mapping[str, Any]) -> str:
    name = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(name, "fp32")


def _flag(config: Mapping[str, Any], rule: str | bool) -> bool:
    return bool(config.get(rule, False)) if isinstance(rule, str) else rule


def _attention(config: Mapping[str, Any], traits: Traits, hidden: int, queries: int, keys: int) -> tuple[Linear, ...]:
    biased, out = _flag(config, traits.qkv_bias), _flag(config, traits.out_bias)
    o_proj = Linear("self_attn.o_proj", queries, hidden, "context", out)
    if traits.fused:
        return Linear("self_attn.qkv_proj", hidden, queries + 2 * keys, "attention", biased), o_proj
    widths = {"q": queries, "k": keys, "v": keys}
    return *(Linear(f"self_attn.{name}_proj", hidden, width, "attention", biased) for name, width in widths.items()), o_proj


def _layer(config: Mapping[str, Any], traits: Traits, index: int, attention: tuple[Linear, ...], norms: int, where: str) -> Layer:
    hidden = int(config["hidden_size"])
    if not traits.experts or not _is_sparse(config, traits, index):
        width = _size(config, "intermediate_size", where)
        return Layer((*attention, *_mlp("mlp", hidden, width, _flag(config, traits.mlp_bias), fused=traits.fused)), norms, width)
    count = "num_experts" if "num_experts" in config else "num_local_experts"  # transformers 5 writes the second for the first
    sizes = [_size(config, key, where) for key in (count, "num_experts_per_tok", traits.experts)]
    experts = Experts(sizes[0], sizes[1], hidden, sizes[2])
    if traits.qkv_bias != "qkv_bias":
        return Layer(attention, norms, 0, experts)
    shared = _size(config, "shared_expert_intermediate_size", where)  # qwen2_moe: every token passes through one more, behind a gate
    gate = Linear("mlp.shared_expert_gate", hidden, 1, "mlp")
    return Layer((*attention, *_mlp("mlp.shared_expert", hidden, shared, False, fused=False), gate), norms, shared, experts)


def _is_sparse(config: Mapping[str, Any], traits: Traits, index: int) -> bool:
    """Qwen's may keep dense layers among the others; Mixtral's have experts in each."""
    return traits.experts == "intermediate_size" or (
        index not in config.get("mlp_only_layers", ()) and (index + 1) % int(config.get("decoder_sparse_step", 1)) == 0
    )


def _mlp(place: str, hidden: int, width: int, bias: bool, *, fused: bool) -> tuple[Linear, ...]:
    down = Linear(f"{place}.down_proj", width, hidden, "product", bias)
    if fused:
        return Linear(f"{place}.gate_up_proj", hidden, 2 * width, "mlp", bias), down
    return *(Linear(f"{place}.{name}_proj", hidden, width, "mlp", bias) for name in ("gate", "up")), down
