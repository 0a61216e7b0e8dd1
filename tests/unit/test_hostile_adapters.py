"""Hostile adapter folders, sealed and promoted by who checks nothing: each is refused with a reason, and the version before goes on."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapter_files import CONFIG, WEIGHTS
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import utc_now
from ftcore.errors import FtcoreError, IntegrityError, ModelError
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from tests.hostile_folders import ATTACKS, CONTENTS, Attack, seal_unchecked
from tests.live_http import Do, loop_thread
from tests.served import Server, Store, served
from tests.served import store as store


@dataclass
class Live:
    """A server in a thread, the same for every attack."""

    server: Server
    do: Do
    first: AdapterRef
    """What acme/support means before and after each attack."""
    sound: Path
    """A fetched version."""
    store: AdapterStore

    def sealed(self, attack: Attack, scratch: Path) -> AdapterRef:
        shutil.copytree(self.sound, scratch / "version")
        card = json.loads((scratch / "version" / "card.json").read_text())
        (scratch / "version" / "README.md").unlink()
        return seal_unchecked(scratch / "version", card, self.store.folder.path, attack)

    def point(self, ref: AdapterRef) -> None:
        """As `promote`, by somebody who does not look at the card."""
        self.store._change(ref.tenant, ref.name, lambda pointer: pointer.promoted(ref.digest, 1.0, utc_now()))

    async def ask(self, model: str) -> Any:
        return await self.server.complete("acme", model=model, prompt="a", max_tokens=1)

    async def settled(self) -> None:
        """What the attack before left behind is seen at the next look: its version is gone, and the name means the first one again."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            reply = await self.ask("support")
            if reply.status_code == 200 and reply.headers["x-ftcore-adapter"] == self.first.full:
                return
            await asyncio.sleep(0.01)
        pytest.fail(reply.text)

    async def refused(self, ref: AdapterRef) -> str:
        """Why; asks by name meanwhile, and every answer is the old version's."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            reply = await self.ask("support")
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-ftcore-adapter"] == self.first.full
            if ref in self.server.replica.slots.refusals:
                return self.server.replica.slots.refusals[ref]
            await asyncio.sleep(0.01)
        pytest.fail("it was never refused")


@pytest.fixture(scope="module")
def live(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home, place, first = tmp_path_factory.mktemp("live"), AdapterStore(store.path), store.refs["acme/support"]
    opened = served(store, home, poll_s=0.02)
    with loop_thread() as do:
        yield Live(do(opened.__aenter__()), do, first, place.fetch(first, home / "fetched"), place)
        do(opened.__aexit__(None, None, None))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_is_refused_with_a_reason_and_the_version_before_goes_on(live: Live, tmp_path: Path, attack: Attack) -> None:
    live.do(live.settled())
    ref = live.sealed(attack, tmp_path)
    live.point(ref)
    try:
        reason = live.do(live.refused(ref))
        assert re.search(attack.words, reason), reason
        asked = live.do(live.ask(f"support@{ref.digest}"))
        assert (asked.status_code, asked.json()["error"]["code"]) == (409, "adapter_refused")
        assert ref.digest not in live.server.replica.engine.stats().adapters
        assert not [path for path in (tmp_path.parent / "escaped", live.store.folder.path.parent / "escaped") if path.exists()]
        cached = [path for path in live.server.replica._scratch.path.rglob(ref.digest) if path.exists()]
        assert not cached, "what is refused does not fill the disk"
    finally:
        live.point(live.first)
        shutil.rmtree(live.store.folder.path / ref.key)


def test_what_no_attack_was_made_of_is_served(live: Live, tmp_path: Path) -> None:
    """Else the attacks would prove nothing."""
    ref = live.sealed(Attack("none", ""), tmp_path)
    live.point(ref)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if live.do(live.ask("support")).headers["x-ftcore-adapter"] == ref.full:
                return
        pytest.fail("it never answered")
    finally:
        live.point(live.first)


@pytest.mark.parametrize("attack", [attack for attack in CONTENTS if not attack.is_imported], ids=lambda attack: attack.name)
def test_import_refuses_it_too(store: Store, tmp_path: Path, attack: Attack) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(store.folders["acme/support"], folder)
    attack.folder(folder)
    place = AdapterStore(tmp_path / "store")
    with pytest.raises(FtcoreError):
        import_adapter(folder, "acme/support", Model(path=str(store.base)), place, log=lambda _: None)
    assert place.list() == []


def test_a_hard_link_is_no_way_in(live: Live, tmp_path: Path) -> None:
    """What a replica serves was copied and then hashed: who keeps another name for the file changes nothing."""

    def link(version: Path) -> None:
        (tmp_path / "mine").hardlink_to(version / WEIGHTS)

    ref = live.sealed(Attack("hard link", "", sealed=link), tmp_path)
    live.point(ref)
    try:
        live.do(live.server.replica.slots.load(ref))
        (tmp_path / "mine").write_bytes(b"x" * (tmp_path / "mine").stat().st_size)
        cached = live.server.replica.slots.resident[ref].folder / WEIGHTS
        assert cached.read_bytes()[:1] != b"x" and not cached.samefile(tmp_path / "mine")
        assert live.do(live.ask(f"support@{ref.digest}")).status_code == 200
        live.do(_dropped(live, ref))
        assert live.do(live.ask(f"support@{ref.digest}")).status_code == 409
    finally:
        live.point(live.first)


async def _dropped(live: Live, ref: AdapterRef) -> None:
    live.server.replica.slots.drop(ref)
    while ref.digest in live.server.replica.engine.stats().adapters:
        await asyncio.sleep(0.01)


def test_what_could_never_fit_the_memory_is_not_even_fetched(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = live.sealed(Attack("none", ""), tmp_path)
    slots = live.server.replica.slots
    monkeypatch.setattr(slots, "_max_bytes", 1000)
    monkeypatch.setattr(live.server.replica.store, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ModelError, match="larger than the memory"):
        live.do(slots.load(ref))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("num_tries", [150, pytest.param(5000, marks=pytest.mark.proof)])
def test_no_damage_ends_in_anything_but_a_refusal(live: Live, tmp_path: Path, name: str, num_tries: int) -> None:
    """Bytes of the header or the configuration at random: a ModelError, an IntegrityError, or an adapter that could be read."""
    rng, engine = random.Random(0), live.server.replica.engine
    shutil.copytree(live.sound, tmp_path / "a")
    sound = (tmp_path / "a" / name).read_bytes()
    told = {"refused": 0, "read": 0}
    for _ in range(num_tries):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            at, kind = rng.randrange(min(len(sound), 1500)), rng.randrange(3)
            damaged[at : at + kind] = rng.choice([b'"', b"{", b"]", b"9", b"-", b"\x00", b"\xff", bytes([rng.randrange(256)]), b"1e9"])
        (tmp_path / "a" / name).write_bytes(damaged)
        try:
            engine._read(tmp_path / "a")
            told["read"] += 1
        except (ModelError, IntegrityError):
            told["refused"] += 1
    assert told["refused"] > num_tries / 2, told
