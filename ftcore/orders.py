"""Orders: what other threads want done by one that must not be disturbed in the middle of its work.

In: something to call. Out: a future of what it gave. Runs in: whoever orders, and the thread that obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Order:
    """Something to do between two steps of an engine."""

    do: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if self.done.set_running_or_notify_cancel():  # a caller that went away wants nothing any more
            try:
                self.done.set_result(self.do())
            except Exception as error:
                self.done.set_exception(error)

    def refuse(self, error: BaseException) -> None:
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)
