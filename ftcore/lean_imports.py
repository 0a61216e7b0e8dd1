"""Lean imports: the one door to peft and bitsandbytes, which leaves inductor outside (4 CPU seconds of every process that trains).

bitsandbytes hands functions to torch.compile as it is imported, and that alone imports inductor; most runs never call one. Through this
door such a function is compiled when it is called first. Whoever imports peft imports bitsandbytes with it: all of ours come through here.

In: nothing. Out: peft's names that we use; `bnb`, None where bitsandbytes is not installed. Runs in: train workers, drivers that publish.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """torch.compile, at the first call."""
    if function is None:
        return functools.partial(compiled_when_called, **options)
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*values: Any, **named: Any) -> Any:
        if not made:
            made.append(torch.compile(function, **options))
        return made[0](*values, **named)

    return call


@contextmanager
def _compiling_when_called() -> Iterator[None]:
    now: Any = torch.compile
    torch.compile = compiled_when_called
    try:
        yield
    finally:
        torch.compile = now


with _compiling_when_called():
    bnb: Any
    try:
        bnb = importlib.import_module("bitsandbytes")
    except ImportError:  # peft does without it
        bnb = None
    from peft import LoraConfig as LoraConfig
    from peft import PeftModel as PeftModel
    from peft import get_peft_model as get_peft_model
    from peft import get_peft_model_state_dict as get_peft_model_state_dict
    from peft import set_peft_model_state_dict as set_peft_model_state_dict
