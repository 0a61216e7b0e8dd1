"""A proxy between an S3 client and its server that breaks things by a plan.

    with faulty_proxy(endpoint) as proxy:
        proxy.plan = seeded(rate=0.2, seed=1)          # or: always("503"), at("cut", 3), matching("PUT", "manifest.json", "507"), calm
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ...
    proxy.seen        every Request that came, with the fault it met        proxy.watch = f    called with each Request before it is handled

Faults: 500 503 429 403 404 507 too-large (answered in the server's place), lost (cut before the request was handled), cut (handled, but the
answer is cut in mid-body), short (the answer's body is halved and its length says so), slow (a body in drops), stall (no answer).
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CODES = {
    "500": (500, "InternalError"), "503": (503, "SlowDown"), "429": (429, "TooManyRequests"), "403": (403, "AccessDenied"),
    "404": (404, "NoSuchKey"), "507": (507, "InsufficientStorage"), "too-large": (400, "EntityTooLarge"),
}  # fmt: skip
TRANSIENT = ("500", "503", "429", "lost", "cut", "slow")
DROP_S, DROPS = 0.05, 6
STALL_S = 600.0


@dataclass(frozen=True)
class Request:
    """`number` counts from 0. `part` is true for the requests of a multipart upload."""

    number: int
    method: str
    path: str
    body_bytes: int
    fault: str | None = None

    @property
    def part(self) -> bool:
        return "uploadId=" in self.path or self.path.endswith("?uploads")


Plan = Callable[[Request], str | None]


def calm(request: Request) -> str | None:
    return None


def seeded(rate: float, seed: int, kinds: Sequence[str] = TRANSIENT) -> Plan:
    """Each request meets a fault with this probability; which one follows from the seed and the order of requests."""
    draw = random.Random(seed)

    def plan(request: Request) -> str | None:
        return draw.choice(kinds) if draw.random() < rate else None

    return plan


def always(kind: str) -> Plan:
    return lambda request: kind


def at(kind: str, *numbers: int) -> Plan:
    """At the requests with these numbers."""
    return lambda request: kind if request.number in numbers else None


def matching(method: str, text: str, kind: str, times: int = 1_000_000) -> Plan:
    """The first `times` requests of this method ("" for any) whose path holds the text."""
    left = [times]

    def plan(request: Request) -> str | None:
        if left[0] and request.method.startswith(method) and text in request.path:
            left[0] -= 1
            return kind
        return None

    return plan


class FaultyProxy:
    """Lives in a thread. `plan` and `watch` may be changed at any time."""

    def __init__(self, target: str) -> None:
        self.plan: Plan = calm
        self.watch: Callable[[Request], None] | None = None
        self.seen: list[Request] = []
        self.port = 0
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._loop = asyncio.new_event_loop()
        self._clients: set[asyncio.Task[Any] | None] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self, plan: Plan = calm) -> None:
        """Forgets what was seen; requests count from 0 again."""
        self.seen = []
        self.plan = plan

    def start(self) -> None:
        self._thread.start()
        self._started.wait(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for _ in range(3):  # a connection may have come in as it closed; closed sockets need a turn of the loop
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.01)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._clients.add(task)  # the loop itself holds tasks weakly
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._clients.discard(task)
            writer.transport.abort() if self._stop.is_set() else writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handles one request; false when the connection is over."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = line.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "100-continue" in headers.get("expect", "").lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        number = len(self.seen)
        fault = self.plan(Request(number, method, path, len(body)))
        request = Request(number, method, path, len(body), fault)
        self.seen.append(request)
        if self.watch:
            self.watch(request)
        return await self._answer(request, line, lines, body, writer)

    async def _answer(self, request: Request, line: str, lines: list[str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        fault = request.fault
        if fault == "lost":
            writer.transport.abort()
            return False
        if fault == "stall":
            await asyncio.sleep(STALL_S)
        if fault in CODES:
            answer, content = _refusal(fault, request.method)
        else:
            answer, content = await self._forward(request, line, lines, body)
        if fault == "cut":
            writer.write((answer + content)[: len(answer) + len(content) // 2] if content else b"")
            await writer.drain()
            writer.transport.abort()
            return False
        if fault == "short" and len(content) > 1:
            answer = answer.replace(b"content-length: %d" % len(content), b"content-length: %d" % (len(content) // 2))
            content = content[: len(content) // 2]
        writer.write(answer)
        step = max(1, len(content) // DROPS) if fault == "slow" else max(1, len(content))
        for start in range(0, len(content), step):
            if fault == "slow":
                await asyncio.sleep(DROP_S)
            writer.write(content[start : start + step])
            await writer.drain()
        return True

    async def _forward(self, request: Request, line: str, lines: list[str], body: bytes) -> tuple[bytes, bytes]:
        """The server's answer as (head, body); the head always ends with the body's real length."""
        reader, writer = await asyncio.open_connection(*self._target, limit=1 << 20)
        try:
            kept = [header for header in lines if header.split(":")[0].lower() not in ("expect", "connection")]
            writer.write("\r\n".join([line, *kept, "connection: close", "", ""]).encode("latin-1") + body)
            await writer.drain()
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status, *answered = head.split(b"\r\n")
        length = len(content)
        fields = []
        for field in answered:
            name, _, value = field.partition(b":")
            if name.lower() == b"content-length":
                length = int(value) if request.method == "HEAD" else length
            elif name.lower() not in (b"connection", b"transfer-encoding"):
                fields.append(field)
        return b"\r\n".join([status, *fields, b"content-length: %d" % length, b"", b""]), content


def _refusal(fault: str, method: str) -> tuple[bytes, bytes]:
    status, code = CODES[fault]
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected: {code}</Message><RequestId>0</RequestId></Error>"
    content = b"" if method == "HEAD" else text.encode()
    return f"HTTP/1.1 {status} {code}\r\ncontent-type: application/xml\r\ncontent-length: {len(content)}\r\n\r\n".encode(), content


@contextmanager
def faulty_proxy(target: str, plan: Plan = calm) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target)
    proxy.plan = plan
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
