"""Outbox: a worker's journal lines, said together.

In: lines, one at a time. Out: messages with several. Runs in: train workers; imports no ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Message = Mapping[str, Any]


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
