"""plain: one process, or data parallel over gloo or nccl with the weights on every rank.

In: an applied model. Out: updated weights. Runs in: train workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcore.backends.base import BACKENDS, Backend, Stepper, World
from ftcore.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcore.optim import Optim


@BACKENDS.register("plain")
class Plain(Backend):
    """One process or plain data parallel."""

    kind: str = "plain"

    def open(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> Stepper:
        import torch

        from ftcore.data_parallel import PlainStepper

        if autocast == torch.float16 and world.device == "cpu":
            raise ModelError(
                "fp16 cannot be trained on a CPU", where="model.dtype", got="fp16", wanted="bf16 | fp32", remedy="model.dtype=bf16"
            )
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
        return PlainStepper(model, optim, num_steps, world, autocast)
