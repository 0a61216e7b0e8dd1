"""The admin API over real sockets, beside the server it changes: who may, what each change does there, and what is written down of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.routing import APIRoute

from ftcore.cli import main
from ftcore.errors import ConfigError
from ftcore.signing import keygen
from serving import slots
from serving.admin import admin_running
from serving.admin_routes import Desk, build_routes
from serving.settings import ServeSettings
from serving.tenants import key_hash, new_clear_key
from tests.live_http import loop_thread, on_a_port
from tests.served import Server, Store, served
from tests.served import store as store

FAKE = {"kind": "fake", "vocabulary": 250, "max_context": 256, "max_batch": 8, "token_s": 0.001}
REPO = Path(__file__).resolve().parents[2]


@dataclass
class World:
    server: Server
    settings: ServeSettings
    public: httpx.Client
    admin: httpx.Client
    key: str

    def models(self, key: str) -> httpx.Response:
        return self.public.get("/v1/models", headers={"authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def world(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server and its admin API, each on a port of its own, over a copy of the store."""
    tmp_path = tmp_path_factory.mktemp("admin")
    own = Store(tmp_path / "adapters", store.base, store.refs, store.folders)
    shutil.copytree(store.path, own.path)
    key = new_clear_key()
    opened = served(own, tmp_path, engine=FAKE, admin={"port": 0, "keys": {"other": key_hash(new_clear_key()), "ada": key_hash(key)}})
    with loop_thread() as do:
        server = do(opened.__aenter__())
        settings = server.gate.settings
        with on_a_port(server, do) as port, admin_running(settings) as url:
            headers = {"authorization": f"Bearer {key}"}
            with (
                httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as public,
                httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as admin,
            ):
                yield World(server, settings, public, admin, key)
        do(opened.__aexit__(None, None, None))


def soon(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(settings: ServeSettings) -> list[dict[str, Any]]:
    """The changes in the audit log, on the disk."""
    rows = [json.loads(line) for path in Path(settings.audit_spool).glob("*.jsonl") for line in path.read_text().splitlines()]
    return [row for row in rows if "change" in row]


def test_a_tenant_from_its_first_key_to_the_end_of_its_last(world: World) -> None:
    assert world.admin.post("/admin/tenants", json={"name": "cyan", "limits": {"max_choices": 2}}).status_code == 201
    made = world.admin.post("/admin/tenants/cyan/keys", json={}).json()
    assert world.admin.get("/admin/tenants").json() == ["acme", "bolt", "cyan"]
    soon(lambda: world.models(made["key"]).status_code == 200)

    rotated = world.admin.post(f"/admin/tenants/cyan/keys/{made['id']}/rotate", json={"overlap_hours": 15 / 3600, "days": 1}).json()
    soon(lambda: world.models(rotated["key"]).status_code == 200)
    assert world.models(made["key"]).status_code == 200, "the old key is taken during the overlap"
    soon(lambda: world.models(made["key"]).status_code == 401)
    ended = world.admin.post(f"/admin/tenants/cyan/keys/{made['id']}/rotate", json={})
    assert (ended.status_code, ended.json()["error"]["what"]) == (400, "this key has ended: there is nothing to rotate")

    changed = world.admin.patch("/admin/tenants/cyan/limits", json={"requests_per_minute": 1}).json()["limits"]
    assert changed == {"max_choices": 2, "requests_per_minute": 1}, "what is not named stays"
    headers = {"authorization": f"Bearer {rotated['key']}"}
    asked = {"model": "base", "prompt": [5], "max_tokens": 1}
    soon(lambda: world.public.post("/v1/completions", headers=headers, json=asked).status_code == 429)
    assert (
        world.admin.patch("/admin/tenants/cyan/limits", json={"requests_per_minute": None}).json()["limits"]["requests_per_minute"] is None
    )
    assert world.admin.delete("/admin/tenants/cyan/limits").json()["limits"] is None

    gone = world.admin.delete(f"/admin/tenants/cyan/keys/{rotated['id']}").json()
    assert [key["revoked"] for key in gone["keys"]] == [False, True]
    soon(lambda: world.models(rotated["key"]).status_code == 401)


def test_a_canary_a_promotion_a_rollback_and_a_revocation_reach_who_asks(world: World, store: Store) -> None:
    first, second = store.refs["acme/support"], store.refs["acme/support v2"]
    key = world.server.keys["acme"]

    def now() -> str:
        rows = {row["id"]: row["root"] for row in world.models(key).json()["data"]}
        return str(rows.get("support", ""))

    canary = world.admin.post("/admin/adapters/acme/support/promote", json={"version": second.digest[:12], "share": 0.25}).json()
    assert {row["ref"]: row["share"] for row in canary["versions"]} == {first.full: 0.75, second.full: 0.25}
    assert canary["pointer"] == world.server.store.pointer("acme", "support").model_dump(mode="json")
    world.admin.post("/admin/adapters/acme/support/promote", json={"version": second.digest})
    soon(lambda: now() == second.full)
    assert world.admin.post("/admin/adapters/acme/support/rollback").status_code == 200
    revoked = world.admin.post("/admin/adapters/acme/support/revoke", json={"version": second.digest[:12], "reason": "wrong rows"}).json()
    assert {row["ref"]: row["revoked"] for row in revoked["versions"]} == {first.full: None, second.full: "wrong rows"}
    refused = world.admin.post("/admin/adapters/acme/support/promote", json={"version": second.digest})
    assert refused.status_code == 409 and refused.json()["error"]["got"] == "wrong rows" and refused.json()["error"]["remedy"]
    world.admin.post("/admin/adapters/acme/support/rollback")
    soon(lambda: now() == first.full)
    listed = {row["ref"] for row in world.admin.get("/admin/adapters", params={"tenant": "bolt"}).json()}
    assert listed == {ref.full for ref in store.refs.values() if ref.tenant == "bolt"}


def test_what_a_listed_publisher_did_not_sign_is_not_served(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters here are unsigned."""
    monkeypatch.setattr(slots, "REFUSED_FOR_S", 0.2)
    publisher = keygen(tmp_path / "theirs.pem")
    pem = (tmp_path / "theirs.pub.pem").read_text()
    asked, headers = {"model": "support", "prompt": [5], "max_tokens": 1}, {"authorization": f"Bearer {world.server.keys['bolt']}"}

    def status() -> int:
        return world.public.post("/v1/completions", headers=headers, json=asked).status_code

    soon(lambda: status() == 200)
    added = world.admin.post("/admin/tenants/bolt/publishers", json={"pem": pem})
    assert (added.status_code, added.json()["publishers"]) == (201, [publisher])
    soon(lambda: status() == 409)
    assert world.admin.delete(f"/admin/tenants/bolt/publishers/{publisher}").json()["publishers"] == []
    assert world.admin.delete("/admin/tenants/bolt/publishers").json()["publishers"] is None
    soon(lambda: status() == 200)


BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/admin/tenants"): {"name": "acme"},
    ("PATCH", "/admin/tenants/{tenant}/limits"): {"max_choices": 1},
    ("DELETE", "/admin/tenants/{tenant}/limits"): None,
    ("POST", "/admin/tenants/{tenant}/keys"): {},
    ("POST", "/admin/tenants/{tenant}/keys/{key}/rotate"): {},
    ("DELETE", "/admin/tenants/{tenant}/keys/{key}"): None,
    ("POST", "/admin/tenants/{tenant}/publishers"): {"pem": "no key"},
    ("DELETE", "/admin/tenants/{tenant}/publishers/{publisher}"): None,
    ("DELETE", "/admin/tenants/{tenant}/publishers"): None,
    ("POST", "/admin/adapters/{tenant}/{name}/promote"): {"version": "abcdef"},
    ("POST", "/admin/adapters/{tenant}/{name}/rollback"): None,
    ("POST", "/admin/adapters/{tenant}/{name}/revoke"): {"version": "abcdef", "reason": "-"},
}
"""Of every route that changes something, what is refused of a tenant that does not exist, or exists already."""


def routes(settings: ServeSettings) -> set[tuple[str, str]]:
    found = [route for route in build_routes(Desk(settings)).routes if isinstance(route, APIRoute)]
    return {(method, route.path) for route in found for method in route.methods}


def test_every_change_is_written_down_with_who_made_it_and_no_key_is(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    made = world.admin.post("/admin/tenants/acme/keys", json={"days": 3.5}).json()
    assert {pair for pair in routes(world.settings) if pair[0] != "GET"} == set(BODIES), "each route that changes something is asked"
    for (method, path), body in BODIES.items():
        reply = world.admin.request(method, path.format(tenant="nobody", name="nothing", key="0" * 8, publisher="0" * 16), json=body)
        assert reply.status_code == 400 and reply.json()["error"]["what"], (path, reply.text)
    wanted = {"admin": "ada", "change": "key.new", "of": "acme", "detail": '{"days": 3.5}', "result": "done"}

    def since() -> list[dict[str, Any]]:
        found = lines(world.settings)
        return found[next((at for at, line in enumerate(found) if wanted.items() <= line.items()), len(found)) + 1 :]

    soon(lambda: len(since()) == len(BODIES))
    refused = since()
    assert {line["result"] for line in refused} == {"refused"} and {line["admin"] for line in refused} == {"ada"}
    written = b"".join(path.read_bytes() for path in Path(world.settings.audit_spool).glob("*"))
    for secret in (made["key"], world.key):
        assert secret.encode() not in written and key_hash(secret).encode() not in written
    for command, wanted in (("lines", '"change": "key.new"'), ("usage", "requests"), ("verify", "sound")):
        assert main(["audit", command, world.settings.store, "--spool", world.settings.audit_spool]) == 0
        assert wanted in capsys.readouterr().out


def test_neither_kind_of_key_opens_the_others_door(world: World) -> None:
    theirs = {"authorization": f"Bearer {world.server.keys['acme']}"}
    asked = [*routes(world.settings), ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/docs"), ("POST", "/admin/tenants/x")]
    assert len(asked) > 15
    before = sorted(world.server.tenants.names())
    for method, path in asked:
        for headers in (
            theirs,
            {"authorization": ""},
            {"authorization": f"Bearer {new_clear_key()}"},
            {"authorization": f"Basic {world.key}"},
        ):
            reply = world.admin.request(method, path, headers=headers, json={"name": "evil"})
            assert (reply.status_code, set(reply.json()["error"])) == (401, {"what"}), (method, path)
    assert sorted(world.server.tenants.names()) == before, "nothing was done behind the door"
    for path in ("/v1/models", "/metrics"):
        assert world.public.get(path, headers={"authorization": f"Bearer {world.key}"}).status_code in (401, 403)


def test_without_keys_this_machine_alone_may_ask_and_no_page_of_a_browser(store: Store, tmp_path: Path) -> None:
    tree = {"base": str(store.base), "store": str(store.path), "audit_spool": str(tmp_path / "spool"), "admin": {"port": 0}}
    settings = ServeSettings.model_validate(tree)
    with admin_running(settings) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        assert http.get("/admin/adapters").status_code == 200
        assert http.get("/admin/tenants").json()["error"]["remedy"] == "serve with tenants=FOLDER"
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
            assert http.post("/admin/adapters/acme/support/rollback", headers=headers).status_code == 403
    with (
        pytest.raises(ConfigError, match="only this machine"),
        admin_running(settings.model_copy(update={"admin": settings.admin.model_copy(update={"host": "0.0.0.0"})})),
    ):
        pass


def test_what_is_wrong_is_said_and_changes_nothing(world: World) -> None:
    before = world.server.tenants.read("acme")
    for path, body, word in (
        ("/admin/tenants", {"name": "../x"}, "name"), ("/admin/tenants", {"name": "x", "limit": {}}, "limit"),
        ("/admin/tenants/acme/keys", {"days": -1}, "days"), ("/admin/tenants/ACME/keys", {}, "tenant"),
        ("/admin/adapters/acme/support/promote", {"version": "current", "share": 2}, "share"),
        ("/admin/tenants/acme/keys", ["x"], "object"), ("/admin/adapters/acme/support/promote", {"version": "../../bolt"}, "adapter name"),
    ):  # fmt: skip
        reply = world.admin.post(path, json=body)
        assert reply.status_code == 400 and word in reply.text, (path, body, reply.text)
    assert world.admin.post("/admin/tenants", content=b"x" * 70_000).status_code == 413
    assert world.admin.get("/admin/nothing").status_code == 404
    schema = world.admin.get("/openapi.json").json()
    assert {(method.upper(), path) for path, entry in schema["paths"].items() for method in entry} == routes(world.settings)
    assert world.server.tenants.read("acme") == before


def test_it_runs_by_itself_from_the_same_settings(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve.yaml").write_text(f"base: {store.base}\nstore: {tmp_path}\ntenants: {tmp_path / 'tenants'}\n")
    assert main(["serve", "--new-admin-key"]) == 0
    clear, told = capsys.readouterr().out.splitlines()
    key = told.rpartition(" ")[2].replace("YOUR-NAME", "ada")
    assert main(["tenants", "add", str(tmp_path / "tenants"), "acme"]) == 0
    (first,) = json.loads((tmp_path / "tenants" / "acme.json").read_text())["keys"]
    assert main(["tenants", "rotate", str(tmp_path / "tenants"), "acme", first["id"], "--overlap-hours", "2"]) == 0
    command = [sys.executable, "-m", "serving.admin", str(tmp_path / "serve.yaml"), "admin.port=0", key]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("admin API: http://127.0.0.1:") and "keys: ada" in said
        place, headers = said.split()[2] + "/tenants/acme", {"authorization": f"Bearer {clear}"}
        found = httpx.get(place, headers=headers, trust_env=False, timeout=60).json()
        assert [key["expires"] is None for key in found["keys"]] == [False, True]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
