"""Connect: joins the Ray cluster a run belongs to, or starts a small one here, and says which in one line.

In: a recipe (or nothing), RAY_ADDRESS, the environment of a submitted job. Out: a Connection. Runs in: the driver.

Rules: inside a job, the job's cluster; else RAY_ADDRESS; else a Ray of our own on this machine with as many logical CPUs as it has cores
(FTCORE_LOCAL_CPUS overrules). A cluster that merely happens to run on this machine is not joined by surprise: `RAY_ADDRESS=auto` asks
for it. A cluster beyond this machine must ask for a token (FTCORE_ALLOW_OPEN_CLUSTER=1 overrules).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from cluster.runtime_env import code_for_cluster, code_for_here, inside_job
from cluster.token_auth import check_token, is_loopback, is_open, refuse_open
from ftcore.errors import ClusterError, ConfigError, FtcoreError

Kind = Literal["job", "cluster", "local", "joined"]

DRIVER_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the controller's poll; at its default of 2 s a short run ends 5 s late
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a worker stays where the recipe's relative paths make sense
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray's own FutureWarning asks for
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # pipelines.lead looks itself, every second, and makes the checkpoint
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # the room was seen a moment ago; when it is gone, pipelines.lead looks again
}
KNOCK_S = 5.0
TOO_SLOW = "timed out during startup"
"""In what Ray says where its processes took longer than the 30 s that it gives them."""


@dataclass(frozen=True)
class Connection:
    """The cluster this process is joined to. `started` is true when closing it ends it."""

    kind: Kind
    address: str
    nodes: int
    cpus: float
    gpus: float
    logs: str
    started: bool = False

    def __str__(self) -> str:
        what = {
            "job": "this job's Ray cluster",
            "cluster": "the running Ray cluster",
            "local": "a Ray of our own on this machine",
            "joined": "the Ray this process is already in",
        }[self.kind]
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"{what} at {self.address} ({self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs{gpus})"

    def close(self) -> None:
        """Leaves the cluster, if it was ours to join; a Ray started here ends. The end of the process does the same."""
        if self.kind != "joined" and ray.is_initialized():
            ray.shutdown()


_ONE_AT_A_TIME = threading.Lock()
_OURS: list[Connection] = []


def connect(*, local_cpus: float = 0, dashboard: bool = False, log: Callable[[str], None] = print) -> Connection:
    """Joins or starts Ray, once a process. If one is started here: `local_cpus` are its least number of logical CPUs, `dashboard` its page.

    Raises ClusterError when the cluster that was asked for does not answer.
    """
    with _ONE_AT_A_TIME:
        for name, value in DRIVER_DEFAULTS.items():
            os.environ.setdefault(name, value)
        if ray.is_initialized():
            return _OURS[0] if _OURS else _describe("joined")
        _OURS[:] = [_connected(local_cpus, dashboard, log)]
        log(f"ray: {_OURS[0]}")
        return _OURS[0]


def connect_early(log: Callable[[str], None] = print) -> None:
    """Begins to connect in a thread while the caller loads torch; the `connect` that follows waits for it, or says what failed."""

    def begin() -> None:
        with contextlib.suppress(FtcoreError):  # `connect` meets the same error, where it can be raised
            connect(log=log)
            threading.Event().wait()  # Linux ends a Ray started here with the thread that started it, not with the process

    threading.Thread(target=begin, name="connect", daemon=True).start()


def _connected(local_cpus: float, dashboard: bool, log: Callable[[str], None]) -> Connection:
    address = os.environ.get("RAY_ADDRESS", "")
    kind: Kind = "job" if inside_job() else "cluster" if address not in ("", "local") else "local"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's own announcements
        if kind == "local":
            session = _start_local(local_cpus, dashboard)
        else:
            session = _join(address or "auto", log)
    connection = _describe(kind, f"{session}/logs")
    if connection.nodes > 1 and kind != "local" and not is_loopback(connection.address) and is_open(connection.address):
        try:
            refuse_open(connection.address, log)
        except ClusterError:
            ray.shutdown()
            raise
    return connection


def local_num_cpus() -> int:
    """Logical CPUs of a Ray started here: the cores this process may use, unless FTCORE_LOCAL_CPUS says otherwise."""
    asked = os.environ.get("FTCORE_LOCAL_CPUS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdigit() or int(asked) < 1:
        raise ConfigError("FTCORE_LOCAL_CPUS is not a number of CPUs", got=asked, wanted="1, 2, 3, ...")
    return int(asked)


def patiently(start: Callable[[], Any], num_tries: int = 3) -> Any:
    """What `start` returns, tried again where a busy machine was too slow for Ray."""
    while True:
        num_tries -= 1
        try:
            return start()
        except Exception as error:
            if not num_tries or TOO_SLOW not in str(error):
                raise
            ray.shutdown()


def _start_local(local_cpus: float, dashboard: bool) -> str:
    code_for_here()
    try:
        context: Any = patiently(lambda: ray.init(
            address="local", num_cpus=max(local_num_cpus(), int(local_cpus)), include_dashboard=dashboard, log_to_driver=_wants_ray_logs(),
            logging_level=logging.ERROR, configure_logging=True, _temp_dir=str(_temporary_folder()),
        ))  # fmt: skip
    except FtcoreError:
        raise
    except Exception as error:  # Ray raises plain Exception when its processes are too slow to come up
        raise ClusterError(
            "a Ray of our own did not start on this machine", where=_temporary_folder(), got=_first_line(error),
            remedy="look for a full disk or an overloaded machine, and try again; its logs are in the newest session folder there",
        ) from error  # fmt: skip
    return str(context.address_info["session_dir"])


def _join(address: str, log: Callable[[str], None]) -> str:
    try:
        _knock(address, log)
        context: Any = ray.init(
            address=address, runtime_env=code_for_cluster(), log_to_driver=_wants_ray_logs(), logging_level=logging.ERROR
        )
    except ClusterError:
        raise
    except (ConnectionError, RayError, OSError, RuntimeError, ValueError) as error:
        if "Version mismatch" in str(error):
            raise ClusterError(
                "this cluster runs other versions than this process", where=f"RAY_ADDRESS={address}", got=" ".join(str(error).split()),
                remedy="use the Python and the Ray that the cluster was started with (constraints.txt holds both sides to one)",
            ) from error  # fmt: skip
        raise ClusterError(
            "no Ray cluster answers",
            where=f"RAY_ADDRESS={address}",
            got=_first_line(error),
            wanted="a running `ray start --head`",
            remedy="start it, correct RAY_ADDRESS, give its token (RAY_AUTH_TOKEN or ~/.ray/auth_token), or unset RAY_ADDRESS to run here",
        ) from error
    return str(context.address_info["session_dir"])


def _knock(address: str, log: Callable[[str], None]) -> None:
    """Ray itself waits a minute for a silent address and then ends the whole process. Raises OSError, or ClusterError about its token."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
        if not address.startswith("ray://"):
            check_token(address, log)


def _describe(kind: Kind, logs: str = "Ray's session folder") -> Connection:
    resources = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    address = ray.get_runtime_context().gcs_address
    return Connection(kind, address, nodes, resources.get("CPU", 0.0), resources.get("GPU", 0.0), logs, started=kind == "local")


def _temporary_folder() -> Path:
    """Ray's sessions of this user: not Ray's own default, which all users of a machine share; short, because sockets live under it."""
    parent = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir())
    root = Path(os.environ.get("FTCORE_RAY_TMP") or parent / f"ftray-{os.getuid()}")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise ClusterError("Ray's temporary folder belongs to another user", where=root, remedy="set FTCORE_RAY_TMP to a folder of yours")
    return root


def _wants_ray_logs() -> bool:
    return os.environ.get("FTCORE_RAY_LOGS", "") == "1"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
