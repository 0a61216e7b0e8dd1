"""Predictors: whatever foretells the answers of a conversation, judged answer by answer with the true past given (teacher forcing).

In: conversations. Out: Forecasts: for every answer, was it hit, and how likely was it held to be. Runs in: the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ftcore.data.chat import Chat
from ftcore.data.collate import IGNORED, Batch, collate
from ftcore.data.types import Block, Conversation, Example, Origin
from ftcore.evals.shots import prompted
from ftcore.models import CausalModel

BATCH_TOKENS = 4096
"""Tokens run through the model at once."""
ROWS_OF_LOGITS = 1024
"""Answer tokens whose logits are held at once."""


@dataclass(frozen=True)
class Forecast:
    """One conversation's answers, in order. hits: bool [A], every token of the answer, its stop token too, was the likeliest one;
    nlls: float [A], in nats, summed over the answer's tokens (nan where the predictor has no probabilities); tokens: int [A]."""

    hits: np.ndarray
    nlls: np.ndarray
    tokens: np.ndarray


class Predictor(Protocol):
    """Anything the tables of `ftcore.evals` have a line for."""

    name: str

    def forecast(self, conversations: Sequence[Conversation]) -> list[Forecast]:
        """One Forecast a conversation; every assistant turn whose weight is not 0 counts."""


Switch = Callable[[], AbstractContextManager[None]]


class LanguageModel:
    """A causal language model, with an adapter or bare. `active` is entered around the forward passes (switching adapters, for one)."""

    def __init__(
        self, name: str, model: CausalModel, chat: Chat, *, examples: Sequence[Conversation] = (), active: Switch = nullcontext
    ) -> None:
        """`examples`: solved conversations put in front of each one (k-shot prompting)."""
        self.name, self.model, self.chat, self.examples, self.active = name, model, chat, tuple(examples), active

    def forecast(self, conversations: Sequence[Conversation]) -> list[Forecast]:
        encoded = [self.chat.encode(prompted(conversation, self.examples)) for conversation in conversations]
        with self.active():
            return teacher_forced(self.model, encoded, pad_id=self.chat.tokenizer.pad_token_id or 0)

    def forecast_texts(self, texts: Sequence[str], context: int) -> list[Forecast]:
        """Of bare texts: all tokens after the one that begins a text, without one that ends it. A text longer than `context` tokens is
        several answers, a window of it each."""
        windows = [_from_their_first_token(self.chat, text, context) for text in texts]
        with self.active():
            each = [example for own in windows for example in own]
            found = iter(teacher_forced(self.model, each, pad_id=self.chat.tokenizer.pad_token_id or 0))
        return [_together([next(found) for _ in own]) for own in windows]


def _from_their_first_token(chat: Chat, text: str, context: int) -> list[Example]:
    """A tokenizer without a token that begins texts lends the one that ends them, which stands between documents."""
    tokenizer, most = chat.tokenizer, context - 1
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = []
    for start in range(0, max(1, len(ids)), most):
        part = [begin, *ids[start : start + most]]
        mask = np.ones(len(part), np.uint8)
        mask[:1] = 0
        found.append(Example(np.array(part, np.int32), mask, np.zeros(len(mask), np.uint8), Origin("text", 0)))
    return found


def _together(parts: Sequence[Forecast]) -> Forecast:
    return Forecast(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("hits", "nlls", "tokens")))


@torch.no_grad()
def teacher_forced(model: CausalModel, examples: Sequence[Example], *, pad_id: int = 0) -> list[Forecast]:
    """Runs every example once and looks at its trained runs of tokens; one run is one answer."""
    was_training = model.model.training
    model.model.eval()
    forecasts: list[Forecast | None] = [None] * len(examples)
    device = str(next(model.model.parameters()).device)
    for indices in batches([len(example.ids) for example in examples]):
        blocks = [_block(examples[i]) for i in indices]
        right, nll = token_scores(model, collate(blocks, padded=model.layout == "padded", pad_id=pad_id).to(device))
        at = 0
        for i in indices:
            runs = answer_runs(examples[i].mask)
            width = sum(end - start for start, end in runs)
            forecasts[i] = _by_answer(runs, right[at : at + width], nll[at : at + width])
            at += width
    model.model.train(was_training)
    return [forecast for forecast in forecasts if forecast is not None]


def token_scores(model: CausalModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For every trained target, in row-major order: was it the likeliest token (bool [N]); its negative log-probability (float64 [N])."""
    targets = batch.targets[batch.targets != IGNORED]
    exact = model.head_exact
    rows = model.hidden(batch) if exact else model.logits(batch)[batch.targets != IGNORED]
    right, nll = [], []
    for start in range(0, len(targets), ROWS_OF_LOGITS):
        part, wanted = rows[start : start + ROWS_OF_LOGITS], targets[start : start + ROWS_OF_LOGITS]
        logits = (model.head(part) if exact else part).float()[:, : model.vocabulary]
        right.append(logits.argmax(-1) == wanted)
        nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    if not right:
        return np.zeros(0, bool), np.zeros(0)
    return torch.cat(right).cpu().numpy(), torch.cat(nll).double().cpu().numpy()


def answer_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of every run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def batches(lengths: Sequence[int], budget: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of examples of like length, whose padded size stays within `budget` tokens (one longer example goes alone)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _block(example: Example) -> Block:
    return Block(example.ids, example.mask, np.array([len(example.ids)], np.int32), np.zeros(1, np.int64))


def _by_answer(runs: list[tuple[int, int]], right: np.ndarray, nll: np.ndarray) -> Forecast:
    widths = np.array([end - start for start, end in runs], np.int64)
    starts = np.cumsum(widths) - widths
    if not len(widths):
        return Forecast(np.zeros(0, bool), np.zeros(0), widths)
    return Forecast(np.logical_and.reduceat(right, starts), np.add.reduceat(nll, starts), widths)
