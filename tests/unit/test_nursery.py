"""Workers forked from a nursery: they bring back a value or the error, a killed one is known at once, and none outlives its supervisor."""

from __future__ import annotations

import os
import signal
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
    while not post.should_stop():
        time.sleep(0.02)
    return "asked to stop"


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    opened = Nursery.open(tmp_path / "n" / "s", ["json", __name__])
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
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("by", ["order", "SIGTERM"])
def test_a_worker_asked_to_stop_finishes_what_it_does_and_a_signal_is_told_as_a_notice(nursery: Nursery, by: str) -> None:
    worker = nursery.bear(Birth(waits, ALONE, "", {}))
    time.sleep(0.3)
    if by == "order":
        worker.ask_to_stop()
    else:
        os.kill(worker.pid, signal.SIGTERM)
    end, said = ended(worker)
    assert end.value == "asked to stop"
    assert [message["why"] for message in said if isinstance(message, dict)] == ([] if by == "order" else ["SIGTERM"])


def test_nobody_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = (
        f"import time\nfrom pathlib import Path\nfrom tests.unit.test_nursery import *\n"
        f"nursery = Nursery.open(Path({str(tmp_path)!r}) / 's', [])\nworker = nursery.bear(Birth(waits, ALONE, '', {{}}))\n"
        "print(nursery._process.pid, worker.pid, flush=True)\ntime.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        supervisor.kill()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_nursery_that_cannot_import_says_so(tmp_path: Path) -> None:
    nursery = Nursery.open(tmp_path / "s", ["no_such_module_at_all"])
    with pytest.raises(WorkerDied, match="nursery"):
        nursery.bear(Birth(waits, ALONE, "", {}))
    nursery.close()


def test_a_nursery_that_was_killed_is_opened_again_for_the_next_worker(tmp_path: Path) -> None:
    nursery = Nursery.open(tmp_path / "s", [])
    first = nursery.bear(Birth(waits, ALONE, "", {}))
    assert nursery._process is not None
    nursery._process.kill()
    nursery._process.wait()
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
    nursery = Nursery.open(tmp_path / "s", [])
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
    until, why = time.monotonic() + 10, ""
    while not why and time.monotonic() < until:
        why = notices.heard()
        time.sleep(0.02)
    server.shutdown()
    server.server_close()
    assert why.endswith("says TRUE")
