"""ZeroStepper: one rank's share of a ZeRO-sharded optimizer, and under stage 3 of the weights, run by DeepSpeed.

In: a summed loss and its scale. Out: updated weights. Runs in: train workers.

Ours: what is accumulated and divided by (windows of global weight), the learning rate of each step, what a checkpoint holds. DeepSpeed's:
gathering and releasing weights, reducing gradients in fp32, clipping, the masters. The update itself is torch's fused AdamW on both kinds
of device, offloaded or not, so nothing has to be compiled.

Precision. Adapters, and everything under stages 1 and 2: fp32 weights under autocast, exactly as the plain backend holds them. A whole
model in bf16 under stage 3: DeepSpeed holds bf16 weights and fp32 masters (autocast would keep a bf16 copy of every gathered weight for
the backward pass, which is the whole model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ftcore.backends.base import StepInfo, World
from ftcore.backends.deepspeed import DeepSpeed
from ftcore.crew import Crew
from ftcore.data_parallel import summed
from ftcore.errors import ConfigError, ModelError
from ftcore.methods.base import Method
from ftcore.models import autocasting, keep_masters
from ftcore.optim import Optim
from ftcore.zero_config import configuration
from ftcore.zero_export import export_model, gathered, refuse_merges
from ftcore.zero_runtime import is_sharded, save_no_weights, shape_of
from ftcore.zero_state import ZeroState, part_name

T = TypeVar("T")


class Root(nn.Module):
    """What DeepSpeed is given. Its forward is whatever our stages want of the model, so that it sees where a pass starts and ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        return call()


class ZeroStepper:
    """See `backends.base.Stepper`."""

    def __init__(
        self, model: nn.Module, backend: DeepSpeed, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None
    ) -> None:  # fmt: skip
        import deepspeed  # only where it is used: it costs seconds and patches torch

        _refuse_precision(model, autocast)
        halves = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16 and is_sharded(p)]
        if not halves:
            keep_masters(model)
        self.model, self.optim, self.num_steps, self.world = model, optim, num_steps, world
        if all(p.requires_grad for p in model.parameters()):
            refuse_merges(model, torch.float32)  # now, rather than as its result is written
        self.autocast = None if halves else autocast
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if backend.zero == 3:
            save_no_weights(model)
        self.adam = optim.build(model, lambda parameter: len(shape_of(parameter)))
        num_trainable = sum(math.prod(shape_of(parameter)) for _, parameter in self.trainable)
        config = configuration(backend, optim, bf16=bool(halves), num_trainable=num_trainable)
        with _naming_the_section():
            self.engine, zero, *_ = deepspeed.initialize(model=Root(model), optimizer=self.adam, config=config, dist_init_required=False)
        self.zero: Any = zero
        self.state = ZeroState(self.trainable, zero, self.adam, backend.zero, world.rank)
        self.crew: Crew | None = Crew(world)
        self.stage = backend.zero

    def run(self, forward: Callable[[], T]) -> T:
        found: list[T] = []

        def call() -> Tensor | None:
            with autocasting(self.world.device, self.autocast):
                found.append(forward())
            return found[0] if isinstance(found[0], Tensor) else None

        result = self.engine(call)
        return result if isinstance(found[0], Tensor) else found[0]

    def micro_step(self, loss: Callable[[], Tensor], *, scale: float, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        total = self.run(loss)
        self.engine.backward(total * (scale * self.world.size), scale_wrt_gas=False)  # it averages over ranks; our scale is global
        return total.detach()

    def rehearse(self, loss: Callable[[], Tensor], *, scale: float) -> None:
        """Nothing: gradients that DeepSpeed has begun to sum can only be cleared by a step. Its first step shows what it takes."""

    def update(self, step: int, check: Callable[[str, float, int], None]) -> StepInfo:
        lr = self.optim.lr_at(step, self.num_steps)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        check("gradient", norm, step)  # infinite when it was not finite; DeepSpeed then left the weights alone
        return StepInfo(norm, lr)

    def reduce(self, values: list[float]) -> list[float]:
        return summed(values, self.world)

    def whole(self) -> dict[str, Tensor]:
        self._settle()
        found = dict(gathered(self.trainable, self.world, self.reduce))
        return found if self.world.is_main else {}

    def _settle(self) -> None:
        """Lets go of what is still gathered (small parameters stay so between steps)."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def snapshot(self, method: Method) -> Callable[[Path], None]:
        """The returned function streams from the live tensors: it is called before training goes on, and the page cache holds the copy."""
        buffers = self._buffers() if self.world.is_main and not method.is_adapter else {}
        return lambda folder: self.state.save(folder / part_name(self.world.rank, self.world.size), buffers)

    def load(self, method: Method, folder: Path) -> None:
        self._settle()
        buffers = self.state.load(folder)
        for name, buffer in () if method.is_adapter else self._buffers().items():
            buffer.copy_(buffers[name])
        self.state.publish()

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the weights (an MoE router's correction bias, for one)."""
        kept = self.model.state_dict()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def export(self, method: Method, folder: Path, dtype: torch.dtype) -> None:
        if method.is_adapter:
            weights = self.whole()
            if self.world.is_main:
                method.export(self.model, weights, folder)
        else:
            self._settle()
            export_model(self.model, folder, dtype, self.world, self.reduce)

    def close(self) -> None:
        self.engine.destroy()


@contextmanager
def _naming_the_section() -> Iterator[None]:
    """DeepSpeed's own judgement of its configuration as a ConfigError: what the recipe derives is sound, so a raw key is meant."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (ValidationError, DeepSpeedConfigError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place = ".".join(map(str, first["loc"])) if first else "a key"
        raise ConfigError(
            "DeepSpeed refuses a key of its configuration", where="backend.deepspeed",
            got=f"{place}: {first['msg']}" if first else " ".join(str(error).split()),
            wanted="keys and values as DeepSpeed's documentation has them", remedy=f"correct or remove {place}",
        ) from error  # fmt: skip


def _refuse_precision(model: nn.Module, autocast: torch.dtype | None) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if autocast == torch.float16 or torch.float16 in dtypes or torch.float64 in dtypes:
        raise ModelError(
            "the deepspeed backend trains in fp32 and bf16", where="model.dtype", got="fp64" if torch.float64 in dtypes else "fp16",
            wanted="fp32 | bf16", remedy="model.dtype=bf16, or backend.kind=plain",
        )  # fmt: skip
