"""The values that walk through the data rooms, in order: Row -> item -> Example -> Block. Torch-free.

In: nothing. Out: frozen dataclasses. Runs in: Ray Data tasks, the driver, train workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from, for every message about it: `file` as the person named it, `row` from 1 (its line in JSONL and CSV)."""

    file: str
    row: int
    source: int = 0

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record: the parsed JSON object, CSV line or paragraph (`{"text": ...}`), untouched."""

    value: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 or 1 overrules the recipe's `train_on` for this turn (OpenAI's field); None leaves it to the recipe."""

    role: Role
    content: str
    weight: int | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str = ""
    """Of a tool's result: the call it answers (some templates refuse a result without it)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A document for continued pre-training."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt (ends with a user turn) and two answers to it."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    origin: Origin


Item = Conversation | Text | Preference


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that will not be trained on, and why. `reason` is one of a small fixed vocabulary (it is counted); `detail` is for people."""

    origin: Origin
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, born with them, which of them are labels.

    ids: int32 [T]; mask: uint8 [T], 1 where the token is to be predicted by the one before it (the first token is never trained).
    roles: uint8 [T], index into ROLES of the turn that wrote the token (audit: trained tokens per role).
    """

    ids: np.ndarray
    mask: np.ndarray
    roles: np.ndarray
    origin: Origin
    truncated: bool = False
    """Trained tokens were cut off by `max_length`."""
    num_answers: int = 0
    num_stopped: int = 0
    """Of the answers (trained assistant turns), how many end in a trained stop token."""

    @property
    def num_trained(self) -> int:
        return int(self.mask[1:].sum())


ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool", "text", "template")
"""Roles a token may have; `template` is markup no turn wrote, `text` a pre-training document."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a micro-step reads: one or more whole segments laid end to end. Attention and positions never cross a segment.

    ids: int32 [T]; mask: uint8 [T]; lengths: int32 [S], sum T; rows: int64 [S], the index of each segment's item in its split.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Trained tokens: a segment's first token has nothing before it, so it never counts."""
        firsts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        return int(self.mask.sum() - self.mask[firsts].sum())


@dataclass(slots=True)
class Counts:
    """A small mutable tally used by the audit; merged across tasks."""

    values: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, amount: int = 1) -> None:
        self.values[key] = self.values.get(key, 0) + amount

    def merge(self, other: Counts) -> None:
        for key, amount in other.values.items():
            self.add(key, amount)
