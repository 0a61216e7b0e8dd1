"""sharegpt: `{conversations: [{from, value}], system?, tools?}`; roles human, gpt, system, function_call, observation.

In: Row. Out: Conversation. Runs in: Ray Data tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftcore.data.formats.base import conversation, format, role_of, text_of, tool_calls_of, tools_of
from ftcore.data.types import Conversation, Message, Row
from ftcore.errors import DataError


def _recognises(value: Mapping[str, Any]) -> str:
    turns = value.get("conversations", value.get("conversation"))
    known = isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in turns)
    return "it has `conversations` with `from` and `value` each" if known and "chosen" not in value else ""


@format("sharegpt", item=Conversation, recognises=_recognises)
def sharegpt(row: Row) -> Conversation:
    turns = row.value.get("conversations", row.value.get("conversation"))
    if not isinstance(turns, list):
        raise DataError("missing key", got="no list `conversations`", wanted="conversations: [{from, value}]")
    messages = [message(turn) for turn in turns]
    if system := text_of(row.value.get("system"), "`system`"):
        messages.insert(0, Message("system", system))
    return conversation(messages, row, tools_of(row.value.get("tools")))


def message(turn: Any) -> Message:
    """One turn. A `function_call` turn holds JSON `{name, arguments}` (or a list of them) and becomes tool calls of an empty answer."""
    if not isinstance(turn, dict) or "from" not in turn:
        raise DataError("a turn is not an object", got=repr(turn)[:60], wanted="{from, value}")
    role, text = role_of(turn["from"]), text_of(turn.get("value"), "`value`")
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError("broken weight", got=repr(weight)[:40], wanted="0 or 1")
    weight = None if weight is None else int(weight)
    if turn["from"] != "function_call":
        return Message(role, text, weight)
    try:
        calls = json.loads(text)
    except ValueError as error:
        raise DataError("broken tool call", got=str(error), wanted="JSON {name, arguments}") from error
    return Message(role, "", weight, tool_calls_of(calls if isinstance(calls, list) else [calls]))
