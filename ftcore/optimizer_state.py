"""Optimizer state: what an optimizer remembers, as plain tensors by parameter name, and back; exact for torch's AdamW and bitsandbytes'.

In: an optimizer and its named parameters. Out: tensors and a step count that safetensors and JSON hold. Runs in: train workers.

bitsandbytes keeps 8-bit moments (uint8), a scale for each 256 of them (fp32), and two code tables that all parameters share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftcore.errors import IntegrityError

Named = Iterable[tuple[str, nn.Parameter]]
SHARED = ("qmap1", "qmap2")
"""State that is one tensor for all parameters: written once, under its own name."""


def read_state(optimizer: torch.optim.Optimizer, parameters: Named) -> tuple[dict[str, Tensor], int]:
    """Copies every tensor to the CPU as `parameter.key`; and the number of steps taken (the same for all parameters)."""
    tensors: dict[str, Tensor] = {}
    steps = 0
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                steps = int(value)
            elif key not in SHARED:
                tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
            elif key not in tensors:
                tensors[key] = value.detach().to("cpu", copy=True)
    return tensors, steps


def write_state(optimizer: torch.optim.Optimizer, parameters: Named, tensors: Mapping[str, Tensor], steps: int, where: object) -> None:
    """Puts back what `read_state` gave. Raises IntegrityError unless every parameter finds each of its tensors, and none is left over."""
    if not steps:
        return
    left = set(tensors)
    for name, parameter in parameters:
        for key, held in _fresh(optimizer, parameter).items():
            if key == "step":
                optimizer.state[parameter]["step"] = steps if isinstance(held, int) else torch.full_like(held, steps)
                continue
            kept = key if key in SHARED else f"{name}.{key}"
            saved = tensors.get(kept)
            if saved is None or saved.shape != held.shape or saved.dtype != held.dtype:
                raise _unbound(where, f"nothing that fits {kept}")
            held.copy_(saved)  # in place: a paged tensor's memory is the optimizer's own
            left.discard(kept)
    if left:
        raise _unbound(where, f"{len(left)} tensors more than there is place for, first {sorted(left)[0]}")


def _fresh(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter's state as the optimizer itself would make it before the first step."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, own in enumerate(group["params"]):
            if own is parameter:
                if isinstance(optimizer, torch.optim.AdamW):
                    moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}
                else:
                    optimizer.init_state(group, parameter, group_index, index)  # bitsandbytes': 8-bit, fp32 where small, or paged
                return optimizer.state[parameter]
    raise AssertionError("a trainable parameter that the optimizer does not know")


def _unbound(where: object, got: str) -> IntegrityError:
    return IntegrityError(
        "the optimizer's state does not bind to this model", where=where, got=got, wanted="every tensor, with its shape and dtype",
        remedy="same method and optim.kind as it was saved with; else start a new run under another name",
    )  # fmt: skip
