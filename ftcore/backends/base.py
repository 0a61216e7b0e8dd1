"""Backend: how a step is executed. `open` gives a Stepper: forward, backward, reduce, update; and the weights made whole again.

In: an applied model, the optimizer section, the world. Out: updated weights. Runs in: train workers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ftcore.registry import Registry
from ftcore.section import Choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftcore.optim import Optim

BACKENDS: Registry[type[Backend]] = Registry("backend", "ftcore.backends")


@dataclass(frozen=True)
class World:
    """This process among the workers of one run. The process group exists already when size > 1 (Ray Train or torchrun made it)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    node: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class StepInfo:
    grad_norm: float
    lr: float
    skipped: bool = False
    """fp16 only: the scaler found infinities and left the weights alone."""


class Stepper(Protocol):
    """One rank's share of the optimizer. Every method but `reduce` with equal arguments must be called on all ranks (collectives)."""

    def micro_step(self, loss: Callable[[], Tensor], *, scale: float, last: bool) -> Tensor:
        """Runs `loss()` (a sum) forward and backward, gradients scaled by `scale` (1 / global weight of the window); `last` starts the
        gradient reduction. Returns the detached, unscaled sum."""

    def update(self, step: int, check: Callable[[str, float, int], None]) -> StepInfo:
        """Clips, steps the optimizer with the learning rate of `step` (0-based), clears gradients.

        `check(what, value, step)` raises when the global gradient norm is not finite and no loss scaler is there to skip the step.
        """

    def reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""

    def whole(self) -> dict[str, Tensor]:
        """Every trainable parameter by name, gathered, on the CPU (on rank 0; other ranks may get {})."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copies optimizer (and scaler) state now; the returned function writes it into a folder as safetensors + JSON, from any thread.
        Weights are the method's to save."""

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


class Backend(Choice):
    """How a step is executed."""

    shards_weights: ClassVar[bool] = False

    micro_batch: int = 1
    """Blocks a worker runs through the model at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Bit-identical reruns on a GPU, slower (CPU runs always are)."""

    @abstractmethod
    def open(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> Stepper:
        """Makes the stepper. `num_steps` is the whole run's length (for schedules); `autocast` the compute dtype over fp32 trainables."""

    def load_options(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        """Extra keyword arguments for `from_pretrained`."""
        return {}
