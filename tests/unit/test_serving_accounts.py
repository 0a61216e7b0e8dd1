"""Through the HTTP API, with the torch engine: what is told of limits, what an answer costs however it ends, what the audit log holds."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.storage import Folder
from serving import quotas as quotas_module
from serving.audit import HOME, read_segment
from serving.ledger import HOME as LEDGERS
from serving.ledger import Ledger
from serving.published_keys import published_keys
from tests.served import Server, Store, run, served, soon
from tests.served import store as store

SECRET = "xyzzy the content of a question"


@pytest.fixture(autouse=True)
def fresh(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ledger and no audit of the test before; what is idle is given back quickly."""
    for home in (LEDGERS, HOME):
        shutil.rmtree(store.path / home, ignore_errors=True)
    monkeypatch.setattr(quotas_module, "TICK_S", 0.05)
    monkeypatch.setattr(quotas_module, "IDLE_S", 0.2)


async def settled(store: Store, tenant: str = "acme") -> int:
    """The month's tokens, once the tenant was idle and every lease has ended."""
    for _ in range(2400):
        await asyncio.sleep(0.05)
        book = Ledger(Folder(store.path) / LEDGERS, tenant).read().books["tokens_per_month"]
        if not book.leases:
            return book.ended
    raise AssertionError("a lease did not end")


def audited(store: Store) -> list[dict[str, Any]]:
    folder, keys = Folder(store.path) / HOME, published_keys(str(store.path))
    names = sorted(path.stem for path in (store.path / HOME).rglob("*.jsonl"))
    return [line for name in names for line in read_segment(folder, name, keys)[1] if "outcome" in line]


async def usage_of(server: Server, number: int) -> int:
    """The tokens that one answer of a random kind says it used."""
    rng = random.Random(number)
    body: dict[str, Any] = {"model": rng.choice(["support", "base"]), "max_tokens": rng.randrange(1, 30), "n": rng.randrange(1, 4)}
    body["prompt"] = rng.choice([SECRET * rng.randrange(1, 4), [rng.randrange(5, 200) for _ in range(rng.randrange(1, 60))]])
    if rng.random() < 0.5:
        return int((await server.complete("acme", **body)).json()["usage"]["total_tokens"])
    reply = await server.complete("acme", **body, stream=True, stream_options={"include_usage": True})
    return int(json.loads(reply.text.strip().split("\n\n")[-2].removeprefix("data: "))["usage"]["total_tokens"])


def test_the_ledger_and_the_audit_hold_the_sum_of_what_answers_say_they_used(store: Store, tmp_path: Path) -> None:
    async def go() -> int:
        async with served(store, tmp_path, limits={"tokens_per_month": 1_000_000, "max_concurrent": 200}) as server:
            used = sum(await asyncio.gather(*(usage_of(server, number) for number in range(40))))
            assert await settled(store) == used
            return used

    used = run(go())
    lines = audited(store)
    assert len(lines) == 40
    assert sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines) == used
    assert {line["outcome"] for line in lines} <= {"finished", "length"}
    assert {line["adapter"] for line in lines} == {"", store.refs["acme/support"].full}
    assert main(["audit", "verify", str(store.path)]) == 0


def test_over_a_limit_is_told_in_openais_shape(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, limits={"tokens_per_month": 120, "requests_per_minute": 1000}) as server:
            body = {"model": "support", "prompt": [5] * 20, "max_tokens": 80, "logit_bias": {str(token): -100 for token in range(3)}}
            first = await server.complete("acme", **body)
            assert (first.status_code, first.json()["usage"]["total_tokens"]) == (200, 100)
            assert (first.headers["x-ratelimit-limit-tokens"], first.headers["x-ratelimit-remaining-tokens"]) == ("120", "20")
            assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("1000", "999")
            over = await server.complete("acme", **body)
            assert over.status_code == 429
            assert int(over.headers["retry-after"]) > 0 and over.headers["x-ratelimit-reset-tokens"].endswith("s")
            error = over.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("insufficient_quota", "insufficient_quota", None)
            assert "120 tokens a month" in error["message"]
            longer = await server.complete("acme", model="support", prompt="?!" * 60, max_tokens=1)
            assert longer.status_code == 429, "a prompt that is found to be longer than was guessed is refused before it is computed"
            assert (await server.complete("bolt", **body)).status_code == 200, "another tenant's quota is its own"
            assert (await server.complete("acme", model="support", prompt=[5] * 10, max_tokens=10)).status_code == 200
            assert await settled(store) <= 120

    run(go())
    lines = [line for line in audited(store) if line["tenant"] == "acme"]
    assert [(line["outcome"], line["code"]) for line in lines[1:3]] == [("refused", "insufficient_quota")] * 2
    assert [line["prompt_tokens"] for line in lines[1:3]] == [0, 0]


def test_a_client_that_leaves_pays_for_what_was_handed_on(store: Store, tmp_path: Path) -> None:
    async def go() -> int:
        async with served(store, tmp_path, limits={"tokens_per_month": 10_000}) as server:
            never_ends = {str(token): -100 for token in range(3)}
            body = {"model": "support", "prompt": [5] * 10, "max_tokens": 240, "stream": True, "logit_bias": never_ends}
            task = asyncio.create_task(server.complete("acme", **body))
            while server.replica.engine.stats().num_tokens < 20:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return await settled(store)

    spent = run(go())
    (line,) = audited(store)
    assert (line["outcome"], line["prompt_tokens"]) == ("aborted", 10)
    assert spent == 10 + line["completion_tokens"] and 10 <= line["completion_tokens"] < 240


def test_an_engine_that_fails_ends_the_account(store: Store, tmp_path: Path) -> None:
    async def go() -> int:
        async with served(store, tmp_path, limits={"tokens_per_month": 10_000}) as server:
            never_ends = {str(token): -100 for token in range(3)}
            body = {"model": "support", "prompt": [5] * 10, "max_tokens": 240, "logit_bias": never_ends}
            task = asyncio.create_task(server.complete("acme", **body))
            while server.replica.engine.stats().num_tokens < 20:
                await asyncio.sleep(0.005)
            await server.replica.engine.close()
            assert (await task).status_code == 503
            return await settled(store)

    spent = run(go())
    (line,) = audited(store)
    assert (line["outcome"], line["code"]) == ("failed", "engine_ended")
    assert spent == line["prompt_tokens"] + line["completion_tokens"] < 250


def test_limits_of_a_tenant_are_its_own_and_a_running_server_follows(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            command = ["tenants", "limits", str(tmp_path / "tenants"), "acme"]
            assert main([*command, "tokens_per_moth=5"]) == 2
            assert "did you mean tokens_per_month" in capsys.readouterr().err
            assert main([*command, "tokens_per_month=5", "max_tokens=7"]) == 0
            body = {"model": "support", "prompt": [5] * 4, "max_tokens": 7}

            async def told(status: int) -> bool:
                return (await server.complete("acme", **body)).status_code == status

            await soon(lambda: told(429))
            assert (await server.complete("bolt", **body)).status_code == 200
            assert main([*command, "tokens_per_month=null"]) == 0
            await soon(lambda: told(200))
            assert (await server.complete("acme", **{**body, "max_tokens": 8})).status_code == 400

    run(go())


def test_the_audit_names_who_and_what_and_holds_no_content(store: Store, tmp_path: Path) -> None:
    async def go() -> dict[str, str]:
        async with served(store, tmp_path) as server:
            answer = await server.complete("acme", model="support", prompt=SECRET, max_tokens=5)
            assert (await server.complete("acme", model="bolt/legal-xyzzy", prompt=SECRET, max_tokens=5)).status_code == 404
            assert (await server.complete("bolt", model="legal", prompt=SECRET, max_tokens=5, xyzzy=1)).status_code == 400
            assert (await server.complete("bolt", model="legal", prompt=[10**9], max_tokens=5)).status_code == 400
            assert (await server.complete("bolt", model="legal", prompt=SECRET, max_tokens=5000)).status_code == 400
            return {**server.keys, "request": answer.headers["x-ftcore-request"]}

    told = run(go())
    lines = audited(store)
    ids = {line["key"] for line in lines if line["tenant"] == "acme"}
    assert len(ids) == 1 and len(ids.pop()) == 8
    assert [(line["tenant"], line["outcome"], line["code"]) for line in lines] == [
        ("acme", "finished" if lines[0]["outcome"] == "finished" else "length", ""),
        ("acme", "refused", "model_not_found"),
        ("bolt", "refused", "invalid_request"),
        ("bolt", "refused", "invalid_value"),
        ("bolt", "refused", "invalid_value"),
    ]
    assert (lines[0]["request"], lines[0]["adapter"]) == (told["request"], store.refs["acme/support"].full)
    assert len(lines[0]["base"]) == 64 and lines[0]["duration_s"] > 0
    kept = b"".join(path.read_bytes() for path in (store.path / HOME).rglob("*") if path.is_file())
    for word in ("xyzzy", told["acme"], told["bolt"], told["acme"][3:20]):
        assert word.encode() not in kept
