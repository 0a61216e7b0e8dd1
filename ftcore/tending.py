"""Tending: the nursery's own process, which imports and forks, and the life of the workers that it forks.

In: a socket's path and names of modules, on the command line; a Birth for each worker. Out: workers. Runs in: the nursery, the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ftcore.backends.base import World
from ftcore.errors import FtcoreError
from ftcore.nursery import AFTER_S, BEAR, FAILED, HOLD, OVER, READY, RETRY_S, STALE, START_S, Birth, Post

GROUP_TIMEOUT_S = 1800
PR_SET_PDEATHSIG = 1
REAP_EVERY_S = 1.0
BACKLOG = 64


def tend() -> None:
    """The nursery's own process: imports, then forks a worker for each connection that asks for one."""
    path, linger_s, preload = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    listens, says = os.pipe()
    if os.fork():
        os.close(says)
        os.read(listens, 1)
        os._exit(0)  # what goes on is nobody's child: it may outlive who started it
    os.setsid()
    lock = path.with_suffix(".lock").open("w")
    if not _locked(lock, path):
        os._exit(0)  # another one is there
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    os.close(says)
    try:
        for name in preload:
            importlib.import_module(name)
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("an import started CUDA, which a forked worker cannot use; FTCORE_PLUGINS must not do that")
    except BaseException:  # whatever it was: told in the log, and to everybody who waits
        traceback.print_exc()
        path.unlink(missing_ok=True)
        _refuse_all(listener)
        os._exit(1)
    _let_go_of_output()
    _Tending(path, lock, listener, linger_s).forever()


def _let_go_of_output() -> None:
    """Workers write where their supervisors do. Who reads what the first of these wrote must not wait for the end of the nursery."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _locked(lock: IO[str], path: Path) -> bool:
    """Whether this process may tend at `path`; False when another one does, and answers."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):  # it has not come up yet
                line.connect(str(path))
                return False
        time.sleep(RETRY_S)
    return False


def _refuse_all(listener: socket.socket) -> None:
    """Tells everybody who already waits that there will be no workers."""
    listener.settimeout(0.5)
    with contextlib.suppress(OSError):  # the time is over
        while True:
            line, _ = listener.accept()
            with line:
                line.send(FAILED)


class _Tending:
    """Who holds the nursery, which workers live, and whether what was imported is still what the files say."""

    def __init__(self, path: Path, lock: IO[str], listener: socket.socket, linger_s: float) -> None:
        self.path, self.lock, self.listener, self.linger_s = path, lock, listener, linger_s
        self.holds, self.children = set[socket.socket](), set[int]()
        self.until = time.monotonic() + linger_s
        self.stamps = _stamps()

    def forever(self) -> None:
        while self.holds or time.monotonic() < self.until:
            ready, _, _ = select.select([*self.holds, *([self.listener] if self.listener.fileno() >= 0 else [])], [], [], REAP_EVERY_S)
            self.children -= {pid for pid in self.children if os.waitpid(pid, os.WNOHANG)[0]}
            for line in ready:
                if line is self.listener:
                    self._meet(self.listener.accept()[0])
                else:
                    self._hear(line)
        self._leave()
        os._exit(0)

    def _hear(self, hold: socket.socket) -> None:
        """A holder is over, or it is gone and somebody may take its place."""
        try:
            over = hold.recv(1) == OVER
        except OSError:
            over = False
        self.holds.remove(hold)
        hold.close()
        self.until = time.monotonic() + (min(AFTER_S, self.linger_s) if over else self.linger_s)

    def _meet(self, line: socket.socket) -> None:
        line.settimeout(START_S)
        try:
            wish, descriptors, _, _ = socket.recv_fds(line, 1, 2)
            if wish == HOLD and _stamps(self.stamps) == self.stamps:
                line.send(READY)
                self.holds.add(line)
                return
            if wish == HOLD:
                self._leave()  # for those who hold it, it goes on; the next one begins anew
                line.send(STALE)
        except OSError:
            wish, descriptors = b"", []
        if wish == BEAR:
            line.setblocking(True)
            self._fork(line, descriptors)
        line.close()
        for descriptor in descriptors:
            os.close(descriptor)

    def _leave(self) -> None:
        """Makes room for another nursery. May be called again."""
        if self.listener.fileno() >= 0:
            self.path.unlink(missing_ok=True)
            self.listener.close()
            self.lock.close()

    def _fork(self, line: socket.socket, descriptors: Sequence[int]) -> None:
        pid = os.fork()
        if pid:
            self.children.add(pid)
            return
        for held in (*self.holds, self.listener):
            held.close()
        self.lock.close()
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _live(Connection(line.detach()))


def _stamps(files: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """File -> (size, time of change) of what was imported; of `files` again later."""
    if files is None:
        files = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    found = {}
    for file in files:
        with contextlib.suppress(OSError):  # it is gone: that is a change too
            facts = Path(file).stat()
            found[file] = (facts.st_size, facts.st_mtime_ns)
    return found


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies. Nothing happens where there is no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _live(channel: Connection) -> None:
    """A worker's whole life; never returns."""
    code = 1
    try:
        die_with_parent()
        folder, birth = channel.recv()
        channel.send(os.getpid())
        os.chdir(folder)
        _log_apart()
        line = _Line(channel, birth.world.rank)
        os.environ.update(birth.variables)
        line.end(*_worked(birth, Post(birth.world, line.say, line.wants_stop.is_set)))
        code = 0
    except BaseException:  # the edge of the process: whatever is left goes to the log, and the silence tells the rest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of the nursery's own is to be closed here


def _log_apart() -> None:
    """Where this process inherited a log `worker-*.err`, it writes into one of its own beside it, named by its number: the last words of
    a worker that dies are then found, and are no other's."""
    for descriptor in (1, 2):
        link = Path(f"/proc/self/fd/{descriptor}")
        inherited = link.readlink() if link.is_symlink() else Path()
        if inherited.name.startswith("worker-"):
            with (inherited.parent / f"worker-training-{os.getpid()}{inherited.suffix}").open("ab") as own:
                os.dup2(own.fileno(), descriptor)


def _worked(birth: Birth, post: Post) -> tuple[str, Any]:
    try:
        with _group(birth.world, birth.address):
            return "value", birth.work(post)
    except BaseException as error:  # carried to the supervisor, which explains it
        if not isinstance(error, FtcoreError):
            traceback.print_exc()  # into this worker's log
        return "error", error


@contextlib.contextmanager
def _group(world: World, address: str) -> Any:
    """This worker's place in the process group of all; none for a world of one."""
    if world.size == 1:
        yield
        return
    import torch  # the nursery of a supervisor has it already; reading this module must not
    import torch.distributed as dist

    if world.device != "cpu":
        torch.cuda.set_device(world.device)
    backend = "gloo" if world.device == "cpu" else "nccl"
    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=world.rank, world_size=world.size, timeout=timedelta(seconds=GROUP_TIMEOUT_S)
    )
    yield
    dist.destroy_process_group()  # not after an error: peers may be gone, and the process ends anyway


class _Line:
    """A worker's side of its connection: words go up, the wish to stop comes down; SIGTERM is such a wish too, and is told."""

    def __init__(self, channel: Connection, rank: int) -> None:
        self._channel, self._rank, self._one_at_a_time = channel, rank, threading.Lock()
        self.wants_stop = threading.Event()
        self._terminated = threading.Event()
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group of processes; the driver decides what it means
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated.set()

    def say(self, message: Mapping[str, Any]) -> None:
        self._send("said", message)

    def end(self, kind: str, content: Any) -> None:
        try:
            ForkingPickler.loads(ForkingPickler.dumps(content))  # some errors go in and do not come out again
            self._send(kind, content)
        except Exception:  # whatever its class does when it is packed or unpacked: the words travel
            self._send(kind, RuntimeError(f"{type(content).__name__}: {content}") if kind == "error" else None)

    def _send(self, kind: str, content: Any) -> None:
        with self._one_at_a_time:
            self._channel.send((kind, content))

    def _listen(self) -> None:
        told = False
        while True:
            try:
                if self._channel.poll(0.1) and self._channel.recv() == "stop":
                    self.wants_stop.set()
            except (EOFError, OSError):
                os._exit(1)  # the supervisor is gone, and this run goes on elsewhere or not at all: write nothing more
            if self._terminated.is_set() and not told:
                told = True
                try:
                    self.say({"event": "notice", "rank": self._rank, "why": "SIGTERM", "time": time.time()})
                finally:
                    self.wants_stop.set()
