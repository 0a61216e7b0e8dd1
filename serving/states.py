"""States: what every replica says about itself, asked rarely however many want to know, and what that means for readiness.

In: a way to ask all replicas of each base. Out: their states, each under a small number; whether requests should come, and why not.
Runs in: the ingress.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serving.lineage import Origin

log = logging.getLogger(__name__)
State = dict[str, Any]
"""`Replica.state()`; `base`, its name; and `number`: small, this replica's alone while it lives, then another's."""
Ask = Callable[[], Awaitable[list[State]]]
FRESH_S, PATIENCE_S = 0.5, 5.0


class States:
    """The last answer of all replicas."""

    def __init__(self, asks: Mapping[str, Ask]) -> None:
        """`asks`: by the base's name."""
        self._asks = asks
        self._lock = asyncio.Lock()
        self._states: list[State] = []
        self._asked = -FRESH_S
        self._numbers: dict[tuple[str, str], int] = {}
        self.origins: dict[str, Origin] = {}
        """Name -> what that base is, as its replicas said last; bases that never answered are missing."""

    async def now(self) -> list[State]:
        """In the order of their numbers; empty when none can be reached."""
        async with self._lock:
            if time.monotonic() - self._asked >= FRESH_S:
                found = await asyncio.gather(*(self._said(name) for name in self._asks))
                self._states = self._numbered([state for states in found for state in states])
                self._asked = time.monotonic()
            return self._states

    async def _said(self, name: str) -> list[State]:
        try:
            states = await asyncio.wait_for(self._asks[name](), PATIENCE_S)
        except Exception as error:  # whatever the reason, none of that base is known to be well
            log.warning("the replicas of %s do not say how they are: %s", name, type(error).__name__)
            return []
        for state in states:
            state["base"] = name
            self.origins[name] = Origin(state["weights"], state["tokenizer"], state["template"])
        return states

    def _numbered(self, states: list[State]) -> list[State]:
        here, answering = {_key(state) for state in states}, {state["base"] for state in states}
        # who cannot be asked for a moment keeps its number
        self._numbers = {key: number for key, number in self._numbers.items() if key in here or key[0] not in answering}
        for state in states:
            free = next(number for number in range(len(self._numbers) + 1) if number not in self._numbers.values())
            state["number"] = self._numbers.setdefault(_key(state), free)
        return sorted(states, key=lambda state: state["number"])


def _key(state: State) -> tuple[str, str]:
    return state["base"], state["replica"]


def reasons(states: list[State], num_bases: int) -> list[str]:
    """Why requests should not come; empty when they should. Names no base and no adapter: whoever asks for readiness has shown no key."""
    if not states:
        return ["no replica answers"]
    num_silent = num_bases - len({state["base"] for state in states})
    silent = [f"{num_silent} of {num_bases} bases: no replica answers"] if num_silent else []
    return silent + [
        f"replica {state['number']}: {len(state['missing'])} of its adapters not loaded" for state in states if state["missing"]
    ]
