"""Plain forward: a model from the training loop run as plain PEFT and transformers would run it.

In: a model as the loop left it. Out: a context to call it in; it is as before afterwards. Runs in: train workers, the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
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
