"""The serving API over a base that only says words: what the ingress decides by itself. No engine, no torch."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client import generate_latest

from ftcore.adapters import AdapterRef
from ftcore.errors import StorageError
from ftcore.pointer import Pointer, Target
from ftcore.storage import Folder
from serving.api import Service, build_api
from serving.directory import Directory, Name, Picture
from serving.gate import Gate
from serving.jobs import Closing, Event, Job, Opening, Piece
from serving.published_keys import publish_key
from serving.settings import ServeSettings
from tests.served import soon

ONE, TWO = "1" * 64, "2" * 64
ASK: dict[str, Any] = {"model": "support", "prompt": "a"}


class Words:
    """Answers with "b", at once."""

    async def answer(self, job: Job) -> AsyncGenerator[Event, None]:
        ref = job.answerer.ref
        yield Opening(ref.full if ref else "", "0" * 64, "key", False, 1)
        yield Piece(0, "b", finish="stop", num_tokens=1)
        yield Closing(1, 1, {"output": "signed"})

    async def states(self) -> list[dict[str, Any]]:
        return [{"replica": "key", "weights": "0", "tokenizer": "0", "template": "", "missing": {}}]


class Silent(Words):
    async def answer(self, _: Job) -> AsyncGenerator[Event, None]:
        await asyncio.Event().wait()
        yield Closing(0, 0, {})


def name_of(*shares: tuple[str, float], revoked: tuple[str, ...] = ()) -> Name:
    targets = tuple(Target(digest=digest, share=share) for digest, share in shares)
    return Name(Pointer(targets=targets), frozenset(digest for digest, _ in shares), frozenset(revoked))


def _away() -> Picture:
    raise StorageError("there is nothing")


def takes(directory: Directory, picture: Callable[[], Picture]) -> None:
    """What it finds in the store from now on."""
    directory._take = picture  # type: ignore[method-assign]  # its own thread is to see it too


CANARY = name_of((ONE, 0.9), (TWO, 0.1))


@asynccontextmanager
async def ingress(
    tmp_path: Path, names: dict[str, Name], answers: Any = None, is_away: bool = False, **keys: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """Of a store whose picture holds these names."""
    (tmp_path / "store" / "_kept").mkdir(parents=True, exist_ok=True)
    (tmp_path / "store" / "_kept" / "file").touch()
    settings = ServeSettings.model_validate(
        {"base": "none", "store": str(tmp_path / "store"), "audit_spool": str(tmp_path / "spool"), **keys}
    )
    gate = Gate(settings)
    takes(gate.directory, _away if is_away else lambda: Picture({"demo": names}))
    service = Service(gate, dict.fromkeys(settings.all_bases, answers or Words()))
    await service.open()
    transport = httpx.ASGITransport(app=build_api(lambda: service), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            yield http, service
    finally:
        await service.close()


def test_a_canary_takes_its_share_of_requests_and_a_session_or_a_user_sticks(tmp_path: Path) -> None:
    async def go() -> None:
        async with ingress(tmp_path, {"support": CANARY}, limits={"max_concurrent": 400}) as (http, _):

            async def met(session: str = "", **more: str) -> str:
                headers = {"x-ftcore-session": session} if session else {}
                reply = await http.post("/v1/completions", json={**ASK, **more}, headers=headers)
                return reply.headers["x-ftcore-adapter"].rpartition("@")[2]

            found = Counter([await met() for _ in range(300)])
            assert 5 <= found[TWO] <= 70 and found[ONE] == 300 - found[TWO], found
            users = [f"u{number}" for number in range(40)]
            by_user = [await met(user=user) for user in users]
            assert set(by_user) == {ONE, TWO} and by_user == [await met(user=user) for user in users]
            for one in (ONE, TWO):
                session = users[by_user.index(one)]
                assert {await met(session, user=user) for user in users[:10]} == {one}, "the header goes before the user"

    asyncio.run(go())


def test_a_revoked_canary_leaves_its_share_to_the_version_beside_it() -> None:
    picture = Picture({"demo": {"support": name_of((ONE, 0.9), (TWO, 0.1), revoked=(TWO,))}})
    assert {picture.find("demo", "support", f"demo:{number}") for number in range(100)} == {AdapterRef("demo", "support", ONE)}
    assert picture.find("demo", f"support@{TWO}") is None


def test_until_the_store_was_read_once_a_name_is_not_unknown_but_cannot_be_looked_up(tmp_path: Path) -> None:
    async def go() -> None:
        async with ingress(tmp_path, {"support": CANARY}, is_away=True, poll_s=0.05) as (http, service):
            reply = await http.post("/v1/completions", json=ASK)
            assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "store_unavailable", "5")
            assert (await http.post("/v1/completions", json={**ASK, "model": "base"})).status_code == 200
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["reasons"]) == (503, ["the store was not read yet"])
            takes(service.gate.directory, lambda: Picture({"demo": {"support": CANARY}}))
            await soon(lambda: not service.gate.directory.is_blank)
            assert (await http.get("/readyz")).status_code == 200
            assert (await http.post("/v1/completions", json=ASK)).status_code == 200
            assert (await http.post("/v1/completions", json={**ASK, "model": "nobody"})).status_code == 404
            takes(service.gate.directory, _away)
            await soon(lambda: bool(service.gate.directory.problem))
            assert (await http.post("/v1/completions", json=ASK)).status_code == 200, "what was known is served"
            assert (await http.get("/readyz")).status_code == 200

    asyncio.run(go())


def test_an_adapter_named_like_its_base_is_told_of_and_listed_by_its_whole_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"base": name_of((ONE, 1.0)), "support": name_of((TWO, 1.0))}

    async def go() -> None:
        async with ingress(tmp_path, names) as (http, _):
            rows = (await http.get("/v1/models")).json()["data"]
            assert [row["id"] for row in rows] == ["base", "demo/base", "support"]
            for model, digest in {"base": "", "demo/base": ONE, "support": TWO}.items():
                reply = await http.post("/v1/completions", json={**ASK, "model": model})
                assert reply.headers["x-ftcore-adapter"].rpartition("@")[2] == digest

    asyncio.run(go())
    assert f"{AdapterRef('demo', 'base', ONE)} is asked for as demo/base alone: a base has its name" in caplog.text


def test_who_waits_too_long_is_audited_and_counted_as_what_they_were_told(tmp_path: Path) -> None:
    async def go() -> bytes:
        async with ingress(tmp_path, {"support": CANARY}, answers=Silent(), begin_s=0.05) as (http, service):
            reply = await http.post("/v1/completions", json=ASK)
            assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "overloaded", "5")
            assert not service.gate._under_way
            return generate_latest(service.seeing.metrics.registry)

    figures = asyncio.run(go()).decode()
    assert 'ftcore_requests_total{adapter="support",outcome="refused",tenant="demo"} 1.0' in figures
    assert 'outcome="aborted",tenant="demo"} 0.0' in figures
    (path,) = (tmp_path / "store" / "_audit").rglob("*.jsonl")
    (line,) = (row for row in map(json.loads, path.read_text().splitlines()) if "outcome" in row)
    assert (line["outcome"], line["code"]) == ("failed", "overloaded")


def test_log_probabilities_are_counted_by_what_the_context_holds(tmp_path: Path) -> None:
    async def go() -> None:
        async with ingress(tmp_path, {"support": CANARY}, engine={"max_context": 2048}) as (http, _):
            body = {"model": "support", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            assert (await http.post("/v1/chat/completions", json={**body, "n": 2})).status_code == 400

    asyncio.run(go())


def test_receipt_keys_are_read_once_each_and_listed_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, listed = Folder.read, Folder.files
    told: Counter[str] = Counter()

    def counted(self: Folder, key: str) -> bytes:
        told[key.removeprefix("_receipts/")] += 1
        return read(self, key)

    def counted_files(self: Folder, key: str = "") -> list[str]:
        told["listed"] += str(self).endswith("_receipts")
        return listed(self, key)

    async def go() -> None:
        async with ingress(tmp_path, {}) as (http, _):
            publish_key(str(tmp_path / "store"), ONE[:16], "one")
            monkeypatch.setattr(Folder, "read", counted)
            monkeypatch.setattr(Folder, "files", counted_files)

            async def ids() -> list[str]:
                return [row["id"] for row in (await http.get("/v1/receipt-keys")).json()["data"]]

            assert await asyncio.gather(*(ids() for _ in range(20))) == [[ONE[:16]]] * 20
            publish_key(str(tmp_path / "store"), TWO[:16], "two")

            async def both() -> bool:
                return await ids() == [ONE[:16], TWO[:16]]

            await soon(both, 10)
            assert told[f"{ONE[:16]}.pub.pem"] == told[f"{TWO[:16]}.pub.pem"] == 1 and told["listed"] <= 3, told

    asyncio.run(go())


def test_keys_and_names_are_read_while_every_common_thread_is_held(tmp_path: Path) -> None:
    async def go() -> None:
        async with ingress(tmp_path, {}, poll_s=0.05) as (_, service):
            over = threading.Event()
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            held = loop.run_in_executor(None, over.wait)
            try:
                takes(service.gate.directory, lambda: Picture({"demo": {"support": CANARY}}))
                await soon(lambda: service.gate.directory.picture.find("demo", "support") is not None, 5)
            finally:
                over.set()
                await held

    asyncio.run(go())
