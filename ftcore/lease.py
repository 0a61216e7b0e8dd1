"""Lease: one driver a run, on any storage: an object that says who holds the run, renewed while its holder lives.

In: a RunDir. Out: the run held, or a ConfigError that says who holds it and since when. Runs in: the driver.

Nobody compares clocks: a lease is watched, and taken over when it was not renewed for STALE_S. A holder on this very machine is asked for
instead: the lease of a process that is gone is taken over at once. Every change is one conditional write, so of two who take over at once
one wins, and a holder that was taken over (it slept, its network was gone) finds out at its next renewal.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ftcore.card import utc_now
from ftcore.errors import ConfigError
from ftcore.rundir import LEASE, RunDir
from ftcore.storage import Folder

RENEW_S, STALE_S, LOOK_S = 5.0, 20.0, 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a run. `started`: when its process did (clock ticks, so that a reused pid is another process); `beat` counts renewals."""

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    beat: int = 0
    released: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether it is certainly over: given back, or a process of this machine that is no more."""
        return self.released or (self.machine == _machine() and _started(self.pid) != self.started)


@contextmanager
def holding(run: RunDir, say: Callable[[str], None] = log.info) -> Iterator[Lease]:
    """Holds the run while the block runs. Raises ConfigError when another driver does, StorageError when nothing can be written there."""
    lease = Lease(run.folder, acquire(run.folder, say))
    lease.start()
    run.token = lease.mine.token  # travels with the run to its workers: what another driver's workers hold does not match it
    try:
        yield lease
    except BaseException:
        lease.close()
        lease.require()  # why it was interrupted, rather than that it was
        raise
    lease.close()
    lease.require()


def acquire(folder: Folder, say: Callable[[str], None] = log.info) -> Holder:
    mine = Holder(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), utc_now())
    seen, since, told = b"", time.monotonic(), False
    while True:
        if folder.create(LEASE, mine.to_json()):
            return mine
        raw = folder.read(LEASE)
        holder = _parsed(raw)
        if holder is not None and holder.token == mine.token:
            return holder  # it was made, and the answer lost
        if raw != seen:
            if seen and holder is not None and not holder.is_gone:
                raise _held(folder, holder)
            seen, since = raw, time.monotonic()
        if holder is None or holder.is_gone or time.monotonic() - since > STALE_S:
            if folder.replace(LEASE, raw, mine.to_json()):
                return mine
            continue
        if holder.machine == mine.machine:
            raise _held(folder, holder)  # it lives
        if not told:
            told = True
            say(f"this run is held by {holder}; looking for up to {STALE_S:g} s whether that driver still lives")
        time.sleep(LOOK_S)


class Lease:
    """A run that is held, renewed by a thread. `lost` is set when somebody else took it over; then the main thread is interrupted."""

    def __init__(self, folder: Folder, mine: Holder) -> None:
        self.folder, self.mine = folder, mine
        self.lost = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Gives the run back, if it is still ours; an error is only logged: the work is done, or has an error of its own."""
        self._over.set()
        self._thread.join()
        try:
            if not self.lost.is_set() and not self._put(replace(self.mine, released=True)) and self._is_ours():
                self._put(replace(self.mine, released=True))
        except Exception as error:  # as said above, whatever it is
            log.warning("the run's lease could not be given back; it ends by itself: %s", error)

    def require(self) -> None:
        """Raises ConfigError when somebody else took the run over."""
        if self.lost.is_set():
            holder = _parsed(self.folder.read(LEASE)) if self.folder.exists(LEASE) else None
            raise ConfigError(
                "another driver took this run over while this one did not answer", where=self.folder, got=holder or "its lease is gone",
                remedy="let that one finish; what is sealed is whole",
            )  # fmt: skip

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            renewed = replace(self.mine, beat=self.mine.beat + 1)
            try:
                kept = self._put(renewed)
                if not kept and self._is_ours():
                    continue
            except Exception as error:  # also what nobody foresaw: without this thread the run would be lost in silence
                log.warning("the run's lease could not be renewed, trying again: %s", error)
                continue
            if not kept:
                self.lost.set()
                _interrupt(threading.main_thread().ident or 0)
                return
            self.mine = renewed

    def _put(self, changed: Holder) -> bool:
        return self.folder.replace(LEASE, self.mine.to_json(), changed.to_json())

    def _is_ours(self) -> bool:
        """Whether the lease, though it does not read as expected, is ours: a renewal landed whose answer was lost. Goes on from that."""
        holder = _parsed(self.folder.read(LEASE)) if self.folder.exists(LEASE) else None
        if holder is None or holder.token != self.mine.token:
            return False
        self.mine = holder
        return True


def _interrupt(thread: int) -> None:
    """A KeyboardInterrupt in the main thread: by a signal, which ends a wait too; where that is ignored (nohup), at its next step."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.pthread_kill(thread, signal.SIGINT)
    else:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def _held(folder: Folder, holder: Holder) -> ConfigError:
    return ConfigError(
        "another driver is at work on this run", where=folder, got=f"held by {holder}",
        remedy="let it finish or stop it, or give this run another name (name=...); if it was killed, its hold ends by itself",
    )  # fmt: skip


def _parsed(raw: bytes) -> Holder | None:
    """None for what is no lease, which is then nobody's."""
    try:
        return Holder(**json.loads(raw))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    """This machine and its process numbers: two containers of one host do not see each other's."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(name)
        if path.is_symlink():
            parts.append(str(path.readlink()))
        elif path.is_file():
            parts.append(path.read_text().strip())
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks; "" when there is none (or it is a zombie), "?" where that cannot be known."""
    if not Path("/proc/self/stat").is_file():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "?"
        return "?"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
