"""Streamed: a chat completion that comes piece by piece, read to its end, with the time of its first text.

In: an HTTP reply, server-sent events or plain JSON. Out: the completion as if it had come at once. Runs in: workers of an evaluation.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from ftcore.card import printable
from ftcore.errors import FtcoreError

ASKING = {"stream": True, "stream_options": {"include_usage": True}}
"""What asks for it."""


def whole(reply: http.client.HTTPResponse) -> tuple[Any, float | None]:
    """The completion, and when its first text came (time.monotonic; None where it came at once).

    Raises IncompleteRead for a stream that breaks off, ValueError for what is not JSON, FtcoreError for an error within the stream.
    """
    if reply.headers.get_content_type() != "text/event-stream":
        return json.loads(reply.read()), None
    text, finish, usage, first, ended = "", "", None, None, False
    for line in reply:
        field, _, value = line.decode("utf-8", "replace").partition(":")
        if field != "data" or ended:
            continue
        if value.strip() == "[DONE]":
            ended = True
            continue
        piece = json.loads(value)
        if not isinstance(piece, dict) or "error" in piece:
            raise FtcoreError("the endpoint broke its answer off", got=printable(value.strip())[:300], remedy="the same command goes on")
        usage = piece.get("usage") or usage
        for choice in piece.get("choices") or ():
            try:
                said = (choice.get("delta") or {}).get("content") or ""
                text, finish = text + said, choice.get("finish_reason") or finish
            except (AttributeError, TypeError) as error:
                raise ValueError(f"a piece is none of a completion: {printable(value.strip())[:200]}") from error
            first = first if first is not None or not said else time.monotonic()
    if not ended and not finish:
        raise http.client.IncompleteRead(text.encode())
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}, first
