"""qlora: LoRA over a base held in 4 or 8 bits (Dettmers et al. 2023, arXiv:2305.14314); base frozen, adapters in fp32.

In: a base loaded with `load_options`. Out: a PEFT model and a plain PEFT folder, as lora makes them. Runs in: train workers, publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from ftcore.errors import ModelError
from ftcore.methods.base import METHODS
from ftcore.methods.lora import Lora, names_module
from ftcore.quantisation import Form, Quantisation

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("qlora")
class Qlora(Lora):
    """Low-rank adapters over a quantised base (bitsandbytes)."""

    mergeable: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    kind: str = "qlora"
    bits: Literal[4, 8] = 4
    """4 takes a quarter of bf16's memory, 8 a half."""
    quant_type: Form = "nf4"
    """How a weight is coded: `nf4` (for weights that are normally distributed) or `fp4` in 4 bits, `int8` in 8."""
    double_quant: bool = True
    """4 bits: quantise the scales too, 0.37 bits a weight less. Off in 8 bits."""
    compute_dtype: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """What quantised layers multiply in; `auto`: model.dtype. fp16 on GPUs only."""

    @model_validator(mode="before")
    @classmethod
    def _eight_bits_are_int8(cls, values: Any) -> Any:
        return {"quant_type": "int8", "double_quant": False} | values if isinstance(values, dict) and values.get("bits") == 8 else values

    @model_validator(mode="after")
    def _fits(self) -> Qlora:
        if self.bits == 8 and self.double_quant:
            raise ValueError("double_quant quantises the scales of 4-bit blocks; 8 bits have one scale a row: remove it, or take bits: 4")
        if (self.bits == 8) != (self.quant_type == "int8"):
            raise ValueError(f"{self.bits} bits cannot be held as {self.quant_type}; wanted {'int8' if self.bits == 8 else 'nf4 or fp4'}")
        if self.bits == 8 and self.compute_dtype != "auto":
            raise ValueError("compute_dtype is for 4 bits; 8-bit layers compute in model.dtype: remove it, or take bits: 4")
        return self

    def held(self, dtype: str) -> str:
        return self.quant_type

    def quantisation(self, dtype: str) -> str:
        return self.held_as.describe(dtype)

    @property
    def held_as(self) -> Quantisation:
        return Quantisation(self.quant_type, self.double_quant, self.compute_dtype)

    def load_options(self) -> dict[str, Any]:
        return self.held_as.load_options()

    def loaded(self, model: nn.Module, dtype: str) -> None:
        self.held_as.loaded(model, dtype)

    def apply(self, model: nn.Module) -> nn.Module:
        from ftcore.layers.quantised import quantised_layers

        coded = {name for name, _ in quantised_layers(model)}
        if not coded:
            raise ModelError(
                "this base has no quantised layer to put adapters on", where=type(model).__name__, wanted="a model with linear layers",
                remedy="take method `lora`",
            )  # fmt: skip
        for wanted in self.modules_to_save:
            if inside := sorted(name for name in coded if names_module(wanted, name) or f".{wanted}." in f".{name}."):
                raise ModelError(
                    "a quantised layer cannot be trained whole", where="method.modules_to_save", got=f"{wanted} ({inside[0]})",
                    wanted="embeddings, norms or the head, which are not quantised", remedy="name it in method.targets",
                )  # fmt: skip
        return super().apply(model)

    def in_fp32(self, model: nn.Module) -> AbstractContextManager[None]:
        return _in_fp32(model)

    def merge(self, model: nn.Module) -> nn.Module:
        raise ModelError(
            "merged into a quantised base, the adapter would be quantised with it", got=self.quant_type,
            remedy="publish it, then `ftcore merge` folds it into the full-precision base",
        )  # fmt: skip


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    from ftcore.layers.quantised import quantised_in_fp32
    from ftcore.plain_forward import computed_in_fp32

    with computed_in_fp32(model), quantised_in_fp32(model):
        yield
