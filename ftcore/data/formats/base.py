"""Formats: how a raw row reads. One file per format in this folder, each one decorated function.

In: Row. Out: an item (Conversation, Text, Preference, ...) or a DataError whose `what` is the reason a row is rejected for.
Runs in: Ray Data tasks, the driver; no torch.

What is refused in every conversation, and what is let pass, is decided here once (`conversation`):
refused: no turns; a start with the assistant; no answer at all; an empty answer or question; two user turns or two answers in a row;
a tool result that follows no answer; an unknown role; content that is not text.
let pass: system turns anywhere (the template decides), a last turn without an answer (it has no labels), several tool results in a row,
an empty answer that calls a tool, an empty answer with weight 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcore.data.types import Conversation, Item, Message, Role, Row
from ftcore.errors import DataError
from ftcore.registry import Registry

FORMATS: Registry[Format] = Registry("format", "ftcore.data.formats")

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """`recognises(value)` says why a row looks like this format ("it has the keys ..."), or "" if it does not; `make` builds the item."""

    name: str
    item: type
    recognises: Callable[[Mapping[str, Any]], str]
    make: Callable[[Row], Item]


def format(
    name: str, *, item: type, recognises: Callable[[Mapping[str, Any]], str]
) -> Callable[[Callable[[Row], Item]], Callable[[Row], Item]]:
    """Decorator: registers a function Row -> Item as a format."""

    def add(make: Callable[[Row], Item]) -> Callable[[Row], Item]:
        FORMATS.register(name)(Format(name, item, recognises, make))
        return make

    return add


def recognise(rows: Sequence[Row], item: type) -> tuple[str, str]:
    """The format whose `item` this stage learns from and that fits most of the given first rows; and why, as a clause for people.

    Rows it does not fit are left to `to_item`, which rejects them one by one. Raises DataError when fewer than half fit, or two as well.
    """
    if not rows:
        raise DataError("there is no row to recognise a format by", wanted="at least one readable row", remedy="check data.sources")
    wanted = {name: entry for name, entry in FORMATS.items() if entry.item is item}
    if not wanted:
        raise DataError(f"no format makes a {item.__name__}", wanted=" | ".join(FORMATS), remedy="register one, or choose another stage")
    fits = {name: [entry.recognises(row.value) for row in rows] for name, entry in wanted.items()}
    counts = {name: sum(map(bool, reasons)) for name, reasons in fits.items()}
    most = max(counts.values())
    best = [name for name, count in counts.items() if count == most]
    if 2 * most < len(rows):
        raise _unrecognised(rows, item, fits[best[0]], best[0])
    if len(best) > 1:
        remedy = "name one with data.sources[].format"
        raise DataError("more than one format fits these rows", where=rows[0].origin, got=" and ".join(best), remedy=remedy)
    seen = "all" if most == len(rows) else f"{most}"
    return best[0], f"{next(filter(None, fits[best[0]]))} (in {seen} of the first {len(rows)} rows)"


def _unrecognised(rows: Sequence[Row], item: type, reasons: list[str], best: str) -> DataError:
    odd = next(row for row, reason in zip(rows, reasons, strict=True) if not reason)
    near = f"; only {sum(map(bool, reasons))} of {len(rows)} rows look like {best}" if any(reasons) else ""
    keys = ", ".join(sorted(map(str, odd.value))[:20]) or "no keys"
    others = [name for name, entry in FORMATS.items() if entry.item is not item and entry.recognises(odd.value)]
    inside = next((key for key, value in odd.value.items() if isinstance(value, list) and value and isinstance(value[0], dict)), None)
    if len(rows) == 1 and inside is not None and not others:
        return DataError(
            "the file is one object that holds the rows",
            where=odd.origin,
            got=f"a list of objects under `{inside}`",
            wanted="the rows themselves",
            remedy=f"save the list under `{inside}` as a file of its own",
        )
    hint = f"this looks like {' or '.join(others)}, which another stage learns from; or " if others else ""
    return DataError(
        f"no known format of a {item.__name__} fits these rows",
        where=odd.origin,
        got=f"keys: {keys}{near}",
        wanted=" | ".join(name for name, entry in FORMATS.items() if entry.item is item),
        remedy=f"{hint}name it with data.sources[].format, or rename the columns",
    )


def to_item(row: Row, name: str) -> Item:
    """One row, read as that format. Raises DataError: `what` is the reason it is rejected for."""
    return FORMATS[name].make(row)


def text_of(value: Any, what: str) -> str:
    """A string field; None is an empty one; OpenAI's list of text parts is joined. Anything else is refused."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") for part in value
    ):
        return "".join(str(part.get("text", "")) for part in value)
    raise DataError("a turn is not text", got=f"{what} is {_kind(value)}", wanted="a string")


def role_of(value: Any) -> Role:
    role = ROLE_NAMES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise DataError("unknown role", got=repr(value)[:60], wanted="system | user | assistant | tool")
    return role


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list, or the same as JSON text; bare functions are wrapped as OpenAI has them."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError("broken tools", got=str(error), wanted="a JSON list of tool definitions") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("broken tools", got=_kind(value), wanted="a list of tool definitions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def tool_calls_of(value: Any) -> tuple[dict[str, Any], ...]:
    """OpenAI's tool_calls, with `arguments` as an object (chat templates write it as JSON themselves)."""
    calls = []
    for call in value or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("broken tool call", got=_kind(call), wanted="{function: {name, arguments}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise DataError("broken tool call", got=f"arguments: {error}", wanted="JSON") from error
        kept = {key: text for key, text in call.items() if key == "id" and isinstance(text, str)}
        calls.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(calls)


def conversation(messages: Iterable[Message], row: Row, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """The one place that decides which conversations are refused (see the top of this file)."""
    turns = tuple(messages)
    if not turns:
        raise DataError("no turns")
    before: Role = "system"
    for i, turn in enumerate(turns):
        place = f"turn {i + 1} of {len(turns)} ({turn.role})"
        if turn.role == "assistant":
            if before == "system":
                raise DataError("starts with the assistant", got=place, wanted="a user turn first")
            if before == "assistant":
                raise DataError("two answers in a row", got=place)
            if not turn.content.strip() and not turn.tool_calls and turn.weight != 0:
                raise DataError("empty answer", got=place)
        elif turn.role == "user":
            if before == "user":
                raise DataError("two user turns in a row", got=place, wanted="an answer between them")
            if not turn.content.strip():
                raise DataError("empty question", got=place)
        elif turn.role == "tool" and before not in ("assistant", "tool"):
            raise DataError("a tool result with no answer before it", got=place)
        if turn.role != "system":
            before = turn.role
    if all(turn.role != "assistant" for turn in turns):
        raise DataError("no answer", got=f"{len(turns)} turns, none by the assistant")
    return Conversation(turns, row.origin, tools)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", type(None): "null", str: "text"}.get(
        type(value), type(value).__name__
    )
