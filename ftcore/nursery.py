"""Nursery: a process that has the heavy imports behind it and forks workers from there, so that a killed worker is back within a second.

    supervisor --connect--> nursery --fork--> worker
        ^----- the connection is the worker's -----'

In: names of modules to import; for each worker its World, where they meet, and the work. Out: what it said, and how it ended.
Runs in: supervisors (Linux and macOS; those of one machine share a nursery, so that it imports once), the nursery's own process, the
workers.

Nobody outlives who is above him: a worker ends with its supervisor's end of the connection, and the nursery with the supervisor that
opened it; on Linux the kernel kills the workers of a nursery that dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

from ftcore.backends.base import World
from ftcore.errors import ClusterError, FtcoreError

GROUP_TIMEOUT_S = 1800
PR_SET_PDEATHSIG = 1
IMPORT_TIMEOUT_S = 600.0
"""How long a nursery may take to import before it counts as stuck; imports from a cold network disk are slow."""
RETRY_S = 0.05
REAP_EVERY_S = 1.0
BACKLOG = 64


@dataclass(frozen=True)
class Post:
    """A worker's place in the run: who it is among the others, how it speaks to the driver, and whether somebody wants it to stop."""

    world: World
    say: Callable[[Mapping[str, Any]], None]
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Birth:
    """What a worker is told first. `address` (host:port) is where rank 0 lets the others meet; unused by a world of one."""

    work: Callable[[Post], Any]
    world: World
    address: str
    variables: Mapping[str, str]


class WorkerDied(RuntimeError):
    """A worker's process ended without a word: killed, out of memory, or crashed."""


@dataclass(frozen=True)
class End:
    """How a worker ended: its value, or the error it raised (WorkerDied when it could not even say so)."""

    value: Any = None
    error: BaseException | None = None


class Worker:
    """The supervisor's hold on one forked worker."""

    def __init__(self, channel: Connection, pid: int) -> None:
        self._channel, self.pid = channel, pid
        self.end: End | None = None

    def hear(self, timeout_s: float) -> list[Mapping[str, Any]]:
        """What it said since the last call, waiting at most `timeout_s` for a first word; sets `end` when it is over."""
        said: list[Mapping[str, Any]] = []
        try:
            while self.end is None and self._channel.poll(0 if said else timeout_s):
                kind, content = self._channel.recv()
                if kind == "said":
                    said.append(content)
                else:
                    self.end = End(value=content) if kind == "value" else End(error=content)
        except (EOFError, OSError):
            self.end = End(error=WorkerDied(f"process {self.pid} died (killed, out of memory, or crashed)"))
        return said

    def ask_to_stop(self) -> None:
        with contextlib.suppress(OSError):  # it is gone: `hear` says so
            self._channel.send("stop")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._channel.close()


class Nursery:
    """A supervisor's way to the nursery at `path`, a socket in a folder that only its user may enter."""

    def __init__(self, path: Path, preload: Sequence[str] = ()) -> None:
        self._path, self._preload = path, tuple(preload)
        self._process: subprocess.Popen[bytes] | None = None
        self._born = False

    @classmethod
    def open(cls, path: Path, preload: Sequence[str]) -> Nursery:
        """Starts it; imports begin at once, beside whatever the supervisor does next. It ends with this process.

        Raises ClusterError when the folder of `path` is another user's: what comes through the socket is code.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.parent.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
            raise ClusterError(
                "the folder of the workers' socket is open to other users", where=path.parent, wanted="a folder of yours, mode 700",
                remedy="remove it, or set TMPDIR to a folder of yours",
            )  # fmt: skip
        nursery = cls(path, preload)
        nursery._start()
        return nursery

    def _start(self) -> None:
        self._path.unlink(missing_ok=True)
        command = [sys.executable, "-c", f"from {__name__} import tend; tend()", str(self._path), *self._preload]
        modules = os.pathsep.join(dict.fromkeys(p for p in sys.path if p))
        # asked through NVML whether there is a GPU, torch does not start CUDA, which would not survive the fork
        variables = {**os.environ, "PYTHONPATH": modules, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables)

    def bear(self, birth: Birth) -> Worker:
        """Forks a worker; waits for the imports the first time, and for new ones when the nursery itself was killed since the last."""
        if self._process is not None and self._process.poll() is not None and self._born:
            self._process.communicate()
            self._start()
        worker = self._bear(birth)
        self._born = True
        return worker

    def _bear(self, birth: Birth) -> Worker:
        """Raises WorkerDied when there is no nursery."""
        line, until = socket.socket(socket.AF_UNIX), time.monotonic() + IMPORT_TIMEOUT_S
        while True:
            try:
                line.connect(str(self._path))
                break
            except OSError as error:  # it has not come up yet
                if time.monotonic() > until or (self._process and self._process.poll() is not None):
                    raise WorkerDied("the nursery of workers is gone") from error
                time.sleep(RETRY_S)
        channel = Connection(line.detach())
        try:
            channel.send(birth)
            if not channel.poll(max(0.0, until - time.monotonic())):
                raise WorkerDied(f"the nursery of workers imported for more than {IMPORT_TIMEOUT_S:.0f} s")
            return Worker(channel, channel.recv())
        except (EOFError, OSError) as error:
            raise WorkerDied("the nursery ended while it imported what workers need (its traceback is in this worker's log)") from error

    def close(self) -> None:
        """Ends the nursery, if it was opened here, and any worker that is left."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._path.unlink(missing_ok=True)


def tend() -> None:
    """The nursery's own process: imports, then forks a worker for each connection until its supervisor is gone."""
    die_with_parent()
    listener, children = socket.socket(socket.AF_UNIX), set[int]()
    listener.bind(sys.argv[1])
    listener.listen(BACKLOG)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("an import started CUDA, which a forked worker cannot use; FTCORE_PLUGINS must not do that")
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], REAP_EVERY_S)
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        if sys.stdin in ready:
            os._exit(0)  # the supervisor's end of the pipe is closed
        if listener not in ready:
            continue
        line, _ = listener.accept()
        pid = os.fork()
        if pid == 0:
            listener.close()
            _live(Connection(line.detach()))
        line.close()
        children.add(pid)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies. Nothing happens where there is no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _live(channel: Connection) -> None:
    """A worker's whole life; never returns."""
    code = 1
    try:
        die_with_parent()
        birth: Birth = channel.recv()
        channel.send(os.getpid())
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
                self.wants_stop.set()
                self.say({"event": "notice", "rank": self._rank, "why": "SIGTERM", "time": time.time()})
