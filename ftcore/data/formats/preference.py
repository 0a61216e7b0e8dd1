"""preference: a prompt and two answers, `{prompt | instruction | conversations | messages, chosen, rejected}`; answers as text or as turns.

In: Row. Out: Preference. Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore.data.formats.base import conversation, format, text_of
from ftcore.data.formats.messages import message as openai_message
from ftcore.data.formats.sharegpt import message as sharegpt_message
from ftcore.data.types import Message, Preference, Row
from ftcore.errors import DataError


def _recognises(value: Mapping[str, Any]) -> str:
    return "it has the keys `chosen` and `rejected`" if "chosen" in value and "rejected" in value else ""


@format("preference", item=Preference, recognises=_recognises)
def preference(row: Row) -> Preference:
    value = row.value
    for key in ("chosen", "rejected"):
        if key not in value:
            raise DataError("missing key", got=f"no `{key}`", wanted="chosen, rejected")
    prompt = _prompt(value)
    chosen, rejected = _turns(value["chosen"]), _turns(value["rejected"])
    if not prompt:  # both answers are whole conversations that share their beginning
        if chosen[:-1] != rejected[:-1]:
            raise DataError("chosen and rejected answer different prompts")
        prompt = chosen[:-1]
    if system := text_of(value.get("system"), "`system`"):
        prompt = [Message("system", system), *prompt]
    for answer in (chosen, rejected):
        if not answer or answer[-1].role != "assistant":
            raise DataError("no answer", got="chosen or rejected does not end with the assistant")
        conversation([*prompt, answer[-1]], row)
    if chosen[-1] == rejected[-1]:
        raise DataError("chosen and rejected are the same")
    return Preference(tuple(prompt), chosen[-1], rejected[-1], row.origin)


def _prompt(value: Mapping[str, Any]) -> list[Message]:
    for key in ("conversations", "messages", "prompt", "question"):
        if value.get(key):
            return _turns(value[key], role="user")
    parts = [text_of(value.get(key), f"`{key}`") for key in ("instruction", "input")]
    text = "\n".join(part for part in parts if part)
    return [Message("user", text)] if text else []


def _turns(value: Any, *, role: str = "assistant") -> list[Message]:
    """An answer or prompt as text, as one turn, or as a list of turns (either spelling)."""
    if isinstance(value, str):
        return [Message("assistant" if role == "assistant" else "user", value)]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("a turn is not an object", got=type(value).__name__, wanted="text, a turn or a list of turns")
    return [sharegpt_message(turn) if "from" in turn else openai_message(turn) for turn in turns]
