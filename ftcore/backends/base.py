"""Backend: how a step is executed. `open` gives a Stepper: forward, backward, reduce, update; and the weights made whole again.

In: an applied model, the optimizer section, the world. Out: updated weights. Runs in: train workers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ftcore.registry import Registry
from ftcore.section import Choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftcore.crew import Crew
    from ftcore.methods.base import Method
    from ftcore.optim import Optim
    from ftcore.recipe import Recipe

T = TypeVar("T")
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
    """One rank's share of the optimizer. All ranks call every method together (collectives), with equal arguments but for `reduce`."""

    def run(self, forward: Callable[[], T]) -> T:
        """Calls `forward()` the way a step's forward pass is run: mixed precision, sharded weights gathered where they are used.

        Every forward pass outside of a step goes through here: validation, probes, asking the model what it can do.
        """

    def micro_step(self, loss: Callable[[], Tensor], *, scale: float, last: bool) -> Tensor:
        """Runs `loss()` (a sum) forward and backward, gradients scaled by `scale` (1 / global weight of the window); `last` starts the
        gradient reduction. Returns the detached, unscaled sum."""

    def rehearse(self, loss: Callable[[], Tensor], *, scale: float) -> None:
        """Runs `loss()` forward and backward for the memory it takes, leaving weights, gradients and optimizer as they were."""

    def update(self, step: int, check: Callable[[str, float, int], None]) -> StepInfo:
        """Clips, steps the optimizer with the learning rate of `step` (0-based), clears gradients.

        `check(what, value, step)` raises when the global gradient norm is not finite and no loss scaler is there to skip the step.
        """

    def reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""

    def whole(self) -> dict[str, Tensor]:
        """Every trainable parameter by name, gathered, on the CPU (on rank 0; other ranks may get {})."""

    def snapshot(self, method: Method) -> Callable[[Path], None]:
        """Copies weights and optimizer (and scaler) state now; the returned function writes this rank's part of them into a folder, as
        safetensors + JSON, from any thread. Where there is a `crew` every rank writes, else rank 0 alone."""

    @property
    def crew(self) -> Crew | None:
        """The ranks that write a checkpoint together; None where rank 0 holds all there is to write."""

    def load(self, method: Method, folder: Path) -> None:
        """Puts a checkpoint's weights and optimizer state back, written at whatever number of ranks."""

    def export(self, method: Method, folder: Path, dtype: torch.dtype) -> None:
        """Writes the result as plain PEFT or transformers read it (a whole model in `dtype`) and reads it back, into rank 0's `folder`."""

    def close(self) -> None: ...


class Backend(Choice):
    """How a step is executed."""

    micro_batch: int = 1
    """Blocks a worker runs through the model at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Bit-identical reruns on a GPU, slower (CPU runs always are)."""

    def refusals(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """(path, what and what to do) for each combination with the rest of the recipe that cannot work; no torch."""
        yield from ()

    def loading(self, dtype: torch.dtype, world: World) -> AbstractContextManager[None]:
        """Held while the base is loaded and the method applied: a backend that shards weights has them sharded as they are read."""
        return nullcontext()

    @abstractmethod
    def open(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> Stepper:
        """Makes the stepper. `num_steps` is the whole run's length (for schedules); `autocast` the compute dtype over fp32 trainables.

        Trainables held in half precision get fp32 masters here: updates below bf16's 3 digits would be lost.
        """
