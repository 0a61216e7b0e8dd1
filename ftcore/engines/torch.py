"""torch: the embedded engine. Continuous batching over Hugging Face weights, many LoRA adapters in one batch, on a CPU or one GPU.

In: a base, adapter folders, requests. Out: tokens. Runs in: serving replicas, `ftcore chat`, evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, model_validator

from ftcore.devices import device_here
from ftcore.engines.base import ENGINES, Engine
from ftcore.quantisation import FOUR_BITS, Quantisation

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from ftcore.engines.base import LiveEngine

Dtype = Literal["fp32", "bf16", "fp16", "auto"]
Quantise = Literal["none", "nf4", "fp4", "int8"]


@ENGINES.register("torch")
class Torch(Engine):
    """Runs in a thread of this process."""

    kind: str = "torch"
    dtype: Dtype = "auto"
    """What weights, keys and values are held in; `auto`: bf16 on a GPU, fp32 on a CPU."""
    quantise: Quantise = "none"
    """Holds the base's linear layers, all but the head, in 4 or 8 bits (bitsandbytes), as QLoRA trains over them."""
    double_quant: bool = True
    """`nf4` and `fp4`: quantise the scales too, 0.37 bits a weight less. Off elsewhere."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    chunk_tokens: int = Field(256, ge=1)
    """Prompt tokens read in a step at most, so that nobody's next token waits for a long prompt."""
    stretch: float | None = Field(1.2, ge=1)
    """How many times as long a step may take for the rows of a tenant who asks much, while one is in who asks little (at most half as many
    rows): the others wait their turn meanwhile. `null` lets all of them in: most tokens a second."""
    max_rank: int = Field(64, ge=1)
    """Largest rank of an adapter."""
    max_lanes: int = Field(512, ge=1)
    """Sum of the ranks, rounded up to powers of two, of adapters of one such width that answer at once; requests of further ones wait."""
    prefix_mib: int = Field(256, ge=0)
    """Memory for keys and values of prompts that may come again; 0 keeps none."""
    num_threads: int = Field(0, ge=0)
    """Compute threads; 0: as many as this process may use."""

    @model_validator(mode="before")
    @classmethod
    def _four_bits_have_blocks(cls, values: Any) -> Any:
        return {"double_quant": values.get("quantise") in FOUR_BITS} | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits(self) -> Torch:
        if self.double_quant and self.quantise not in FOUR_BITS:
            raise ValueError("double_quant quantises the scales of 4-bit blocks: remove it, or take quantise: nf4")
        return self

    @property
    def held_as(self) -> Quantisation | None:
        """None: in full precision."""
        return None if self.quantise == "none" else Quantisation(self.quantise, self.double_quant)

    @classmethod
    def reading(cls, num_tokens: int) -> Torch:
        """For prompts with answers of so many tokens; the longer, the fewer at once, so that the cache is no larger."""
        usual = cls()
        context = max(usual.max_context, num_tokens)
        return cls(max_context=context, max_batch=max(1, usual.max_batch * usual.max_context // context))

    def place(self) -> str:
        """The device, in this process."""
        return device_here() if self.device == "auto" else self.device

    async def open(self, base: str) -> LiveEngine:
        from ftcore.torch_engine import TorchEngine

        return await TorchEngine.start(self, base)


def add_base_options(parser: ArgumentParser) -> None:
    """`--dtype` and `--quantise`, for commands that open this engine."""
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--quantise", default="none", choices=get_args(Quantise), help="hold the base in 4 or 8 bits (default: none)")
