"""Worker logs: the last words of a worker that died, read on the node it died on: the cause, not that an actor is gone.

In: where a worker ran. Out: one sentence. Runs in: the driver, and a task without a CPU on the worker's node.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TAIL_BYTES = 64 << 10
LAST_LINES = 3
TIMEOUT_S = 8.0
SIGNAL = re.compile(r"\*\*\* (SIG[A-Z]+) received")
FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
MARKERS = (":job_id:", ":actor_name:", ":task_name:")
MEMORY_MONITOR = "running low on memory"


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker runs; `node_id` is Ray's, `node` the address."""

    node: str
    node_id: str
    pid: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node}"


@dataclass(frozen=True)
class Logs:
    """What a node knows of a process: its output, the kernel's lines and the raylet's lines that name it."""

    err: str
    out: str
    kernel: str
    raylet: str


def why_it_died(place: WorkerPlace | None, told: str = "") -> str:
    """One sentence; `told` is Ray's own account of the death."""
    if MEMORY_MONITOR in told:
        return "Ray's memory monitor killed it: the node ran low on memory"
    if place is None:
        return "its process died before it said where it ran"
    if place.node_id not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
        return f"its node {place.node} is gone, and its logs with it"
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    reading = ray.remote(_logs_of).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(place.pid)
    try:
        return verdict(ray.get(reading, timeout=TIMEOUT_S), place.pid)
    except GetTimeoutError:
        ray.cancel(reading, force=True)
        return f"its process died, and its node {place.node} does not answer (cut off, or going)"
    except RayError:
        return f"its node {place.node} is gone, and its logs with it"


def verdict(logs: Logs, pid: int) -> str:
    """The most certain cause that the logs hold."""
    if f"rocess {pid} " in logs.kernel:
        return "the kernel's OOM killer killed it: the machine was out of memory"
    if MEMORY_MONITOR in logs.raylet:
        return "Ray's memory monitor killed it: the node ran low on memory"
    if found := SIGNAL.search(logs.err):
        return f"its process died of {found[1]}{_where(logs.err)}"
    for text in (logs.err, logs.out):
        if traced := _last_traceback(text):
            return f"its process died; the last error in its log: {traced}"
    said = [line.strip() for line in f"{logs.out}\n{logs.err}".splitlines() if line.strip() and not line.startswith(MARKERS)]
    if not said:
        return "its process died without a word (SIGKILL, or it ended itself)"
    return f"its process died (SIGKILL, or it ended itself); its last words: {' | '.join(said[-LAST_LINES:])[:400]}"


def _last_traceback(text: str) -> str:
    """`Error: message (file:line in function)` of the last one."""
    _, mark, rest = text.rpartition("Traceback (most recent call last):")
    if not mark:
        return ""
    frames = [found for line in rest.splitlines() if (found := FRAME.match(line))]
    last = next((line for line in rest.splitlines()[1:] if line and not line[0].isspace()), "")
    at = f" ({frames[-1]['file']}:{frames[-1]['line']} in {frames[-1]['function']})" if frames else ""
    return f"{last[:300]}{at}" if last else ""


def _where(text: str) -> str:
    """The innermost Python frame of a crash: faulthandler prints it first."""
    _, mark, rest = text.rpartition("most recent call first")
    frames = [found for line in rest.splitlines() if (found := FRAME.match(line))] if mark else []
    return f" in {frames[0]['function']} ({frames[0]['file']}:{frames[0]['line']})" if frames else ""


def _logs_of(pid: int) -> Logs:
    """On the worker's node: this task's own log lies beside the worker's."""
    folder = Path("/proc/self/fd/2").readlink().parent
    parts = {kind: "".join(_tail(path) for path in sorted(folder.glob(f"worker-*-{pid}.{kind}"))) for kind in ("err", "out")}
    raylet = "\n".join(line for line in _tail(folder / "raylet.out").splitlines() if re.search(rf"\b{pid}\b", line))
    return Logs(parts["err"], parts["out"], _kernel_lines(pid), raylet)


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _kernel_lines(pid: int) -> str:
    """Empty where the kernel's log may not be read."""
    if shutil.which("dmesg") is None:
        return ""
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False)
    return "\n".join(line for line in done.stdout.splitlines() if f"Killed process {pid} " in line)


def laid_out(places: Mapping[int, WorkerPlace]) -> str:
    """Which rank is on which node, in one line."""
    by_node: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        by_node.setdefault(place.node, []).append(rank)
    each = "; ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {node}" for node, ranks in by_node.items())
    return f"{len(places)} workers on {len(by_node)} node{'s' * (len(by_node) != 1)}: {each}"
