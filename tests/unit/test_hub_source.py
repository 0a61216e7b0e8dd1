"""`hf:` sources, read from a hub served on loopback by a process that knows nothing but HF_ENDPOINT."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
READ = """
import json, sys
from ftcore.data.read import plan, read
from ftcore.errors import DataError
from ftcore.recipe import Source
for path in sys.argv[1:]:
    try:
        rows = [row for piece in plan((Source(path=path),)) for row in read(piece)]
        print(json.dumps([[row.origin.file, row.origin.row, row.value] for row in rows]))
    except DataError as error:
        print(json.dumps([error.what, error.got, error.wanted]))
"""


def table(*texts: str) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in texts]), out)
    return out.getvalue()


HUB = {
    "org/parts": {
        "README.md": b"# about",
        "data/train-00000-of-00002.parquet": table("a"),
        "data/train-00001-of-00002.parquet": table("b"),
        "data/test-00000-of-00001.parquet": table("c"),
    },
    "org/lines": {"train.jsonl": b'{"text": "d"}\n', "dataset_infos.json": b"{}"},
    "org/configs": {"en/train-00000-of-00001.parquet": table("e"), "fr/train-00000-of-00001.parquet": table("f")},
    "org/code": {"load.py": b"raise SystemExit"},
    "org/converted": {"load.py": b"raise SystemExit"},
    "org/converted@parquet": {"default/train/0000.parquet": table("g"), "default/test/0000.parquet": table("h")},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's file API as listing and reading a dataset take."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        branch = "@parquet" if "refs%2Fconvert%2Fparquet" in path else ""
        files = next(
            (files for name, files in HUB.items() if name.endswith(branch) and f"/datasets/{name.removesuffix(branch)}" in path), None
        )
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if branch else "RepoNotFound"})
        if found := re.search(r"/resolve/[^/]+/(.+)$", path):
            return self.file(files[found.group(1)])
        if found := re.search(r"/tree/[^/]+/?(.*)$", path):
            inside = {name: data for name, data in files.items() if name.startswith(found.group(1))}
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in inside.items()]
            tree += [{"type": "directory", "path": name, "oid": "0" * 40} for name in {str(Path(name).parent) for name in inside} - {"."}]
            return self.answer(200 if tree else 404, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": "org/x", "sha": "0" * 40, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def file(self, data: bytes) -> None:
        headers = {"ETag": f'"{len(data):040x}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        return self.answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


NAMES = ("parts", "parts:test", "parts:nope", "lines", "configs", "configs/fr", "none", "code", "converted")
SOURCES = tuple(f"hf:org/{name}" for name in NAMES)


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, Any]]:
    """What a fresh process reads from each source."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run([sys.executable, "-c", READ, *SOURCES], env=environment, capture_output=True, text=True, timeout=400)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    yield dict(zip(SOURCES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_without_a_split_the_train_files_are_read_in_order(answers: dict[str, Any]) -> None:
    assert answers["hf:org/parts"] == [
        ["hf:org/parts (train-00000-of-00002.parquet)", 1, {"text": "a"}],
        ["hf:org/parts (train-00001-of-00002.parquet)", 1, {"text": "b"}],
    ]


def test_a_split_is_picked_by_name(answers: dict[str, Any]) -> None:
    assert [row[2] for row in answers["hf:org/parts:test"]] == [{"text": "c"}]


def test_a_split_that_is_not_there_lists_those_that_are(answers: dict[str, Any]) -> None:
    assert answers["hf:org/parts:nope"] == ["this dataset has no such split", "nope", "test | train"]


def test_other_kinds_of_file_are_read_and_metadata_is_left(answers: dict[str, Any]) -> None:
    assert [row[2] for row in answers["hf:org/lines"]] == [{"text": "d"}]


def test_several_configurations_have_to_be_told_apart(answers: dict[str, Any]) -> None:
    assert answers["hf:org/configs"] == ["this dataset has several configurations", "en, fr", "one"]
    assert [row[2] for row in answers["hf:org/configs/fr"]] == [{"text": "f"}]


def test_a_dataset_that_is_not_there_or_is_only_code_is_refused(answers: dict[str, Any]) -> None:
    assert answers["hf:org/none"][0] == "there is no such dataset on the hub"
    assert answers["hf:org/code"][0] == "this dataset holds no readable files"


def test_a_dataset_that_is_only_code_is_read_from_the_hubs_own_parquet_copy(answers: dict[str, Any]) -> None:
    assert [row[2] for row in answers["hf:org/converted"]] == [{"text": "g"}]
