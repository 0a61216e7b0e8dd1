"""Serving without Ray: whose weights answer, what a promotion and a revocation do, what a receipt proves."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapter_files import content_digest, content_files
from ftcore.adapters import AdapterStore
from ftcore.cli import main
from ftcore.engines.base import Sampling
from ftcore.errors import IntegrityError
from ftcore.publish import import_adapter
from ftcore.receipts import Receipt, verify_receipt
from ftcore.recipe import Model
from serving.jobs import Answerer, Closing, Event, Job, Piece
from tests.oracles import Truth, make_adapter
from tests.served import TENANTS, Server, Store, run, served, soon
from tests.served import store as store
from tests.served import truth as truth


async def is_unknown(server: Server, tenant: str, model: str) -> bool:
    return (await server.complete(tenant, model=model, prompt="a", max_tokens=1)).status_code == 404


def test_each_tenants_answer_is_its_own_adapters(store: Store, truth: Truth, tmp_path: Path) -> None:
    async def go() -> None:
        rng, num_foreign = random.Random(0), 0
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
                got = (reply.json()["choices"][0]["logprobs"] or {"token_logprobs": []})["token_logprobs"]
                if not got:
                    continue  # it stopped at once
                own = ref.digest if ref else ""
                for digest in ("", *(each.digest for each in store.refs.values())):
                    near = float((truth.logps(digest, prompt)[-1] - got[0]).abs().min()) <= 1e-4
                    assert near or digest != own
                    num_foreign += near and digest != own
            assert num_foreign <= 10  # of 200: some token's number may be the same by chance

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
                for _ in range(3000):
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
            for _ in range(3000):
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
            damaged = store.path / "acme" / "sales" / "revoked" / f"{'0' * 64}.json"
            damaged.parent.mkdir(exist_ok=True)
            damaged.write_text("[]")  # says nothing of what is served, and must not keep anybody from looking
            (tmp_path / "tenants" / "Notes.json").write_text("{}")
            server.store.revoke(ref, "trained on the wrong data")
            await soon(lambda: is_unknown(server, "acme", "doomed"))
            await soon(lambda: ref not in server.replica.slots.resident and ref.digest not in server.replica.engine.stats().adapters)

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
            assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
            assert chunks[-2]["ftcore_receipt"]["output"] == whole["ftcore_receipt"]["output"]

    run(go())


def test_a_revocation_that_cannot_be_read_still_revokes(store: Store, tmp_path: Path) -> None:
    ref = store.refs["bolt/legal"]

    async def go() -> None:
        async with served(store, tmp_path) as server:
            assert (await server.complete("bolt", model="legal", prompt="a", max_tokens=1)).status_code == 200
            mark = store.path / "bolt" / "legal" / "revoked" / f"{ref.digest}.json"
            mark.parent.mkdir()
            mark.write_text("[]")
            try:
                await soon(lambda: ref not in server.replica.slots.resident)
                await soon(lambda: is_unknown(server, "bolt", "legal"))
            finally:
                mark.unlink()
                mark.parent.rmdir()

    run(go())


def test_one_damaged_pointer_takes_out_its_own_name_alone(store: Store, tmp_path: Path) -> None:
    pointer = store.path / "acme" / "sales" / "current.json"
    before = pointer.read_bytes()

    async def go() -> None:
        async with served(store, tmp_path) as server:
            pointer.write_bytes(b"{")

            async def is_out() -> bool:
                rows = (await server.http.get("/v1/models", headers=server.headers("acme"))).json()["data"]
                return [row["id"] for row in rows] == ["base", "support"]

            await soon(is_out)
            assert (await server.complete("bolt", model="support", prompt="a", max_tokens=1)).status_code == 200

    try:
        run(go())
    finally:
        pointer.write_bytes(before)


def test_the_command_checks_a_saved_answer(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def go() -> tuple[Any, Any]:
        async with served(store, tmp_path) as server:
            answer = (await server.complete("acme", model="support", prompt="a", max_tokens=4)).json()
            return answer, (await server.http.get("/v1/receipt-keys", headers=server.headers("acme"))).json()

    answer, keys = run(go())
    (tmp_path / "keys.json").write_text(json.dumps(keys))

    def checked(body: Any) -> int:
        (tmp_path / "answer.json").write_text(json.dumps(body))
        return main(["verify-receipt", str(tmp_path / "answer.json"), "--keys", str(tmp_path / "keys.json"), "--store", str(store.path)])

    assert checked(answer) == 0
    assert store.refs["acme/support"].full in capsys.readouterr().out
    choice = answer["choices"][0]
    for forged in ({**choice, "text": "yes"}, {**choice, "message": {"content": "yes"}}, {**choice, "index": 1}):
        assert checked({**answer, "choices": [forged]}) != 0


@pytest.mark.parametrize("num_swaps", [60, pytest.param(10_000, marks=pytest.mark.proof)])
def test_swaps_under_load_fail_no_request_and_none_gets_what_was_never_promoted(
    store: Store, truth: Truth, tmp_path: Path, num_swaps: int
) -> None:
    """Each swap is seen by the gate before the next; four clients ask all the while, each answer from one of the two versions whole."""
    versions = [store.refs["acme/support"], store.refs["acme/support v2"]]

    async def go() -> Counter[str]:
        told: Counter[str] = Counter()
        async with served(store, tmp_path, poll_s=0.002) as server:
            over = asyncio.Event()

            async def client(number: int) -> None:
                while not over.is_set():
                    body = {"model": "support", "prompt": [5 + number, 6, 7], "max_tokens": 3, "logprobs": 0, "temperature": 0}
                    reply = await server.complete("acme", **body)
                    assert reply.status_code == 200, reply.text
                    ref = next(ref for ref in versions if ref.full == reply.headers["x-ftcore-adapter"])
                    assert reply.json()["ftcore_receipt"]["adapter"] == ref.full
                    logprobs = reply.json()["choices"][0]["logprobs"]
                    if logprobs is not None:
                        own = truth.logps(ref.digest, [5 + number, 6, 7])[-1]
                        assert float((own - logprobs["token_logprobs"][0]).abs().min()) <= 1e-4
                    told[ref.full] += 1

            clients = [asyncio.create_task(client(number)) for number in range(4)]
            for swap in range(num_swaps):
                wanted = versions[(swap + 1) % 2]
                await asyncio.to_thread(server.store.promote, wanted)
                while server.gate.directory.picture.find("acme", "support") != wanted:
                    assert not any(task.done() for task in clients), [task.exception() for task in clients if task.done()]
                    await asyncio.sleep(0.001)
                before = told[wanted.full]
                while swap % 10 == 0 and told[wanted.full] == before:
                    assert not any(task.done() for task in clients), [task.exception() for task in clients if task.done()]
                    await asyncio.sleep(0.001)
            over.set()
            await asyncio.gather(*clients)
            server.store.promote(versions[0])
        return told

    told = run(go(), num_swaps)
    assert min(told[ref.full] for ref in versions) > 0
    print(f"{num_swaps} swaps, {sum(told.values())} requests, 0 failed")


def test_a_version_that_cannot_be_proven_never_answers_and_the_one_before_goes_on(
    store: Store, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Its probes are another adapter's: sealed and promoted all the same, as by a publisher that checks nothing."""
    place, first = AdapterStore(store.path), store.refs["bolt/legal"]
    made = make_adapter(tiny_model_dir, tmp_path / "made", 55)
    sound = import_adapter(made, "bolt/draft", model=Model(path=str(tiny_model_dir)), store=place, log=lambda _: None)
    fetched, card = place.fetch(sound, tmp_path / "fetched"), place.card(sound)
    lie = tmp_path / "lie"
    shutil.copytree(fetched, lie)
    for name in ("probes.safetensors", "probes.json"):
        shutil.copyfile(place.fetch(first, tmp_path / "fetched") / name, lie / name)
    files = content_files(lie)
    changes = {"name": "legal", "files": files, "digest": content_digest(files), "probes": place.card(first).probes, "signature": None}
    false = place.publish(lie, card.model_copy(update=changes))

    async def go() -> None:
        async with served(store, tmp_path) as server:
            assert (await server.complete("bolt", model="legal", prompt="a", max_tokens=1)).headers["x-ftcore-adapter"] == first.full
            server.store.promote(false)
            try:
                until = time.monotonic() + 60
                while false.full not in server.replica.state()["refused"]:
                    assert time.monotonic() < until
                    reply = await server.complete("bolt", model="legal", prompt="a", max_tokens=1)
                    assert (reply.status_code, reply.headers["x-ftcore-adapter"]) == (200, first.full)
                    await asyncio.sleep(0.05)
                reply = await server.complete("bolt", model="legal", prompt="a", max_tokens=1)
                assert (reply.status_code, reply.headers["x-ftcore-adapter"]) == (200, first.full)
                assert "recorded logits" in server.replica.state()["refused"][false.full]
                asked = await server.complete("bolt", model=f"legal@{false.digest}", prompt="a", max_tokens=1)
                assert (asked.status_code, asked.json()["error"]["code"]) == (409, "adapter_refused")
            finally:
                server.store.promote(first)

    run(go())


def test_a_canary_takes_its_share_of_the_sessions_and_each_sticks(store: Store, tmp_path: Path) -> None:
    first, second = store.refs["acme/support"], store.refs["acme/support v2"]

    async def go() -> None:
        async with served(store, tmp_path) as server:
            server.store.promote(second, 0.1)
            try:
                await soon(lambda: second in server.gate.directory.picture.current())
                picture = server.gate.directory.picture
                sessions = [f"session {number}" for number in range(5000)]
                met = [picture.find("acme", "support", f"acme:{session}") for session in sessions]
                assert abs(met.count(second) / len(met) - 0.1) <= 0.02
                assert met == [picture.find("acme", "support", f"acme:{session}") for session in sessions]
                await server.replica.slots.load(first)
                await server.replica.slots.load(second)
                for number, session in enumerate(sessions[:20]):
                    headers = {**server.headers("acme"), "x-ftcore-session": session}
                    body = {"model": "support", "prompt": "a", "max_tokens": 1}
                    replies = [await server.http.post("/v1/completions", headers=headers, json=body) for _ in range(2)]
                    wanted = met[number]
                    assert wanted is not None
                    assert [reply.headers["x-ftcore-adapter"] for reply in replies] == [wanted.full] * 2
            finally:
                server.store.promote(first)

    run(go())


def test_a_whole_answer_crosses_in_few_events_and_says_what_the_stream_says(store: Store, tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path) as server:
            streamed = Job("j", "acme", Answerer("base"), (5, 6, 7), 60, Sampling(seed=3, num_logprobs=1), num_choices=3)
            found: list[list[Event]] = []
            for job in (streamed, replace(streamed, is_streamed=False)):
                found.append([event async for event in server.replica.answer(job)])
            many, few = ([event for event in events if isinstance(event, Piece)] for events in found)
            assert len(few) < len(many) / 4
            for choice in range(3):
                one, other = (reduce(add, [piece for piece in pieces if piece.choice == choice]) for pieces in (many, few))
                assert replace(one, tokens=()) == replace(other, tokens=()) and one.finish is not None
                assert [token.text for token in one.tokens] == [token.text for token in other.tokens]
                assert len(one.tokens) == one.num_tokens
            first, last = (events[-1] for events in found)
            assert isinstance(first, Closing) and isinstance(last, Closing) and first.completion_tokens == last.completion_tokens
            assert first.receipt["output"] == last.receipt["output"]

    run(go())
