"""Entailment: how far a text supports another, sentence by sentence, by a classifier of sentence pairs that the user names.

In: sources and answers. Out: a number from 0 to 1 for each. Runs in: the driver; torch is imported inside functions.

SummaC-ZS (Laban et al. 2022, section 3.2): of each sentence of the answer the highest probability that some sentence of the source entails
it, and the mean of these. It is small models' strength to judge sentences, not documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from ftcore.devices import device_here
from ftcore.errors import ModelError
from ftcore.weights import base_folder, weights_digest

END = re.compile("(?<=[.!?])\\s+|(?<=[\u3002\uff01\uff1f\uff1b])|\\n+")
PAIRS_AT_ONCE = 32
LABEL = "entailment"
SPECIAL = 2
"""Positions that RoBERTa and its kin keep for themselves."""

Entails = Callable[[Sequence[tuple[str, str]]], np.ndarray]
"""(premise, hypothesis) pairs -> probabilities [N]."""


class Entailment:
    """A sequence classifier with a label called `entailment`, in fp32, on a GPU where this process has one."""

    def __init__(self, name: str) -> None:
        """`name`: a folder or hub name. Raises ModelError for one that has no such label, or is no classifier of pairs."""
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        folder = base_folder(name, "main")
        told = AutoConfig.from_pretrained(folder).label2id or {}
        labels = {str(label).lower(): int(at) for label, at in told.items()}
        if LABEL not in labels or len(labels) < 2:
            raise ModelError(
                "this model tells no entailment", where=f"--entailment {name}", got=f"labels {', '.join(labels)}",
                wanted=f"a label `{LABEL}` in label2id of its config.json", remedy="take a model of natural language inference (NLI)",
            )  # fmt: skip
        self.name, self.digest, self._at = name, weights_digest(folder), labels[LABEL]
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).float().eval()
        self._most = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings - SPECIAL)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Pairs of like length together: padding is work."""
        import torch

        found = np.zeros(len(pairs))
        model = self._model.to(device_here())  # late: until then the systems have it
        order = sorted(range(len(pairs)), key=lambda at: len(pairs[at][0]) + len(pairs[at][1]))
        for start in range(0, len(order), PAIRS_AT_ONCE):
            chosen = order[start : start + PAIRS_AT_ONCE]
            premises, hypotheses = zip(*(pairs[at] for at in chosen), strict=True)
            batch = self._tokenizer(
                list(premises), list(hypotheses), truncation=True, max_length=self._most, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits
            found[chosen] = torch.softmax(logits.float(), dim=-1)[:, self._at].cpu().numpy()
        return found


def support(sources: Sequence[str], answers: Sequence[str], entails: Entails) -> list[float]:
    """Of each answer by its source; 0 for an answer without a sentence (nothing supports it), or beside an empty source."""
    cut = [(sentences(source), sentences(answer)) for source, answer in zip(sources, answers, strict=True)]
    pairs = [(premise, hypothesis) for premises, hypotheses in cut for hypothesis in hypotheses for premise in premises]
    known = list(dict.fromkeys(pairs))
    values = dict(zip(known, entails(known), strict=True)) if known else {}
    return [
        float(np.mean([max(values[premise, hypothesis] for premise in premises) for hypothesis in hypotheses]))
        if premises and hypotheses
        else 0.0
        for premises, hypotheses in cut
    ]


def sentences(text: str) -> list[str]:
    """Cut after marks that end one, English or Chinese, and at line ends; pieces without a letter or digit are left out."""
    return [piece.strip() for piece in END.split(text) if any(character.isalnum() for character in piece)]
