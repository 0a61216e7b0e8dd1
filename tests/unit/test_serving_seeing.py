"""What operators see of a server: every figure moves when what it counts happens, nobody else reads it, names are bounded."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ftcore.adapters import AdapterRef
from ftcore.engines.base import Sampling
from serving.jobs import Answerer, Closing, Job, Opening, Piece
from serving.metrics import OTHER, Labels, Metrics, Stamped
from serving.replica_metrics import Replicas
from serving.states import States
from serving.tenants import key_hash, new_clear_key
from serving.top import Sample, frame, quantile
from serving.watching import status_lines
from tests.served import Server, Store, run, served
from tests.served import store as store

KEY = new_clear_key()
HEADERS = {"authorization": f"Bearer {KEY}"}
METRICS = {"metrics": {"key_sha256": key_hash(KEY)}}
GRAFANA = Path(__file__).resolve().parents[2] / "k8s/base/grafana.json"


@pytest.fixture
def own_store(store: Store, tmp_path: Path) -> Store:
    """A copy that a test may change."""
    return replace(store, path=Path(shutil.copytree(store.path, tmp_path / "own-store")))


def damaged(store: Store, name: str) -> AdapterRef:
    """A version that is no longer what was published."""
    ref = store.refs[name]
    weights = store.path / ref.tenant / ref.name / "versions" / ref.digest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\x01" * 8)
    return ref


async def sampled(server: Server) -> Sample:
    server.gate.directory.refresh()
    reply = await server.http.get("/metrics", headers=HEADERS)
    assert reply.status_code == 200, reply.text
    return Sample(time.monotonic(), reply.text)


def moved(before: Sample, after: Sample) -> set[str]:
    names = {name for name, _ in after.values}
    return {name for name in names if after.sum(name) != before.sum(name)}


def test_every_figure_moves_when_what_it_counts_happens(own_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.states.FRESH_S", 0.0)
    bad, second = damaged(own_store, "bolt/legal"), own_store.refs["acme/support v2"]

    async def go() -> None:
        async with served(own_store, tmp_path, engine={"max_batch": 8, "max_context": 512, "num_threads": 1}, **METRICS) as server:
            prompt = list(range(5, 45))
            first = await sampled(server)
            assert first.sum("ftcore_replicas") == first.sum("ftcore_replica_ready") == 1
            for _ in range(3):
                reply = await server.complete(
                    "acme", model="support", prompt=prompt, max_tokens=8, logit_bias={"0": -100, "1": -100, "2": -100}
                )
                assert reply.status_code == 200, reply.text
            warm = await sampled(server)
            pair = {"tenant": "acme", "adapter": "support"}
            for name in ("request_seconds_count", "time_to_first_token_seconds_count", "time_per_output_token_seconds_count"):
                assert warm.sum(f"ftcore_{name}", **pair) == 3, name
            assert (warm.sum("ftcore_prompt_tokens_total", **pair), warm.sum("ftcore_completion_tokens_total", **pair)) == (120, 24)
            assert (warm.sum("ftcore_requests_total", outcome="ok", **pair), warm.sum("ftcore_cold_starts_total", **pair)) == (3, 1)
            assert warm.sum("ftcore_resident_versions", **pair) == warm.sum("ftcore_resident_adapters") == 1
            assert warm.sum("ftcore_adapter_load_seconds_count") == 1
            assert warm.sum("ftcore_engine_reused_prompt_tokens_total") >= 39
            assert warm.sum("ftcore_queue_wait_seconds_count") == 3 and warm.sum("ftcore_adapter_bytes") > 0
            body = {"model": "support", "prompt": "a", "max_tokens": 480, "logit_bias": {"0": -100, "1": -100, "2": -100}}
            asking = [asyncio.create_task(server.complete("acme", **body)) for _ in range(10)]
            await until(lambda: server.replica.engine.stats().num_waiting > 0)
            await until(lambda: server.replica.engine.stats().cache_tokens > 0)
            busy = await sampled(server)
            assert busy.sum("ftcore_requests_under_way", **pair) == 10
            for task in asking[:5]:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            server.store.promote(second)
            await until(lambda: server.gate.directory.num_followed == 1)
            assert (await server.complete("acme", model="support", prompt="a", max_tokens=1)).status_code == 200
            await until(lambda: second in server.replica.slots.resident)
            assert (await server.complete("bolt", model="legal", prompt="a", max_tokens=1)).status_code == 409
            assert (await server.complete("acme", model="nobody", prompt="a")).status_code == 404
            assert (await server.complete("acme", model="base", prompt="a", n=500)).status_code == 400
            assert (await server.http.get("/v1/models")).status_code == 401
            assert list(server.replica.state()["refused"]) == [bad.full]
            last = await sampled(server)
            assert last.sum("ftcore_requests_total", outcome="aborted", **pair) == 5
            assert last.sum("ftcore_refusals_total", tenant="acme", code="model_not_found") == 1
            assert last.sum("ftcore_refusals_total", tenant="acme", code="invalid_request") == 1
            assert last.sum("ftcore_refusals_total", tenant="", code="invalid_api_key") == 1
            assert last.sum("ftcore_requests_total", tenant="bolt", adapter="legal", outcome="refused") == 1
            assert last.sum("ftcore_resident_versions", **pair) == 2
            for name in ("versions_refused", "promotions_followed", "swaps"):
                assert last.sum(f"ftcore_{name}_total") == 1, name
            seen = moved(first, warm) | moved(warm, busy) | moved(busy, last)
            still = {"ftcore_replicas", "ftcore_replica_ready", "ftcore_store_away", "ftcore_cache_capacity_tokens"}
            assert {name for name, _ in last.values} - seen == still
            assert "tokens/s" in "\n".join(frame(first, warm))
            assert_dashboard_names({name for name, _ in last.values})

    run(go())


def assert_dashboard_names(known: set[str]) -> None:
    """Every query of the dashboard asks for what /metrics shows, by labels that it has."""
    panels = json.loads(GRAFANA.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"ftcore_\w+", query)}
    assert len(queries) >= 17 and asked <= known, asked - known
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in known} == {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in asked
    }


async def until(done: Any) -> None:
    for _ in range(6000):
        if done():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never came to that")


def test_the_metrics_key_alone_opens_metrics_and_status_and_nothing_else(store: Store, tmp_path: Path) -> None:
    async def told(server: Server, path: str, **headers: str) -> int:
        return (await server.http.get(path, headers=headers)).status_code

    async def go() -> None:
        async with served(store, tmp_path, **METRICS) as server:
            for path in ("/metrics", "/status"):
                assert await told(server, path) == await told(server, path, **server.headers("acme")) == 401
                assert await told(server, path, authorization=f"Bearer {KEY[:-1]}") == await told(server, path, authorization=KEY) == 401
                assert await told(server, path, **HEADERS) == 200
            assert await told(server, "/v1/models", **HEADERS) == 401
            prefixed = httpx.ASGITransport(app=server.api, root_path="/llm", raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=prefixed, base_url="http://server") as http:
                assert (await http.get("/llm/v1/models", headers=server.headers("acme"))).status_code == 200
                assert (await http.get("/llm/metrics", headers=server.headers("acme"))).status_code == 404
        async with served(store, tmp_path / "closed") as server:  # tenants, and no metrics key: nobody, from this machine neither
            for headers in ({}, server.headers("acme"), HEADERS):
                assert await told(server, "/metrics", **headers) == await told(server, "/status", **headers) == 403

    run(go())


def test_without_keys_only_this_machine_reads_metrics(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, tenants="", local_tenant="acme") as server:
            for host, status in (("localhost", 200), ("evil.example", 403)):
                assert (await server.http.get("/metrics", headers={"host": host})).status_code == status

    run(go())


def job(tenant: str, adapter: str) -> Job:
    return Job("id", tenant, Answerer("base", AdapterRef(tenant, adapter, "0" * 64)), (5,), 4, Sampling())


def test_five_hundred_tenants_make_no_more_series_than_were_allowed() -> None:
    metrics, most = Metrics(40), 40
    for tenant in range(500):
        for adapter in range(3):
            answer = metrics.begun(job(f"t{tenant}", f"a{adapter}"))
            for event in (
                Opening("", "", "", False, 3),
                Piece(0, "a", num_tokens=1),
                Piece(0, "b", num_tokens=1, finish="length"),
                Closing(3, 2, {}),
            ):
                answer.saw(event)
            answer.ended(False)
        metrics.refused(f"t{tenant}", "model_not_found")
    resident = {AdapterRef(f"t{tenant}", "a0", "0" * 64).full: {} for tenant in range(500)}
    engine = dict.fromkeys(
        ("num_running", "num_waiting", "cache_tokens", "cache_capacity", "adapter_bytes", "num_steps", "num_tokens", "num_prompt_tokens",
         "num_reused_tokens", "num_admitted", "waited_s"), 0,
    )  # fmt: skip
    state = {
        "number": 0,
        "replica": "r0",
        "base": "base",
        "engine": engine,
        "resident": resident,
        "missing": {},
        "num_refused": 0,
        "num_swaps": 0,
        "load_s": 0,
        "loads": [0] * 12,
    }
    metrics.registry.register(Replicas([state], metrics.labels, 0, False))
    sample = Sample(0.0, generate_latest(metrics.registry).decode())
    assert sample.sum("ftcore_requests_total") == sample.sum("ftcore_time_to_first_token_seconds_count") == 1500
    assert sample.sum("ftcore_refusals_total") == sample.sum("ftcore_resident_versions") == 500
    for name in ("ftcore_request_seconds_count", "ftcore_resident_versions", "ftcore_refusals_total"):
        assert len([1 for own, _ in sample.values if own == name]) <= most + 1
    assert sample.sum("ftcore_requests_total", tenant=OTHER, adapter=OTHER) > 1000
    assert len(sample.values) < (most + 1) * 80


def test_one_tenant_with_many_adapters_leaves_labels_to_others() -> None:
    labels = Labels(20)
    assert len({labels.of("hog", f"a{number}") for number in range(100)}) == 11  # half, and one for the rest
    assert labels.of("hog", "a99") == ("hog", OTHER)
    assert labels.of("light", "a") == ("light", "a")
    assert labels.of("hog", "a0") == ("hog", "a0")


def test_what_is_preloaded_is_there_before_any_request_stays_and_follows(own_store: Store, tmp_path: Path) -> None:
    first, bad = own_store.refs["acme/support"], damaged(own_store, "acme/support v2")

    async def go() -> None:
        async with served(own_store, tmp_path, preload=["acme/support", "bolt/legal"], **METRICS) as server:
            wanted = {first, own_store.refs["bolt/legal"]}
            assert set(server.replica.slots.resident) == wanted
            assert (await server.http.get("/readyz")).json() == {"status": "ready", "reasons": [], "replicas": 1, "store": "ok"}
            assert "x-ftcore-cold" not in (await server.complete("acme", model="support", prompt="a", max_tokens=1)).headers
            server.replica.slots._max_bytes = 1  # room for nothing that is not kept
            await server.complete("bolt", model="support", prompt="a", max_tokens=1)
            await server.complete("acme", model="sales", prompt="a", max_tokens=1)
            assert wanted <= set(server.replica.slots.resident) and own_store.refs["bolt/support"] not in server.replica.slots.resident
            server.replica.slots._max_bytes = 1 << 30
            server.store.promote(bad)
            await until(lambda: bad in server.replica.slots._refused)
            await until(lambda: bad in server.gate.directory.picture.current())
            await asyncio.sleep(0.6)
            assert (await server.http.get("/readyz")).status_code == 200  # the version before answers
            status = (await server.http.get("/status", headers=HEADERS)).json()
            lines = "\n".join(status_lines(status))
            assert re.search(rf"acme/support@{bad.digest[:12]}\s+REFUSED .*not the one that was published", lines), lines
            assert re.search(rf"acme/support@{first.digest[:12]}\s+not current", lines) and "replica 0  ready" in lines
            assert re.search(rf"bolt/legal@{own_store.refs['bolt/legal'].digest[:12]}\s+100%\s+on replica 0", lines), lines

    run(go())


def test_a_listed_name_that_cannot_answer_holds_the_server_up_and_an_unlisted_one_does_not(own_store: Store, tmp_path: Path) -> None:
    async def ready(preload: object) -> tuple[int, str, set[str]]:
        async with served(own_store, tmp_path / str(preload).replace("/", "-"), preload=preload, **METRICS) as server:
            reply, status = await server.http.get("/readyz"), (await server.http.get("/status", headers=HEADERS)).json()
            held = {ref.name for ref in server.replica.slots.resident}
            assert ("secret" in json.dumps(status)) == (reply.status_code == 503)
            return reply.status_code, reply.text, held

    async def go() -> None:
        code, text, held = await ready(["bolt/legal", "acme/secret"])
        assert (code, held) == (503, {"legal"})
        assert "replica 0: 1 of its adapters not loaded" in text and "secret" not in text  # who asks has shown no key
        code, _, held = await ready("all")
        assert (code, held) == (200, {"support", "sales", "legal"})

    run(go())


def test_replicas_keep_small_numbers_and_one_that_comes_takes_the_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.states.FRESH_S", 0.0)
    here = {"x": "", "y": ""}

    async def ask(base: str) -> list[dict[str, Any]]:
        if not here[base]:
            raise TimeoutError
        return [{"replica": name, "weights": base, "tokenizer": "", "template": ""} for name in here[base]]

    async def go() -> None:
        states = States({base: partial(ask, base) for base in here})
        seen = []
        for here["x"], here["y"] in (("ab", ""), ("b", ""), ("", ""), ("bc", "d"), ("", "d"), ("fcb", "de")):
            seen.append({state["base"] + state["replica"]: state["number"] for state in await states.now()})
        assert seen[:3] == [{"xa": 0, "xb": 1}, {"xb": 1}, {}]
        assert seen[3:] == [{"xb": 1, "xc": 0, "yd": 2}, {"yd": 2}, {"xb": 1, "xc": 0, "yd": 2, "xf": 3, "ye": 4}]
        assert {name: origin.weights for name, origin in states.origins.items()} == {"x": "x", "y": "y"}

    run(go())


def test_the_live_view_counts_what_happened_between_two_looks() -> None:
    metrics = Metrics(10)

    def answered_by(at: float) -> Sample:
        answer = metrics.begun(job("acme", "support"))
        for event in (Opening("", "", "", True, 30), Piece(0, "a", num_tokens=1), Closing(30, 10, {})):
            answer.saw(event)
        answer.ended(False)
        return Sample(at, generate_latest(metrics.registry).decode())

    title, whole, row, *_ = frame(answered_by(1.0), answered_by(3.0))
    assert title.split()[0] == "tokens/s"
    assert [whole.split()[:5], row.split()[:5]] == [["all", "5.0", "15.0", "0.50", "0"], ["acme/support", "5.0", "15.0", "0.50", "0"]]
    assert quantile({0.1: 0.0, 0.2: 10.0, 0.4: 20.0, float("inf"): 20.0}, 0.5) == pytest.approx(0.2)
    assert quantile({0.1: 0.0, 0.2: 10.0, 0.4: 20.0, float("inf"): 20.0}, 0.75) == pytest.approx(0.3)
    assert quantile({0.1: 0.0, float("inf"): 5.0}, 0.5) == 0.1
    assert quantile({}, 0.5) is quantile({0.1: 0.0, float("inf"): 0.0}, 0.5) is None


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """(address, bodies that came) of a server that takes traces."""
    bodies: list[bytes] = []

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taker)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


def test_a_trace_of_each_request_arrives_and_holds_no_content(store: Store, tmp_path: Path) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def go(address: str) -> str:
        async with served(store, tmp_path, otel_endpoint=address) as server:
            headers = {**server.headers("acme"), "traceparent": f"00-{trace}-{parent}-01"}
            body = {"model": "support", "messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 3, "seed": 1}
            reply = await server.http.post("/v1/chat/completions", headers=headers, json=body)
            assert reply.status_code == 200
            assert (await server.complete("acme", model="base", prompt=[5] * 300)).status_code == 400
            await asyncio.to_thread(server.seeing.close)
            return reply.headers["x-ftcore-adapter"]

    with collector() as (address, bodies):
        adapter = run(go(address))
    spans = {}
    for body in bodies:
        assert b"xyzzy" not in body and b"ft_" not in body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"chat support", "text_completion base"}
    chat = spans["chat support"]
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (trace, parent)
    facts = {fact.key: fact.value for fact in chat.attributes}
    assert facts["gen_ai.request.model"].string_value == "support" and facts["gen_ai.response.model"].string_value == adapter
    assert facts["gen_ai.usage.input_tokens"].int_value > 0 and facts["gen_ai.usage.output_tokens"].int_value <= 3
    (finish,) = facts["gen_ai.response.finish_reasons"].array_value.values
    assert finish.string_value in ("stop", "length")
    assert facts["gen_ai.operation.name"].string_value == "chat" and facts["ftcore.tenant"].string_value == "acme"
    assert {fact.key: fact.value for fact in spans["text_completion base"].attributes}["error.type"].string_value == "refused"


def test_the_text_is_what_prometheus_reads() -> None:
    metrics = Metrics(10)
    metrics.refused("acme", "model_not_found")
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    assert families["ftcore_refusals"].type == "counter" and families["ftcore_request_seconds"].type == "histogram"
    assert not any(name.endswith("_created") for name in families)


def test_counters_of_two_ingresses_are_told_apart_and_replicas_are_not() -> None:
    samples = []
    for name, number in (("first", 7), ("second", 3)):
        metrics, told = Metrics(8), CollectorRegistry()
        counter = Counter("ftcore_asked", "Asked.", ["tenant"], registry=metrics.registry)
        counter.labels("acme").inc(number)
        told.register(Stamped([metrics.registry], name))
        samples.append(Sample(0, generate_latest(told).decode()))
    assert [sample.sum("ftcore_asked_total", tenant="acme", ingress=sample.ingress) for sample in samples] == [7, 3]
    assert [sample.ingress for sample in samples] == ["first", "second"]
