"""Bodies: a request's body, read whole before anything else is done with it, within a size and a time.

In: ASGI messages. Out: bytes, or a Refusal. Runs in: the ingress, the admin API.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect

from serving.gate import Refusal


async def read_body(receive: Any, max_kib: int, within_s: float) -> bytes:
    """The whole body. Raises Refusal for one that is too large, or that takes too long to come: it would hold a place of the ingress."""
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > max_kib << 10:
                    raise too_large(max_kib)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, f"the request did not come within {within_s:g} s", "request_timeout") from None


def replayed(body: bytes, receive: Any) -> Any:
    """What tells an application of a body that was read already; after that, whether the client is still there."""
    rest = iter([{"type": "http.request", "body": body}])

    async def again() -> Any:
        return next(rest, None) or await receive()

    return again


def too_large(max_kib: int) -> Refusal:
    return Refusal(413, f"a request is at most {max_kib << 10} bytes", "requesttoo_large")
