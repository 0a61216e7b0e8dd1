"""Workers forked from a nursery: they bring back a value or the error, a killed one is known at once, and none outlives its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import notices as notices_module
from cluster.notices import Notices
from ftcore.backends.base import World
from ftcore.errors import StorageError
from ftcore.nursery import Birth, End, Nursery, Post, Worker, WorkerDied

ALONE = World()


def says_hello(post: Post) -> str:
    post.say({"event": "hello", "rank": post.world.rank})
    return os.environ["GIVEN"]


def fails(post: Post) -> None:
    error = StorageError("the disk is full", where="here")
    error.errno = 28
    raise error


def waits(post: Post) -> str:
    post.say({"event": "waiting"})
    while not post.should_stop():
        time.sleep(0.02)
    return "asked to stop"


def says_where(post: Post) -> str:
    return str(Path.cwd())


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    opened = Nursery.open(tmp_path / "n", ["json", __name__])
    yield opened
    opened.close()


def ended(worker: Worker) -> tuple[End, list[object]]:
    said: list[object] = []
    until = time.monotonic() + 60
    while worker.end is None and time.monotonic() < until:
        said += worker.hear(0.1)
    assert worker.end is not None
    return worker.end, said


def test_a_worker_speaks_has_its_variables_and_brings_back_a_value(nursery: Nursery) -> None:
    end, said = ended(nursery.bear(Birth(says_hello, ALONE, "", {"GIVEN": "yes"})))
    assert (end.value, end.error, said) == ("yes", None, [{"event": "hello", "rank": 0}])


def test_an_error_comes_back_as_itself_with_the_number_that_decides_about_a_retry(nursery: Nursery) -> None:
    end, _ = ended(nursery.bear(Birth(fails, ALONE, "", {})))
    assert isinstance(end.error, StorageError) and end.error.errno == 28 and end.error.where == "here"


def test_a_killed_worker_is_known_at_once_and_the_next_one_is_born_at_once(nursery: Nursery) -> None:
    worker = nursery.bear(Birth(waits, ALONE, "", {}))
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    end, _ = ended(worker)
    assert isinstance(end.error, WorkerDied)
    assert ended(nursery.bear(Birth(says_hello, ALONE, "", {"GIVEN": "again"})))[0].value == "again"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("by", ["order", "SIGTERM"])
def test_a_worker_asked_to_stop_finishes_what_it_does_and_a_signal_is_told_as_a_notice(nursery: Nursery, by: str) -> None:
    worker = nursery.bear(Birth(waits, ALONE, "", {}))
    while not worker.hear(0.1):
        assert worker.end is None
    if by == "order":
        worker.ask_to_stop()
    else:
        os.kill(worker.pid, signal.SIGTERM)
    end, said = ended(worker)
    assert end.value == "asked to stop"
    assert [message["why"] for message in said if isinstance(message, dict)] == ([] if by == "order" else ["SIGTERM"])


SUPERVISOR = """
import sys, time
from pathlib import Path
from tests.unit.test_nursery import *
nursery = Nursery.open(Path(sys.argv[1]), [], linger_s=float(sys.argv[2]))
worker = nursery.bear(Birth(waits, ALONE, "", {}))
print(tender_of(nursery), worker.pid, flush=True)
signal.pause()
"""


def tender_of(nursery: Nursery) -> int:
    """The number of the nursery's process, as the kernel knows it."""
    assert nursery._hold is not None
    return int(struct.unpack("3i", nursery._hold.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def killed_supervisor(folder: Path, linger_s: float) -> tuple[int, int]:
    """The numbers of the nursery and of the worker that a supervisor, killed now, had."""
    command = [sys.executable, "-c", SUPERVISOR, str(folder), str(linger_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as supervisor:
        assert supervisor.stdout is not None
        tender, worker = map(int, supervisor.stdout.readline().split())
        supervisor.kill()
    return tender, worker


def gone_within(seconds: float, *pids: int) -> bool:
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_nobody_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    assert gone_within(60, *killed_supervisor(tmp_path / "n", 0.5))


def test_who_takes_a_killed_supervisors_place_finds_its_nursery(tmp_path: Path) -> None:
    tender, worker = killed_supervisor(tmp_path / "n", 60)
    assert gone_within(60, worker) and alive(tender)
    again = Nursery.open(tmp_path / "n", [])
    assert ended(again.bear(Birth(says_hello, ALONE, "", {"GIVEN": "again"})))[0].value == "again"
    assert tender_of(again) == tender
    again.close()
    os.kill(tender, signal.SIGKILL)


def test_a_nursery_is_shared_and_ends_with_the_last_who_holds_it(tmp_path: Path) -> None:
    one, two = (Nursery.open(tmp_path / "n", [], linger_s=0.5) for _ in range(2))
    assert [ended(n.bear(Birth(says_hello, ALONE, "", {"GIVEN": "x"})))[0].value for n in (one, two)] == ["x", "x"]
    tender = tender_of(one)
    assert tender_of(two) == tender
    one.close()
    assert ended(two.bear(Birth(says_hello, ALONE, "", {"GIVEN": "y"})))[0].value == "y"
    two.close()
    assert gone_within(60, tender)


@pytest.mark.parametrize("change", ["file", "variable", "node"])
def test_another_program_or_environment_gets_another_nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    module = tmp_path / "imported_by_the_nursery.py"
    module.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    one = Nursery.open(tmp_path / "n", [module.stem], node="a")
    ended(one.bear(Birth(says_hello, ALONE, "", {"GIVEN": "x"})))
    if change == "file":
        module.write_text("VALUE = 22\n")
    elif change == "variable":
        monkeypatch.setenv("HF_HOME", "/elsewhere")
    two = Nursery.open(tmp_path / "n", [module.stem], node="b" if change == "node" else "a")
    assert ended(two.bear(Birth(says_hello, ALONE, "", {"GIVEN": "y"})))[0].value == "y"
    assert tender_of(two) != tender_of(one)
    assert ended(one.bear(Birth(says_hello, ALONE, "", {"GIVEN": "z"})))[0].value == "z" if change != "file" else True
    one.close()
    two.close()


def test_who_reads_the_output_of_a_killed_supervisor_need_not_wait_for_the_nursery(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "n"), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        tender, worker = map(int, supervisor.stdout.readline().split())
        supervisor.kill()
        supervisor.communicate(timeout=60)
    assert gone_within(60, worker) and alive(tender)
    os.kill(tender, signal.SIGKILL)


def test_the_next_run_finds_the_nursery_of_the_last(tmp_path: Path) -> None:
    last = Nursery.open(tmp_path / "n", [], variables={"OMP_NUM_THREADS": "3"})
    ended(last.bear(Birth(says_hello, ALONE, "", {"GIVEN": "x"})))
    tender = tender_of(last)
    last.close()
    following = Nursery.open(tmp_path / "n", [], linger_s=0.5, variables={"OMP_NUM_THREADS": "3"})
    assert tender_of(following) == tender
    following.close()


def test_a_worker_works_in_its_supervisors_folder(nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(nursery.bear(Birth(says_where, ALONE, "", {})))[0].value == str(tmp_path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_nursery_that_cannot_import_says_so(tmp_path: Path) -> None:
    nursery = Nursery.open(tmp_path / "n", ["no_such_module_at_all"])
    with pytest.raises(WorkerDied, match="nursery"):
        nursery.bear(Birth(waits, ALONE, "", {}))
    nursery.close()


def test_a_nursery_that_was_killed_is_opened_again_for_the_next_worker(tmp_path: Path) -> None:
    nursery = Nursery.open(tmp_path / "n", [])
    first = nursery.bear(Birth(waits, ALONE, "", {}))
    os.kill(tender_of(nursery), signal.SIGKILL)
    while first.end is None:
        first.hear(0.1)
    assert isinstance(first.end.error, WorkerDied)
    again = nursery.bear(Birth(says_hello, ALONE, "", {"GIVEN": "value"}))
    while again.end is None:
        again.hear(0.1)
    nursery.close()
    assert again.end.value == "value"


class Unpickable(Exception):
    """Goes into a pickle, and does not come out."""

    def __init__(self, text: str, *, needed: int) -> None:
        super().__init__(text)


def fails_oddly(post: Post) -> None:
    raise Unpickable("the true cause", needed=1)


def test_an_error_that_cannot_travel_is_told_in_words(tmp_path: Path) -> None:
    nursery = Nursery.open(tmp_path / "n", [])
    worker = nursery.bear(Birth(fails_oddly, ALONE, "", {}))
    while worker.end is None:
        worker.hear(0.1)
    nursery.close()
    assert str(worker.end.error) == "Unpickable: the true cause"


def test_a_notice_file_is_heard_once(tmp_path: Path) -> None:
    notices = Notices(file=str(tmp_path / "going"))
    assert notices.heard() == ""
    (tmp_path / "going").touch()
    notices._looked = float("-inf")
    assert [notices.heard(), notices.heard()] == [f"{tmp_path / 'going'} appeared", ""]


def test_a_clouds_notice_is_read_with_the_headers_it_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "EVERY_S", 0.02)

    class Cloud(BaseHTTPRequestHandler):
        """Answers as AWS's second version and Google's do, together."""

        def do_PUT(self) -> None:
            self._say(200, "token-1" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else "")

        def do_GET(self) -> None:
            allowed = self.headers["X-aws-ec2-metadata-token"] == "token-1" and self.headers["Metadata-Flavor"] == "Google"
            self._say(200 if allowed else 401, "TRUE" if allowed else "no")

        def _say(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    notices = Notices(url=f"http://127.0.0.1:{server.server_port}/preempted")
    until, why = time.monotonic() + 60, ""
    while not why and time.monotonic() < until:
        why = notices.heard()
        time.sleep(0.02)
    server.shutdown()
    server.server_close()
    assert why.endswith("says TRUE")
