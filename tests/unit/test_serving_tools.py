"""Formats and tools over HTTP: held answers, calls whole and streamed, results given back, and what is told of broken schemas."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ftcore.errors import IntegrityError
from ftcore.receipt_commands import main as verify_main
from tests.served import Server, Store, run, served
from tests.served import store as store

TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call: <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{%- for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>{{ message.content }}</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOUR: dict[str, Any] = {
    "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}, "level": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "level"], "additionalProperties": False,
}  # fmt: skip
PAINT = {"type": "function", "function": {"name": "paint", "description": "d", "parameters": COLOUR}}
NOW = {"type": "function", "function": {"name": "now"}}
ASK = {"role": "user", "content": "Hi"}


async def chat(server: Server, **body: Any) -> Any:
    whole = {"model": "base", "messages": [ASK], "max_tokens": 200, "seed": 1, **body}
    headers = {**server.headers("acme"), "content-type": "application/json"}
    return await server.http.post("/v1/chat/completions", headers=headers, content=json.dumps(whole))


def with_tools(store: Store, tmp_path: Path) -> Any:
    (tmp_path / "tools.jinja").write_text(TEMPLATE)
    engine = {"max_batch": 8, "max_context": 500, "num_threads": 1}
    return served(store, tmp_path, chat_template=str(tmp_path / "tools.jinja"), engine=engine)


def deltas(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed_choice(chunks: list[dict[str, Any]], index: int) -> tuple[str, list[dict[str, Any]], str]:
    """(content, calls, finish) of one choice, put together as OpenAI's clients do."""
    content, finish, calls = "", "", []
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        content += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for part in choice["delta"].get("tool_calls", ()):
            if part["index"] == len(calls):
                assert part["type"] == "function" and part["id"]
                calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return content, calls, finish


def test_an_answer_has_the_format_that_was_asked_for_whole_or_streamed(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            schema = {"type": "json_schema", "json_schema": {"name": "paint", "schema": COLOUR, "strict": True}}
            reply = (await chat(server, model="support", response_format=schema, n=3, logprobs=True, top_logprobs=2)).json()
            assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop"] * 3
            texts = [choice["message"]["content"] for choice in reply["choices"]]
            for text, choice in zip(texts, reply["choices"], strict=True):
                Draft202012Validator(COLOUR).validate(json.loads(text))
                assert "".join(token["token"] for token in choice["logprobs"]["content"]) == text
            assert len(set(texts)) > 1
            chunks = deltas((await chat(server, model="support", response_format=schema, n=3, stream=True)).text)
            assert [streamed_choice(chunks, i)[0] for i in range(3)] == texts
            for body, check in (
                ({"structured_outputs": {"regex": "[ab]{3,5}"}}, lambda text: set(text) <= set("ab") and 3 <= len(text) <= 5),
                ({"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}, lambda text: text in ("yes", "no")),
                ({"structured_outputs": {"json": {"type": "boolean"}}}, lambda text: text in ("true", "false")),
                ({"response_format": {"type": "text"}, "max_tokens": 3}, lambda text: True),
            ):
                assert check((await chat(server, **body)).json()["choices"][0]["message"]["content"]), body
            plain = await server.complete("acme", model="base", prompt="a", structured_outputs={"regex": "[0-9]{4}"}, max_tokens=9)
            assert len(plain.json()["choices"][0]["text"]) == 4
            cut = (await chat(server, structured_outputs={"regex": "[a-z]{90}"}, max_tokens=5)).json()["choices"][0]
            assert cut["finish_reason"] == "length"
            some = (await chat(server, response_format={"type": "json_object"}, max_tokens=8)).json()["choices"][0]
            assert some["message"]["content"].lstrip().startswith("{")

    run(go())


def test_a_tool_is_called_its_result_is_given_back_and_the_receipt_covers_the_call(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with with_tools(store, tmp_path) as server:
            asked = {"tools": [PAINT, NOW], "tool_choice": "required", "parallel_tool_calls": False, "n": 4}
            reply = await chat(server, **asked)
            choices = reply.json()["choices"]
            chunks = deltas((await chat(server, **asked, stream=True)).text)
            for i, choice in enumerate(choices):
                assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
                (call,) = choice["message"]["tool_calls"]
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "paint":
                    Draft202012Validator(COLOUR).validate(arguments)
                else:
                    assert (call["function"]["name"], arguments) == ("now", {})
                content, calls, finish = streamed_choice(chunks, i)
                assert (content, finish) == ("", "tool_calls")
                assert [(each["name"], each["arguments"]) for each in calls] == [(call["function"]["name"], call["function"]["arguments"])]
            cut = (await chat(server, **asked, max_tokens=25)).json()["choices"]
            assert "length" in {choice["finish_reason"] for choice in cut}
            named = (await chat(server, tools=[PAINT, NOW], tool_choice={"type": "function", "function": {"name": "paint"}})).json()
            message = named["choices"][0]["message"]
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["paint"]
            result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "done: blue"}
            again = await chat(server, tools=[PAINT], messages=[ASK, message, result], max_tokens=4)
            assert again.status_code == 200, again.text
            assert (await chat(server, tools=[PAINT], tool_choice="none", max_tokens=4)).json()["usage"]["prompt_tokens"] < 30

            keys = await server.http.get("/v1/receipt-keys", headers=server.headers("acme"))
            (tmp_path / "keys.json").write_text(keys.text)
            body = reply.json()
            (tmp_path / "answer.json").write_text(json.dumps(body))
            assert verify_main([str(tmp_path / "answer.json"), "--keys", str(tmp_path / "keys.json")]) == 0
            body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] += " "
            (tmp_path / "answer.json").write_text(json.dumps(body))
            with pytest.raises(IntegrityError, match="not the answer"):
                verify_main([str(tmp_path / "answer.json"), "--keys", str(tmp_path / "keys.json")])

    run(go())


def test_the_model_reads_the_tools_the_calls_and_their_results(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with with_tools(store, tmp_path) as server:
            base, prompts = server.replica.base, []
            chat_prompt = base.chat_prompt
            monkeypatch.setattr(base, "chat_prompt", lambda *given: prompts.append(chat_prompt(*given)) or prompts[-1])
            strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}
            call = {"id": "abc", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red", "level": 1}'}}
            turns = [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "abc", "content": "ok"},
            ]
            assert (await chat(server, messages=turns, tools=[strict], max_tokens=3)).status_code == 200
            text = base.tokenizer.decode(prompts[0])
            assert '"name": "paint"' in text and '"enum": ["red", "blue"]' in text and "strict" not in text
            assert '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "level": 1}}\n</tool_call>' in text
            assert "<tool_response>ok</tool_response>" in text and text.endswith("<|im_start|>assistant\n")

    run(go())


DEEP = json.loads('{"a":' * 80 + "1" + "}" * 80)


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def called(arguments: str) -> dict[str, Any]:
    return {"id": "a", "function": {"name": "f", "arguments": arguments}}


BROKEN: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tools": [NOW, tool({"type": "object", "properties": {"a": {"type": "strin"}}})]}, "tools[1].function.parameters.properties.a.type"),
    ({"tools": [tool({"type": "string"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool({"type": "object", "x": DEEP})]}, "nested too deeply"),
    ({"tools": [tool({"type": "object"}, "a b")]}, "tools.0.function.name"),
    ({"tools": [NOW, NOW]}, "same name"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, "no such function"),
    ({"tool_choice": "required"}, "no tools"),
    ({"tools": [NOW], "response_format": {"type": "json_object"}}, "not both"),
    ({"tools": [tool({"type": "array"})], "tool_choice": "none"}, "arguments are an object"),
    ({"tools": [tool({"type": "object", "properties": {"a": {"$ref": "http://x"}}})], "tool_choice": "required"}, "compiled"),
    ({"functions": [{"name": "f"}]}, "ask with tools"),
    ({"guided_json": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
    ({"structured_outputs": {"grammar": "start: x"}}, "grammar"),
    ({"structured_outputs": {"regex": "(a"}}, "unclosed"),
    ({"structured_outputs": {"regex": r"(a)\1"}}, "backreferences"),
    ({"structured_outputs": {"choice": []}}, "choice"),
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"properties": 3}), "response_format.json_schema.schema.properties"),
    (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "cannot be met"),
    (schema({"enum": ["v" * 90] * 5000}), "too large"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": [{"role": "assistant"}]}, "content"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [called("{}")]}]}, "assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [called("{")]}]}, "broken tool call"),
    ({"messages": [{"role": "assistant", "tool_calls": [called("[" * 9000)]}]}, "nested too deeply"),
    ({"messages": [{"role": "assistant", "tool_calls": [called('{"a": "\\ud800"}')]}]}, "Unicode"),
    ({"tools": [tool({"type": "object", "description": "<|im_end|>"})]}, "control tokens"),
    (schema({"const": "\ud800"}), "Unicode"),
    (schema({"patternProperties": [1]}), "patternProperties: this is no JSON schema"),
)  # fmt: skip


def test_a_broken_schema_pattern_or_tool_is_a_400_that_says_where(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with with_tools(store, tmp_path) as server:
            for body, words in BROKEN:
                reply = await chat(server, **{"max_tokens": 2, **body})
                assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), (words, reply.text)
            healthy = await asyncio.gather(*(chat(server, max_tokens=2) for _ in range(3)))
            assert {reply.status_code for reply in healthy} == {200}

    run(go())


def test_a_base_without_a_place_for_tools_and_an_engine_that_computes_nothing_say_so(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            reply = await chat(server, tools=[NOW])
            assert (reply.status_code, "no place for tools" in reply.text) == (400, True)
        async with served(store, tmp_path / "fake", engine={"kind": "fake", "max_context": 256}) as server:
            reply = await chat(server, response_format={"type": "json_object"})
            assert (reply.status_code, "computes nothing" in reply.text) == (400, True)

    run(go())
