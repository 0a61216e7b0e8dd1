"""Quantised linears: bitsandbytes' layers, held so that training and evaluation compute the same, and so that a proof can compute in fp32.

In: a base just loaded with a bitsandbytes configuration. Out: the same base, its layers as below. Runs in: train workers, publish, engines.

Left alone, bitsandbytes 0.50 on a CPU (a) repacks 4-bit weights at the first evaluation, after which training gets no gradient through them
and rounds their scales to bf16, (b) quantises the activations of 8-bit layers too, but only in evaluation, with a log line a call, and
(c) keeps an 8-bit layer's input alive through gradient checkpointing. None of that happens here.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ftcore.lean_imports import bnb

CAST_NOTE = "inputs will be cast from"
"""bitsandbytes logs this at every 8-bit matmul on a GPU whose input is not fp16: each one, for ever."""


class Held4bit(bnb.nn.Linear4bit):
    """A 4-bit linear whose packing never changes."""

    in_fp32: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp32:
            return nn.functional.linear(x.float(), dequantised(self), None if self.bias is None else self.bias.float())
        return super().forward(x)


class Held8bit(bnb.nn.Linear8bitLt):
    """An 8-bit linear: on a CPU its weights times the input as it is; on a GPU LLM.int8() (Dettmers et al. 2022), inputs quantised too."""

    in_fp32: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp32:
            return nn.functional.linear(x.float(), dequantised(self), None if self.bias is None else self.bias.float())
        if x.device.type != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # as nn.Linear would
        out = _Int8Linear.apply(x, *codes_and_scales(self))
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Int8Linear(Function):
    """x W^T with W = codes * scales / 127, made anew in the backward pass: nothing but the input's gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return nn.functional.linear(x, _int8_weight(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient @ _int8_weight(codes, scales, gradient.dtype), None, None


def hold(model: nn.Module, compute: torch.dtype) -> None:
    """Prepares every quantised layer of a freshly loaded base. `compute`: what 4-bit layers multiply in.

    Nothing is upcast: norms widen to fp32 inside, the loss makes its logits in fp32, and frozen weights lose no updates by being narrow.
    (PEFT's own preparation holds embeddings, norms and head in fp32, for models that run without autocast.)
    """
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.__class__ = Held4bit
            layer.compute_dtype, layer.compute_type_is_set, layer.support_avx512bf16_for_cpu = compute, True, False
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(
                    compute
                )  # bitsandbytes would do so in the first forward: the base must not change then
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            layer.__class__ = Held8bit
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if _says_something not in logger.filters:
        logger.addFilter(_says_something)


def give_back_freed() -> None:
    """Hands what loading allocated and freed back to the kernel: full-precision copies, a layer at a time, leave holes in the heap."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc has no such call
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _says_something(line: logging.LogRecord) -> bool:
    return CAST_NOTE not in line.msg


def quantised_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Held4bit | Held8bit)]


@contextmanager
def quantised_in_fp32(model: nn.Module) -> Iterator[None]:
    """Quantised layers multiply in fp32 with their dequantised weights: the same on any device, to fp32's last digits."""
    compute_in_fp32(model, True)
    try:
        yield
    finally:
        compute_in_fp32(model, False)


def compute_in_fp32(model: nn.Module, on: bool) -> None:
    for _, layer in quantised_layers(model):
        layer.in_fp32 = on


def dequantised(layer: Held4bit | Held8bit) -> Tensor:
    """The weights that the layer stands for, [out, in] fp32."""
    if isinstance(layer, Held8bit):
        return _int8_weight(*codes_and_scales(layer), torch.float32)
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32  # else the dtype the weights had on disk, which rounds codes times scales
    return bnb.functional.dequantize_4bit(layer.weight.data, state)


def codes_and_scales(layer: Held8bit) -> tuple[Tensor, Tensor]:
    """int8 [out, in], and fp32 [out]: the weight is codes * scales / 127."""
    if layer.state.CB is None:
        layer.init_8bit_state()
    return layer.state.CB, layer.state.SCB


def _int8_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def quantised_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Everything a quantised layer holds: codes, and the scales that `get_memory_footprint` does not count."""
    if isinstance(layer, Held8bit):
        codes, scales = codes_and_scales(layer)
        found = {"codes": codes, "scales": scales}
    else:
        state = layer.weight.quant_state
        found = {"codes": layer.weight.data, "absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"offset": state.offset, "absmax2": state.state2.absmax, "code2": state.state2.code}
    return found if layer.bias is None else found | {"bias": layer.bias.data}


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of quantised layers with their scales, bytes of everything else), each storage counted once."""
    inside = {t.data_ptr(): t.nbytes for _, layer in quantised_layers(model) for t in quantised_tensors(layer).values()}
    around = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(inside.values()), sum(size for place, size in around.items() if place not in inside)
