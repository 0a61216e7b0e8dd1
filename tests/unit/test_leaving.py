"""A pod that goes: says so to its workers, and waits for them and for its clients, but not for ever and not for other pods' work."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import leaving

WORKING = "import sys, time; time.sleep(60)"


@pytest.fixture
def notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCORE_PREEMPTION_FILE", str(tmp_path / "preempted"))
    return tmp_path / "preempted"


def worker() -> subprocess.Popen[bytes]:
    """A process with the title of one that trains."""
    title = f"ray::{leaving.WORKER}.execute"
    return subprocess.Popen(["bash", "-c", f'exec -a "$0" {sys.executable} -c "{WORKING}"', title])


def test_with_nobody_at_work_it_says_so_and_goes(notice: Path) -> None:
    began = time.monotonic()
    assert leaving.main(["300"]) == 0 and notice.exists()
    assert time.monotonic() - began < 60


def test_it_waits_until_who_trains_has_gone(notice: Path) -> None:
    with worker() as process:
        while process.pid not in leaving.titled(leaving.WORKER):
            time.sleep(0.01)
        began = time.monotonic()
        threading.Timer(1.0, process.kill).start()
        assert leaving.main(["300"]) == 0
        assert 0.9 < time.monotonic() - began < 60


def test_it_does_not_wait_for_ever(notice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with worker() as process:
        while process.pid not in leaving.titled(leaving.WORKER):
            time.sleep(0.01)
        assert leaving.main(["1"]) == 1
        process.kill()
    assert "still at work after 1 s" in capsys.readouterr().err


def test_clients_that_are_connected_are_counted_until_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "FIRST_S", 0.0)
    monkeypatch.setattr(leaving, "drain", lambda seconds: None)  # other tests' Ray may run on this machine
    monkeypatch.setattr(leaving, "titled", lambda what: iter(()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert leaving.num_connected(port) == 0
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            assert leaving.num_connected(port) == 1
            assert leaving.main(["0.5", "--port", str(port)]) == 1
        accepted.close()
        assert leaving.main(["30", "--port", str(port)]) == 0


def test_what_another_pod_does_is_not_waited_for(tmp_path: Path) -> None:
    """Where all processes of a machine can be seen, those of another network are another pod's."""
    for name, network in (("self", "own"), ("11", "own"), ("12", "other")):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / network).touch()
        (tmp_path / name / "ns/net").symlink_to(tmp_path / network)
        (tmp_path / name / "cmdline").write_bytes(b"ray::RayTrainWorker.run\0")
    assert list(leaving.titled(leaving.WORKER, tmp_path)) == [11]


def test_ray_is_told_which_node_goes_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/7/ns").mkdir(parents=True)
    for name in ("self", "7"):
        (tmp_path / f"proc/{name}/ns/net").touch()
    monkeypatch.setattr(Path, "stat", lambda self: type("Stat", (), {"st_ino": 1}))
    (tmp_path / "proc/7/cmdline").write_bytes(b"/x/ray/core/src/ray/raylet/raylet\0--node_id=abc\0--gcs-address=10.0.0.1:6379\0")
    said: list[list[str]] = []
    monkeypatch.setattr(
        leaving.subprocess, "run", lambda words, check, timeout: (said.append(words), subprocess.CompletedProcess(words, 0))[1]
    )
    leaving.drain(100, tmp_path / "proc")
    [words] = said
    assert words[:6] == ["ray", "drain-node", "--address", "10.0.0.1:6379", "--node-id", "abc"] and words[-1] == "100"
