"""Several bases behind one URL: each adapter is answered on the one it was trained on; one quota and one view of it all."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.backends.base import World
from ftcore.loop import train
from ftcore.publish import import_adapter
from ftcore.receipts import Receipt, verify_receipt
from ftcore.recipe import Model, Recipe
from ftcore.rundir import RunDir
from ftcore.weights import weights_digest
from serving.tenants import key_hash, new_clear_key
from serving.top import Sample, frame
from serving.watching import status_lines
from tests.conftest import make_tiny_model
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.oracles import Truth, make_adapter
from tests.served import Server, Store, run, served

ENGINE = {"max_batch": 8, "max_context": 256, "num_threads": 1}
KEY = new_clear_key()
METRICS = {"metrics": {"key_sha256": key_hash(KEY)}}
ON = {"acme/support": "base", "acme/sales": "large", "bolt/support": "large", "bolt/legal": "absent"}
"""Name -> the base that it was trained on; `absent` is not served."""


@pytest.fixture(scope="module")
def bases(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    large = make_tiny_model(home / "large", seed=1, hidden=48, layers=3, vocab=320)
    return {"base": tiny_model_dir, "large": large, "absent": make_tiny_model(home / "absent", seed=2)}


@pytest.fixture(scope="module")
def sealed(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """`acme/support` has a second version, on the other base; `v3` of it is on one that is not served."""
    home = tmp_path_factory.mktemp("sealed")
    place, refs, folders = AdapterStore(home / "adapters"), {}, {}
    for number, (name, base) in enumerate({**ON, "acme/support v2": "large", "acme/support v3": "absent"}.items()):
        folders[name] = make_adapter(bases[base], home / f"made-{number}", number)
        refs[name] = import_adapter(folders[name], name.split()[0], model=Model(path=str(bases[base])), store=place, log=lambda _: None)
    for name in ON:
        place.promote(refs[name])
    return Store(home / "adapters", bases["base"], refs, folders)


@pytest.fixture
def store(sealed: Store, tmp_path: Path) -> Store:
    """A copy that a test may change."""
    return replace(sealed, path=Path(shutil.copytree(sealed.path, tmp_path / "store")))


@pytest.fixture(scope="module")
def truths(bases: dict[str, Path], sealed: Store) -> dict[str, Truth]:
    on = {**ON, "acme/support v2": "large"}
    return {
        base: Truth(bases[base], {sealed.refs[name].digest: sealed.folders[name] for name in on if on[name] == base})
        for base in ("base", "large")
    }


def both(bases: dict[str, Path], **large: Any) -> dict[str, Any]:
    keys = {"base": str(bases["large"]), "engine": ENGINE, **large}
    return {"bases": {"large": keys}, **METRICS}


async def told(server: Server, path: str) -> httpx.Response:
    return await server.http.get(path, headers={"authorization": f"Bearer {KEY}"})


async def until(done: Any) -> None:
    for _ in range(6000):
        if done():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never came to that")


def test_each_answer_is_its_own_adapters_on_its_own_base(
    store: Store, bases: dict[str, Path], truths: dict[str, Truth], tmp_path: Path
) -> None:
    """By log-probabilities, by header and by receipt; the same prompts to all at once."""
    weights = {name: weights_digest(folder) for name, folder in bases.items()}

    async def go() -> None:
        rng, num_foreign, num_compared = random.Random(0), 0, 0
        async with served(store, tmp_path, **both(bases)) as server:
            keys = {row["id"]: row["pem"] for row in (await _get(server, "/v1/receipt-keys"))["data"]}
            asked = []
            for number in range(40):
                tenant, name = rng.choice(
                    [("acme", "support"), ("acme", "sales"), ("acme", "base"), ("acme", "large"), ("bolt", "support")]
                )
                prompt = [rng.randrange(5, 250) for _ in range(rng.randrange(1, 40))]
                body = {"model": name, "prompt": prompt, "max_tokens": 4, "seed": number, "logprobs": 0}
                asked.append((tenant, name, prompt, server.complete(tenant, **body)))
            replies = await asyncio.gather(*(reply for *_, reply in asked))
            for (tenant, name, prompt, _), reply in zip(asked, replies, strict=True):
                assert reply.status_code == 200, reply.text
                ref, base = store.refs.get(f"{tenant}/{name}"), ON.get(f"{tenant}/{name}", name)
                answer, own = reply.json(), ref.full if ref else ""
                receipt = Receipt.model_validate(answer["ftcore_receipt"])
                assert (reply.headers["x-ftcore-base"], reply.headers["x-ftcore-adapter"]) == (weights[base], own)
                assert (receipt.base, receipt.adapter) == (weights[base], own)
                verify_receipt(receipt, [answer["choices"][0]["text"]], keys)
                if answer["choices"][0]["logprobs"] is None:
                    continue  # it stopped at once
                num_compared += 1
                got = answer["choices"][0]["logprobs"]["token_logprobs"][0]
                for other, truth in truths.items():
                    for digest in ("", *truth.digests):
                        near = float((truth.logps(digest, prompt)[-1] - got).abs().min()) <= 1e-4
                        is_own = (other, digest) == (base, ref.digest if ref else "")
                        assert near or not is_own
                        num_foreign += near and not is_own
            assert num_compared > 30 and num_foreign <= 10  # some token's number may be the same by chance
            embedded = await server.http.post("/v1/embeddings", headers=server.headers("acme"), json={"model": "sales", "input": [5, 6, 7]})
            vector = truths["large"].embedding(store.refs["acme/sales"].digest, [5, 6, 7])
            assert embedded.json()["data"][0]["embedding"] == pytest.approx(vector.tolist(), abs=1e-4)

    run(go())


async def _get(server: Server, path: str, tenant: str = "acme") -> Any:
    return (await server.http.get(path, headers=server.headers(tenant))).json()


def test_a_name_says_which_base_it_is_on_and_what_is_nowhere_is_refused_to_its_owner_alone(
    store: Store, bases: dict[str, Path], tmp_path: Path
) -> None:
    async def go() -> None:
        async with served(store, tmp_path, **both(bases)) as server:
            acme, bolt = [(await _get(server, "/v1/models", tenant))["data"] for tenant in ("acme", "bolt")]
            assert [(row["id"], row["parent"]) for row in acme] == [
                ("base", None),
                ("large", None),
                ("sales", "large"),
                ("support", "base"),
            ]
            assert [(row["id"], row["parent"]) for row in bolt] == [("base", None), ("large", None), ("legal", None), ("support", "large")]
            homeless, foreign, unknown, absent = [
                await server.complete(tenant, model=model, prompt="a", max_tokens=1)
                for tenant, model in (("bolt", "legal"), ("acme", "legal"), ("acme", "nobody"), ("acme", "absent"))
            ]
            assert (homeless.status_code, homeless.json()["error"]["code"]) == (409, "adapter_refused")
            assert "its base is not served here" in homeless.text and str(bases["absent"]) not in homeless.text
            assert foreign.status_code == unknown.status_code == absent.status_code == 404
            assert foreign.json() == unknown.json() == absent.json()
            assert all(not replica.slots.refusals for replica in server.replicas.values())  # neither base was bothered with it
            lines = "\n".join(status_lines((await told(server, "/status")).json()))
            assert re.search(r"bolt/legal@\w+ +100% +its base is not served here", lines), lines
            assert re.search(r"acme/sales@\w+ +100% +loaded when it is asked for, of large", lines), lines

    run(go())


@pytest.mark.parametrize("first", [True, False], ids=["the first base", "a further base"])
def test_a_base_for_some_tenants_does_not_exist_for_the_others(store: Store, bases: dict[str, Path], tmp_path: Path, first: bool) -> None:
    """Nor do their adapters get an answer from it, whoever made them."""
    keys: dict[str, Any] = {"base": str(bases["large"]), "base_name": "large", "only": "acme", "preload": "all", **METRICS}
    keys = keys if first else both(bases, only="acme", preload="all")

    async def go() -> None:
        async with served(store, tmp_path, **keys) as server:
            parents = {row["id"]: row["parent"] for row in (await _get(server, "/v1/models", "bolt"))["data"]}
            assert "large" not in parents and parents["support"] is None
            hidden, unknown = [await server.complete("bolt", model=model, prompt="a", max_tokens=1) for model in ("large", "nobody")]
            assert hidden.status_code == unknown.status_code == 404 and hidden.json() == unknown.json()
            assert (await server.complete("bolt", model="support", prompt="a", max_tokens=1)).status_code == 409
            for model in ("large", "sales"):
                assert (await server.complete("acme", model=model, prompt="a", max_tokens=1)).status_code == 200
            assert "bolt" not in {ref.tenant for ref in server.replicas["large"].slots.resident}
            assert (await server.http.get("/readyz")).status_code == 200

    run(go())


def test_versions_of_one_name_may_be_on_different_bases(store: Store, bases: dict[str, Path], tmp_path: Path) -> None:
    """As a canary, and promoted; one that is on no base here, or that its base refuses, leaves the name with what it meant before."""
    first, second, third = (store.refs[f"acme/support{version}"] for version in ("", " v2", " v3"))

    async def asked(server: Server, session: str = "", model: str = "support") -> httpx.Response:
        headers = {**server.headers("acme"), "x-ftcore-session": session}
        return await server.http.post("/v1/completions", headers=headers, json={"model": model, "prompt": "a", "max_tokens": 1})

    async def answering(server: Server, *wanted: AdapterRef) -> None:
        """Each of 20 sessions meets one version, and all of them together those wanted."""
        met = [(await asked(server, f"s{number % 20}")).headers["x-ftcore-adapter"] for number in range(40)]
        assert met[:20] == met[20:] and set(met) == {ref.full for ref in wanted}

    async def go() -> None:
        async with served(store, tmp_path, **both(bases)) as server:
            place, directory = server.store, server.gate.directory
            await answering(server, first)
            place.promote(second, 0.5)
            await until(lambda: len(list(directory.picture.current())) == len(ON) + 1)
            await answering(server, first, second)
            place.promote(second)
            await until(lambda: second in directory.picture.current() and first not in directory.picture.current())
            await answering(server, second)
            assert (await asked(server, model=f"support@{first.digest[:12]}")).headers["x-ftcore-adapter"] == first.full
            place.promote(third)
            await until(lambda: third in directory.picture.current())
            await answering(server, second)
            assert (await asked(server, model=f"support@{third.digest}")).status_code == 409
            _damage(store, third, second)
            place.promote(first)
            for ref in server.replicas["large"].slots.resident:
                server.replicas["large"].slots.drop(ref)
            place.promote(second)
            await until(lambda: second in directory.picture.current())
            await answering(server, first)
            assert list(server.replicas["large"].slots.refusals) == [second] and not server.replicas["base"].slots.refusals
            assert (await asked(server, model=f"support@{second.digest}")).status_code == 409

    run(go())


def _damage(store: Store, *refs: AdapterRef) -> None:
    for ref in refs:
        weights = store.path / ref.key / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8] + b"\x01" * 8)


def test_each_base_preloads_its_own_adapters_and_no_others(
    store: Store, bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = store.refs["acme/support v2"]

    async def go() -> None:
        async with served(store, tmp_path, preload=["acme/support"], **both(bases, preload="all")) as server:
            held = {name: {ref.full for ref in replica.slots.resident} for name, replica in server.replicas.items()}
            assert held == {
                "base": {store.refs["acme/support"].full},
                "large": {store.refs["acme/sales"].full, store.refs["bolt/support"].full},
            }
            assert not any("refused" in record.message for record in caplog.records)
            assert (await server.http.get("/readyz")).json() == {"status": "ready", "reasons": [], "replicas": 2, "store": "ok"}
            server.store.promote(second)
            await until(lambda: second in server.replicas["large"].slots.resident)
            await asyncio.sleep(0.6)
            assert (await server.http.get("/readyz")).status_code == 200  # the name moved: the first base has nothing to hold

    run(go())


def test_one_quota_holds_over_all_bases(store: Store, bases: dict[str, Path], tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, limits={"requests_per_minute": 4}, **both(bases)) as server:
            models = ["support", "sales", "base", "large", "support", "large"]
            codes = [(await server.complete("acme", model=model, prompt="a", max_tokens=1)).status_code for model in models]
            assert codes == [200] * 4 + [429] * 2
            assert (await server.complete("bolt", model="large", prompt="a", max_tokens=1)).status_code == 200

    run(go())


def test_what_is_seen_covers_every_base(store: Store, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.states.FRESH_S", 0.0)

    async def go() -> None:
        async with served(store, tmp_path, **both(bases)) as server:
            before = Sample(0.0, (await told(server, "/metrics")).text)
            for model in ("large", "large", "base", "sales"):
                assert (await server.complete("acme", model=model, prompt=[5, 6], max_tokens=1)).status_code == 200
            after = Sample(1.0, (await told(server, "/metrics")).text)
            asked = {name: after.sum("ftcore_requests_total", adapter=name, outcome="ok") for name in ("base", "large", "sales")}
            assert asked == {"base": 1, "large": 2, "sales": 1}
            replicas = after.each("ftcore_replica_ready", "replica", "base")
            assert sorted(each["base"] for each in replicas) == ["base", "large"]
            assert after.sum("ftcore_resident_versions", base="large", adapter="sales") == 1
            lines = list(frame(before, after))
            assert all(any(line.startswith(f"{each['replica']} {each['base']} ") for line in lines) for each in replicas)
            status = (await told(server, "/status")).json()
            assert {state["base"]: state["weights"] for state in status["replicas"]} == {
                name: weights_digest(bases[name]) for name in ("base", "large")
            }

            async def silent() -> list[dict[str, Any]]:
                raise TimeoutError

            monkeypatch.setitem(server.service.states._asks, "large", silent)
            ready = await server.http.get("/readyz")
            assert (ready.status_code, ready.json()["reasons"]) == (503, ["1 of 2 bases: no replica answers"])
            assert (await server.complete("acme", model="sales", prompt="a", max_tokens=1)).status_code == 200  # what was known goes on

    run(go())


def test_an_adapter_whose_base_does_not_say_what_it_is_yet_is_asked_for_later(store: Store, bases: dict[str, Path], tmp_path: Path) -> None:
    async def go() -> None:
        async with served(store, tmp_path, **both(bases)) as server:
            asks = server.service.states._asks
            states = asks["large"]

            async def silent() -> list[dict[str, Any]]:
                raise TimeoutError

            asks["large"] = silent
            reply = await server.complete("acme", model="sales", prompt="a", max_tokens=1)
            assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "base_unavailable", "5")
            assert (await server.complete("acme", model="support", prompt="a", max_tokens=1)).status_code == 200
            asks["large"] = states
            await asyncio.sleep(0.6)
            assert (await server.complete("acme", model="sales", prompt="a", max_tokens=1)).status_code == 200

    run(go())


def test_while_the_store_is_away_each_adapter_is_answered_where_it_was(store: Store, bases: dict[str, Path], tmp_path: Path) -> None:
    """Also one that nobody asked for before; one whose card was never read is told that the store is away."""
    old = store.refs["acme/support v2"]

    async def go() -> None:
        async with served(store, tmp_path, **both(bases, preload="all")) as server:
            store.path.rename(store.path.with_name("away"))
            await until(lambda: server.gate.directory.problem)
            for tenant, model in (("acme", "sales"), ("bolt", "support"), ("acme", "base"), ("acme", "large")):
                reply = await server.complete(tenant, model=model, prompt="a", max_tokens=1)
                assert reply.status_code == 200, reply.text
            began = time.monotonic()
            reply = await server.complete("acme", model=f"support@{old.digest}", prompt="a", max_tokens=1)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unavailable") and time.monotonic() - began < 30
            rows = (await _get(server, "/v1/models"))["data"]
            assert [(row["id"], row["parent"]) for row in rows[2:]] == [("sales", "large"), ("support", "base")]

    run(go())


def test_of_two_bases_with_the_same_weights_the_one_with_its_template_answers(store: Store, bases: dict[str, Path], tmp_path: Path) -> None:
    """Two names with the very same content: their cards differ in the template alone."""
    text = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    (tmp_path / "plain.jinja").write_text(text)
    twin = {"base": str(bases["base"]), "chat_template": str(tmp_path / "plain.jinja"), "engine": ENGINE}
    place, support = AdapterStore(store.path), store.refs["acme/support"]
    card = place.card(support).model_copy(
        update={"name": "plain", "template": hashlib.sha256(text.encode()).hexdigest(), "signature": None}
    )
    place.promote(place.publish(place.fetch(support, tmp_path / "fetched"), card))

    async def go() -> None:
        async with served(store, tmp_path, bases={"twin": twin}, **METRICS) as server:
            parents = {row["id"]: row["parent"] for row in (await _get(server, "/v1/models"))["data"]}
            assert (parents["plain"], parents["support"]) == ("twin", "base")
            for model in ("plain", "support"):
                assert (await server.complete("acme", model=model, prompt="a", max_tokens=1)).status_code == 200
            held = {name: [ref.name for ref in replica.slots.resident] for name, replica in server.replicas.items()}
            assert held == {"base": ["support"], "twin": ["plain"]}

    run(go())


def test_a_full_fine_tune_is_served_as_a_base_of_its_own(
    store: Store, bases: dict[str, Path], truths: dict[str, Truth], tmp_path: Path
) -> None:
    """As its run left it; adapters that were trained on it are answered on it."""
    recipe = Recipe.model_validate(
        {"name": "mine", "model": {"path": str(bases["base"]), "dtype": "fp32"}, "data": {"sources": "unused.jsonl"}, "method": "full",
         "stage": "sft", "backend": {"kind": "plain", "micro_batch": 4}, "optim": {"lr": 5e-3, "batch_size": 8, "max_steps": 4},
         "output": {"runs": str(tmp_path / "runs")}}
    )  # fmt: skip
    train(recipe, World(), MemoryBlocks(packed_blocks(24, seed=3), packed_blocks(5, seed=4)), RunDir(tmp_path / "runs", "mine"))
    final = tmp_path / "runs/mine/final"
    made = make_adapter(final, tmp_path / "made", 3)
    ref = import_adapter(made, "acme/tuned", model=Model(path=str(final)), store=AdapterStore(store.path), log=lambda _: None)
    AdapterStore(store.path).promote(ref)
    own, plain, prompt = Truth(final, {ref.digest: made}), truths["base"], [5, 60, 7, 80]

    async def go() -> None:
        async with served(store, tmp_path, bases={"mine": {"base": str(final), "engine": ENGINE}}) as server:
            for model, digest in (("mine", ""), ("tuned", ref.digest)):
                body = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 0, "logit_bias": {"9": 100}}
                reply = await server.complete("acme", **body)
                assert (reply.status_code, reply.headers["x-ftcore-base"]) == (200, weights_digest(final)), reply.text
                got = reply.json()["choices"][0]["logprobs"]["token_logprobs"][0]
                assert got == pytest.approx(float(own.logps(digest, prompt)[-1][9]), abs=1e-4)
                assert abs(got - float(plain.logps("", prompt)[-1][9])) > 0.01
            chat = {"model": "mine", "messages": [{"role": "user", "content": "What is your name?"}], "max_tokens": 2}
            assert (await server.http.post("/v1/chat/completions", headers=server.headers("acme"), json=chat)).status_code == 200

    run(go())
