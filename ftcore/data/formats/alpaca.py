"""alpaca: `{instruction, input, output}`, with optional `system` and `history` (pairs of earlier turns).

In: Row. Out: Conversation. Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore.data.formats.base import conversation, format, text_of, tools_of
from ftcore.data.types import Conversation, Message, Row
from ftcore.errors import DataError


def _recognises(value: Mapping[str, Any]) -> str:
    return "it has the keys `instruction` and `output`" if "instruction" in value and "output" in value else ""


@format("alpaca", item=Conversation, recognises=_recognises)
def alpaca(row: Row) -> Conversation:
    """`input` follows `instruction` on a line of its own, as LLaMA-Factory has it."""
    value = row.value
    for key in ("instruction", "output"):
        if key not in value:
            raise DataError("missing key", got=f"no `{key}`", wanted="instruction, output")
    parts = [text_of(value.get(key), f"`{key}`") for key in ("instruction", "input")]
    messages: list[Message] = []
    if system := text_of(value.get("system"), "`system`"):
        messages.append(Message("system", system))
    for pair in value.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("broken history", got=repr(pair)[:60], wanted="pairs [question, answer]")
        messages += [Message("user", text_of(pair[0], "`history`")), Message("assistant", text_of(pair[1], "`history`"))]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", text_of(value["output"], "`output`")))
    return conversation(messages, row, tools_of(value.get("tools")))
