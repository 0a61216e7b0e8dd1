"""The Ray Serve application: two replicas behind one address, each adapter on the replica that has it, streams, aborts, a full queue."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.cli import main
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.settings import ServeSettings
from serving.tenants import TenantStore, key_hash, new_clear_key
from serving.top import Sample
from tests.oracles import Truth, make_adapter
from tests.serve_command import free_port

pytestmark = pytest.mark.ray
NUM_ADAPTERS = 8
METRICS_KEY = new_clear_key()


@dataclass
class Place:
    url: str
    keys: dict[str, str]
    refs: dict[str, AdapterRef]
    truth: Truth
    store: AdapterStore
    tenants: TenantStore

    def client(self, tenant: str = "acme") -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {self.keys[tenant]}"}, timeout=60)


@pytest.fixture(scope="module")
def place(local_ray: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from ray import serve

    from serving.app import application

    home = tmp_path_factory.mktemp("serve")
    store, refs, folders = AdapterStore(home / "adapters"), {}, {}
    for number in range(NUM_ADAPTERS):
        made = make_adapter(tiny_model_dir, home / f"made-{number}", number)
        ref = import_adapter(made, f"acme/a{number}", Model(path=str(tiny_model_dir)), store, log=lambda _: None)
        store.promote(ref)
        refs[ref.name], folders[ref.digest] = ref, made
    tenants = TenantStore(str(home / "tenants"))
    keys = {}
    for name in ("acme", "bolt"):
        tenants.add(name)
        keys[name], _ = tenants.new_key(name)
    port = free_port()
    settings = ServeSettings.model_validate(
        {"base": str(tiny_model_dir), "store": str(home / "adapters"), "tenants": str(home / "tenants"), "replicas": 2, "num_cpus": 0.5,
         "port": port, "poll_s": 0.2, "queue": 32, "preload": ["acme/a0"],
         "metrics": {"key_sha256": key_hash(METRICS_KEY)}, "engine": {"max_batch": 8, "max_context": 256, "num_threads": 1}}
    )  # fmt: skip
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(application(settings), name="ftcore", route_prefix="/", logging_config={"log_level": "WARNING"})
    yield Place(f"http://127.0.0.1:{port}", keys, refs, Truth(tiny_model_dir, folders), store, tenants)
    serve.shutdown()


def run(task: Any) -> Any:
    return asyncio.run(asyncio.wait_for(task, 600))


def test_every_answer_is_its_own_adapters_and_comes_from_the_replica_that_has_it(place: Place) -> None:
    async def go() -> None:
        rng = random.Random(0)
        async with place.client() as http:

            async def one(number: int) -> tuple[str, list[int], httpx.Response]:
                name, prompt = f"a{number % NUM_ADAPTERS}", [rng.randrange(5, 250) for _ in range(rng.randrange(1, 40))]
                body = {"model": name, "prompt": prompt, "max_tokens": 4, "seed": number, "logprobs": 0}
                return name, prompt, await http.post("/v1/completions", json=body)

            found = []
            for burst in range(10):
                found += await asyncio.gather(*(one(16 * burst + i) for i in range(16)))
        homes: dict[str, set[str]] = {}
        num_compared = 0
        for name, prompt, reply in found:
            assert reply.status_code == 200, reply.text
            ref = place.refs[name]
            assert reply.headers["x-ftcore-adapter"] == ref.full
            homes.setdefault(name, set()).add(reply.headers["x-ftcore-replica"])
            if (logprobs := reply.json()["choices"][0]["logprobs"]) is not None:  # None: it stopped at once
                num_compared += 1
                own = place.truth.logps(ref.digest, prompt)[-1]
                assert float((own - logprobs["token_logprobs"][0]).abs().min()) <= 1e-4
        assert num_compared > 120
        cold = sum("x-ftcore-cold" in reply.headers for *_, reply in found)
        assert all(len(home) == 1 for home in homes.values()), homes
        warm = [reply for *_, reply in found[32:]]
        assert cold <= 4 * NUM_ADAPTERS and sum("x-ftcore-cold" in reply.headers for reply in warm) <= 0.05 * len(warm)

    run(go())


def test_a_stream_ends_with_its_receipt_and_a_key_of_it_is_published(place: Place) -> None:
    async def go() -> None:
        async with place.client() as http:
            body = {"model": "a1", "messages": [{"role": "user", "content": "What is your name?"}], "max_tokens": 12, "stream": True}
            async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                lines = [line async for line in reply.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            receipt = json.loads(lines[-2][6:])["ftcore_receipt"]
            assert receipt["adapter"] == place.refs["a1"].full
            keys = (await http.get("/v1/receipt-keys")).json()["data"]
            assert receipt["key"] in {row["id"] for row in keys}
            assert len(keys) == 2

    run(go())


def test_who_goes_away_is_aborted_in_the_replica_too(place: Place) -> None:
    async def go() -> None:
        async with place.client() as http:
            never_ends = {str(token): -100 for token in range(3)}
            body = {"model": "a2", "prompt": "a", "max_tokens": 240, "stream": True, "logit_bias": never_ends}
            before = (await _state("a2", place))["engine"]["num_tokens"]
            for _ in range(6):
                async with http.stream("POST", "/v1/completions", json=body) as reply:
                    assert reply.status_code == 200
                    await anext(reply.aiter_lines())
            until = time.monotonic() + 60
            while (state := await _state("a2", place))["engine"]["num_running"] or any(slot["pins"] for slot in state["resident"].values()):
                assert time.monotonic() < until
                await asyncio.sleep(0.1)
            assert state["engine"]["num_tokens"] - before < 6 * 240, "they were answered to their end"

    run(go())


async def _state(name: str, place: Place) -> dict[str, Any]:
    """Of the replica that has this adapter."""
    from ray import serve

    handle = serve.get_deployment_handle("engine", "ftcore").options(multiplexed_model_id=f"acme/{name}")
    return await handle.state.remote()


def test_more_than_the_queue_holds_is_refused_and_told_when_to_come_back(place: Place) -> None:
    async def go() -> None:
        async with place.client() as http:
            body = {"model": "a3", "prompt": "a", "max_tokens": 120}
            replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(160)))
            told = Counter(reply.status_code for reply in replies)
            assert set(told) <= {200, 429, 503} and told[200] >= 32 and told[429] + told[503] > 0, told
            for reply in replies:
                if reply.status_code != 200:
                    assert int(reply.headers["retry-after"]) >= 1
            assert (await http.post("/v1/completions", json={**body, "max_tokens": 1})).status_code == 200

    run(go())


def test_a_promotion_reaches_every_replica(place: Place, tiny_model_dir: Path, tmp_path: Path) -> None:
    made = make_adapter(tiny_model_dir, tmp_path / "made", 99)
    ref = import_adapter(made, "acme/a4", Model(path=str(tiny_model_dir)), place.store, log=lambda _: None)

    async def go() -> None:
        async with place.client() as http:
            place.store.promote(ref)
            for _ in range(1200):
                reply = await http.post("/v1/completions", json={"model": "a4", "prompt": "a", "max_tokens": 1})
                assert reply.status_code == 200
                if reply.headers["x-ftcore-adapter"] == ref.full:
                    return
                await asyncio.sleep(0.05)
            pytest.fail("the new version never answered")

    run(go())
    assert run(_foreign(place)) == 404


async def _foreign(place: Place) -> int:
    async with place.client("bolt") as http:
        return (await http.post("/v1/completions", json={"model": "acme/a4", "prompt": "a", "max_tokens": 1})).status_code


def test_both_replicas_are_seen_by_metrics_readiness_and_the_command_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def figures(http: httpx.AsyncClient) -> Sample:
        reply = await http.get("/metrics", headers={"authorization": f"Bearer {METRICS_KEY}"})
        assert reply.status_code == 200, reply.text
        return Sample(0.0, reply.text)

    async def go() -> None:
        async with place.client() as http:
            for path in ("/metrics", "/status"):
                assert (await http.get(path)).status_code == 401
            assert (await http.get("/readyz")).json() == {"status": "ready", "reasons": [], "replicas": 2, "store": "ok"}
            before = await figures(http)
            asked = [
                http.post("/v1/completions", json={"model": f"a{i % 8}", "prompt": "a", "max_tokens": 4, "logprobs": 0}) for i in range(64)
            ]
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
            await asyncio.sleep(0.6)
            after = await figures(http)
        both = after.each("ftcore_replica_ready", "replica")
        assert len(both) == 2
        for own in both:
            assert after.sum("ftcore_engine_tokens_total", **own) > before.sum("ftcore_engine_tokens_total", **own)
            assert (
                after.sum("ftcore_resident_versions", tenant="acme", adapter="a0", **own) == after.sum("ftcore_replica_ready", **own) == 1
            )
            assert after.sum("ftcore_adapter_load_seconds_count", **own) >= 1
        assert after.sum("ftcore_replicas") == 2
        assert after.sum("ftcore_requests_total", outcome="ok") - before.sum("ftcore_requests_total", outcome="ok") == 64

    run(go())
    assert main(["serve", "--status", place.url]) != 0 and "needs the metrics key" in capsys.readouterr().err
    monkeypatch.setenv("FTCORE_METRICS_KEY", METRICS_KEY)
    assert main(["serve", "--status", place.url]) == 0
    said = capsys.readouterr().out
    assert main(["adapters", "status", place.url]) == 0 and capsys.readouterr().out.count("\n") == said.count("\n")
    assert re.search(rf"{place.refs['a0'].full[:20]}\S* +100% +on replica 0, 1", said) and "replica 1  ready" in said, said
    assert main(["serve", "--top", f"{place.url}/v1", "--every", "0.2"]) == 0
    said = capsys.readouterr().out
    assert len(set(re.findall(r"^([0-9a-z]{8,}) base ", said, re.MULTILINE))) == 2 and "acme/a0" in said, said


def test_what_a_replica_refuses_is_told_as_if_the_ingress_had_refused_it(place: Place) -> None:
    """Errors cross a process: their kind and words have to arrive."""

    async def go() -> None:
        async with place.client() as http:
            for stream in (False, True):
                long = await http.post("/v1/completions", json={"model": "a1", "prompt": [5] * 300, "stream": stream})
                assert (long.status_code, "does not fit" in long.text) == (400, True), long.text
            forged = {"model": "a1", "messages": [{"role": "user", "content": "<|im_end|>"}]}
            assert (await http.post("/v1/chat/completions", json=forged)).status_code == 400
            broken = await http.post("/v1/completions", json={"model": "a1", "prompt": "a", "structured_outputs": {"regex": "(a"}})
            assert (broken.status_code, "unclosed" in broken.text) == (400, True), broken.text
            held = await http.post("/v1/completions", json={"model": "a1", "prompt": "a", "structured_outputs": {"choice": ["yes"]}})
            assert held.json()["choices"][0]["text"] == "yes"

    run(go())


def test_a_revoked_key_is_refused_within_seconds_and_no_log_of_the_cluster_holds_one(place: Place) -> None:
    import ray

    revoked, record = place.tenants.new_key("bolt")

    async def told(wanted: int) -> float:
        async with httpx.AsyncClient(base_url=place.url, headers={"authorization": f"Bearer {revoked}"}, timeout=60) as http:
            began = time.monotonic()
            while (
                reply := await http.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 1})
            ).status_code != wanted:
                assert time.monotonic() - began < 30, reply.text
                await asyncio.sleep(0.05)
            return time.monotonic() - began

    run(told(200))
    place.tenants.revoke_key("bolt", record.id)
    run(told(401))
    logs = Path(str(ray._private.worker.global_worker.node.get_logs_dir_path()))
    said = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any("engine" in path.name for path in said) and any("ingress" in path.name for path in said), sorted(map(str, said))
    for key in (*place.keys.values(), revoked, METRICS_KEY):
        secret = key.removeprefix("ft_").encode()
        assert not [path for path, text in said.items() if secret in text]
