"""What OpenAI's clients read and send: chunks of a stream, log-probabilities, and fields that they leave empty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serving.jobs import Closing, Event, Opening, Piece
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
