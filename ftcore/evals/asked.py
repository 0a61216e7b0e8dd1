"""Asked: a question of a test set and its right answer: a conversation cut before its last answer; or a whole document.

In: items as training reads them. Out: Asked rows; the same as Parquet. Runs in: the driver, workers; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from ftcore.data.duplicates import content_hash, item_text
from ftcore.data.formats.messages import message
from ftcore.data.types import Conversation, Item, Message, Preference, Row, Text
from ftcore.errors import DataError
from ftcore.storage import digest_of

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "content", "turns", "tools", "reference", "words", "kind", "group")])


@dataclass(frozen=True)
class Asked:
    """One question. `id` names its row in messages; `content`, 32 hex digits, the row's whole content wherever it lies."""

    id: str
    content: str
    turns: tuple[Message, ...]
    """What is asked: everything before the last answer; nothing of a document."""
    reference: str
    """The right answer, or the document."""
    tools: tuple[dict[str, Any], ...] = ()
    words: str = ""
    """All text of the row, by which near copies are found."""
    kind: str = ""
    """What the row is one of, where results are told by kind (--by)."""
    group: str = ""
    """Rows of one group are alike (--group): see Answered."""


def asked_of(item: Item) -> Asked:
    """Raises DataError for a row that asks nothing, or has no answer in words. A document asks nothing and is its own answer."""
    first, second = content_hash(item)
    if isinstance(item, Text):
        return Asked(str(item.origin), f"{first:016x}{second:016x}", (), item.text, words=item_text(item))
    if isinstance(item, Preference):
        turns, answer = item.prompt, item.chosen
    else:
        last = max((at for at, turn in enumerate(item.messages) if turn.role == "assistant"), default=0)
        turns, answer = item.messages[:last], item.messages[last]
    if not turns or not answer.content.strip():
        raise DataError("this row has no answer in words", where=item.origin, wanted="a last answer that is text")
    tools = item.tools if isinstance(item, Conversation) else ()
    return Asked(str(item.origin), f"{first:016x}{second:016x}", turns, answer.content, tools, item_text(item))


def asked_row(row: Row, turns: tuple[Message, ...], reference: str = "") -> Asked:
    """Of a row that is no conversation with its right answer; `reference` is what people are shown in its place."""
    words = "\n".join(turn.content for turn in turns)
    return Asked(str(row.origin), digest_of(row.value)[:32], turns, reference, words=words)


def prompt_of(row: Row) -> tuple[Message, ...]:
    """What a row {prompt: text} or {messages: turns} asks, without a last answer. Raises DataError where it asks nothing."""
    prompt, turns = row.value.get("prompt"), row.value.get("messages")
    if isinstance(turns, list):
        asked = tuple(message(turn) for turn in turns)
        asked = asked[:-1] if asked and asked[-1].role == "assistant" else asked
    else:
        asked = (Message("user", prompt),) if isinstance(prompt, str) else ()
    if not asked or asked[-1].role != "user" or not asked[-1].content.strip():
        raise DataError("this row asks nothing", where=row.origin, got=", ".join(map(str, row.value)), wanted="`prompt`, or `messages`")
    return asked


def to_table(rows: Iterable[Asked]) -> pa.Table:
    return pa.Table.from_pylist([_record(row) for row in rows], SCHEMA)


def from_table(table: pa.Table) -> list[Asked]:
    return [_row(record) for record in table.to_pylist()]


def _record(row: Asked) -> dict[str, str]:
    plain = {field.name: getattr(row, field.name) for field in fields(row)}
    turns = json.dumps([asdict(turn) for turn in row.turns], ensure_ascii=False)
    return {**plain, "turns": turns, "tools": json.dumps(row.tools, ensure_ascii=False)}


def _row(record: dict[str, str]) -> Asked:
    turns = [Message(**{**turn, "tool_calls": tuple(turn["tool_calls"])}) for turn in json.loads(record["turns"])]
    return Asked(**{**record, "turns": tuple(turns), "tools": tuple(json.loads(record["tools"]))})  # type: ignore[arg-type]
