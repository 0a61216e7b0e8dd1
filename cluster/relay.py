"""Relay: carries small messages from the workers of a run to its driver, and the driver's orders back, without making a step wait.

In: dictionaries pushed by workers, not awaited; orders set by the driver. Out: the same, drained by the driver, read by workers.
Runs in: one actor without a CPU, on the driver's node. It lives as long as its driver: workers who lose it know that nobody leads them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.outbox import Message

LOOK_S = 0.01
MAX_WAITING = 100_000
"""Messages kept while nobody drains; the oldest go first."""


@dataclass(frozen=True)
class Orders:
    """What the driver wants of all workers. A higher `generation` makes them leave what they do and begin again together."""

    group: int = 0
    """Which group of workers is meant; one that is not has been given up, and leaves."""
    generation: int = 0
    stop: bool = False
    """Make a checkpoint at the next step boundary and end."""
    over: bool = False
    """This group of workers is not needed any more."""
    address: str = ""
    """host:port where rank 0 of this generation lets the others meet, once it has said so."""


class Mailbox:
    """The actor's state: what was pushed and not yet drained, and the orders."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._orders = Orders()

    def push(self, message: dict[str, Any]) -> None:
        self._waiting.append(message)
        del self._waiting[:-MAX_WAITING]

    def drain(self) -> list[dict[str, Any]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def command(self, orders: Orders) -> None:
        self._orders = orders

    def ask_to_stop(self) -> None:
        self._orders = replace(self._orders, stop=True)

    def meet_at(self, generation: int, address: str) -> None:
        if generation == self._orders.generation:
            self._orders = replace(self._orders, address=address)

    async def orders(self, known: Orders | None, wait_s: float) -> Orders:
        """The orders, as soon as they are others than `known`, and after `wait_s` in any case."""
        until = time.monotonic() + wait_s
        while self._orders == known and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)  # here it costs nothing; asked from a worker it would cost a call
        return self._orders


class Relay:
    """Opened by the driver; goes to workers as it is."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._unanswered: Any = None

    def __reduce__(self) -> tuple[type[Relay], tuple[Any]]:
        return Relay, (self._mailbox,)

    @classmethod
    def open(cls) -> Relay:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote())

    def push(self, message: Message) -> None:
        """Sends and does not wait."""
        self._mailbox.push.remote(dict(message))

    def drain(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """What arrived since the last call, in order. An actor that is still starting has nothing to say yet.

        An answer that is late is waited for again the next time: it holds what the mailbox then no longer has.
        """
        asked = self._unanswered if self._unanswered is not None else self._mailbox.drain.remote()
        try:
            self._unanswered = None
            return list(ray.get(asked, timeout=timeout_s))
        except GetTimeoutError:
            self._unanswered = asked
            return []

    def command(self, orders: Orders) -> None:
        self._mailbox.command.remote(orders)

    def ask_to_stop(self) -> None:
        self._mailbox.ask_to_stop.remote()

    def meet_at(self, generation: int, address: str) -> None:
        self._mailbox.meet_at.remote(generation, address)

    def orders(self, known: Orders | None = None, wait_s: float = 0.0) -> Orders:
        """In a worker: the orders, at once, or when they are others than `known`, within `wait_s`.

        Raises RayError when the driver, and the mailbox with it, is gone."""
        return ray.get(self._mailbox.orders.remote(known, wait_s), timeout=wait_s + LOST_S)

    def close(self) -> None:
        ray.kill(self._mailbox)


LOST_S = 60.0
"""A mailbox that does not answer for this long is gone (GetTimeoutError is a RayError too)."""
