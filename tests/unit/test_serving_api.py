"""Serving without Ray: the API over one replica in this process. Whose weights answer, who may ask, and what is refused."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.data.tokenizer import load_tokenizer
from ftcore.errors import IntegrityError
from ftcore.publish import import_adapter
from ftcore.receipts import Receipt, verify_receipt
from ftcore.recipe import Model
from serving.api import Service, build_api
from serving.gate import Gate
from serving.replica import Replica
from serving.settings import ServeSettings
from serving.tenants import TenantStore
from tests.oracles import Truth, make_adapter

TENANTS = {"acme": ("support", "sales"), "bolt": ("support", "legal")}


@dataclass
class Store:
    path: Path
    base: Path
    refs: dict[str, AdapterRef]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two tenants, two names each, and two versions of acme/support."""
    home = tmp_path_factory.mktemp("serving")
    place = AdapterStore(home / "adapters")
    refs, folders = {}, {}
    names = [f"{tenant}/{name}" for tenant, own in TENANTS.items() for name in own]
    for number, name in enumerate([*names, "acme/support v2"]):
        folders[name] = make_adapter(tiny_model_dir, home / f"made-{number}", number)
        refs[name] = import_adapter(folders[name], name.split()[0], model=Model(path=str(tiny_model_dir)), store=place, log=lambda _: None)
    for name in names:
        place.promote(refs[name])
    return Store(home / "adapters", tiny_model_dir, refs, folders)


@pytest.fixture(scope="module")
def truth(store: Store) -> Truth:
    return Truth(store.base, {ref.digest: store.folders[name] for name, ref in store.refs.items()})


class Local:
    """A Replica as the API sees one."""

    def __init__(self, replica: Replica) -> None:
        self.replica, self.answer = replica, replica.answer

    async def states(self) -> list[dict[str, Any]]:
        return [self.replica.state()]


@dataclass
class Server:
    http: httpx.AsyncClient
    replica: Replica
    keys: dict[str, str]
    store: AdapterStore
    tenants: TenantStore

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    async def complete(self, tenant: str, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", headers=self.headers(tenant), json=body)


@asynccontextmanager
async def served(store: Store, tmp_path: Path, **keys: Any) -> AsyncIterator[Server]:
    tenants = TenantStore(str(tmp_path / "tenants"))
    clear = {}
    for name in TENANTS:
        tenants.add(name)
        clear[name], _ = tenants.new_key(name)
    settings = ServeSettings.model_validate(
        {"base": str(store.base), "store": str(store.path), "tenants": str(tmp_path / "tenants"), "poll_s": 0.05,
         "engine": {"max_batch": 8, "max_context": 256, "num_threads": 1}, **keys}
    )  # fmt: skip
    replica = await Replica.open(settings, tmp_path / "cache")
    gate = Gate(settings)
    await gate.open()
    service = Service(gate, Local(replica))
    transport = httpx.ASGITransport(app=build_api(lambda: service), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as http:
            yield Server(http, replica, clear, AdapterStore(store.path), tenants)
    finally:
        gate.close()
        await replica.close()


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 120))


def test_each_tenants_answer_is_its_own_adapters(store: Store, truth: Truth, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(store.base)))

    async def go() -> None:
        rng = random.Random(0)
        async with served(store, tmp_path) as server:
            asked = []
            for number in range(40):
                tenant = rng.choice(list(TENANTS))
                name = rng.choice([*TENANTS[tenant], "base"])
                prompt = [rng.randrange(5, 250) for _ in range(rng.randrange(1, 40))]
                body = {"model": name, "prompt": prompt, "max_tokens": 6, "seed": number, "logprobs": 0}
                asked.append((tenant, name, prompt, server.complete(tenant, **body)))
            replies = await asyncio.gather(*(reply for *_, reply in asked))
            for (tenant, name, prompt, _), reply in zip(asked, replies, strict=True):
                assert reply.status_code == 200, reply.text
                ref = store.refs.get(f"{tenant}/{name}")
                assert reply.headers["x-ftcore-adapter"] == (ref.full if ref else "")
                got = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
                logps = truth.answer_logps(ref.digest if ref else "", prompt, [0] * len(got))
                assert min(abs(float(value) - got[0]) for value in logps[0]) <= 1e-4
                others = [r.digest for n, r in store.refs.items() if ref is None or r != ref]
                assert all(min(abs(float(v) - got[0]) for v in truth.logps(o, prompt)[-1]) >= 0 for o in others)
            assert tokenizer is not None

    run(go())


def test_a_receipt_says_which_weights_answered_and_nothing_of_it_can_be_altered(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            reply = (await server.complete("acme", model="support", prompt="Open the report", max_tokens=8)).json()
            keys = {
                row["id"]: row["pem"] for row in (await server.http.get("/v1/receipt-keys", headers=server.headers("acme"))).json()["data"]
            }
            receipt = Receipt.model_validate(reply["ftcore_receipt"])
            texts = [reply["choices"][0]["text"]]
            assert receipt.adapter == store.refs["acme/support"].full
            verify_receipt(receipt, texts, keys)
            for field in ("request", "tenant", "adapter", "time"):
                forged = receipt.model_copy(update={field: getattr(receipt, field)[:-1] + "~"})
                with pytest.raises(IntegrityError, match="altered"):
                    verify_receipt(forged, texts, keys)
            with pytest.raises(IntegrityError, match="not the answer"):
                verify_receipt(receipt, [texts[0] + "."], keys)
            with pytest.raises(IntegrityError, match="not known"):
                verify_receipt(receipt, texts, {})

    run(go())


def test_a_promoted_version_answers_and_who_streams_keeps_theirs(store: Store, tmp_path: Path) -> None:
    first, second = store.refs["acme/support"], store.refs["acme/support v2"]

    async def go() -> None:
        async with served(store, tmp_path) as server:
            body = {"model": "support", "prompt": "a", "max_tokens": 200, "stream": True, "temperature": 0}
            job = server.http.build_request("POST", "/v1/completions", headers=server.headers("acme"), json=body)
            streaming = asyncio.create_task(server.http.send(job))
            await asyncio.sleep(0.2)
            try:
                server.store.promote(second)
                for _ in range(200):
                    reply = await server.complete("acme", model="support", prompt="a", max_tokens=2)
                    assert reply.status_code == 200
                    if reply.headers["x-ftcore-adapter"] == second.full:
                        break
                    await asyncio.sleep(0.02)
                else:
                    pytest.fail("the new version never answered")
                pinned = await server.complete("acme", model=f"support@{first.digest[:12]}", prompt="a", max_tokens=2)
                assert pinned.headers["x-ftcore-adapter"] == first.full
                streamed = await streaming
                assert streamed.headers["x-ftcore-adapter"] == first.full
                lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
                assert lines[-1] == "[DONE]"
                last = json.loads(lines[-2])
                assert last["ftcore_receipt"]["adapter"] == first.full
            finally:
                server.store.promote(first)

    run(go())


def test_without_a_good_key_nothing_is_said(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            routes = [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/receipt-keys"),
                      ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/v1/models")]  # fmt: skip
            good = server.keys["acme"]
            bad = [None, "", "Bearer", "Bearer x", f"Basic {good}", f"Bearer {good[:-1]}", f"Bearer {good}x", f"Bearer {'é' * 46}",
                   f"Bearer ft_{'a' * 43}", f"Bearer {good} extra"]  # fmt: skip
            for method, path in routes:
                for header in bad:
                    headers = {} if header is None else {"authorization": header.encode()}
                    reply = await server.http.request(method, path, headers=headers)
                    assert reply.status_code == 401, (method, path, header)
                    assert reply.json()["error"]["code"] == "invalid_api_key"
            assert (await server.http.get("/healthz")).status_code == 200
            _, key = server.tenants.new_key("acme", days=-1)
            assert key.expires
            revoked, record = server.tenants.new_key("acme")
            await asyncio.sleep(0.3)
            assert (await server.http.get("/v1/models", headers={"authorization": f"Bearer {revoked}"})).status_code == 200
            server.tenants.revoke_key("acme", record.id)
            await asyncio.sleep(0.3)
            assert (await server.http.get("/v1/models", headers={"authorization": f"Bearer {revoked}"})).status_code == 401

    run(go())


def test_a_tenant_sees_and_reaches_its_own_alone(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            for tenant, names in TENANTS.items():
                rows = (await server.http.get("/v1/models", headers=server.headers(tenant))).json()["data"]
                assert [row["id"] for row in rows] == ["base", *sorted(names)]
                assert all(row["root"].startswith(f"{tenant}/") for row in rows[1:])
            foreign = store.refs["bolt/legal"]
            strangers = [
                "legal", "bolt/legal", f"bolt/legal@{foreign.digest}", f"legal@{foreign.digest}", "bolt/support", "nobody",
                f"support@{store.refs['bolt/support'].digest}", "../bolt/legal", "acme/../bolt/legal", "acme//support", "support@",
                "support@zzz", "@", "/", "acme/", "a" * 256, "support\u0000", "SUPPORT", "support@current@x",
            ]  # fmt: skip
            told = set()
            for name in strangers:
                reply = await server.complete("acme", model=name, prompt="a", max_tokens=1)
                told.add((reply.status_code, reply.text))
            assert len(told) <= 2, told
            assert {status for status, _ in told} == {404}, sorted(told)
            for name in ("support", "acme/support", "support@current", f"support@{store.refs['acme/support'].digest}"):
                reply = await server.complete("acme", model=name, prompt="a", max_tokens=1)
                assert reply.headers["x-ftcore-adapter"] == store.refs["acme/support"].full

    run(go())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "support"}, 400, "prompt"),
        ({"model": "support", "prompt": "a", "temprature": 1}, 400, "temprature"),
        ({"model": "support", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "support", "prompt": "a", "max_tokens": 10**6}, 400, "at most"),
        ({"model": "support", "prompt": "a", "temperature": 99}, 400, "temperature"),
        ({"model": "support", "prompt": "a " * 5000, "max_tokens": 4}, 400, "does not fit"),
        ({"model": "support", "prompt": [10**9], "max_tokens": 4}, 400, "does not have"),
        ({"model": "support", "prompt": "a", "stop": ["x"] * 10_000}, 400, "stop"),
        ({"model": "support", "prompt": "a", "n": 100}, 400, "n is at most"),
        ({"model": "support", "prompt": "a", "logit_bias": {"999999": 1.0}}, 400, "logit_bias"),
        ({"model": "support", "prompt": "", "max_tokens": 1}, 400, "empty"),
        ({"model": ["support"], "prompt": "a"}, 400, "model"),
        ([1, 2], 400, "valid"),
    ],
)
def test_bad_input_is_told_what_is_wrong(store: Store, tmp_path: Path, body: Any, status: int, words: str) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            reply = await server.http.post("/v1/completions", headers=server.headers("acme"), json=body)
            assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.text

    run(go())


def test_a_body_that_is_too_large_or_no_json_is_refused(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, max_body_kib=64) as server:

            async def endless() -> AsyncIterator[bytes]:
                for _ in range(100):
                    yield b"x" * 1024

            for content, status in ((b"x" * 100_000, 413), (endless(), 413), (b"{", 400), (b'{"model": "\xff"}', 400), (b"", 400)):
                headers = {**server.headers("acme"), "content-type": "application/json"}
                reply = await server.http.post("/v1/completions", headers=headers, content=content)
                assert reply.status_code == status, reply.text
                assert reply.json()["error"]["message"]

    run(go())


def test_a_client_that_goes_away_frees_what_it_held(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            body = {"model": "support", "prompt": "a", "max_tokens": 240, "stream": True}
            tasks = [asyncio.create_task(server.complete("acme", **body)) for _ in range(4)]
            for _ in range(500):
                if server.replica.engine.stats().num_running == 4:
                    break
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for _ in range(200):
                await server.replica.engine.health()
                if server.replica.engine.stats().num_running == 0:
                    break
                await asyncio.sleep(0.005)
            stats = server.replica.engine.stats()
            assert (stats.num_running, stats.cache_tokens) == (0, 0)
            assert all(slot.pins == 0 for slot in server.replica.slots.resident.values())

    run(go())


def test_a_revoked_version_answers_nobody_within_seconds(store: Store, tmp_path: Path, tiny_model_dir: Path) -> None:
    place = AdapterStore(store.path)
    made = make_adapter(tiny_model_dir, tmp_path / "made", 77)
    ref = import_adapter(made, "acme/doomed", model=Model(path=str(tiny_model_dir)), store=place, log=lambda _: None)
    place.promote(ref)

    async def go() -> None:
        async with served(store, tmp_path) as server:
            assert (await server.complete("acme", model="doomed", prompt="a", max_tokens=1)).status_code == 200
            assert ref in server.replica.slots.resident
            server.store.revoke(ref, "trained on the wrong data")
            await asyncio.sleep(0.5)
            assert (await server.complete("acme", model="doomed", prompt="a", max_tokens=1)).status_code == 404
            assert ref not in server.replica.slots.resident
            assert ref.digest not in server.replica.engine.stats().adapters

    run(go())


def test_chat_streams_as_it_answers_whole(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            body = {"model": "support", "messages": [{"role": "user", "content": "What is your name?"}], "max_tokens": 24, "temperature": 0}
            whole = (await server.http.post("/v1/chat/completions", headers=server.headers("acme"), json=body)).json()
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            reply = await server.http.post("/v1/chat/completions", headers=server.headers("acme"), json=body)
            chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
            assert text == whole["choices"][0]["message"]["content"]
            assert chunks[-1]["usage"] == whole["usage"]
            assert chunks[-1]["ftcore_receipt"]["output"] == whole["ftcore_receipt"]["output"]

    run(go())
