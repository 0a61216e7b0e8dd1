"""`ftcore serve` in a process of its own, as a person runs it; for tests of the command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@dataclass
class ServeCommand:
    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    """What it printed so far."""

    def wait_ready(self, limit_s: float = 600) -> None:
        deadline = time.monotonic() + limit_s
        while not any(line.startswith("try: curl") for line in self.lines):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.1)  # its lines come from a thread that reads them

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def require_end(self, limit_s: float) -> None:
        assert self.process.wait(limit_s) == 0, "".join(self.lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve_command(base: Path, store: Path, cwd: Path, cpus: int, *words: str) -> Iterator[ServeCommand]:
    """Ready when it is entered; killed when it is left, if it runs yet."""
    port = free_port()
    command = [sys.executable, "-m", "ftcore.cli", "serve", f"base={base}", f"store={store}", f"port={port}", "num_cpus=0.5", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "FTCORE_LOCAL_CPUS": str(cpus)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd
    ) as process:  # fmt: skip
        served = ServeCommand(process, port)
        stdout = process.stdout
        reading = threading.Thread(target=lambda: served.lines.extend(iter(stdout.readline, "")) if stdout else None, daemon=True)
        reading.start()
        try:
            served.wait_ready()
            yield served
        finally:
            process.kill()  # nothing, where it has ended
            process.wait(10)
            reading.join(10)
