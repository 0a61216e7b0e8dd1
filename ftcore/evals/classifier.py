"""Classifier: a local model for sequence classification that the user names, and the label whose probability is asked for.

In: FOLDER#LABEL, texts. Out: probabilities. Runs in: the driver (checking), workers of an evaluation (classifying).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ftcore.devices import device_here
from ftcore.errors import ConfigError
from ftcore.weights import weights_digest

BATCH = 32
LONGEST = 512
"""Tokens that are looked at where neither the model nor its tokenizer says how many it takes."""


@dataclass(frozen=True)
class Classifier:
    """`weights`: digest of its safetensors files; `label`: as its config.json calls it."""

    folder: str
    label: str
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> Classifier:
        """Raises ConfigError for what is no such model, or has no such label; loads nothing."""
        place, _, label = text.partition("#")
        folder = Path(place).expanduser().absolute()
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                "there is no classifier there",
                where="--classifier",
                got=f"{place}: {error}",
                wanted="FOLDER#LABEL, a model's folder on disk",
            ) from error
        labels = list(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).values())
        if not any("SequenceClassification" in name for name in config.get("architectures") or ()):
            raise ConfigError(
                "this model does not classify texts", where=place, got=", ".join(config.get("architectures") or ("no architectures",)),
                wanted="a ...ForSequenceClassification",
            )  # fmt: skip
        if label not in labels:
            raise ConfigError(
                "which of its labels is asked for?", where="--classifier", got=label or "no label", wanted=" | ".join(labels),
                remedy=f"--classifier {place}#{labels[-1]}",
            )  # fmt: skip
        return cls(str(folder), label, weights_digest(folder))

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """Of the label, for each text; an empty text is asked like any other. Of a long one its beginning is looked at."""
        model, tokenizer, longest = _opened(self.folder)
        return [float(value) for at in range(0, len(texts), BATCH) for value in self._of(model, tokenizer, texts[at : at + BATCH], longest)]

    def _of(self, model: Any, tokenizer: Any, texts: Sequence[str], longest: int) -> Any:
        import torch  # the driver checks a classifier without it

        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        alone = model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        return (logits.sigmoid() if alone else logits.softmax(-1))[:, model.config.label2id[self.label]].cpu()


@cache
def _opened(folder: str) -> tuple[Any, Any, int]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    room = getattr(model.config, "max_position_embeddings", LONGEST)
    return model.to(device_here()).eval(), tokenizer, min(tokenizer.model_max_length, room)
