"""Relay: carries small messages from the workers of a run to its driver, and the wish to stop back, without making a step wait.

In: dictionaries pushed by workers, not awaited. Out: the same, drained by the driver. Runs in: one actor without a CPU, on the driver's
node.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Message = Mapping[str, Any]
MAX_WAITING = 100_000
"""Messages kept while nobody drains; the oldest go first."""
STOP_POLL_S = 0.5


class Mailbox:
    """The actor's state: what was pushed and not yet drained, and whether the driver wants the run to stop."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._stop = False

    def push(self, message: dict[str, Any]) -> None:
        self._waiting.append(message)
        del self._waiting[:-MAX_WAITING]

    def drain(self) -> list[dict[str, Any]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def ask_to_stop(self) -> None:
        self._stop = True

    def should_stop(self) -> bool:
        return self._stop


class Relay:
    """Opened by the driver; goes to workers as it is."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    @classmethod
    def open(cls) -> Relay:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return cls(ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote())

    def push(self, message: Message) -> None:
        """Sends and does not wait."""
        self._mailbox.push.remote(dict(message))

    def drain(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """What arrived since the last call, in order. An actor that is still starting has nothing to say yet."""
        try:
            return list(ray.get(self._mailbox.drain.remote(), timeout=timeout_s))
        except GetTimeoutError:
            return []

    def ask_to_stop(self) -> None:
        self._mailbox.ask_to_stop.remote()

    def watch_for_stop(self) -> Callable[[], bool]:
        """In a worker: a function that says, at once, whether the driver asked to stop; a thread does the asking."""
        asked = threading.Event()

        def poll() -> None:
            while not asked.is_set():
                try:
                    if ray.get(self._mailbox.should_stop.remote()):
                        asked.set()
                except RayError:
                    return  # the driver is gone or going, and Ray takes this worker with it
                time.sleep(STOP_POLL_S)

        threading.Thread(target=poll, name="stop-watch", daemon=True).start()
        return asked.is_set

    def close(self) -> None:
        ray.kill(self._mailbox)


class Outbox:
    """Gathers a worker's journal lines and says them together, so that steps of a millisecond do not flood the driver."""

    def __init__(self, say: Callable[[Message], None], interval_s: float = 0.2) -> None:
        self._say, self._interval_s = say, interval_s
        self._lines: list[Message] = []
        self._last = float("-inf")

    def add(self, line: Message) -> None:
        self._lines.append(line)
        if time.monotonic() - self._last >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._say({"event": "lines", "lines": self._lines})
        self._lines, self._last = [], time.monotonic()
