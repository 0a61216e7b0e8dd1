"""`/v1/embeddings`: each tenant's adapter, as numbers and as base64, signed, counted, and bounded."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from ftcore.errors import IntegrityError
from ftcore.receipt_commands import main as verify_main
from tests.oracles import Truth
from tests.served import Server, Store, run, served
from tests.served import store as store
from tests.served import truth as truth


async def embed(server: Server, tenant: str = "acme", **body: Any) -> httpx.Response:
    return await server.http.post("/v1/embeddings", headers=server.headers(tenant), json=body)


def test_an_input_is_embedded_by_the_callers_own_adapter(store: Store, truth: Truth, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            inputs = [[5, 6, 7], [9] * 40]
            for tenant, model in (("acme", "support"), ("bolt", "support"), ("acme", "base")):
                reply = await embed(server, tenant, model=model, input=inputs)
                body = reply.json()
                ref = store.refs.get(f"{tenant}/{model}")
                assert reply.headers["x-ftcore-adapter"] == (ref.full if ref else "")
                assert [(row["object"], row["index"]) for row in body["data"]] == [("embedding", 0), ("embedding", 1)]
                got = torch.tensor([row["embedding"] for row in body["data"]])
                want = torch.stack([truth.embedding(ref.digest if ref else "", ids) for ids in inputs])
                assert float((got - want).abs().max()) <= 1e-5
                assert body["usage"] == {"prompt_tokens": 43, "total_tokens": 43}
            packed = (await embed(server, model="support", input="a text", encoding_format="base64")).json()["data"][0]["embedding"]
            plain = (await embed(server, model="support", input=["a text"])).json()["data"][0]["embedding"]
            assert list(struct.unpack(f"<{len(plain)}f", base64.b64decode(packed))) == plain

    run(go())


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_embedding_carries_a_receipt_and_one_altered_number_is_found(store: Store, tmp_path: Path, encoding: str) -> None:
    async def go() -> tuple[Any, Any]:
        async with served(store, tmp_path) as server:
            body = (await embed(server, model="support", input=["a", "b"], encoding_format=encoding)).json()
            return body, (await server.http.get("/v1/receipt-keys", headers=server.headers("acme"))).json()

    body, keys = run(go())
    answer, known = tmp_path / "answer.json", tmp_path / "keys.json"
    known.write_text(json.dumps(keys))
    words = [str(answer), "--keys", str(known), "--store", str(store.path)]
    answer.write_text(json.dumps(body))
    assert verify_main(words) == 0
    values = body["data"][1]["embedding"]
    body["data"][1]["embedding"] = [*values[:-1], values[-1] * 1.001] if encoding == "float" else "A" + values[1:]
    answer.write_text(json.dumps(body))
    with pytest.raises(IntegrityError, match="not the answer"):
        verify_main(words)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"model": "legal", "input": "a"}, 404, "model_not_found"),
        ({"model": "support", "input": []}, 400, "input"),
        ({"model": "support", "input": [[]]}, 400, "input"),
        ({"model": "support", "input": ["a"] * 257}, 400, "input"),
        ({"model": "support", "input": ["a", [5]]}, 400, "input"),
        ({"model": "support", "input": [10**9]}, 400, "invalid_value"),
        ({"model": "support", "input": [5] * 300}, 400, "does not fit"),
        ({"model": "support", "input": ""}, 400, "empty"),
        ({"model": "support", "input": "a", "dimensions": 8}, 400, "dimensions"),
        ({"model": "support", "input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"model": "support", "input": "a", "max_tokens": 3}, 400, "max_tokens"),
    ],
)
def test_what_cannot_be_embedded_is_told_why(store: Store, tmp_path: Path, body: dict[str, Any], status: int, word: str) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            reply = await embed(server, **body)
            assert (reply.status_code, word in reply.text) == (status, True), reply.text

    run(go())


def test_inputs_count_against_the_tenants_quota(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, limits={"tokens_per_month": 100}) as server:
            assert (await embed(server, model="support", input=[[5] * 30, [6] * 30])).status_code == 200
            assert (await embed(server, model="support", input=[[5] * 30, [6] * 30])).status_code == 429
            assert (await embed(server, model="support", input=[5] * 40)).status_code == 200

    run(go())


def test_an_engine_that_computes_nothing_embeds_nothing(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, engine={"kind": "fake", "max_context": 128}) as server:
            reply = await embed(server, model="support", input="a")
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")

    run(go())
