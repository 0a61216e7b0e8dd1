"""Slots alone: what a refusal holds on to, whose load is next, what makes room. The engine and the store hold nothing here."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftcore.adapters import AdapterRef
from ftcore.errors import IntegrityError
from serving.jobs import Answerer
from serving.replica import Replica
from serving.slots import Slots


def ref(tenant: str, number: int) -> AdapterRef:
    return AdapterRef(tenant, f"a{number}", f"{tenant.encode().hex()}{number:02d}".ljust(64, "0"))


def fetched(ref: AdapterRef, cache: Path) -> Path:
    folder = cache / ref.digest
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(1000))
    return folder


def slots_of(cache: Path, fetch: Callable[[AdapterRef, Path], Path] = fetched, **keys: Any) -> Slots:
    loaded: dict[str, int] = {}

    class Engine:
        most = 0

        async def load_adapter(self, digest: str, folder: Path) -> None:
            await asyncio.sleep(0.002)
            loaded[digest] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            self.most = max(self.most, sum(loaded.values()))

        async def unload_adapter(self, digest: str) -> None:
            loaded.pop(digest, None)

        def stats(self) -> Any:
            return SimpleNamespace(adapter_bytes=sum(loaded.values()))

    async def prove(_: AdapterRef, __: Path) -> None:
        pass

    engine: Any = Engine()
    store: Any = SimpleNamespace(card=lambda ref: SimpleNamespace(files={}), fetch=fetch)
    return Slots(engine, store, cache, lambda card: None, prove, **{"max_bytes": 1 << 20, **keys})


async def refusal(task: Coroutine[Any, Any, None]) -> IntegrityError:
    try:
        await task
    except IntegrityError as error:
        return error
    raise AssertionError("it was not refused")


def test_a_refusal_told_again_and_again_holds_no_request_that_it_was_told(tmp_path: Path) -> None:
    def broken(_: AdapterRef, __: Path) -> Path:
        raise IntegrityError("it is not what was published")

    async def go() -> None:
        slots, broke = slots_of(tmp_path, broken), ref("acme", 1)
        first = await asyncio.gather(*(refusal(slots.load(broke)) for _ in range(50)))
        later = [await refusal(slots.load(broke)) for _ in range(50)]
        told = [len(traceback.extract_tb(error.__traceback__)) for error in first + later]
        assert max(told) <= 3, told
        assert {str(error) for error in first + later} == {"it is not what was published"}

    asyncio.run(go())


@pytest.mark.parametrize("is_changing", [True, False])
def test_the_version_before_answers_at_once_only_while_the_name_is_changing(tmp_path: Path, is_changing: bool) -> None:
    async def go() -> None:
        old, new, slots = ref("acme", 1), ref("acme", 2), slots_of(tmp_path)
        await slots.load(old)
        replica: Any = object.__new__(Replica)
        replica.slots = slots
        job: Any = SimpleNamespace(answerer=Answerer("base", new, old, is_changing=is_changing))
        async with replica._held(job) as (answers, was_cold):
            assert (answers, was_cold) == ((old, False) if is_changing else (new, True))
        await slots.load(new)

    asyncio.run(go())


def test_a_tenants_cold_adapters_do_not_wait_for_all_of_anothers(tmp_path: Path) -> None:
    async def go() -> None:
        slots = slots_of(tmp_path)
        hog = [asyncio.create_task(slots.load(ref("acme", number))) for number in range(40)]
        await asyncio.sleep(0)
        await slots.load(ref("bolt", 1))
        assert sum(task.done() for task in hog) <= 4
        await asyncio.gather(*hog)
        assert len(slots.resident) == 41

    asyncio.run(go())


def test_the_engine_never_holds_more_than_it_may_and_what_was_used_last_stays(tmp_path: Path) -> None:
    async def go() -> None:
        slots = slots_of(tmp_path, max_bytes=5000)
        for number in range(3):
            await slots.load(ref("kept", number))
        for number in range(30):
            async with slots.pinned(ref("kept", 0)):
                pass
            await asyncio.gather(slots.load(ref("acme", 2 * number)), slots.load(ref("bolt", 2 * number + 1)))
        engine: Any = slots._engine
        assert engine.most == 5000
        assert len(slots.resident) == 5 and ref("kept", 0) in slots.resident

    asyncio.run(go())
