"""Claim: one driver at a time leads a run; who it is lies beside the run, so that a second one is told and a dead one is replaced at once.

In: a RunDir. Out: writer.json in it, beaten like a pulse and gone at the end; RunDir.token, which workers check before they seal.
Runs in: the driver.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ftcore.errors import ClusterError, IntegrityError, StorageError
from ftcore.rundir import WRITER, RunDir

BEAT_S = 5.0
STALE_S = 16.0
"""A pulse that stood still for this long, on a machine whose processes cannot be looked at, is a dead driver's."""
OLD_S = 600.0
"""From this age on nobody waits to see whether it moves; clocks of two machines differ by less."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class Writer:
    """Who leads a run."""

    token: str
    place: str
    """Host, boot and process namespace: where `pid` means something."""
    pid: int
    born: str
    """The process's start, in the kernel's ticks: a number used again is another process."""
    beat: int = 0
    time: float = 0.0


@contextmanager
def claimed(run: RunDir, log: Log) -> Iterator[None]:
    """The run is this process's while inside. Raises ClusterError when another live process leads it."""
    before = _read(run)
    if before is not None:
        _refuse_if_alive(run, before, log)
    writer = Writer(uuid.uuid4().hex, _here(), os.getpid(), _born(os.getpid()), 0, time.time())
    run.folder.write_json(WRITER, asdict(writer))
    run.token = writer.token
    over = threading.Event()
    threading.Thread(target=_pulse, args=(run, writer, over), name="claim", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        now = _read(run)
        if now is not None and now.token == writer.token:
            run.folder.delete(WRITER)
        run.token = ""
        if run.folder.is_local:
            with contextlib.suppress(OSError):  # what was refused before it began leaves no folder behind
                run.folder.path.rmdir()


def _pulse(run: RunDir, writer: Writer, over: threading.Event) -> None:
    beat = 0
    while not over.wait(BEAT_S):
        beat += 1
        with contextlib.suppress(StorageError):  # storage that stumbles: the next beat tries again, and stale takes three
            now = _read(run)
            if over.is_set() or now is None or now.token != writer.token:
                return  # another driver took over; workers find out before they seal
            run.folder.write_json(WRITER, asdict(writer) | {"beat": beat, "time": time.time()})


def _refuse_if_alive(run: RunDir, before: Writer, log: Log) -> None:
    if before.place == _here():
        alive = _born(before.pid) == before.born and before.pid != os.getpid()
    elif time.time() - before.time > OLD_S:
        alive = False
    else:
        log(f"another machine led this run {time.time() - before.time:.0f} s ago: looking for {STALE_S:.0f} s whether it still does")
        alive = _moves(run, before)
    if alive:
        host = before.place.split("/")[0]
        raise ClusterError(
            "another process trains this run now", where=run.url, got=f"process {before.pid} on {host}",
            wanted="one writer", remedy="wait for it or stop it (Ctrl-C there seals a checkpoint), or give this run another name",
        )  # fmt: skip
    log("the process that led this run before is gone; taking over")


def _moves(run: RunDir, before: Writer) -> bool:
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(0.5)
        now = _read(run)
        if now is None:
            return False  # it ended just now
        if now != before:
            return True
    return False


def _read(run: RunDir) -> Writer | None:
    if not run.folder.exists(WRITER):
        return None
    try:
        return Writer(**run.folder.read_json(WRITER))
    except (TypeError, IntegrityError):  # not one of ours
        return None


def _here() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no /proc: the host's name alone
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return "/".join(parts)


def _born(pid: int) -> str:
    """Start time of a live process; "" when there is none, or it only waits to be buried."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not _exists(pid) else "unknown"
    return "" if facts[0] in "ZX" else facts[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
