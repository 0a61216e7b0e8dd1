"""PlainStepper: gradients in flat buckets of a fixed layout, reduced while the backward pass still runs, one AdamW on every rank.

In: a summed loss and its scale. Out: updated weights. Runs in: train workers.

The bucket layout is fixed by the order of parameters before the first step, so a resumed run adds the same numbers in the same order
(DistributedDataParallel rebuilds its buckets after the first step, which changes the last bits at 3 and more ranks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftcore.backends.base import StepInfo, World
from ftcore.crew import Crew
from ftcore.methods.base import Method
from ftcore.models import autocasting, keep_masters
from ftcore.optim import Optim
from ftcore.optimizer_state import read_state, write_state

BUCKET_BYTES = 32 << 20
WEIGHTS, OPTIMIZER_WEIGHTS, OPTIMIZER_STATE = "weights", "optimizer.safetensors", "optimizer.json"
T = TypeVar("T")


class GradientBucket:
    """One flat buffer; each parameter's `.grad` is a view into it, so nothing is copied to reduce, clip or clear."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        offset = 0
        for parameter in parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        self.missing = len(parameters)
        self.work: dist.Work | None = None


def bucketed(parameters: list[nn.Parameter]) -> list[GradientBucket]:
    """Parameters in reverse order (about the order their gradients arrive), cut at BUCKET_BYTES and at changes of dtype or device."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        same = groups and (groups[-1][0].dtype, groups[-1][0].device) == (parameter.dtype, parameter.device)
        if not same or size >= BUCKET_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return [GradientBucket(group) for group in groups]


def summed(values: list[float], world: World) -> list[float]:
    """The sums over all ranks, in float64; a collective."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


class PlainStepper:
    """See `backends.base.Stepper`."""

    crew: Crew | None = None

    def __init__(self, model: nn.Module, optim: Optim, num_steps: int, world: World, autocast: torch.dtype | None) -> None:
        keep_masters(model)
        self.model = model
        self.optim, self.num_steps, self.world, self.autocast = optim, num_steps, world, autocast
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = optim.build(model)
        self.buckets = bucketed([p for _, p in self.trainable])
        self.scaler = torch.amp.GradScaler(world.device.split(":")[0], enabled=autocast == torch.float16)
        self._reducing = False
        self._next = 0
        if world.size > 1:
            for _, parameter in self.trainable:
                dist.broadcast(parameter.data, 0)
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._arrived(bucket))

    def _arrived(self, bucket: GradientBucket) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._reducing:
                bucket.missing -= 1
                self._launch()

        return hook

    def _launch(self, everything: bool = False) -> None:
        """Starts reductions in bucket order, so that every rank issues the same collectives in the same order."""
        while self._next < len(self.buckets) and (everything or self.buckets[self._next].missing <= 0):
            bucket = self.buckets[self._next]
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
            self._next += 1

    def run(self, forward: Callable[[], T]) -> T:
        with autocasting(self.world.device, self.autocast):
            return forward()

    def micro_step(self, loss: Callable[[], Tensor], *, scale: float, last: bool) -> Tensor:
        total = self.run(loss)
        self._reducing = last and self.world.size > 1
        self.scaler.scale(total * scale).backward()
        if self._reducing:
            self._launch(everything=True)
            self._reducing = False
        return total.detach()

    def rehearse(self, loss: Callable[[], Tensor], *, scale: float) -> None:
        self.micro_step(loss, scale=scale, last=False)
        for bucket in self.buckets:
            bucket.flat.zero_()

    def update(self, step: int, check: Callable[[str, float, int], None]) -> StepInfo:
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            bucket.missing = len(bucket.parameters)
        self._next = 0
        lr = self.optim.lr_at(step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        # in fp64: fp32 sums of 100 million squares are off in the second digit
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(bucket.flat, dtype=torch.float64)) ** 2 for bucket in self.buckets))
        if not self.scaler.is_enabled():
            check("gradient", norm, step)
        if self.optim.clip_norm and math.isfinite(norm) and norm > self.optim.clip_norm:
            for bucket in self.buckets:
                bucket.flat.mul_(self.optim.clip_norm / (norm + 1e-6))  # torch's clip_grad_norm_, to the last digit
        before = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for bucket in self.buckets:
            bucket.flat.zero_()
        return StepInfo(norm, lr, skipped=self.scaler.is_enabled() and self.scaler.get_scale() < before)

    def reduce(self, values: list[float]) -> list[float]:
        return summed(values, self.world)

    def whole(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trainable} if self.world.is_main else {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The optimizer's tensors by parameter name (copied), and the counts that go with them."""
        tensors, steps = read_state(self.optimizer, self.trainable)
        numbers = {"steps": float(steps), **{f"scaler.{key}": float(value) for key, value in self.scaler.state_dict().items()}}
        return tensors, numbers

    def snapshot(self, method: Method) -> Callable[[Path], None]:
        """Copies the state now; the returned function writes it (from any thread). Every rank holds the same: rank 0 alone copies."""
        if not self.world.is_main:
            return lambda folder: None
        weights, (tensors, numbers) = self.whole(), self.state()

        def write(folder: Path) -> None:
            method.save(self.model, weights, folder / WEIGHTS)
            save_file(tensors, folder / OPTIMIZER_WEIGHTS)
            (folder / OPTIMIZER_STATE).write_text(json.dumps(numbers))

        return write

    def load(self, method: Method, folder: Path) -> None:
        method.load(self.model, folder / WEIGHTS)
        tensors, numbers = load_file(folder / OPTIMIZER_WEIGHTS), json.loads((folder / OPTIMIZER_STATE).read_text())
        write_state(self.optimizer, self.trainable, tensors, int(numbers["steps"]), folder)
        if self.scaler.is_enabled():
            known = self.scaler.state_dict()
            self.scaler.load_state_dict({key: type(value)(numbers[f"scaler.{key}"]) for key, value in known.items()})

    def export(self, method: Method, folder: Path, dtype: torch.dtype) -> None:
        if self.world.is_main:
            weights = self.whole()
            method.export(self.model, weights if method.is_adapter else {name: t.to(dtype) for name, t in weights.items()}, folder)

    def close(self) -> None:
        for _, parameter in self.trainable:
            parameter.grad = None
