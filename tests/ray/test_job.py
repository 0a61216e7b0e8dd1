"""`ray job submit --working-dir .` on a head of our own: logs stream, the adapter is published, a wrong recipe gives its exit code."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.connect import TOO_SLOW
from ftcore.adapters import AdapterStore
from tests.ray.small_runs import write_rows

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = secrets.token_hex(32)
MAX_UPLOAD_BYTES = 20 << 20
"""Code, recipes and the demo's base (at most 10 MB)."""


@dataclass(frozen=True)
class Head:
    """A head node of this test's own: started, found and ended by its own ports, folder and process."""

    dashboard: str
    temporary: Path
    home: Path

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        for _ in range(60):  # Ray's dashboard answers before its job agent on a busy node does
            done = subprocess.run(
                [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", "python", *words],
                cwd=REPO, env=environment(), capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            if "No available agent" not in done.stdout + done.stderr:
                break
            time.sleep(2)
        return done


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **kept,
        "PATH": path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    temporary, home = Path(f"/tmp/ft-head-{os.getpid()}"), tmp_path_factory.mktemp("home")  # short: sockets live under it
    port, dashboard, client, agent = free_ports(4)
    words = [
        RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={temporary}", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
    ]  # fmt: skip
    known = environment(FTCORE_HOME=str(home))
    try:
        for left in (2, 1, 0):
            process = subprocess.Popen(words, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                wait_for(dashboard, process)
                break
            except AssertionError as error:
                if not left or TOO_SLOW not in str(error):
                    raise
        yield Head(f"http://127.0.0.1:{dashboard}", temporary, home)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()  # with `--block` the kernel ends what it started with it
            process.communicate()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for(dashboard: int, process: subprocess.Popen[str], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", dashboard)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("the head's dashboard did not come up")


def test_a_submitted_job_streams_its_log_and_publishes_into_the_home_of_the_cluster(
    head: Head, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=60)
    done = head.submit(
        "pipelines/sft.py", "pipelines/recipes/sft-lora.yaml", "name=job", f"model.path={tiny_model_dir}", "model.dtype=fp32",
        f"data.sources.0.path={rows}", "data.max_length=64", "optim.epochs=1", "output.adapter=acme/job",
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for expected in ("ray: this job's Ray cluster", "relative paths land under", "step 1/", "published acme/job@"):
        assert expected in said, f"{expected!r} is not in\n{said}"
    store = AdapterStore(head.home / "adapters")
    assert store.verify(store.resolve("acme/job")).world_size == 2


def test_what_was_uploaded_is_small_and_only_what_runs(head: Head) -> None:
    [package] = [path for path in head.temporary.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*") if path.is_dir()]
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert sum((package / file).stat().st_size for file in files) < MAX_UPLOAD_BYTES
    assert Path("pipelines/sft.py") in files
    assert not {file.parts[0] for file in files} & {"tests", "runs", "adapters", "prepared", ".venv", ".git", ".demo"}


def test_a_wrong_recipe_fails_the_job_with_the_reason_in_its_log(head: Head) -> None:
    done = head.submit("pipelines/sft.py", "pipelines/recipes/sft-lora.yaml", "optim.learning_rate=1")
    assert done.returncode != 0
    assert "did you mean" in done.stdout + done.stderr, json.dumps(done.stdout)
