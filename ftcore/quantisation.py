"""Quantisation: how a base is held in 4 or 8 bits (bitsandbytes), whether it is trained over or served.

In: a form. Out: what `from_pretrained` takes for it, and the loaded base prepared. Runs in: train workers, publish, engines; no torch until
a base is loaded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftcore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

Form = Literal["nf4", "fp4", "int8"]
FOUR_BITS: tuple[Form, ...] = ("nf4", "fp4")
"""Forms whose scales are those of blocks, which may be quantised too; `int8` has one a row."""


@dataclass(frozen=True)
class Quantisation:
    """One way to hold the linear layers of a base; `load_base` takes it in the place of a method that quantises."""

    quantises: ClassVar[bool] = True

    form: Form
    """How a weight is coded, as probes name it."""
    double_quant: bool
    """4 bits: the scales are quantised too."""
    compute_dtype: str = "auto"
    """What 4-bit layers multiply in; `auto`: what the rest of the base is held in."""

    def describe(self, dtype: str) -> str:
        """For people and cards. `dtype`: what is not quantised is in."""
        double = ", double quantised" if self.double_quant else ""
        return f"{self.form}{double}, computed in {self.computes_in(dtype)}"

    def computes_in(self, dtype: str) -> str:
        return dtype if self.compute_dtype == "auto" else self.compute_dtype

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`. Raises ConfigError where bitsandbytes is not installed."""
        from transformers import BitsAndBytesConfig

        from ftcore.lean_imports import bnb

        if bnb is None:
            raise ConfigError(
                f"a base is held as {self.form} by a package that is not installed", got="no bitsandbytes", wanted="0.48 or newer",
                remedy="pip install bitsandbytes, or hold the base in full precision",
            )  # fmt: skip
        if self.form == "int8":
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        options = {"bnb_4bit_quant_type": self.form, "bnb_4bit_use_double_quant": self.double_quant}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **options)}

    def loaded(self, model: nn.Module, dtype: str) -> None:
        """Called once on a base just loaded with `load_options`, before anything runs through it."""
        from ftcore.layers.quantised import give_back_freed, held_bytes, hold
        from ftcore.models import DTYPES

        hold(model, DTYPES[self.computes_in(dtype)])
        give_back_freed()
        inside, around = held_bytes(model)
        log.info(
            "base held as %s: %.1f MiB of quantised layers, %.1f MiB of the rest", self.describe(dtype), inside / 2**20, around / 2**20
        )

    def serve(self, model: nn.Module, dtype: str) -> str:
        """Has a loaded base compute as engines want it: exactly, where `dtype` is fp32. Returns what probes call that."""
        from ftcore.layers.quantised import compute_in_fp32
        from ftcore.probes import IN_FP32

        compute_in_fp32(model, dtype == "fp32")
        return self.form + IN_FP32 * (dtype == "fp32")
