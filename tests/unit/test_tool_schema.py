"""What a client's schemas may cost together, before any limit of its tenant's holds."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ftcore.errors import ConfigError
from serving.schema import ChatAsked

ONE = {"type": "string", "description": "What it is, in the words of whoever wrote the tool.", "enum": ["one", "two", "three"]}
DENSE: dict[str, Any] = {"type": "object", "anyOf": [{}] * 900}
PAIRS: dict[str, Any] = {"type": "object", "properties": {"a": {"type": [kind for i in range(1200) for kind in (i, f"a{i}")]}}}


def asked(schemas: list[dict[str, Any]], **more: Any) -> ChatAsked:
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i, schema in enumerate(schemas)]
    return ChatAsked.model_validate({"model": "base", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, **more})


@pytest.mark.parametrize(
    ("schemas", "words"), [([DENSE] * 100, r"tools\[2\].function.parameters: .* too many parts"), ([PAIRS], "too many types")]
)
def test_no_request_takes_more_than_some_seconds_to_check(schemas: list[dict[str, Any]], words: str) -> None:
    started = time.thread_time()
    with pytest.raises(ConfigError, match=words):
        asked(schemas).form()
    assert time.thread_time() - started < 4


def test_as_many_tools_as_people_have_are_taken() -> None:
    schema = {"type": "object", "properties": {f"p{i}": ONE for i in range(10)}, "required": ["p0", "p1"], "additionalProperties": False}
    _, tools = asked([schema] * 128).form()
    assert tools is not None and len(tools.definitions) == 128
