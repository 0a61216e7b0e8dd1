"""Flat decoder: the forward pass of Llama-shaped decoders as plain tensor calls over the engine's own layers and cache.

In: token ids [T] of a step and its StepPlan. Out: hidden states [T, H] after the last norm. Runs in: the engine's thread.

transformers' own forward does the same sums (Llama, Mistral, Qwen2, Qwen3: RMSNorm, rotary positions, grouped-query attention, SwiGLU)
through many modules; at the sizes of one decoding step most of its time is not in the sums. A decoder with any part that is not known here
keeps transformers' forward; either is held to the base's own logits when the engine opens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu

from ftcore.layers.multi_lora import Group, MultiLora
from ftcore.layers.slot_cache import SlotCache, StepPlan

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class Norm:
    """Root mean square norm (arXiv:1910.07467), x [..., H]."""

    def __init__(self, module: nn.Module) -> None:
        self.weight: Tensor = module.weight
        self.eps = float(module.variance_epsilon)
        self.size = self.weight.shape[0]
        self._is_plain = self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"
        self._scaled = self.weight * self.size**0.5

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_plain:
            return rms_norm(x, (self.size,), self.weight, self.eps)
        squared = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # on a CPU a third of rms_norm's time
        return (x * squared.add_(self.eps * self.size).rsqrt_()).mul_(self._scaled)


@dataclass(frozen=True)
class Layer:
    """The parts of one layer."""

    before: Norm
    qkv: Group
    norms: tuple[Norm, Norm] | None
    """Of queries and keys, each head alone (Qwen3)."""
    out: Group
    window: int | None
    after: Norm
    gate_up: Group
    down: Group


class FlatDecoder:
    """Made by `flat_decoder`, which knows what it may be made of."""

    def __init__(self, decoder: nn.Module, layers: list[Layer], heads: int, kv_heads: int, size: int, scale: float, positions: int) -> None:
        """`positions`: how many there are at most; their rotary factors are made here, once."""
        self._layers, self._heads, self._kv_heads, self._size, self._scale = layers, heads, kv_heads, size, scale
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._norm = Norm(decoder.norm)
        at = torch.arange(positions, device=self._embedding.device)[None]
        cos, sin = decoder.rotary_emb(self._embedding[:1, None], at)
        self._cos, self._sin = cos[0, :, None].contiguous(), sin[0, :, None].clone()
        self._sin[..., : size // 2].neg_()  # rotating halves: (x1, x2) cos + (-x2, x1) sin

    def __call__(self, ids: Tensor, plan: StepPlan, cache: SlotCache) -> Tensor:
        heads, turned, size = self._heads, self._heads + self._kv_heads, self._size
        count = ids.shape[0]
        x = embedding(ids, self._embedding)
        cos, sin = self._cos[plan.positions], self._sin[plan.positions]
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv.compute(layer.before(x)).view(count, turned + self._kv_heads, size)
            qk = qkv[:, :turned]
            if layer.norms is not None:
                qk = torch.cat([layer.norms[0](qk[:, :heads]), layer.norms[1](qk[:, heads:])], 1)
            qk = torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin)
            seen = cache.attend(number, plan, qk[:, :heads], qk[:, heads:], qkv[:, turned:], self._scale, layer.window)
            x.add_(layer.out.compute(seen.reshape(count, heads * size)))
            gate_up = layer.gate_up.compute(layer.after(x))
            half = gate_up.shape[-1] // 2
            x.add_(layer.down.compute(silu(gate_up[:, :half]).mul_(gate_up[:, half:])))
        return self._norm(x)


def flat_decoder(decoder: nn.Module, prefix: str, lora: MultiLora, positions: int) -> FlatDecoder | None:
    """The flat form of `decoder`, whose layers `lora` knows by names under `prefix`; None where a part is not one that is known here."""
    kind = type(decoder)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        return None
    config = decoder.config
    if config.hidden_act != "silu":
        return None
    layers = []
    for number, layer in enumerate(decoder.layers):
        attention, at = layer.self_attn, f"{prefix}layers.{number}."
        names = (
            tuple(f"{at}self_attn.{each}_proj" for each in "qkv"), (f"{at}self_attn.o_proj",),
            (f"{at}mlp.gate_proj", f"{at}mlp.up_proj"), (f"{at}mlp.down_proj",),
        )  # fmt: skip
        if any(name not in lora.groups for name in names):  # layers of another class, or siblings that are not alike
            return None
        qkv, out, gate_up, down = (lora.groups[name] for name in names)
        window = config.sliding_window if kind.__name__ == "MistralModel" else getattr(attention, "sliding_window", None)
        norms = (Norm(attention.q_norm), Norm(attention.k_norm)) if kind.__name__ == "Qwen3Model" else None
        layers.append(Layer(Norm(layer.input_layernorm), qkv, norms, out, window, Norm(layer.post_attention_layernorm), gate_up, down))
    first = decoder.layers[0].self_attn
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return FlatDecoder(decoder, layers, heads, kv_heads, first.head_dim, first.scaling, positions)
