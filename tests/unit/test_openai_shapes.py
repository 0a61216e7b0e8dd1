"""What OpenAI's clients read and send: chunks of a stream, log-probabilities, and fields that they leave empty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import ValidationError

from serving.jobs import Closing, Event, Opening, Piece, TokenInfo
from serving.schema import ChatAsked, EmbeddingsAsked, TextAsked
from serving.shapes import chat_shape, text_shape

OPENING = Opening("", "0" * 64, "key", False, 3)
CLOSING = Closing(3, 4, {"output": "signed"})


def chunks_of(shape: Any, events: list[Event | Exception], usage: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """(the chunks, whether the stream broke off)."""
    found: list[dict[str, Any]] = []

    async def told() -> AsyncGenerator[Event, None]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def go() -> bool:
        try:
            async for chunk in shape("id", "support", 0, "print").stream(told(), usage):
                found.append(chunk)
        except ConnectionError:
            return True
        return False

    return found, asyncio.run(go())


@pytest.mark.parametrize("shape", [chat_shape, text_shape])
@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_has_its_receipt_where_its_last_choice_ends_and_an_empty_chunk_only_with_usage(shape: Any, usage: bool) -> None:
    pieces = [Piece(0, "a"), Piece(1, "b"), Piece(1, "", finish="length"), Piece(0, "c", finish="stop")]
    chunks, broke = chunks_of(shape, [OPENING, *pieces, CLOSING], usage)
    assert not broke
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["total_tokens"], "ftcore_receipt" in last) == ([], 7, False)
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [end for end in ends if end] == ["length", "stop"] and ends[-1] == "stop"
    assert [chunk.get("ftcore_receipt") for chunk in chunks] == [None] * (len(chunks) - 1) + [CLOSING.receipt]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("shape", [chat_shape, text_shape])
def test_a_stream_that_breaks_off_tells_what_was_said_and_has_no_receipt(shape: Any) -> None:
    pieces = [Piece(0, "a"), Piece(0, "b", finish="stop")]
    chunks, broke = chunks_of(shape, [OPENING, *pieces, ConnectionError()])
    assert broke and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("ftcore_receipt" in chunk for chunk in chunks)


HELLO = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {name: None for name in ChatAsked.model_fields if name not in ("model", "messages")},
        {"stream_options": {"include_usage": None}},
        {"store": False},
        {"messages": [HELLO, {"role": "assistant", "content": "b", "tool_calls": []}, HELLO]},
    ],
)  # fmt: skip
def test_a_chat_may_hold_what_clients_leave_empty(fields: dict[str, Any]) -> None:
    asked = ChatAsked.model_validate({"model": "support", "messages": [HELLO], **fields})
    plain = ChatAsked.model_validate({"model": "support", "messages": [HELLO]})
    assert (asked.sampling(asked.num_logprobs), asked.limit, asked.stops, asked.n, asked.stream) == (
        plain.sampling(None), plain.limit, plain.stops, 1, False,
    )  # fmt: skip


@pytest.mark.parametrize(("prompt", "read"), [("a", "a"), (["a"], "a"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6]), ([5], [5])])
def test_a_completion_takes_a_list_of_one_prompt_and_null_for_what_is_not_set(prompt: Any, read: Any) -> None:
    nothing = {name: None for name in TextAsked.model_fields if name not in ("model", "prompt")}
    assert TextAsked.model_validate({"model": "support", "prompt": prompt, **nothing}).prompt == read
    EmbeddingsAsked.model_validate({"model": "support", "input": "a", "encoding_format": None})


@pytest.mark.parametrize(
    "fields", [{"prompt": ["a", "b"]}, {"prompt": None}, {"prompt": [["a"]]}, {"model": None}, {"store": True}, {"nothing": None}]
)
def test_null_and_lists_are_no_way_around_what_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TextAsked.model_validate({"model": "support", "prompt": "a", **fields})


def test_offsets_of_tokens_go_on_through_a_stream_and_half_a_character_has_no_bytes() -> None:
    tokens = [TokenInfo("ab", -1.0), TokenInfo("c", -2.0)], [TokenInfo("d\ufffd", -3.0)]
    pieces = [Piece(0, "abc", tuple(tokens[0])), Piece(1, "z", (TokenInfo("z", -1.0),)), Piece(0, "d", tuple(tokens[1]), "stop")]
    events: list[Event | Exception] = [OPENING, *pieces, Piece(1, "", finish="stop"), CLOSING]
    chunks, _ = chunks_of(text_shape, events)
    told = [(chunk["choices"][0]["index"], (chunk["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]) for chunk in chunks]
    assert told == [(0, [0, 2]), (1, [0]), (0, [3]), (1, [])]
    whole = text_shape("id", "support", 0, "print").whole([event for event in events if not isinstance(event, Exception)])
    assert [choice["logprobs"]["text_offset"] for choice in whole["choices"]] == [[0, 2, 3], [0]]
    chat, _ = chunks_of(chat_shape, events)
    found = [row["bytes"] for chunk in chat for row in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert found == [[97, 98], [99], [122], None]
