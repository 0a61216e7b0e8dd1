"""Tool calls: found in a model's text as it comes, in the formats that the common families write, and grammars that hold a model to them.

In: a chat template, the tools of a request, text piece by piece. Out: shown text, and CallParts (a name, then its arguments as they come).
Runs in: serving replicas.

A format is one function, which takes characters (`yield` waits for the next; "" is the end) and hands on what they mean. What looks like a
call and is none (no such tool, broken before its arguments) is text.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore.constraints import Constraint, json_rule, text_rule
from ftcore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reader = Generator[None, str, None]
MAX_CALLS = 16
BLANK, NEVER = " \t\r\n", "\0"


@dataclass(frozen=True)
class Tools:
    """What a model may call: OpenAI's definitions, whether it must, and which of them."""

    definitions: tuple[dict[str, Any], ...]
    must: bool = False
    only: str = ""
    """The one function that it has to call."""
    parallel: bool = True
    """Several calls in one answer."""

    @property
    def shown(self) -> tuple[dict[str, Any], ...]:
        """As the chat template is given them: what is strict is this server's business."""
        return tuple(
            {**each, "function": {key: value for key, value in each["function"].items() if key != "strict"}} for each in self.definitions
        )

    @property
    def functions(self) -> list[dict[str, Any]]:
        """Those that may be called."""
        return [each["function"] for each in self.definitions if self.only in ("", each["function"]["name"])]

    @property
    def is_held(self) -> bool:
        """Whether the answer needs a grammar: it must call, or a function is strict."""
        return self.must or any(function.get("strict") for function in self.functions)


@dataclass(frozen=True)
class CallPart:
    """The beginning of a call (its id and name), or more of its arguments' JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallStream:
    """One answer's text, taken apart."""

    def __init__(self, format: ToolFormat, tools: Tools) -> None:
        self._names = {function["name"] for function in tools.functions}
        self._most = MAX_CALLS if tools.parallel else 1
        self._pending = self._blank = self._text = ""
        self._back: deque[str] = deque()
        self._parts: list[CallPart] = []
        self.num_calls = 0
        self.is_full = False
        """As many calls as were allowed are complete; nothing follows."""
        self._reader = format.read(self)
        next(self._reader)

    def push(self, text: str) -> tuple[str, tuple[CallPart, ...]]:
        """(text to show, parts of calls) that this text adds."""
        for char in text:
            if not self.is_full:
                self._reader.send(char)
        return self._taken()

    def end(self) -> tuple[str, tuple[CallPart, ...]]:
        """What was held back, when no text follows."""
        with suppress(StopIteration):
            while not self.is_full:
                self._reader.send("")
        if not self.num_calls:
            self._text += self._blank
        return self._taken()

    def _taken(self) -> tuple[str, tuple[CallPart, ...]]:
        taken = self._text, tuple(self._parts)
        self._text, self._parts = "", []
        return taken

    # ---- for the formats' functions

    def show(self, text: str) -> None:
        """Blanks before and after calls are not shown."""
        self._pending = ""
        whole = self._blank + text
        shown = whole.rstrip(BLANK)
        self._blank = whole[len(shown) :]
        self._text += shown

    def next(self) -> Generator[None, str, str]:
        char = self._back.popleft() if self._back else (yield)
        self._pending += char
        return char

    def skip_blanks(self) -> Generator[None, str, str]:
        char = " "
        while char and char in BLANK:
            char = yield from self.next()
        return char

    def text_until(self, marker: str) -> Generator[None, str, bool]:
        """Shows text up to a marker, never a part of it. False at the end."""
        held = ""
        while held != marker:
            char = yield from self.next()
            if not char:
                self.show(held)
                return False
            held += char
            while not marker.startswith(held):
                self.show(held[0])
                held = held[1:]
        self._pending = held
        return True

    def expect(self, marker: str) -> Generator[None, str, bool]:
        """Passes over blanks and a marker; what is something else is read again."""
        seen, before = "", self._pending
        while True:
            char = yield from self.next()
            seen += char
            rest = seen.lstrip(BLANK)
            if rest == marker or not char or not marker.startswith(rest):
                break
        if rest != marker:
            self._pending = before
            self._back.extendleft(reversed(seen))
        return rest == marker

    def call(self, needs_arguments: bool = False) -> Generator[None, str, bool]:
        """{"name": ..., "arguments" or "parameters": ...}; arguments are handed on as they come. False: it was none, and is text."""
        name, held, begun = "", None, False
        char = yield from self.skip_blanks()
        while char in ("{", ","):
            if (quote := (yield from self.skip_blanks())) != '"':
                break
            key, _ = yield from self._value(quote)
            if (yield from self.skip_blanks()) != ":":
                break
            first = yield from self.skip_blanks()
            is_arguments = key in ('"arguments"', '"parameters"') and not begun
            if is_arguments and name and first == "{":
                begun = True
                self._begin(name)
            value, char = yield from self._value(first, self._more if is_arguments and begun else None)
            if is_arguments and not begun:
                held = value
            elif key == '"name"' and not name:
                name = self._known(value)
            if name and held is not None and not begun:
                begun = True
                self._begin(name)
                self._more(_unquoted(held))
            char = char or (yield from self.skip_blanks())
        if name and not begun and char == "}" and not needs_arguments:
            begun = True
            self._begin(name)
            self._more("{}")
        self.show("" if begun else self._pending)
        self.is_full = char == "}" and self.num_calls >= self._most
        return begun

    def _value(self, first: str, sink: Callable[[str], None] | None = None) -> Generator[None, str, tuple[str, str]]:
        """(a JSON value's text, the comma or bracket read behind it if that was needed to see its end)."""
        text, depth, quoted, char = "", 0, False, first
        while char:
            if not quoted and not depth and char in ",}]":
                return text.rstrip(BLANK), char
            text += char
            if sink is not None:
                sink(char)
            if quoted:
                if char == "\\":
                    char = yield from self.next()
                    text += char
                    if sink is not None:
                        sink(char)
                elif char == '"':
                    quoted = False
            elif char == '"':
                quoted = True
            else:
                depth += (char in "{[") - (char in "}]")
            if not depth and not quoted and char in '}]"':
                return text, ""
            char = yield from self.next()
        return text, ""

    def _known(self, value: str) -> str:
        try:
            name = json.loads(value)
        except ValueError:
            return ""
        return name if isinstance(name, str) and name in self._names else ""

    def _begin(self, name: str) -> None:
        self._pending = self._blank = ""
        self._parts.append(CallPart(self.num_calls, secrets.token_hex(5)[:9], name))
        self.num_calls += 1

    def _more(self, text: str) -> None:
        self._pending = ""
        last = self._parts[-1] if self._parts else None
        if last is not None and not last.name:
            self._parts[-1] = replace(last, arguments=last.arguments + text)
        elif text:
            self._parts.append(CallPart(self.num_calls - 1, arguments=text))


def _unquoted(value: str) -> str:
    """Arguments; some models write their JSON as a string."""
    try:
        inner = json.loads(value)
    except ValueError:
        return value
    return inner if isinstance(inner, str) else "{}" if inner is None else value


def _hermes(stream: CallStream) -> Reader:
    while (yield from stream.text_until("<tool_call>")):
        if (yield from stream.call()):
            yield from stream.expect("</tool_call>")


def _mistral(stream: CallStream) -> Reader:
    while (yield from stream.text_until("[TOOL_CALLS]")):
        if (yield from stream.expect("[")):
            while (yield from stream.call()) and (yield from stream.expect(",")):
                pass
            yield from stream.expect("]")
        else:
            stream.show("[TOOL_CALLS]")


def _llama3(stream: CallStream) -> Reader:
    yield from stream.expect("<|python_tag|>")
    while (yield from stream.call(needs_arguments=True)) and (yield from stream.expect(";")):
        pass
    while (yield from stream.text_until(NEVER)):
        stream.show(NEVER)


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes its calls."""

    name: str
    read: Callable[[CallStream], Reader]
    sign: str
    """Text that stands in the chat templates of this family, and in no other's."""
    marker: str
    """What calls begin with; empty where an answer that begins with a bracket is one."""
    key: str
    before: str
    """Between the marker and the first call."""
    again: str
    """Between two calls."""
    after: str


FORMATS = {
    each.name: each
    for each in (
        ToolFormat("hermes", _hermes, "<tool_call>", "<tool_call>", "arguments", "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ToolFormat("mistral", _mistral, "[TOOL_CALLS]", "[TOOL_CALLS]", "arguments", "[", ", ", "]"),
        ToolFormat("llama3", _llama3, '"parameters"', "", "parameters", "", "; ", ""),
    )
}
UNKNOWN = ("<function=", "[ARGS]", "<arg_key>")
"""In templates of families that write calls in yet other ways."""


def format_of(template: str, setting: str = "auto") -> ToolFormat:
    """The format that a base's template shows, or that was named. Raises DataError where there is none."""
    if "tools" not in template:
        raise DataError("the chat template of this base has no place for tools", got="tools", wanted="a request without them")
    if setting != "auto":
        return FORMATS[setting]
    found = [each for each in FORMATS.values() if each.sign in template] if not any(word in template for word in UNKNOWN) else []
    if not found:
        raise DataError("how this base writes tool calls is not known", got="tools", wanted="a server whose `tool_format` names it")
    return found[0]


def marks_are_special(format: ToolFormat, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what marks a call is a special token, which decoding leaves out unless told."""
    marks = {format.marker, "<|python_tag|>"} if format.name == "llama3" else {format.marker}
    return bool(marks & set(tokenizer.all_special_tokens)) or any(
        token.special and token.content in marks for token in tokenizer.added_tokens_decoder.values()
    )


def call_constraint(format: ToolFormat, tools: Tools, tokenizer: PreTrainedTokenizerBase) -> Constraint:
    """Calls and nothing else where the model must; otherwise text, in which every call of a strict function is right."""
    rules, names = [], []
    for i, function in enumerate(tools.functions):
        schema = function.get("parameters", {"type": "object", "properties": {}, "additionalProperties": False})
        held = tools.must or function.get("strict")
        head = text_rule(f'{{"name": {json.dumps(function["name"])}, "{format.key}": ')
        rules += [f'f{i}: {head} a{i} "}}"', f"a{i}: {json_rule(schema if held else {'type': 'object'})}"]
        names.append(f"f{i}")
    more = f"({_literal(format.again)} call){{0,{MAX_CALLS - 1}}}" if tools.parallel else ""
    calls = f"{_literal(format.before)} call {more} {_literal(format.after)}"
    rules += [f"call: {' | '.join(names)}", f"calls: {calls}"]
    special = marks_are_special(format, tokenizer)
    mark = f"<[{tokenizer.convert_tokens_to_ids(format.marker)}]>" if special else _literal(format.marker)
    if not format.marker:
        start = ["start: calls" if tools.must else 'start: calls | talk | ""', "talk: /[^{\\s](?s:.*)/"]
    elif tools.must:
        start = [f"start: {mark} calls"]
    else:
        lead = f"lead: talk {mark}" if special else f"lead[suffix={text_rule(format.marker)}]: /(?s:.*)/"
        start = ["start: (lead calls)* talk", lead, "talk: /(?s:.*)/"]
    return Constraint("\n".join([*start, *rules]))


def _literal(text: str) -> str:
    return text_rule(text) if text else ""


def whole_calls(parts: Sequence[CallPart]) -> list[CallPart]:
    """Calls with all their arguments."""
    calls: list[CallPart] = []
    for part in parts:
        if part.name:
            calls.append(part)
        else:
            calls[part.index] = replace(calls[part.index], arguments=calls[part.index].arguments + part.arguments)
    return calls
