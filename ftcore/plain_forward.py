"""Plain forward: a model from the training loop run as plain PEFT and transformers would run it, and, where asked, computed in fp32.

In: a model as the loop left it. Out: contexts to call it in; it is as before afterwards. Runs in: train workers, the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftcore.layers import varlen

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def plain_forward(model: nn.Module, *, widened: bool = False) -> Iterator[None]:
    """The model as plain PEFT and transformers run it, whatever the training loop made of it: no dropout, SDPA attention, LoRA in fp32.

    The loop replaces the attention by one that wants segment lengths, and stops PEFT from widening inputs (autocast does it there, and is
    off here; it stays on over whole modules trained in fp32, which a base in bf16 cannot run beside otherwise). With `widened`, weights held
    in 16 bits are computed with in fp32, a layer at a time.
    """
    autocast: AbstractContextManager[None] = torch.autocast(next(model.parameters()).device.type, enabled=False)
    if not widened and any("modules_to_save" in name for name, _ in model.named_parameters()):
        autocast = nullcontext()
    was_training = model.training
    casting = {module: flag for module in model.modules() if (flag := vars(module).get("cast_input_dtype_enabled")) is not None}
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    attention = transformer.config._attn_implementation if transformer is not None else None
    model.eval()
    try:
        for module in casting:
            module.cast_input_dtype_enabled = True  # type: ignore[assignment]
        if transformer is not None and attention == varlen.NAME:
            transformer.set_attn_implementation("sdpa")
        with autocast, _widened(model) if widened else nullcontext():
            yield
    finally:
        if transformer is not None and attention == varlen.NAME:
            transformer.set_attn_implementation(attention)
        for module, flag in casting.items():
            module.cast_input_dtype_enabled = flag
        model.train(was_training)


def can_widen(model: nn.Module) -> bool:
    """Weights held in 16 bits, none of them quantised: then fp32 arithmetic on them is a fact about the model and no other one."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return bool(dtypes & set(HALF)) and all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes)


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Each module's own 16-bit weights are fp32 while it runs: the memory of one layer more, not of a second model."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, *arguments: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in HALF:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *arguments: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in narrow.items():  # what an error left widened
            parameter.data = data
