"""Relay: carries small messages from the workers of a run to its driver without ever making a step wait.

In: dictionaries pushed by workers, not awaited. Out: the same, drained by the driver. Runs in: one actor without a CPU, on the driver's node.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_WAITING = 10_000
"""Messages kept while nobody drains; the oldest go first."""


class Mailbox:
    """The actor's state: what was pushed and not yet drained."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []

    def push(self, message: dict[str, Any]) -> None:
        self._waiting.append(message)
        del self._waiting[:-MAX_WAITING]

    def drain(self) -> list[dict[str, Any]]:
        waiting, self._waiting = self._waiting, []
        return waiting


class Relay:
    """The driver's end. Send it to workers as it is; there, `sender()` gives the function to call."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    @classmethod
    def open(cls) -> Relay:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return cls(ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote())

    def drain(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """What arrived since the last call, in order. An actor that is still starting has nothing to say yet."""
        try:
            return list(ray.get(self._mailbox.drain.remote(), timeout=timeout_s))
        except ray.exceptions.GetTimeoutError:
            return []

    def push(self, message: Mapping[str, Any]) -> None:
        """Sends and does not wait."""
        self._mailbox.push.remote(dict(message))

    def close(self) -> None:
        ray.kill(self._mailbox)


class Throttle:
    """Lets at most one message through every `interval_s`, so that steps of a millisecond do not flood the driver."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s, self._last = interval_s, float("-inf")

    def ready(self) -> bool:
        now = time.monotonic()
        if now - self._last < self.interval_s:
            return False
        self._last = now
        return True
