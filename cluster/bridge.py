"""Bridge: a network of our own on this machine: one bridge, one network namespace a node, each with its own address.

In: a number of nodes; root. Out: addresses, the words that run a command inside a node, links that can be cut, limited and delayed.
Runs in: the host that plays several; imports no ray.

    namespace ft<owner>-1 [eth0 10.a.b.2] --veth-- [ft<owner>v1] bridge ft<owner>b [10.a.b.1, this machine]

Every name holds the pid of its owner: what a killed owner left behind is found and removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ftcore.errors import ClusterError

INSIDE = "eth0"
"""The interface's name inside every node."""
KILL_TIMEOUT_S = 20.0
FORWARDS_S, FORWARDING = 20.0, "3"
"""How long a link may take to pass frames again, and what the kernel calls a port of a bridge that does."""
TBF_BURST_KB, TBF_LATENCY = 32, "400ms"


def why_not() -> str:
    """Why this machine allows no namespaces; empty when it does."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    missing = [word for word in ("ip", "tc", "nsenter", "unshare") if shutil.which(word) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"ft{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except ClusterError as error:
        return f"this kernel or container forbids network namespaces: {error.got}"
    return ""


class Bridge:
    """The network of one cluster. Nodes are numbered from 0; node i has the address 10.a.b.(i + 2), this machine 10.a.b.1."""

    isolated = True
    interface = INSIDE

    def __init__(self) -> None:
        remove_leftovers()
        self.owner, self.subnet = _free_name_and_subnet()
        self.host_address = f"{self.subnet}.1"
        self._relays: dict[int, subprocess.Popen[bytes]] = {}
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.host_address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    @property
    def _bridge(self) -> str:
        return f"{self.owner}b"

    def _link(self, node: int) -> str:
        """The host's end of a node's link."""
        return f"{self.owner}v{node}"

    def namespace(self, node: int) -> str:
        return f"{self.owner}-{node}"

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node + 2}"

    def inside(self, node: int) -> list[str]:
        """The words before a command that is to run inside a node."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(node)}"]

    def add(self, node: int) -> None:
        """Lays a node's namespace and link; nothing to do when they lie already."""
        name, link = self.namespace(node), self._link(node)
        if Path("/run/netns", name).exists():
            return
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", INSIDE, "netns", name)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", INSIDE)
        _ip("-n", name, "link", "set", INSIDE, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "route", "add", "default", "via", self.host_address)

    def pids(self, node: int) -> list[int]:
        return _pids(self.namespace(node))

    def kill(self, node: int) -> None:
        """SIGKILL to all processes of a node, at once."""
        _kill_all(self.namespace(node))

    def cut(self, node: int) -> None:
        """No frame passes any more; nobody is told."""
        _ip("link", "set", self._link(node), "down")

    def restore(self, node: int) -> None:
        """Takes back cut, limit and delay. Returns once frames pass."""
        self._end_relay(node)
        link = self._link(node)
        _ip("link", "set", link, "up")
        until = time.monotonic() + FORWARDS_S  # the kernel takes up to a second to see that a link is up again
        while Path(f"/sys/class/net/{link}/brport/state").read_text().strip() != FORWARDING and time.monotonic() < until:
            time.sleep(0.01)
        for prefix, device in (([], self._link(node)), (["-n", self.namespace(node)], INSIDE)):
            subprocess.run(["tc", *prefix, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
        for name in Path("/run/netns").glob(f"{self.owner}-*"):  # who asked for an address meanwhile would soon give up: it asks anew
            _ip("-n", name.name, "neigh", "flush", "dev", INSIDE)

    def limit(self, node: int, mbit: float) -> None:
        """At most `mbit` megabits a second, each way."""
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", f"{max(TBF_BURST_KB, int(mbit * 4))}kb", "latency", TBF_LATENCY]
        _run(["tc", "qdisc", "replace", "dev", self._link(node), *shape])
        _run(["tc", "-n", self.namespace(node), "qdisc", "replace", "dev", INSIDE, *shape])

    def delay(self, node: int, milliseconds: float) -> None:
        """Every frame of a node arrives so much later, each way: a relay stands between its link and the bridge."""
        self._end_relay(node)
        near, far = f"{self.owner}r{node}", f"{self.owner}s{node}"
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", self._link(node), "nomaster")
        _ip("link", "set", far, "master", self._bridge, "up")
        _ip("link", "set", near, "promisc", "on", "up")
        _ip("link", "set", self._link(node), "promisc", "on")
        root = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-m", "cluster.slow_link", self._link(node), near, str(milliseconds)]
        environment = {**os.environ, "PYTHONPATH": root}
        self._relays[node] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        ready = self._relays[node].stdout
        if ready is None or not ready.readline():
            raise ClusterError("the relay of a slow link did not start", where=self._link(node), remedy="see its message above")

    def _end_relay(self, node: int) -> None:
        relay = self._relays.pop(node, None)
        if relay is None:
            return
        relay.kill()
        relay.communicate()
        _ip("link", "delete", f"{self.owner}r{node}")
        _ip("link", "set", self._link(node), "promisc", "off", "master", self._bridge)

    def close(self) -> None:
        """Ends all processes inside and removes everything that was laid."""
        for node in list(self._relays):
            self._end_relay(node)
        _remove(self.owner)


def remove_leftovers() -> list[str]:
    """Removes what owners that live no more left behind; returns their names."""
    names = [*_namespaces(), *(path.name for path in Path("/sys/class/net").glob("ft*b"))]
    owners = {match[0]: match[1] for name in names if (match := re.match(r"ft(\d+)(x\d+)?", name))}
    dead = [owner for owner, pid in sorted(owners.items()) if not Path("/proc", pid).exists()]
    for owner in dead:
        _remove(owner)
    return dead


def _remove(owner: str) -> None:
    for name in _namespaces():
        if name.startswith(f"{owner}-"):
            _kill_all(name)
            _ip("netns", "delete", name)
    for path in Path("/sys/class/net").glob(f"{owner}[brsv]*"):
        with contextlib.suppress(ClusterError):  # deleting one end of a pair takes the other with it
            _ip("link", "delete", path.name)


def _free_name_and_subnet() -> tuple[str, str]:
    """A name and a 10.a.b of which nothing is taken: by this process's earlier bridges, by others', by the machine's own addresses."""
    taken = subprocess.run(["ip", "-4", "address"], capture_output=True, text=True, check=True).stdout
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    pid = os.getpid()
    number = next(number for number in range(100) if not Path("/sys/class/net", f"ft{pid}{_nth(number)}b").exists())
    for step in range(100 * 256):
        place = (pid * 7 + number * 257 + step) % (100 * 256)
        subnet = f"10.{100 + place // 256}.{place % 256}"
        if f" {subnet}." not in taken and f"{subnet}." not in routes:
            return f"ft{pid}{_nth(number)}", subnet
    raise ClusterError("no subnet of 10.100.0.0/14 is free", remedy="remove old bridges: ip link")


def _nth(number: int) -> str:
    return f"x{number}" if number else ""


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def _kill_all(namespace: str) -> None:
    """Again until none is left: a process may start another between the look and the kill."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while pids := _pids(namespace):
        if time.monotonic() > deadline:
            raise ClusterError("processes of a node do not die", where=namespace, got=pids, remedy="look for them in `ps`, state D")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(
            "the network of the nodes could not be laid",
            where=" ".join(words),
            got=done.stderr.strip(),
            remedy="root, and iproute2 and tc?",
        )
