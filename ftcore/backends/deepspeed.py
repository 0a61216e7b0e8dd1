"""deepspeed: ZeRO stages 1 to 3 with offload: optimizer state, gradients and weights sharded over the workers.

In: an applied model, sharded already under stage 3. Out: updated weights. Runs in: train workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from pydantic import Field, JsonValue

from ftcore.backends.base import BACKENDS, Backend, Stepper, World
from ftcore.errors import ConfigError
from ftcore.zero_config import conflicts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcore.optim import Optim
    from ftcore.recipe import Recipe

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
    """Where masters and optimizer state live, and where the update is computed. `nvme` only where it proves to train the
    same, and what has to be in a checkpoint stays in memory: in practice, parts too small to be swapped."""
    nvme_path: str | None = None
    """A folder on a fast local disk, for `nvme`."""
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)
    """Further keys of DeepSpeed's own configuration; what the recipe decides already is refused here."""

    @property
    def _offloads(self) -> bool:
        return self.offload_params != "none" or self.offload_optimizer != "none"

    def refusals(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        if recipe.resources.min_workers == 1 and not self._offloads:
            key = "resources.workers" if isinstance(recipe.resources.workers, int) else "resources.workers.min"
            yield (
                "backend.kind",
                (
                    "ZeRO shards over workers, and there is one: nothing is sharded, and each step pays for it; "
                    f"set {key} to 2 or more, offload (backend.offload_optimizer: cpu), or take backend.kind: plain"
                ),
            )
        if recipe.optim.kind != "adamw":
            yield (
                "optim.kind",
                f"the deepspeed backend shards the state of adamw only; got {recipe.optim.kind}; or take backend.kind: plain",
            )
        if recipe.model.dtype in ("fp16", "fp64"):
            yield (
                "model.dtype",
                f"the deepspeed backend trains in fp32 and bf16; got {recipe.model.dtype}; or take backend.kind: plain",
            )
        if recipe.method.quantises:
            yield (
                "method.kind",
                (
                    f"method `{recipe.method.kind}` holds the base quantised, and those bytes cannot be sharded; take method lora "
                    "(model.dtype: bf16) with this backend, or this method with backend.kind: plain"
                ),
            )
        if self.offload_params != "none" and self.zero != 3:
            yield "backend.offload_params", "weights are sharded, and so offloaded, in stage 3 only; set backend.zero: 3 or remove this key"
        if "nvme" in (self.offload_params, self.offload_optimizer):
            if self.zero != 3:
                yield "backend.offload_optimizer", "NVMe offload is stage 3's; set backend.zero: 3, or offload to cpu"
            if self.nvme_path is None:
                yield "backend.nvme_path", "offloading to nvme needs a folder on a local disk of every node; set this key"
        elif self.nvme_path is not None:
            yield "backend.nvme_path", "nothing is offloaded to nvme; remove this key, or set offload_params or offload_optimizer to nvme"
        yield from conflicts(self, recipe.optim)

    def loading(self, dtype: torch.dtype, world: World) -> AbstractContextManager[None]:
        from ftcore.zero_runtime import return_memory, sharded_loading, start

        self._check_place(world)
        start(world)
        if self.zero == 3 and world.device == "cpu":
            return_memory()
        return sharded_loading(self, dtype)

    def open(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> Stepper:
        import torch

        from ftcore.zero import ZeroStepper
        from ftcore.zero_parity import prove_nvme_optimizer
        from ftcore.zero_runtime import start

        self._check_place(world)
        start(world)
        if self.offload_optimizer == "nvme" and self.nvme_path:
            prove_nvme_optimizer(self.nvme_path, world)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
        stepper = ZeroStepper(model, self, optim, num_steps, world, autocast)
        stepper.state.require_held()  # before training, rather than at its first checkpoint
        return stepper

    def _check_place(self, world: World) -> None:
        """What only the worker's own machine can tell. Raises ConfigError."""
        from ftcore.zero_runtime import check_nvme

        if world.size == 1 and not self._offloads:
            raise ConfigError(
                "ZeRO on one worker shards nothing", where="backend", got="one worker and no offload", wanted="two workers, or offload",
                remedy="resources.workers=2, backend.offload_optimizer=cpu, or backend.kind=plain",
            )  # fmt: skip
        if "nvme" in (self.offload_params, self.offload_optimizer):
            check_nvme(self.nvme_path)
