"""States: what every replica says about itself, asked rarely however many want to know, and what that means for readiness.

In: a way to ask all replicas. Out: their states, each under a small number; whether requests should come, and why not.
Runs in: the ingress.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger(__name__)
State = dict[str, Any]
"""`Replica.state()`, and `number`: small, this replica's alone while it lives, then another's."""
FRESH_S, PATIENCE_S = 0.5, 5.0


class States:
    """The last answer of all replicas."""

    def __init__(self, ask: Callable[[], Awaitable[list[State]]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._states: list[State] = []
        self._asked = -FRESH_S
        self._numbers: dict[str, int] = {}

    async def now(self) -> list[State]:
        """In the order of their numbers; empty when none can be reached."""
        async with self._lock:
            if time.monotonic() - self._asked >= FRESH_S:
                try:
                    found = await asyncio.wait_for(self._ask(), PATIENCE_S)
                except Exception as error:  # whatever the reason, none is known to be well
                    log.warning("the replicas do not say how they are: %s", type(error).__name__)
                    found = []
                self._states = self._numbered(found)
                self._asked = time.monotonic()
            return self._states

    def _numbered(self, states: list[State]) -> list[State]:
        if states:  # who cannot be asked for a moment keeps its number
            here = {state["replica"] for state in states}
            self._numbers = {replica: number for replica, number in self._numbers.items() if replica in here}
        for state in states:
            free = next(number for number in range(len(states) + 1) if number not in self._numbers.values())
            state["number"] = self._numbers.setdefault(state["replica"], free)
        return sorted(states, key=lambda state: state["number"])


def reasons(states: list[State]) -> list[str]:
    """Why requests should not come; empty when they should. Names no adapter: whoever asks for readiness has shown no key."""
    if not states:
        return ["no replica answers"]
    return [f"replica {state['number']}: {len(state['missing'])} of its adapters not loaded" for state in states if state["missing"]]
