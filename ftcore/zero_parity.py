"""The parity check that NVMe optimizer offload has to pass: a few steps of a small model, offloaded and not, must give the same losses.

In: the backend section, this rank's World. Out: nothing, or a ConfigError with both losses. Runs in: train workers, once a process, before
the run's own model is opened. It was seen to train differently without a word, so no run is trusted to it unproven.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from ftcore.backends.base import World
from ftcore.backends.deepspeed import DeepSpeed
from ftcore.errors import ConfigError
from ftcore.optim import Optim
from ftcore.zero import ZeroStepper

WIDTH, STEPS = 1024, 4
"""Shards of WIDTH x WIDTH weights are above the 1 MiB from which DeepSpeed swaps, on up to four ranks."""
TOLERANCE = 1e-5


def prove_nvme_optimizer(path: str, world: World) -> None:
    """Raises ConfigError unless the offloaded optimizer trains as the one in memory does. All ranks call."""
    offloaded, plain = _losses(path, world), _losses(None, world)
    worst = max(range(STEPS), key=lambda step: abs(offloaded[step] - plain[step]))
    if abs(offloaded[worst] - plain[worst]) > TOLERANCE * abs(plain[worst]):
        raise ConfigError(
            "with its optimizer on NVMe, DeepSpeed trains something else here", where="backend.offload_optimizer",
            got=f"a loss of {offloaded[worst]:.6f} in step {worst + 1} of a small model", wanted=f"{plain[worst]:.6f}, as without offload",
            remedy="backend.offload_optimizer=cpu (parameters may stay on nvme)",
        )  # fmt: skip


@lru_cache
def _losses(path: str | None, world: World) -> tuple[float, ...]:
    device = "none" if path is None else "nvme"
    backend = DeepSpeed.model_validate({"kind": "deepspeed", "zero": 3, "offload_optimizer": device, "nvme_path": path})
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    inputs, targets = torch.randn(2, 8, WIDTH).to(world.device).unbind()
    stepper = ZeroStepper(model, backend, Optim(lr=1e-3, warmup=0, schedule="constant", clip_norm=0), STEPS, world, None)
    losses = []
    for step in range(STEPS):
        loss = stepper.micro_step(lambda: (model(inputs) - targets).square().mean(), scale=1 / world.size, last=True)
        stepper.update(step, lambda what, value, at: None)
        losses.append(float(loss))
    stepper.close()
    return tuple(losses)
