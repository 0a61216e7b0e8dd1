"""The serving API over one replica in this process, two tenants and their adapters; for tests of serving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.api import Service, build_api
from serving.gate import Gate
from serving.replica import Replica
from serving.seeing import Seeing
from serving.settings import ServeSettings
from serving.tenants import TenantStore
from tests.oracles import Truth, make_adapter

TENANTS = {"acme": ("support", "sales"), "bolt": ("support", "legal")}


@dataclass
class Store:
    path: Path
    base: Path
    refs: dict[str, AdapterRef]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two tenants, two names each, and two versions of acme/support."""
    home = tmp_path_factory.mktemp("serving")
    place = AdapterStore(home / "adapters")
    refs, folders = {}, {}
    names = [f"{tenant}/{name}" for tenant, own in TENANTS.items() for name in own]
    for number, name in enumerate([*names, "acme/support v2"]):
        folders[name] = make_adapter(tiny_model_dir, home / f"made-{number}", number)
        refs[name] = import_adapter(folders[name], name.split()[0], model=Model(path=str(tiny_model_dir)), store=place, log=lambda _: None)
    for name in names:
        place.promote(refs[name])
    return Store(home / "adapters", tiny_model_dir, refs, folders)


@pytest.fixture(scope="module")
def truth(store: Store) -> Truth:
    return Truth(store.base, {ref.digest: store.folders[name] for name, ref in store.refs.items()})


class Local:
    """A Replica as the API sees the replicas of a base."""

    def __init__(self, replica: Replica) -> None:
        self.replica, self.answer = replica, replica.answer

    async def states(self) -> list[dict[str, Any]]:
        return [self.replica.state()]


@dataclass
class Server:
    http: httpx.AsyncClient
    replica: Replica
    """Of the first base."""
    replicas: dict[str, Replica]
    keys: dict[str, str]
    store: AdapterStore
    tenants: TenantStore
    gate: Gate
    service: Service
    api: FastAPI

    @property
    def seeing(self) -> Seeing:
        return self.service.seeing

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    async def complete(self, tenant: str, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", headers=self.headers(tenant), json=body)


@asynccontextmanager
async def served(store: Store, tmp_path: Path, **keys: Any) -> AsyncIterator[Server]:
    tenants = TenantStore(str(tmp_path / "tenants"))
    clear = {}
    for name in TENANTS:
        tenants.add(name)
        clear[name], _ = tenants.new_key(name)
    settings = ServeSettings.model_validate(
        {"base": str(store.base), "store": str(store.path), "tenants": str(tmp_path / "tenants"), "poll_s": 0.05,
         "audit_spool": str(tmp_path / "spool"), "engine": {"max_batch": 8, "max_context": 256, "num_threads": 1}, **keys}
    )  # fmt: skip
    replicas = {name: await Replica.open(settings.of(name), tmp_path / f"cache-{name}") for name in settings.all_bases}
    gate = Gate(settings)
    service = Service(gate, {name: Local(replica) for name, replica in replicas.items()})
    await service.open()
    api = build_api(lambda: service)
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as http:
            yield Server(http, replicas[settings.base_name], replicas, clear, AdapterStore(store.path), tenants, gate, service, api)
    finally:
        await service.close()
        for replica in replicas.values():
            await replica.close()


async def soon(done: Callable[[], Awaitable[bool] | bool], limit_s: float = 120) -> None:
    async with asyncio.timeout(limit_s):
        while not (await found if isinstance(found := done(), Awaitable) else found):
            await asyncio.sleep(0.02)


def run(task: Coroutine[Any, Any, Any], limit_s: float = 600) -> Any:
    return asyncio.run(asyncio.wait_for(task, max(limit_s, 600)))
