"""A real S3 API for tests: moto's server on loopback, and the credentials to use it with, by the usual chain.

place = s3("bucket")              s3://bucket-<n>, empty
FTCORE_S3_SERVER_PYTHON           a Python that has moto's server; unset: .venv-s3, which `make test` builds from tests/s3-server.txt
"""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
KEY_ID, SECRET = "AKIAFTCORETESTKEY000", "ftcoreTestSecret/DoNotPrintMe+0123456789"
_NAMES = iter(range(1_000_000))


def server_python() -> Path:
    python = Path(os.environ.get("FTCORE_S3_SERVER_PYTHON") or REPO / ".venv-s3/bin/python")
    if not python.exists():
        pytest.fail(f"the S3 server of the tests is not installed: no {python}; `make test` builds it (or set FTCORE_S3_SERVER_PYTHON)")
    return python


@contextmanager
def moto_server() -> Iterator[str]:
    """Starts the server; yields its address. It ends with the pipe to it, also when this process is killed."""
    process = subprocess.Popen(
        [server_python(), REPO / "tests/s3_moto.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AWS_"))},
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        port = process.stdout.readline().strip()
        assert port, "the S3 server of the tests did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait(120)
        process.stdout.close()


def make_bucket(endpoint: str, name: str = "bucket") -> str:
    """Makes an empty bucket with a name of its own; returns its s3:// URL."""
    bucket = f"{name}-{os.getpid()}-{next(_NAMES)}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=120).close()
    return f"s3://{bucket}"


def credentials_file(folder: Path) -> Path:
    """A shared credentials file with one profile, which is not the default one."""
    path = folder / "credentials"
    path.write_text(f"[ftcore-tests]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n")
    path.chmod(0o600)
    return path


def variables(endpoint: str, credentials: Path) -> dict[str, str]:
    """What a process needs in its environment to reach the server. No secret is among it."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_SHARED_CREDENTIALS_FILE": str(credentials), "AWS_PROFILE": "ftcore-tests",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture(scope="session")
def s3_credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return credentials_file(tmp_path_factory.mktemp("aws"))


@pytest.fixture
def s3(s3_endpoint: str, s3_credentials: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, `s3://…`, with this process's environment set so that s3fs reaches it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables(s3_endpoint, s3_credentials).items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_endpoint)
