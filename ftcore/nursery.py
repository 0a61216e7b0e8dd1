"""Nursery: a process that has the heavy imports behind it and forks workers from there, so that a killed worker is back within a second.

    supervisor --holds--> nursery --fork--> worker
        ^---- the connection is the worker's ---'

In: names of modules to import; for each worker its World, where they meet, and the work. Out: what it said, and how it ended.
Runs in: supervisors (Linux and macOS). The nursery's and the workers' side is ftcore.tending.

Supervisors of one machine that want the same imports from the same files in the same environment share a nursery. It ends when the last
of them has said that it is over, AFTER_S later: a search and a demo have one run after another. When they were killed instead it stays
for LINGER_S: whoever takes their place need not import again.
A worker ends with its supervisor's end of the connection; on Linux the kernel kills the workers of a nursery that dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftcore.backends.base import World
from ftcore.errors import ClusterError

LINGER_S = 60.0
"""How long a nursery waits for a successor of killed supervisors: longer than Ray takes to notice and to start a driver or a worker."""
AFTER_S = 10.0
"""How long it waits for the next run when the last was over: less than anybody would wonder about a process that is still there."""
IMPORT_TIMEOUT_S = 600.0
"""How long a nursery may take to import before it counts as stuck; imports from a cold network disk are slow."""
START_S = 10.0
"""How long a nursery may take from its lock to its socket, and a supervisor to say what it wants: two processes of one machine."""
STARTS = 3
"""How often a supervisor starts a nursery before it believes that none can live here."""
RETRY_S = 0.05
"""How often both sides look again for a socket that is about to be there: no system call waits for one."""
HOLD, BEAR, OVER = b"h", b"b", b"o"
"""What a supervisor says first on a line: that it holds the nursery, or wants a worker; and at the end of a hold, that it is over."""
READY, STALE, FAILED = b"r", b"s", b"f"
"""What a hold is answered: imported; imported from files that changed since; could not import."""
TEND = "from ftcore.tending import tend; tend()"
PASSING = (
    "RAY_", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_",
    "PYTHONPATH", "PYTEST_CURRENT_TEST", "SPDLOG", "PYTHONBREAKPOINT", "SPT_NOENV", "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
)  # fmt: skip
"""Variables that differ from one supervisor to the next and that no import asks for."""
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


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
    """A supervisor's hold on a nursery: one that is there, or else one that this supervisor starts."""

    def __init__(self, folder: Path, preload: Sequence[str], node: str, linger_s: float, variables: Mapping[str, str]) -> None:
        self._preload, self._linger_s = tuple(preload), linger_s
        self._environment = _environment({**os.environ, **variables})
        self._path = folder / _key(self._preload, node, self._environment)
        self._hold: socket.socket | None = None
        self._is_ready = False
        self._starting: subprocess.Popen[bytes] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        preload: Sequence[str],
        *,
        node: str = "",
        linger_s: float = LINGER_S,
        variables: Mapping[str, str] = NO_VARIABLES,
    ) -> Nursery:  # fmt: skip
        """Finds or starts it; imports begin at once, beside whatever the supervisor does next. Nodes on one machine share none.

        `variables`: of the environment of its imports, beside this process's own.
        Raises ClusterError when `folder` is another user's: what comes through the sockets in it is code.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
            raise ClusterError(
                "the folder of the workers' socket is open to other users", where=folder, wanted="a folder of yours, mode 700",
                remedy="remove it, or set TMPDIR to a folder of yours",
            )  # fmt: skip
        nursery = cls(folder, preload, node, linger_s, variables)
        if not nursery._take_hold():
            nursery._start()
        return nursery

    def bear(self, birth: Birth) -> Worker:
        """Forks a worker with this process's folder and output; waits for the imports the first time, and again when the nursery was killed
        since the last. Raises WorkerDied when it cannot import, or dies again and again."""
        until = time.monotonic() + IMPORT_TIMEOUT_S
        for _ in range(STARTS):
            self._ready(until)
            try:
                return self._bear(birth, until)
            except (EOFError, OSError):
                self._let_go()
        raise WorkerDied("the nursery of workers died again and again (what it said is in this worker's log)")

    def _bear(self, birth: Birth, until: float) -> Worker:
        with self._connected() as line:
            socket.send_fds(line, [BEAR], [1, 2])
            channel = Connection(line.detach())
        try:
            channel.send((str(Path.cwd()), birth))
            if not channel.poll(max(0.0, until - time.monotonic())):
                raise EOFError
            return Worker(channel, channel.recv())
        except BaseException:
            channel.close()
            raise

    def _ready(self, until: float) -> None:
        """Holds a nursery whose imports are done, and still those of the files that are there now."""
        starts = 0
        while not self._is_ready:
            if time.monotonic() > until:
                raise WorkerDied(f"the nursery of workers imported for more than {IMPORT_TIMEOUT_S:.0f} s")
            if self._hold is None and not self._take_hold():
                if self._starting is None or self._starting.poll() is not None:
                    starts += 1
                    if starts > STARTS:
                        raise WorkerDied("the nursery of workers does not start (what it said is in this worker's log)")
                    self._start()
                time.sleep(RETRY_S)
                continue
            answer = self._answer(until)
            if answer == FAILED:
                raise WorkerDied("the nursery ended while it imported what workers need (its traceback is in this worker's log)")
            self._is_ready = answer == READY
            if not self._is_ready:  # its files changed, or it was killed
                self._let_go()

    def _answer(self, until: float) -> bytes:
        assert self._hold is not None
        self._hold.settimeout(max(0.001, until - time.monotonic()))
        try:
            return self._hold.recv(1)
        except OSError:
            return b""

    def _take_hold(self) -> bool:
        """False when nobody listens."""
        try:
            with self._connected() as line:
                line.send(HOLD)
                self._hold = socket.socket(fileno=line.detach())
        except OSError:
            return False
        return True

    def _let_go(self) -> None:
        if self._hold is not None:
            self._hold.close()
        self._hold, self._is_ready = None, False

    def _connected(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(self._path))
        except OSError:
            line.close()
            raise
        return line

    def _start(self) -> None:
        """Starts one, away from this process: what kills a supervisor with its children leaves the nursery to the next."""
        self._reap()
        command = [sys.executable, "-c", TEND, str(self._path), str(self._linger_s), *self._preload]
        # asked through NVML whether there is a GPU, torch does not start CUDA, which would not survive the fork
        variables = self._environment | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._starting = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **variables})

    def _reap(self) -> None:
        """Waits for what was started: it ends as soon as the nursery listens."""
        if self._starting is not None:
            self._starting.wait()
            self._starting = None

    def close(self) -> None:
        """It is over. The nursery ends soon unless others hold it, or come."""
        self._reap()
        if self._hold is None:
            self._take_hold()
        if self._hold is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._hold.send(OVER)
        self._let_go()


def _environment(whole: Mapping[str, str]) -> dict[str, str]:
    """What a nursery's imports may depend on: a worker's own variables come with its birth."""
    mine = {name: value for name, value in whole.items() if not name.startswith(PASSING)}
    own = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))  # any interpreter finds these itself
    others = (path for path in sys.path if Path(path).is_absolute() and Path(path).exists() and not path.startswith(own))
    return mine | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(others))}


def _key(preload: Sequence[str], node: str, environment: Mapping[str, str]) -> str:
    """Names the socket; short, for a socket's path holds about a hundred characters. Containers and network namespaces share none."""
    spaces = [str(place.readlink()) for name in ("net", "mnt", "pid", "user") if (place := Path("/proc/self/ns", name)).is_symlink()]
    paths = sorted(environment["PYTHONPATH"].split(os.pathsep))  # Ray's workers have their driver's, in another order
    others = sorted(item for item in environment.items() if item[0] != "PYTHONPATH")
    facts = repr((sys.executable, sys.version, __file__, tuple(preload), node, spaces, paths, others))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
