"""The serving API attacked over real sockets: no key, foreign names, odd paths, slow and broken clients, a store that goes away."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import hypothesis
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck
from schemathesis.core import NOT_SET

from serving.api import OPEN_ROUTES, OPERATOR_ROUTES, Service, build_api
from serving.directory import Directory, Picture
from tests.live_http import Do, loop_thread, on_a_port
from tests.served import TENANTS, Server, Store, served
from tests.served import store as store

FAKE = {"kind": "fake", "vocabulary": 250, "max_context": 256, "max_batch": 8, "token_s": 0.001}
LIMITS = {"max_concurrent": 6}


@dataclass
class Web:
    server: Server
    do: Do
    port: int

    def client(self, tenant: str = "acme", **keys: Any) -> httpx.Client:
        url = f"http://127.0.0.1:{self.port}"
        return httpx.Client(base_url=url, headers=self.server.headers(tenant), timeout=60, trust_env=False, **keys)

    def head(self, length: int, tenant: str = "acme") -> bytes:
        return (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.server.keys[tenant]}\r\n"
            f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        ).encode()


@pytest.fixture(scope="module")
def web(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    opened = served(store, tmp_path_factory.mktemp("web"), engine=FAKE, limits=LIMITS, body_s=10.0)
    with loop_thread() as do:
        server = do(opened.__aenter__())
        with on_a_port(server, do) as port:
            yield Web(server, do, port)
        do(opened.__aexit__(None, None, None))


def _completion(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": [5, 6], "max_tokens": 2, **more}


def test_every_route_there_is_asks_for_a_key(web: Web) -> None:
    app = web.server.http._transport.app
    routes = [(method, route.path) for route in app.routes for method in getattr(route, "methods", ())]
    assert len([route for route in app.routes if isinstance(route, APIRoute)]) >= 6
    asked = [(method, path) for method, path in routes if path not in OPEN_ROUTES]
    asked += [
        ("GET", "/"),
        ("GET", "/docs"),
        ("POST", "/v1/models"),
        ("TRACE", "/v1/models"),
        ("GET", "//v1/models"),
        ("GET", "/healthz/../v1/models"),
    ]
    with web.client() as http:
        for method, path in asked:
            reply = http.request(method, path, headers={"authorization": "Bearer ft_" + "a" * 43})
            refused = (403,) if path in OPERATOR_ROUTES else (401,)  # no metrics key is set: nobody's opens these
            assert reply.status_code in refused, (method, path, reply.status_code)
        for path in OPEN_ROUTES:
            assert http.get(path, headers={"authorization": ""}).status_code == 200


def test_a_foreign_name_is_told_as_one_that_nobody_has_and_nothing_is_looked_up_for_it(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = {ref for refs in (web.server.gate.directory.picture.models(tenant) for tenant in TENANTS) for _, ref in refs}
    looked_up: list[str] = []

    class Watched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            looked_up.append(key)
            return super().get(key, default)

    real = web.server.gate.directory  # left to the thread that takes pictures: what it takes meanwhile must not come in between
    watched = Directory(web.server.replica.store, lambda: list(TENANTS))
    watched.picture = Picture(Watched(real.picture.tenants))
    monkeypatch.setattr(watched, "refresh", lambda: watched.picture)
    monkeypatch.setattr(web.server.gate, "directory", watched)
    told: dict[str, set[tuple[int, str]]] = {}
    for tenant in TENANTS:
        with web.client(tenant) as http:
            foreign = [ref for ref in refs if ref.tenant != tenant]
            forms = [f"{ref.name}@{ref.digest}" for ref in foreign]
            forms += [
                form for ref in foreign for form in (f"{ref.tenant}/{ref.name}", ref.full, str(ref), f"{ref.tenant}/{ref.name}@current")
            ]
            forms += [ref.name for ref in foreign if ref.name not in TENANTS[tenant]]
            for form in [*forms, "nobody", "no/body", "nobody@" + "0" * 64]:
                looked_up.clear()
                for path, body in (
                    ("/v1/completions", _completion(form)), ("/v1/completions", _completion(form, stream=True)),
                    ("/v1/chat/completions", {"model": form, "messages": [{"role": "user", "content": "a"}]}),
                ):  # fmt: skip
                    reply = http.post(path, json=body)
                    told.setdefault(tenant, set()).add((reply.status_code, reply.text))
                assert set(looked_up) == {tenant}, form
            own = {row["root"] for row in http.get("/v1/models").json()["data"]}
            assert not own & {ref.full for ref in foreign}
    assert len({answer for answers in told.values() for answer in answers}) == 1, told
    assert next(iter(told["acme"]))[0] == 404


@pytest.mark.parametrize(
    "name",
    ["../bolt/legal", "..%2fbolt%2flegal", "%2e%2e/bolt/legal", "support/../../bolt/legal", "/etc/passwd", "support\0", "\0", "support\n",
     " support", "\uff53upport", "supp\u043ert", "support\u200b", "a" * 256, "a/" * 100, "support@../legal", "support@\0", "file:///etc/passwd",
     "s3://x/y", "*", "~"],
)  # fmt: skip
def test_a_name_never_becomes_a_path(web: Web, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    touched: list[str] = []
    for method in ("read", "exists", "names", "sizes", "get"):
        folder = type(web.server.replica.store.folder)
        real = getattr(folder, method)
        monkeypatch.setattr(folder, method, lambda self, key="", *rest, real=real: touched.append(str(key)) or real(self, key, *rest))
    with web.client() as http:
        reply = http.post("/v1/completions", json=_completion(name))
        assert reply.status_code == 404
    asked = [key for key in touched if any(part in key for part in ("..", "passwd", "\0", "~", "*", "//")) or key.endswith(name)]
    assert not asked
    with web.client() as http:
        assert http.post("/v1/completions", json=_completion("x" * 10_000)).status_code == 400


@pytest.mark.parametrize(
    "path",
    ["/v1/../v1/models/x", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc/passwd", "/%00", "/v1/models%00",
     "/" + "a" * 5000, "/v1//models", "/V1/MODELS", "/v1/models;x=1", "/v1/\uff4dodels", "/static/..%5c..%5cetc"],
)  # fmt: skip
def test_an_odd_path_leads_nowhere(web: Web, path: str) -> None:
    with web.client() as http:
        reply = http.get(path)
        assert reply.status_code in (400, 404)
        if reply.status_code == 404:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_who_sends_slowly_holds_nobody_up_and_is_told_to_go(web: Web) -> None:
    """Two hundred that never end their headers, more uploads than a tenant has places; another tenant, then the same one, are served."""

    async def go() -> list[bytes]:
        slow = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(200)]
        for _, writer in slow:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-a: ")
        uploads = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(LIMITS["max_concurrent"] + 2)]
        for _, writer in uploads:
            writer.write(web.head(1000) + b'{"model":')
            await writer.drain()
        await asyncio.sleep(0.2)
        with web.client("bolt") as http:
            assert (await asyncio.to_thread(http.post, "/v1/completions", json=_completion("support"))).status_code == 200
        answers = [await asyncio.wait_for(reader.read(), 60) for reader, _ in uploads]
        for _, writer in slow + uploads:
            writer.close()
        return answers

    answers = asyncio.run(go())
    statuses = sorted(int(answer.split(b" ", 2)[1]) for answer in answers)
    assert statuses == [408] * LIMITS["max_concurrent"] + [429] * 2
    assert all(b'"error"' in answer for answer in answers)
    assert not web.server.gate._uploads
    with web.client() as http:
        assert http.post("/v1/completions", json=_completion("support")).status_code == 200


def test_a_body_of_100_mb_is_refused_before_it_is_sent(web: Web) -> None:
    async def go() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        sent, told = 0, asyncio.create_task(reader.readline())
        writer.write(web.head(100 << 20))
        while sent < 100 << 20 and not told.done():
            writer.write(b"x" * 65536)
            sent += 65536
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        return int((await told).split()[1]), sent

    status, sent = asyncio.run(go())
    assert status == 413
    assert sent < 50 << 20


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"\xff\xfe{", 400), (b'{"model": "support", "prompt": "\xc3\x28"}', 400), (b"[" * 500_000, 400), (b'{"a":' * 100_000, 400),
     (b"", 400),     (b"null", 400), (b'{"model": "support", "prompt": [5], "max_tokens": ' + b"9" * 5000 + b"}", 400),
     (b'{"model": "support", "prompt": [5], "max_tokens": -1}', 400), (b'{"model": "support", "prompt": [5], "temperature": NaN}', 400),
     (b'{"model": "support", "prompt": [5], "stop": ' + json.dumps(["x"] * 10_000).encode() + b"}", 400)],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(web: Web, content: bytes, status: int) -> None:
    with web.client() as http:
        for path in ("/v1/completions", "/v1/chat/completions"):
            reply = http.post(path, content=content, headers={"content-type": "application/json"})
            assert (reply.status_code, bool(reply.json()["error"]["message"])) == (status, True), reply.text


def test_who_hangs_up_in_the_middle_leaves_nothing_behind(web: Web) -> None:
    async def hang_up(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        body = json.dumps(_completion("support", max_tokens=240, stream=bool(number % 2))).encode()
        if number % 4 == 3:
            body = body[:-5]
        writer.write(web.head(len(body) + (5 if number % 4 == 3 else 0)) + body)
        await writer.drain()
        if number % 2:
            await asyncio.wait_for(reader.read(10 if number % 4 == 1 else 0), 60)
        writer.transport.abort()

    for _ in range(5):
        asyncio.run(_all(hang_up(number) for number in range(4)))
    deadline = time.monotonic() + 60
    server = web.server
    while server.gate._under_way or server.gate._uploads or server.replica.engine.stats().num_running:
        assert time.monotonic() < deadline, (server.gate._under_way, server.gate._uploads, server.replica.engine.stats())
        time.sleep(0.02)
    assert all(slot.pins == 0 for slot in server.replica.slots.resident.values())


async def _all(tasks: Iterator[Any]) -> None:
    await asyncio.gather(*tasks)


def test_who_waits_for_a_replica_that_never_comes_is_told_so(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        async def answer(self, _: Any) -> Any:
            await asyncio.Event().wait()
            yield

        async def states(self) -> list[Any]:
            return []

    gate = web.server.gate
    monkeypatch.setattr(gate, "settings", gate.settings.model_copy(update={"begin_s": 0.1}))
    app = build_api(lambda: Service(gate, {"base": Silent()}))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as http:
            return await http.post("/v1/completions", headers=web.server.headers("acme"), json=_completion("support"))

    reply = web.do(go())
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "overloaded", "5")
    assert not gate._under_way


def soon_says(http: httpx.Client, store: str) -> None:
    deadline = time.monotonic() + 50  # below STALE_KEYS_S
    while http.get("/readyz").json()["store"] != store:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_the_store_is_away_what_is_known_is_served_and_said_so(web: Web, store: Store) -> None:
    tenants = Path(web.server.tenants.folder.url)
    with web.client() as http:
        assert http.post("/v1/completions", json=_completion("support")).status_code == 200
        for place, moved in ((store.path, store.path.with_name("moved")), (tenants, tenants.with_name("moved-tenants"))):
            place.rename(moved)
            try:
                soon_says(http, "away")
                for _ in range(3):
                    reply = http.post("/v1/completions", json=_completion("support"))
                    assert reply.status_code == 200, reply.text
                assert [row["id"] for row in http.get("/v1/models").json()["data"]] == ["base", "sales", "support"]
                ready = http.get("/readyz").json()
                assert (ready["status"], ready["store"]) == ("ready", "away")
            finally:
                moved.rename(place)
            soon_says(http, "ok")


def test_no_log_holds_a_key_or_what_was_asked(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    secret = "what the tenant asked in confidence"
    with caplog.at_level(logging.DEBUG), web.client() as http:
        for body in (_completion("support", prompt=secret), _completion("nobody", prompt=secret), {"model": "support", "prompt": [secret]}):
            http.post("/v1/completions", json=body)
            http.post("/v1/completions", json=body, headers={"authorization": "Bearer " + web.server.keys["acme"][:-1]})
        http.get(f"/v1/{web.server.keys['acme']}x", headers={"authorization": web.server.keys["acme"]})
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "httpx2", "asyncio"))]
    text = "\n".join(f"{record.getMessage()} {record.exc_text or ''}" for record in ours)
    for key in web.server.keys.values():
        assert key[3:-1] not in text
    assert secret not in text


@pytest.mark.parametrize("num_cases", [25, pytest.param(1000, marks=pytest.mark.proof)])
def test_nothing_the_schema_allows_or_forbids_breaks_the_server(web: Web, num_cases: int) -> None:
    """schemathesis makes requests from the OpenAPI schema, right and wrong ones; every answer is below 500, or says when to come back."""
    with web.client() as http:
        schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
        statuses: Counter[int] = Counter()
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in schemathesis.GenerationMode:

                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                @hypothesis.settings(
                    max_examples=num_cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
                )
                def ask(case: schemathesis.Case) -> None:
                    content = {**case.body, "model": "support"} if isinstance(case.body, dict) and "model" in case.body else case.body
                    if not isinstance(content, bytes):
                        content = b"" if content is NOT_SET else json.dumps(content).encode()
                    reply = http.request(case.method, case.path, content=content, headers={"content-type": "application/json"})
                    statuses[reply.status_code] += 1
                    assert reply.status_code < 500 or reply.headers.get("retry-after"), (case.method, case.path, content, reply.text)

                with suppress(hypothesis.errors.Unsatisfiable):
                    ask()
    assert statuses[200] and statuses[400], statuses
    print(dict(statuses))
