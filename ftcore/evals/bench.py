"""Bench: one base in memory and any number of adapters on it, for judging by likelihood.

In: a base, adapter folders. Out: predictors for `ftcore.evals`. Runs in: the driver of the demo, workers of an evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ftcore.data.chat import Chat
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import Conversation
from ftcore.evals.predictors import LanguageModel
from ftcore.lean_imports import PeftModel
from ftcore.models import CausalModel, choose_layout, load_base, model_type
from ftcore.recipe import Data, Model, Source


class Bench:
    """One base in memory, never quantised, and any number of adapters on it, switched by name."""

    def __init__(self, model: Model, adapters: dict[str, Path], *, device: str = "cpu", dtype: str = "fp32") -> None:
        base = load_base(model, device=device, dtype=dtype)
        layout = choose_layout(base, model.attention, packs=False)
        self.max_context = int(getattr(base.config, "max_position_embeddings", 0) or sys.maxsize)
        """Tokens that the base was made for."""
        data = Data(sources=(Source(path="unused"),))
        self.chat = Chat.open(load_tokenizer(model), data=data, template=model.chat_template, family=model_type(model))
        self.peft: PeftModel | None = None
        for name, folder in adapters.items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                self.peft.load_adapter(str(folder), adapter_name=name)
        self.model = CausalModel(self.peft or base, layout)

    @contextmanager
    def _with(self, adapter: str | None) -> Iterator[None]:
        if self.peft is None:
            yield
        elif adapter is None:
            with self.peft.disable_adapter():
                yield
        else:
            self.peft.set_adapter(adapter)
            yield

    def predictor(self, name: str, adapter: str | None = None, *, examples: Sequence[Conversation] = ()) -> LanguageModel:
        return LanguageModel(name, self.model, self.chat, examples=examples, active=lambda: self._with(adapter))
