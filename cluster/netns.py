"""Netns: a Ray cluster of several nodes on one machine, each with its own address: real `ray start`, for tests and demos.

    python -m cluster.netns --nodes 3 -- ftcore sft pipelines/recipes/sft-lora.yaml resources.workers=3 resources.placement=SPREAD

In: a number of nodes and CPUs. Out: a running cluster whose nodes can be killed, started again, cut off, slowed. Runs in: the host.

A driver must run inside a node (`run`, `popen`): Ray joins a cluster through a raylet at the driver's own address. Jobs can be submitted
from anywhere on this machine (`dashboard`). Where namespaces are not allowed, the nodes share this machine's loopback, and this is said.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cluster.bridge import Bridge, why_not
from cluster.loopback import Loopback
from ftcore.errors import ClusterError, FtcoreError

PORT, DASHBOARD_PORT = 6379, 8265
START_TIMEOUT_S = 240.0
STARTS, TOO_LATE = 3, "timed out during startup"
"""Ray gives a raylet 30 s to come up, which is not to be set; on a machine with much other work that is too little now and then."""
QUICK_TO_NOTICE = {
    # a node that is gone is known within seconds; Ray's own defaults take half a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
PRIVATE = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 1; shift 2; done; shift; exec "$@"'
Process = subprocess.Popen[str]


class NetnsCluster:
    """Opened by `with`. Node 0 is the head.

    cpus: logical ones of every node, or a number for each.
    words: more for the `ray start` of some nodes.
    environment: variables of one node's processes, by node. everywhere: of all nodes' and of what `run` starts.
    private: folders that a node has for itself (empty, not shared with the others), by node; only with namespaces.
    """

    def __init__(
        self, nodes: int = 3, cpus: float | Sequence[float] = 1, *, environment: Mapping[int, Mapping[str, str]] | None = None,
        everywhere: Mapping[str, str] | None = None, private: Mapping[int, Iterable[Path]] | None = None,
        words: Mapping[int, Sequence[str]] | None = None, object_store_mib: int = 100, token: bool = True,
        isolate: bool = True, log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.nodes, self.isolate, self.log = nodes, isolate, log
        self.cpus = [float(cpus)] * nodes if isinstance(cpus, int | float) else list(cpus)
        self._words = {node: list(more) for node, more in (words or {}).items()}
        self._environment, self._everywhere = dict(environment or {}), everywhere or {}
        self._private = {node: [Path(path) for path in paths] for node, paths in (private or {}).items()}
        self._object_store_bytes = object_store_mib << 20
        self.token = secrets.token_hex(32) if token else ""

    def __enter__(self) -> NetnsCluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Lays the network and starts all nodes. After a failure nothing of it is left."""
        reason = why_not() if self.isolate else "as asked"
        if reason:
            self.log(f"nodes: all on this machine's loopback, so links cannot be cut or slowed ({reason})")
        self.network: Bridge | Loopback = Loopback() if reason else Bridge()
        self.folder = Path("/tmp") / self.network.owner  # short: sockets live under it
        for left in [self.folder, *_folders_left()]:
            shutil.rmtree(left, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        started = time.monotonic()
        try:
            self.start_node(0)
            with ThreadPoolExecutor(max(1, self.nodes - 1)) as pool:
                list(pool.map(self.start_node, range(1, self.nodes)))
        except BaseException:
            self.close()
            raise
        kind = "addresses" if self.isolated else "nodes"
        where = f"{self.nodes} {kind} {', '.join(self.addresses)}"
        self.log(f"nodes: {where}, {sum(self.cpus):g} CPUs in all, {time.monotonic() - started:.1f} s")

    def close(self) -> None:
        """Ends every process of every node and removes network and folders."""
        for node in range(self.nodes):
            self.network.kill(node)
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def isolated(self) -> bool:
        """Whether every node has a network of its own; else they share this machine's loopback."""
        return self.network.isolated

    @property
    def addresses(self) -> list[str]:
        return [self.network.address(node) for node in range(self.nodes)]

    @property
    def address(self) -> str:
        """RAY_ADDRESS of what runs inside a node."""
        return f"{self.network.address(0)}:{self._port(PORT)}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted, from a node or from this machine."""
        return f"http://{self.network.address(0)}:{self._port(DASHBOARD_PORT)}"

    @property
    def host_address(self) -> str:
        """Where nodes reach servers of this machine (bound to 0.0.0.0 or to this address)."""
        return self.network.host_address

    def start_node(self, node: int, *, environment: Mapping[str, str] | None = None, private: Iterable[Path] | None = None) -> None:
        """Starts a node (again), with these variables and folders of its own from now on; returns when it has joined.

        Raises ClusterError with what `ray start` said.
        """
        if environment is not None:
            self._environment[node] = environment
        if private is not None:
            self._private[node] = list(private)
        self.network.add(node)
        for left in reversed(range(STARTS)):
            code, said = self._start(node)
            if not code:
                return
            if not left or TOO_LATE not in said:
                break
            self.network.kill(node)  # what has come up of it
        raise ClusterError(
            f"node {node} did not start", where=self.network.address(node), got=said[-1500:], wanted="`ray start` exits with 0"
        )

    def _start(self, node: int) -> tuple[int, str]:
        """(Exit code, output) of `ray start`."""
        output = self.folder / f"node-{node}.log"
        with output.open("w") as file:
            process = subprocess.Popen(
                self.inside(node, self._start_words(node)), env=self.variables(node), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, cwd=self.folder,
            )  # fmt: skip
            try:
                code = process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = -1
        return code, output.read_text(errors="replace").strip()

    def kill_node(self, node: int) -> None:
        """SIGKILL to every process of a node, drivers in it included."""
        self.network.kill(node)

    def pids(self, node: int) -> list[int]:
        """Every process of a node now."""
        return self.network.pids(node)

    def cut_link(self, node: int) -> None:
        """A node lives on but reaches nobody."""
        self.network.cut(node)

    def limit_link(self, node: int, mbit: float) -> None:
        """A node's link carries so many megabits a second, each way (tbf)."""
        self.network.limit(node, mbit)

    def delay_link(self, node: int, milliseconds: float) -> None:
        """What a node sends and gets is so much later, each way."""
        self.network.delay(node, milliseconds)

    def restore_link(self, node: int) -> None:
        """Takes back whatever was done to a node's link."""
        self.network.restore(node)

    def run(self, argv: Sequence[str], *, node: int = 0, timeout_s: float | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command inside a node, joined to the cluster, to its end; `more` goes to `popen`. Output is captured."""
        process = self.popen(argv, node=node, **more)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def popen(
        self, argv: Sequence[str], *, node: int = 0, cwd: Path | None = None, variables: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE, stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> Process:  # fmt: skip
        """Starts a command inside a node, joined to the cluster; `variables` are set over the node's own."""
        environment = {**self.variables(node), "RAY_ADDRESS": self.address, **(variables or {})}
        words = self.inside(node, list(argv))
        return subprocess.Popen(words, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True)

    def inside(self, node: int, words: list[str]) -> list[str]:
        """The command line that runs `words` inside a node."""
        before = self.network.inside(node)
        if not self._private.get(node) or not self.isolated:
            return [*before, *words]
        pairs = []
        for number, path in enumerate(self._private[node]):
            empty = self.folder / f"private-{node}-{number}"
            empty.mkdir(exist_ok=True)
            path.mkdir(parents=True, exist_ok=True)
            pairs += [str(empty), str(path)]
        return [*before, "unshare", "--mount", "--propagation", "slave", "sh", "-c", PRIVATE, "sh", *pairs, "--", *words]

    def _start_words(self, node: int) -> list[str]:
        ray, own = str(Path(sys.executable).with_name("ray")), self.network.address(node)
        words = [
            ray, "start", f"--node-ip-address={own}", f"--num-cpus={self.cpus[node]:g}", f"--temp-dir={self.folder}/{node}",
            f"--object-store-memory={self._object_store_bytes}", "--disable-usage-stats",
            *self._words.get(node, []),
        ]  # fmt: skip
        if not self.isolated:
            words.append(f"--dashboard-agent-listen-port={self._port(20000 + node)}")
        if node:
            return [*words, f"--address={self.address}"]
        ports = [f"--port={self._port(PORT)}", f"--dashboard-port={self._port(DASHBOARD_PORT)}"]
        client = [] if self.isolated else [f"--ray-client-server-port={self._port(30000)}"]
        return [*words, "--head", f"--dashboard-host={own}", *ports, *client]

    def _port(self, port: int) -> int:
        """The same in every namespace; on a shared loopback another for each cluster."""
        return port if self.isolated else port + 1 + os.getpid() % 1500

    def variables(self, node: int) -> dict[str, str]:
        """The environment of a node, without another Ray's settings or a proxy: nothing else decides where a node belongs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and not name.lower().endswith("_proxy")}
        interface = self.network.interface
        variables = {
            **kept, **QUICK_TO_NOTICE, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface,
            "RAY_AUTH_MODE": "token" if self.token else "disabled",
        }  # fmt: skip
        if self.token:
            variables["RAY_AUTH_TOKEN"] = self.token
        return variables | dict(self._everywhere) | dict(self._environment.get(node, {}))


def _folders_left() -> list[Path]:
    """Folders of owners that live no more."""
    owners = ((path, re.fullmatch(r"ft(\d+)(x\d+)?", path.name)) for path in Path("/tmp").glob("ft*"))
    return [path for path, owner in owners if owner and not Path("/proc", owner[1]).exists()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.netns", description="Runs a command on a Ray cluster of several nodes made here."
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=float, default=1, help="logical CPUs of each node")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="runs in the head's namespace; without one, a shell"
    )
    options = parser.parse_args(argv)
    command = [word for number, word in enumerate(options.command) if number or word != "--"] or [os.environ.get("SHELL", "/bin/sh")]
    try:
        with NetnsCluster(options.nodes, options.cpus) as cluster:
            variables = {**cluster.variables(0), "RAY_ADDRESS": cluster.address}
            return subprocess.run(cluster.inside(0, command), env=variables, check=False).returncode
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
