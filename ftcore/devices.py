"""Devices: what a named GPU has, by its maker's datasheet; where this process computes where nobody says otherwise.

In: a name. Out: memory, speed. Runs in: the driver, engines. Figures are dense bf16 and peak bandwidth; memory is what CUDA
shows of it, which is a little less than the name says.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ftcore.errors import ConfigError


@dataclass(frozen=True)
class Device:
    name: str
    memory_gib: float
    tflops: float
    gb_per_s: float
    source: str


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("L4", 22.0, 121, 300, "NVIDIA L4 datasheet, 24 GB"),
        Device("A10G", 22.1, 70, 600, "NVIDIA A10G as AWS G5 has it, 24 GB"),
        Device("RTX4090", 23.5, 165, 1008, "NVIDIA Ada whitepaper, 24 GB"),
        Device("A100-40", 39.4, 312, 1555, "NVIDIA A100 datasheet, 40 GB"),
        Device("L40S", 44.4, 362, 864, "NVIDIA L40S datasheet, 48 GB"),
        Device("A100-80", 79.1, 312, 2039, "NVIDIA A100 datasheet, 80 GB SXM"),
        Device("H100", 79.1, 989, 3350, "NVIDIA H100 datasheet, 80 GB SXM"),
        Device("H200", 139.8, 989, 4800, "NVIDIA H200 datasheet, 141 GB SXM"),
    )
}
MODEL_FLOPS_SHARE = 0.4
"""Of the datasheet's arithmetic, what a training step usually gets. Assumed; `--probe` measures instead."""


def device_of(name: str) -> Device:
    """By its name, in any case. Raises ConfigError."""
    found = {known.lower(): device for known, device in DEVICES.items()}.get(name.lower())
    if found is None:
        near = get_close_matches(name.upper(), DEVICES, n=1)
        remedy = f"did you mean {near[0]}? " if near else ""
        raise ConfigError("unknown GPU", where="--gpu", got=name, wanted=" | ".join(DEVICES), remedy=f"{remedy}or give --memory GIB")
    return found


def device_here() -> str:
    """`cuda` where this process may use a GPU, else `cpu`."""
    import torch  # late: a plan is made without it

    return "cuda" if torch.cuda.is_available() else "cpu"
