"""A tenant's own limits, as they are stored, shown and merged over the server's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.cli import main
from serving.admin_routes import Desk, build_routes
from serving.settings import Limits, ServeSettings
from serving.tenants import Tenant, TenantStore

SERVER = Limits(requests_per_minute=60, tokens_per_day=1000)
OWN = Limits(max_tokens=100)


def asked(tenants: Path, method: str, path: str, body: Any = None) -> Any:
    """Of the admin routes, past their door."""
    routes = build_routes(Desk(ServeSettings(base="none", store=str(tenants / "store"), tenants=str(tenants), limits=SERVER)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["admin"] = "ada"
        await routes(scope, receive, send)

    async def go() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as http:
            reply = await http.request(method, f"/admin/tenants{path}", json=body)
            assert reply.status_code in (200, 201), reply.text
            return reply.json()["limits"]

    return asyncio.run(go())


def test_a_limit_of_its_own_leaves_a_tenant_the_servers_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also as the server's are changed later."""
    tenants = TenantStore(str(tmp_path))
    tenants.add("api")
    tenants.add("command")
    assert asked(tmp_path, "POST", "", {"name": "made", "limits": {"max_tokens": 100}}) == {"max_tokens": 100}
    assert asked(tmp_path, "PATCH", "/api/limits", {"max_tokens": 100}) == {"max_tokens": 100}
    assert main(["tenants", "limits", str(tmp_path), "command", "max_tokens=100"]) == 0
    for limits in (SERVER, SERVER.model_copy(update={"tokens_per_day": 5})):
        seen = tenants.snapshot(limits).tenants
        assert [seen[name] for name in ("api", "command", "made")] == [limits.model_copy(update={"max_tokens": 100})] * 3
    assert main(["tenants", "show", str(tmp_path), "command"]) == 0
    assert "limits: max_tokens=100  the rest is the server's" in capsys.readouterr().out


def test_null_takes_one_of_the_servers_limits_away_and_without_own_ones_all_are_its(tmp_path: Path) -> None:
    tenants = TenantStore(str(tmp_path))
    tenants.add("acme", OWN)
    assert asked(tmp_path, "PATCH", "/acme/limits", {"tokens_per_day": None}) == {"max_tokens": 100, "tokens_per_day": None}
    assert tenants.snapshot(SERVER).tenants["acme"] == Limits(max_tokens=100, requests_per_minute=60)
    assert asked(tmp_path, "DELETE", "/acme/limits") is None
    assert tenants.snapshot(SERVER).tenants["acme"] == SERVER


def test_limits_that_were_stored_whole_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(Tenant(name="old", limits=OWN).model_dump_json())
    assert TenantStore(str(tmp_path)).snapshot(SERVER).tenants["old"] == OWN
