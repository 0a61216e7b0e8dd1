"""Publishers that a tenant lists, over the HTTP API: what they did not sign is not served, from the moment the list says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.cli import main
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from ftcore.signing import keygen
from serving import slots
from tests.oracles import make_adapter
from tests.served import Server, Store, run, served, soon
from tests.served import store as store


def publishers(tmp_path: Path, *words: object) -> int:
    what, *key = words
    return main(["tenants", "publishers", str(tmp_path / "tenants"), "acme", str(what), *map(str, key)])


async def answered(server: Server, tenant: str = "acme") -> str:
    """Which version answers, or why none does."""
    reply = await server.complete(tenant, model="support", prompt="a", max_tokens=1)
    return reply.headers["x-ftcore-adapter"] if reply.status_code == 200 else f"{reply.status_code} {reply.json()['error']['message']}"


async def was_refused(server: Server, ref: AdapterRef, why: str) -> bool:
    await answered(server)
    return why in server.replica.slots.refusals.get(ref, "")


async def has_left(server: Server, ref: AdapterRef) -> bool:
    """Whether the engine forgot a version: a moment after the last answer of it, and after the list said so."""
    return ref.digest not in server.replica.engine.stats().adapters


async def answers(server: Server, full: str) -> bool:
    return await answered(server) == full


def test_a_tenants_list_says_what_is_served_while_it_changes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slots, "REFUSED_FOR_S", 0.05)
    place, unsigned, theirs = AdapterStore(store.path), store.refs["acme/support"], store.refs["bolt/support"]
    ids, refs = {}, {}
    for number, name in enumerate(("listed", "stranger")):
        ids[name] = keygen(tmp_path / f"{name}.pem")
        made = make_adapter(store.base, tmp_path / name, 50 + number)
        model, key = Model(path=str(store.base)), tmp_path / f"{name}.pem"
        refs[name] = import_adapter(made, "acme/support", model, place, sign_key=key, log=lambda _: None)

    async def go() -> None:
        async with served(store, tmp_path) as server:

            async def is_refused(why: str) -> bool:
                return (await answered(server)).startswith("409") and why in await answered(server)

            assert await answered(server) == unsigned.full
            assert publishers(tmp_path, "add", tmp_path / "listed.pub.pem") == 0
            await soon(lambda: is_refused("not signed"))
            await soon(lambda: has_left(server, unsigned))
            assert await answered(server, "bolt") == theirs.full, "nobody else's list"

            place.promote(refs["stranger"])
            await soon(lambda: was_refused(server, refs["stranger"], "not trusted"))
            assert await is_refused("not signed"), "neither it nor the version before"
            place.promote(refs["listed"])
            await soon(lambda: answers(server, refs["listed"].full))
            place.promote(refs["stranger"])
            server.replica.slots._refused.clear()
            await soon(lambda: was_refused(server, refs["stranger"], "not trusted"))
            assert {await answered(server) for _ in range(20)} == {refs["listed"].full}, "the version before goes on"
            assert not (tmp_path / "cache" / "acme" / "support" / refs["stranger"].digest).exists()
            assert not {refs["stranger"].digest, unsigned.digest} & set(server.replica.engine.stats().adapters)

            assert publishers(tmp_path, "add", tmp_path / "stranger.pub.pem") == 0
            await soon(lambda: answers(server, refs["stranger"].full))
            for name in ids:
                assert publishers(tmp_path, "remove", ids[name]) == 0
            await soon(lambda: is_refused("not trusted"))
            assert publishers(tmp_path, "any") == 0
            await soon(lambda: answers(server, refs["stranger"].full))

    try:
        run(go())
    finally:
        place.promote(unsigned)
    told = capsys.readouterr().out
    assert ids["listed"] in told and "is not served at all" in told and "whoever published it" in told


def test_what_is_no_publisher_is_refused(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "add", str(tmp_path / "tenants"), "acme"]) == 0
    keygen(tmp_path / "key.pem")
    for words in (("add",), ("add", tmp_path / "gone"), ("add", tmp_path / "key.pem"), ("remove", "0" * 16), ("remove",)):
        assert publishers(tmp_path, *words) == 2, words
    assert "PRIVATE" not in (tmp_path / "tenants" / "acme.json").read_text()
    assert publishers(tmp_path, "list") == 0 and "whoever published it" in capsys.readouterr().out
