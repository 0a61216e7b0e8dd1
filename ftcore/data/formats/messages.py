"""messages: OpenAI's `{messages: [{role, content, weight?, tool_calls?}], tools?}`.

In: Row. Out: Conversation. Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore.data.formats.base import conversation, format, role_of, text_of, tool_calls_of, tools_of
from ftcore.data.types import Conversation, Message, Row
from ftcore.errors import DataError


def _recognises(value: Mapping[str, Any]) -> str:
    turns = value.get("messages")
    known = isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return "it has `messages` with a `role` each" if known else ""


@format("messages", item=Conversation, recognises=_recognises)
def messages(row: Row) -> Conversation:
    turns = row.value.get("messages")
    if not isinstance(turns, list):
        raise DataError("missing key", got="no list `messages`", wanted="messages: [{role, content}]")
    return conversation([message(turn) for turn in turns], row, tools_of(row.value.get("tools")))


def message(turn: Any) -> Message:
    """One OpenAI message. `reasoning_content` is put before the answer between <think> tags, as the models that write it do."""
    if not isinstance(turn, dict):
        raise DataError("a turn is not an object", got=type(turn).__name__, wanted="{role, content}")
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError("broken weight", got=repr(weight)[:40], wanted="0 or 1")
    content = text_of(turn.get("content"), "`content`")
    if thinking := text_of(turn.get("reasoning_content"), "`reasoning_content`"):
        content = f"<think>\n{thinking.strip()}\n</think>\n\n{content}"
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    call_id = turn.get("tool_call_id")
    return Message(
        role_of(turn.get("role")),
        content,
        None if weight is None else int(weight),
        tool_calls_of(calls),
        call_id if isinstance(call_id, str) else "",
    )
