"""Tool calls in the families' own formats, cut at every byte; and grammars that let a model write nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ftcore.constraints import Constraint, Grammars
from ftcore.data.families import read_template, template_names
from ftcore.errors import DataError
from ftcore.tool_calls import FORMATS, CallPart, CallStream, Tools, call_constraint, format_of, marks_are_special, whole_calls
from tests.chats import make_tokenizer
from tests.live_engines import run

Calls = list[tuple[str, Any]]


def function(name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **keys}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = Tools((function("get_weather", parameters=CITY), function("now")))
OSLO = ("get_weather", {"city": "Oslo"})
ODD = ("get_weather", {"city": 'a}"{\\ ]</tool_call> é'})
SAMPLES: dict[str, tuple[str, str, str, Calls]] = {
    "qwen": ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>', "", [OSLO]),
    "qwen, two, after words": (
        "hermes",
        'I look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>\n{"name": "now", '
        '"arguments": {}}\n</tool_call>',
        "I look.", [OSLO, ("now", {})],
    ),
    "odd text": ("hermes", f'<tool_call>{{"arguments": {json.dumps(ODD[1])}, "name": "get_weather"}}</tool_call>', "", [ODD]),
    "arguments as text": ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', "", [OSLO]),
    "no arguments": ("hermes", '<tool_call>\n{"name": "now"}\n</tool_call>', "", [("now", {})]),
    "never closed": (
        "hermes", '<tool_call>{"name": "now", "arguments": {}}<tool_call>{"name": "now", "arguments": null}', "", [("now", {})] * 2,
    ),
    "unknown tool": ("hermes", 'x <tool_call>{"name": "rm"}</tool_call>', 'x <tool_call>{"name": "rm"}</tool_call>', []),
    "broken": ("hermes", "<tool_call>{name: now}</tool_call> ", "<tool_call>{name: now}</tool_call> ", []),
    "nearly a marker": ("hermes", "a < b <tool_calls> <tool_cal", "a < b <tool_calls> <tool_cal", []),
    "mistral": ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]', "", [OSLO]),
    "mistral, two": (
        "mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Oslo"}}]', "",
        [("now", {}), OSLO],
    ),
    "mistral, words": ("mistral", "see [TOOL_CALLS] none", "see [TOOL_CALLS] none", []),
    "llama": ("llama3", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', "", [OSLO]),
    "llama, tagged, two": (
        "llama3",
        '<|python_tag|>{"name": "now", "parameters": {}}; '
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}',
        "", [("now", {}), OSLO],
    ),
    "llama, an object that is no call": ("llama3", '{"name": "now", "age": 3}\n', '{"name": "now", "age": 3}\n', []),
    "llama, words": ("llama3", 'Say {"name": "now", "parameters": {}}', 'Say {"name": "now", "parameters": {}}', []),
}  # fmt: skip


def read(name: str, pieces: list[str], tools: Tools = TOOLS) -> tuple[str, list[CallPart]]:
    stream = CallStream(FORMATS[name], tools)
    taken = [*(stream.push(piece) for piece in pieces), stream.end()]
    return "".join(text for text, _ in taken), [part for _, parts in taken for part in parts]


@pytest.mark.parametrize("sample", SAMPLES)
def test_calls_are_the_same_wherever_the_text_is_cut(sample: str) -> None:
    name, text, shown, calls = SAMPLES[sample]
    cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]
    for pieces in cuts:
        got, parts = read(name, pieces)
        whole = whole_calls(parts)
        assert (got, [(call.name, json.loads(call.arguments)) for call in whole]) == (shown, calls), pieces
        assert len({call.id for call in whole}) == len(whole) and all(len(call.id) == 9 and call.id.isalnum() for call in whole)
        assert [part.index for part in parts] == sorted(part.index for part in parts)


def test_arguments_come_as_they_are_written_and_one_call_is_one() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    _, parts = read("hermes", list(text))
    assert parts[0].name == "get_weather" and len(parts) > 10
    stream = CallStream(FORMATS["hermes"], Tools(TOOLS.definitions, parallel=False))
    shown, parts_once = stream.push(text + text)
    assert (stream.is_full, shown, len(whole_calls(parts_once))) == (True, "", 1)
    half = CallStream(FORMATS["hermes"], Tools(TOOLS.definitions, parallel=False))
    half.push(text[:-20])
    half.end()
    assert (half.num_calls, half.is_full) == (1, False)
    _, cut = read("hermes", [text[:-30]])
    assert whole_calls(cut)[0].arguments == '{"city": "Oslo"}'[: len(whole_calls(cut)[0].arguments)]


def test_the_format_follows_from_the_template() -> None:
    for name in template_names():
        if "tools" not in read_template(name):
            with pytest.raises(DataError, match="no place for tools"):
                format_of(read_template(name))
    assert format_of("{{ tools }}<tool_call>").name == "hermes"
    assert format_of("{{ tools }}[TOOL_CALLS]").name == "mistral"
    assert format_of('{{ tools }}{"name": n, "parameters": d}').name == "llama3"
    assert format_of("{{ tools }}", "hermes").name == "hermes"
    for unknown in ("{{ tools }}", "{{ tools }}<tool_call><function=", "{{ tools }}[TOOL_CALLS][ARGS]"):
        with pytest.raises(DataError, match="not known"):
            format_of(unknown)


def marked_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("<tool_call>", special=False)])
    return tokenizer


def takes(tokenizer: PreTrainedTokenizerFast, constraint: Constraint, texts: list[str]) -> list[bool]:
    """Whether each text, and the stop token behind it, is an answer under the constraint."""

    async def go() -> list[bool]:
        grammars = Grammars(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
        grammar = await grammars.compile(constraint)
        grammars.close()
        found = []
        for text in texts:
            walk = grammar.begin()
            found.append(
                all(walk.accept(token) for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            )
        return found

    return run(go())


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_takes_its_formats_calls_and_no_broken_ones(name: str) -> None:
    tokenizer, format = marked_tokenizer(), FORMATS[name]
    assert marks_are_special(format, tokenizer) == (name == "mistral")
    mark, key = format.marker + format.before, format.key
    oslo, now = f'{{"name": "get_weather", "{key}": {{"city": "Oslo"}}}}', f'{{"name": "now", "{key}": {{}}}}'
    wrong = f'{{"name": "get_weather", "{key}": {{"city": 3}}}}'
    one, two, bad = mark + oslo + format.after, mark + oslo + format.again + now + format.after, mark + wrong + format.after
    must = Tools(TOOLS.definitions, must=True)
    assert takes(tokenizer, call_constraint(format, must, tokenizer), [one, two, bad, "Hello"]) == [True, True, False, False]
    single = Tools(TOOLS.definitions, must=True, parallel=False)
    assert takes(tokenizer, call_constraint(format, single, tokenizer), [one, two]) == [True, False]
    named = Tools(TOOLS.definitions, must=True, only="now")
    assert takes(tokenizer, call_constraint(format, named, tokenizer), [one, mark + now + format.after]) == [False, True]
    strict = Tools((function("get_weather", parameters=CITY, strict=True), function("now")))
    assert strict.is_held and not TOOLS.is_held
    free = takes(tokenizer, call_constraint(format, strict, tokenizer), [one, two, bad, "Hello {", ""])
    assert free == [True, True, False, True, True]
    for text in (one, two):
        shown, parts = read(name, list(text))
        assert shown == "" and whole_calls(parts)[0].name == "get_weather"
