"""`ftcore serve` as a person runs it, two bases over TLS: says where it answers, asks nobody else's machine, ends in order."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterStore
from ftcore.cli import main
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from ftcore.storage import Folder
from ftcore.weights import weights_digest
from serving.audit import Seal
from serving.ledger import Ledger
from tests.certificates import make_pair
from tests.conftest import make_tiny_model
from tests.oracles import make_adapter
from tests.serve_command import serve_command

pytestmark = pytest.mark.ray


def test_it_serves_and_drains(tiny_model_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    made = make_adapter(tiny_model_dir, tmp_path / "made", 0)
    ref = import_adapter(made, "demo/support", Model(path=str(tiny_model_dir)), store, log=lambda _: None)
    store.promote(ref)
    large = make_tiny_model(tmp_path / "large", seed=1, hidden=48, vocab=320)
    other = import_adapter(make_adapter(large, tmp_path / "made-2", 1), "demo/other", Model(path=str(large)), store, log=lambda _: None)
    store.promote(other)
    pair = make_pair(tmp_path)
    words = ["engine.max_context=512", "engine.num_threads=1", "limits.tokens_per_month=1000000"]
    words += [f"tls.cert={pair.cert}", f"tls.key={pair.key}", "admin.port=0"]
    words += [f"bases.large.base={large}", "bases.large.num_cpus=0.5", "bases.large.engine.kind=fake", "bases.large.preload=all"]
    with serve_command(tiny_model_dir, tmp_path / "adapters", tmp_path, 2, *words) as server:
        assert any("no keys: only this machine may ask" in line for line in server.lines)
        (admin,) = (line.split()[2] for line in server.lines if line.startswith("admin API: https://127.0.0.1:"))
        ours = ssl.create_default_context(cafile=pair.cert)
        assert httpx.get(f"{admin}/adapters/demo/support", verify=ours, timeout=60).json()["versions"][0]["ref"] == ref.full
        with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", timeout=60, verify=ours) as http:
            parents = {"base": None, "large": None, "other": "large", "support": "base"}
            assert {row["id"]: row["parent"] for row in http.get("/v1/models").json()["data"]} == parents
            assert http.get("/readyz").json()["replicas"] == 2
            for model, folder in {"base": tiny_model_dir, "large": large, "other": large}.items():
                reply = http.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 2})
                receipt, told = reply.json()["ftcore_receipt"], (reply.headers["x-ftcore-base"], reply.headers["x-ftcore-adapter"])
                assert told == (receipt["base"], receipt["adapter"]) == (weights_digest(folder), other.full if model == "other" else "")
                assert "x-ftcore-cold" not in reply.headers
            assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
            never_ends = {str(token): -100 for token in range(3)}
            body = {"model": "support", "prompt": "a", "max_tokens": 480, "stream": True, "logit_bias": never_ends}
            with http.stream("POST", "/v1/completions", json=body) as reply:
                assert reply.headers["x-ftcore-adapter"] == ref.full
                events = reply.iter_lines()
                next(events)
                server.terminate()
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        server.require_end(300)
        assert main(["audit", "verify", str(tmp_path / "adapters")]) == 0
        (seal,) = (tmp_path / "adapters" / "_audit").rglob("*.json")
        assert Seal.model_validate_json(seal.read_bytes()).ended, "the log is sealed at drain, by its own process"
        book = Ledger(Folder(tmp_path / "adapters" / "_quotas"), "demo").read().books["tokens_per_month"]
        assert (book.leases, book.ended >= 480) == ({}, True), "what was not used is given back at drain"
