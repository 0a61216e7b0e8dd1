"""Pushing to a hub: one served on loopback takes it; without one, or without the base's name there, the refusal says what to do."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from ftcore.adapter_commands import main
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import ConfigError, StorageError
from ftcore.export.hub import push_to_hub
from tests.adapter_folders import make_card, make_folder


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as creating a repository and committing files to it take."""

    files: dict[str, bytes]
    tokens: set[str]

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.path.endswith("/preupload/main"):
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitOid": "1" * 40, "commitUrl": f"http://{self.headers['Host']}/acme/support/commit/" + "1" * 40, "success": True}
            )
        else:
            self.answer(
                {"url": f"http://{self.headers['Host']}/acme/support", "id": "acme/support", "name": "acme/support", "warnings": []}
            )

    def do_GET(self) -> None:
        self.answer({"id": "acme/support", "sha": "1" * 40, "private": True, "downloads": 0, "tags": [], "siblings": []})

    def answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    served = type("ServedHub", (Hub,), {"files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(tmp_path: Path) -> tuple[AdapterStore, AdapterRef]:
    store = AdapterStore(tmp_path / "store")
    folder = make_folder(tmp_path / "a")
    return store, store.publish(folder, make_card(folder))


def test_a_version_arrives_as_a_plain_peft_repository(
    published: tuple[AdapterStore, AdapterRef], hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    store, ref = published
    assert main(["push", ref.full, "acme/support", "--store", str(store), "--base-model", "acme/base"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json", "card.json", "README.md"} <= hub.files.keys()
    assert b"base_model: acme/base" in hub.files["README.md"]
    assert hub.tokens == {"Bearer hf_made_up"}
    assert "/commit/" in capsys.readouterr().out


def test_without_a_hub_the_refusal_says_what_to_look_at(
    published: tuple[AdapterStore, AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE"):
        push_to_hub(*published, "acme/support", base_model="acme/base")


def test_a_hub_that_cannot_be_reached_is_named(published: tuple[AdapterStore, AdapterRef], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        push_to_hub(*published, "acme/support", base_model="acme/base", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", [None, "/models/base", "base", "a/b/c", "../x"])
def test_a_base_needs_its_name_on_the_hub(published: tuple[AdapterStore, AdapterRef], name: str | None) -> None:
    with pytest.raises(ConfigError, match="base-model"):
        push_to_hub(*published, "acme/support", base_model=name)


def test_a_repository_name_that_is_none_is_refused(published: tuple[AdapterStore, AdapterRef], hub: type[Hub]) -> None:
    with pytest.raises(StorageError, match="did not take"):
        push_to_hub(*published, "../../x y", base_model="acme/base")
