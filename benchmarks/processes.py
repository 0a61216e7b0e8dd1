"""Processes: who is whose child on this machine, and a signal to one of them; for the benchmarks that kill.

In: pids, nodes of ray.cluster_utils. Out: pids. Runs in: a benchmark's process, on Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def all_processes() -> list[int]:
    return [int(place.name) for place in Path("/proc").glob("[0-9]*")]


def children_of(parent: int) -> list[int]:
    return [pid for pid in all_processes() if parent_of(pid) == parent]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def environment_of(pid: int) -> list[str]:
    """`NAME=value` as it was started with; empty for another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def signal_to(pid: int, number: int = signal.SIGKILL) -> None:
    if pid > 1:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, number)


def signal_to_all(pid: int) -> None:
    """SIGKILL to a process and all below it, as when a machine is gone: first the upper ones, who would replace the lower."""
    below = children_of(pid)
    signal_to(pid)
    for child in below:
        signal_to_all(child)
