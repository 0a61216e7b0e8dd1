"""Loopback: the fallback of `bridge.py` where namespaces are not allowed: nodes at 127.0.0.2, 127.0.0.3, ... of this machine.

In: a number of nodes. Out: addresses; a node's processes, known by a mark in their environment. Runs in: the host; imports no ray.

Links cannot be cut, limited or delayed, and ports are shared between the nodes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ftcore.errors import ClusterError

MARK = "FTCORE_NODE_MARK"
KILL_TIMEOUT_S = 20.0
_NUMBERS = count()


class Loopback:
    """The network of one cluster without a network."""

    isolated = False
    interface = "lo" if sys.platform.startswith("linux") else "lo0"
    host_address = "127.0.0.1"

    def __init__(self) -> None:
        remove_leftovers()
        self.owner = f"ft{os.getpid()}x{next(_NUMBERS)}"

    def address(self, node: int) -> str:
        """Linux answers on all of 127/8; others on 127.0.0.1 only."""
        return f"127.0.0.{node + 2}" if sys.platform.startswith("linux") else "127.0.0.1"

    def inside(self, node: int) -> list[str]:
        return ["env", f"{MARK}={self.owner}-{node}"]

    def add(self, node: int) -> None:
        """Nothing is laid."""

    def pids(self, node: int) -> list[int]:
        return [pid for pid, mark in _marked() if mark == f"{self.owner}-{node}"]

    def kill(self, node: int) -> None:
        """SIGKILL to all processes of a node, again until none is left."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while (pids := self.pids(node)) and time.monotonic() < deadline:
            _kill(pids)
            time.sleep(0.05)

    def cut(self, node: int) -> None:
        raise _no_links("cut")

    def restore(self, node: int) -> None:
        raise _no_links("restore")

    def limit(self, node: int, mbit: float) -> None:
        raise _no_links("limit")

    def delay(self, node: int, milliseconds: float) -> None:
        raise _no_links("delay")

    def close(self) -> None:
        """The nodes were ended one by one."""


def remove_leftovers() -> None:
    """Ends the nodes of owners that live no more."""
    _kill([pid for pid, mark in _marked() if (owner := re.match(r"ft(\d+)x", mark)) and not Path("/proc", owner[1]).exists()])


def _marked() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            for entry in (folder / "environ").read_bytes().split(b"\0"):
                if entry.startswith(MARK.encode() + b"="):
                    yield int(folder.name), entry.partition(b"=")[2].decode()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _no_links(verb: str) -> ClusterError:
    return ClusterError(
        f"there is no link to {verb}: the nodes share one address space", remedy="run as root, where namespaces are allowed"
    )
