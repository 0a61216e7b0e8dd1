"""Leaving: what a pod does before it is ended: says so to the workers on it, and waits until they have sealed their work and gone.

    python -m cluster.leaving 100                 training: at most 100 s, for a checkpoint
    python -m cluster.leaving 100 --port 8000     serving: its replicas end what they began, and nobody is connected there any more

In: FTCORE_PREEMPTION_FILE, the processes of this machine. Out: the file; exit code 1 where the time did not do.
Runs in: the preStop hook of a pod; no ray.

A hook counts against terminationGracePeriodSeconds; when it has ended, `ray start` gets SIGTERM and takes everything down at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.notices import FILE_VARIABLE

WORKER, REPLICA = "RayTrainWorker", "ServeReplica"
"""What Ray calls a process that trains, and one that answers (its title begins with `ray::` and holds this)."""
FIRST_S = 10.0
"""How long a service's address is still handed out after a pod is told to go: endpoints follow late."""
LOOK_S = 0.5
DRAIN_S = 30.0
ESTABLISHED = "01"
"""As the kernel writes it in /proc/net/tcp."""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    until = time.monotonic() + options.seconds
    file = os.environ.get(FILE_VARIABLE)
    if file:
        Path(file).touch()
    if options.port is not None:
        drain(options.seconds)
        time.sleep(min(FIRST_S, options.seconds))
    while any(titled(WORKER)) or (options.port is not None and (any(titled(REPLICA)) or num_connected(options.port))):
        if time.monotonic() >= until:
            print(f"still at work after {options.seconds:g} s", file=sys.stderr)
            return 1
        time.sleep(LOOK_S)
    return 0


def titled(what: str, proc: Path = Path("/proc")) -> Iterator[int]:
    """Ray's processes of this kind."""
    for pid, title in _processes(proc):
        if title.startswith(b"ray::") and what.encode() in title:
            yield pid


def drain(seconds: float, proc: Path = Path("/proc")) -> None:
    """Tells Ray that this node goes: other nodes' ingresses hand it nothing more, and its replicas end in time. No raylet here: nothing."""
    for _, title in _processes(proc):
        words = dict(word.lstrip("-").partition("=")[::2] for word in title.decode(errors="replace").split("\0"))
        node, address = words.get("node_id"), words.get("gcs-address")
        if b"raylet" in title.split(b"\0")[0] and node and address:
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its pod goes"]
            left = ["--deadline-remaining-seconds", f"{seconds:.0f}"]
            command = ["ray", "drain-node", "--address", address, "--node-id", node, *reason, *left]
            try:
                told = subprocess.run(command, check=False, timeout=min(DRAIN_S, seconds)).returncode == 0
            except (subprocess.TimeoutExpired, OSError):  # the head is away, too; no `ray` on PATH
                told = False
            if not told:
                print("Ray was not told that this node goes", file=sys.stderr)
            return


def _processes(proc: Path) -> Iterator[tuple[int, bytes]]:
    """(pid, command line) of this pod's alone: those that share its network, where more can be seen."""
    own = (proc / "self/ns/net").stat().st_ino
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
                is_ours = (folder / "ns/net").stat().st_ino == own
            except OSError:  # it ended as we looked, or is another user's
                continue
            if is_ours:
                yield int(folder.name), title


def num_connected(port: int, proc: Path = Path("/proc")) -> int:
    """Connections that somebody holds to a port of this machine."""
    count = 0
    for name in ("tcp", "tcp6"):
        table = proc / "net" / name
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, *_ = line.split()
            count += state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port
    return count


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.leaving", description="Before a pod ends: say so, and wait for its work.")
    parser.add_argument("seconds", type=float, help="how long at most")
    parser.add_argument("--port", type=int, help="where clients are connected")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
