"""deepspeed: ZeRO stages 1 to 3 with offload: optimizer state, gradients and weights sharded over the workers.

In: an applied model, sharded already under stage 3. Out: updated weights. Runs in: train workers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from ftcore.backends.base import BACKENDS, Backend, Stepper, World
from ftcore.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcore.optim import Optim

Device = Literal["none", "cpu", "nvme"]


@BACKENDS.register("deepspeed")
class DeepSpeed(Backend):
    """ZeRO data parallel: what every rank would hold in full is sharded over the ranks."""

    kind: str = "deepspeed"
    zero: Literal[1, 2, 3] = 3
    """What is sharded: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    offload_params: Device = "none"
    """Where sharded weights rest between uses (stage 3)."""
    offload_optimizer: Device = "none"
    """Where masters and optimizer state live, and where the update is computed. `nvme` only where it proves to train the same."""
    nvme_path: str | None = None
    """A folder on a fast local disk, for `nvme`."""
    deepspeed: dict[str, JsonValue] = {}
    """Further keys of DeepSpeed's own configuration; what the recipe decides already is refused here."""

    def loading(self, dtype: torch.dtype, world: World) -> AbstractContextManager[None]:
        from ftcore.zero_runtime import sharded_loading, start

        self._check_place(world)
        start(world)
        return sharded_loading(self, dtype)

    def open(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> Stepper:
        import torch

        from ftcore.zero import ZeroStepper
        from ftcore.zero_runtime import start

        self._check_place(world)
        start(world)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
        return ZeroStepper(model, self, optim, num_steps, world, autocast)

    def _check_place(self, world: World) -> None:
        """What only the worker's own machine can tell. Raises ConfigError."""
        from ftcore.zero_runtime import check_nvme

        if world.size == 1 and self.offload_params == self.offload_optimizer == "none":
            raise ConfigError(
                "ZeRO on one worker shards nothing", where="backend", got="one worker and no offload", wanted="two workers, or offload",
                remedy="resources.workers=2, backend.offload_optimizer=cpu, or backend.kind=plain",
            )  # fmt: skip
        if "nvme" in (self.offload_params, self.offload_optimizer):
            check_nvme(self.nvme_path)
