"""torch: the embedded engine. Continuous batching over Hugging Face weights, many LoRA adapters in one batch, on a CPU or one GPU.

In: a base, adapter folders, requests. Out: tokens. Runs in: serving replicas, `ftcore chat`, evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcore.engines.base import ENGINES, Engine

if TYPE_CHECKING:
    from ftcore.engines.base import LiveEngine


@ENGINES.register("torch")
class Torch(Engine):
    """Runs in a thread of this process."""

    kind: str = "torch"
    dtype: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """What weights, keys and values are held in; `auto`: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    chunk_tokens: int = Field(256, ge=1)
    """Prompt tokens read in a step at most, so that nobody's next token waits for a long prompt."""
    max_rank: int = Field(64, ge=1)
    """Largest rank of an adapter."""
    max_lanes: int = Field(512, ge=1)
    """Sum of the ranks, rounded up to powers of two, of adapters of one such width that answer at once; requests of further ones wait."""
    prefix_mib: int = Field(256, ge=0)
    """Memory for keys and values of prompts that may come again; 0 keeps none."""
    num_threads: int = Field(0, ge=0)
    """Compute threads; 0: as many as this process may use."""

    async def open(self, base: str) -> LiveEngine:
        from ftcore.torch_engine import TorchEngine

        return await TorchEngine.start(self, base)
