"""Plain forward: a model from the training loop run as plain PEFT and transformers would run it.

In: a model as the loop left it. Out: a context to call it in; it is as before afterwards. Runs in: train workers, the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftcore.layers import varlen


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The model as plain PEFT and transformers run it, whatever the training loop made of it: no dropout, SDPA attention, LoRA in fp32.

    The loop replaces the attention by one that wants segment lengths, and stops PEFT from widening inputs (autocast does it there, and is
    off here; it stays on over whole modules trained in fp32, which a base in bf16 cannot run beside otherwise).
    """
    autocast: AbstractContextManager[None] = torch.autocast(next(model.parameters()).device.type, enabled=False)
    if any("modules_to_save" in name for name, _ in model.named_parameters()):
        autocast = nullcontext()
    was_training = model.training
    casting = {module: flag for module in model.modules() if (flag := vars(module).get("cast_input_dtype_enabled")) is not None}
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    attention = transformer.config._attn_implementation if transformer is not None else None
    model.eval()
    try:
        for module in casting:
            module.cast_input_dtype_enabled = True
        if transformer is not None and attention == varlen.NAME:
            transformer.set_attn_implementation("sdpa")
        with autocast:
            yield
    finally:
        if transformer is not None and attention == varlen.NAME:
            transformer.set_attn_implementation(attention)
        for module, flag in casting.items():
            module.cast_input_dtype_enabled = flag
        model.train(was_training)


@contextmanager
def computed_in_fp32(model: nn.Module) -> Iterator[None]:
    """The model's numbers without the rounding of bf16 or fp16 arithmetic: weights as they are held, each widened while its module runs.

    One module at a time, so that memory does not double. Not for weights that are sharded over ranks.
    """
    narrow = (torch.bfloat16, torch.float16)
    held: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in narrow and parameter not in held:
                held[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def narrow_again(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in held:
                parameter.data = held.pop(parameter)

    hooks: list[Any] = []
    for module in model.modules():
        if any(parameter.dtype in narrow for parameter in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow_again)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in held.items():  # a forward that raised
            parameter.data = data
