"""Moved: how many parameters a method trains, and on which layers, told from the model's shape alone.

In: a Shape, a method of the recipe. Out: Moved. Runs in: the driver; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftcore.data.families import family_of
from ftcore.errors import ConfigError, ModelError
from ftcore.methods.base import Method
from ftcore.methods.full import Full
from ftcore.methods.lora import Lora, matches, names_module
from ftcore.methods.qlora import Qlora
from ftcore.shapes import Linear, Shape

QUANTISED_BITS = {"int8": 8.0, "nf4": 4.0, "fp4": 4.0}


@dataclass(frozen=True)
class Moved:
    """`targets`: layer by layer, the names of linear layers with an adapter."""

    full: bool
    tensors: tuple[int, ...]
    """Elements of each trained tensor."""
    targets: tuple[frozenset[str], ...] = ()
    rank: int = 0
    dropout: bool = False
    dora: bool = False
    head: bool = False
    """The head's weight is trained."""
    head_wrapped: bool = False
    """The head is called through PEFT, so the loss cannot take its weight apart."""

    @property
    def count(self) -> int:
        return sum(self.tensors)


def moved(shape: Shape, method: Method) -> Moved:
    """Raises ConfigError for a method that is not known here, ModelError for targets that match no layer."""
    if isinstance(method, Full):
        return Moved(full=True, tensors=_all_tensors(shape), head=True)
    if isinstance(method, Lora):
        return _adapters(shape, method)
    raise ConfigError(
        "there is no forecast for this method", where="method.kind", got=method.kind, wanted="full | lora | qlora",
        remedy="train without one, watching the first steps",
    )  # fmt: skip


def _all_tensors(shape: Shape) -> tuple[int, ...]:
    tensors = [shape.embedding] * (1 if shape.tied else 2)
    for layer in shape.layers:
        tensors += [linear.num_weights for linear in layer.linears] + [linear.outputs for linear in layer.linears if linear.bias]
        if layer.experts:
            expert = layer.experts.count * layer.experts.hidden * layer.experts.width
            tensors += [2 * expert, expert, layer.experts.router]
        tensors.append(layer.norms)
    return (*tensors, shape.hidden)


def _adapters(shape: Shape, method: Lora) -> Moved:
    targets = tuple(
        frozenset(linear.name for linear in layer.linears if _is_target(shape, method, f"model.layers.{index}.{linear.name}"))
        for index, layer in enumerate(shape.layers)
    )
    chosen = [linear for layer, names in zip(shape.layers, targets, strict=True) for linear in layer.linears if linear.name in names]
    if not chosen:
        raise ModelError(
            "a LoRA target matches no linear layer of this model", where="method.targets", got=method.targets,
            wanted=", ".join(sorted({linear.name.rsplit(".", 1)[-1] for layer in shape.layers for linear in layer.linears})),
            remedy="use some of these names, or `auto`",
        )  # fmt: skip
    tensors = [count for linear in chosen for count in (method.rank * linear.inputs, method.rank * linear.outputs)]
    tensors += [linear.outputs for linear in chosen] if method.dora else []
    whole = {name for name in ("model.embed_tokens", "lm_head") for saved in method.modules_to_save if names_module(saved, name)}
    tensors += [shape.embedding] * (1 if shape.tied and whole else len(whole))
    wrapped = "lm_head" in whole
    return Moved(
        full=False, tensors=tuple(tensors), targets=targets, rank=method.rank, dropout=method.dropout > 0, dora=method.dora,
        head=wrapped or bool(shape.tied and whole), head_wrapped=wrapped,
    )  # fmt: skip


def _is_target(shape: Shape, method: Lora, name: str) -> bool:
    """As methods.lora chooses them; what a family names and this model lacks matches nothing."""
    if method.targets not in ("auto", "all-linear"):
        return matches(name, method.targets if isinstance(method.targets, str) else list(method.targets))
    family = family_of(shape.model_type).targets
    return method.targets == "all-linear" or family == ("all-linear",) or matches(name, list(family))


def base_bytes(shape: Shape, method: Method, dtype_bytes: int) -> int:
    """What the frozen base takes: linear layers of the decoder quantised if the method says so, all else in the recipe's dtype.

    Experts are held as tensors, not as linear layers, so they are never quantised.
    """
    whole = shape.num_parameters * dtype_bytes
    if not isinstance(method, Qlora):
        return whole
    linears = [linear for layer in shape.layers for linear in layer.linears]
    return whole - sum(linear.num_weights * dtype_bytes - quantised_bytes(linear, method) for linear in linears)


def quantised_bytes(linear: Linear, method: Qlora) -> int:
    """Codes with their scales: 8 bits, one fp32 scale a row; 4 bits, one a block of 64: fp32, or 8 bits and an fp32 one for 256 of them."""
    codes = int(linear.num_weights * QUANTISED_BITS[method.quant_type] / 8)
    if method.bits == 8:
        return codes + 4 * linear.outputs
    blocks = -(-linear.num_weights // 64)
    return codes + (blocks + 4 * -(-blocks // 256) if method.double_quant else 4 * blocks)
