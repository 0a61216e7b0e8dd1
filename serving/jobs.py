"""Jobs: what the ingress hands to a replica, and what comes back; plain values, so that they travel between processes.

In: a checked request of a known caller. Out: a Job; Pieces of an answer. Runs in: ingress and replicas.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from ftcore.adapters import AdapterRef
from ftcore.constraints import Constraint
from ftcore.data.types import Message
from ftcore.engines.base import Sampling
from ftcore.tool_calls import CallPart, Tools

Finish = Literal["stop", "length", "tool_calls"]
SHORT_WAY = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}  # fmt: skip
"""The environment of ingress and replicas, whatever their nodes were started with: what they say to each other goes by gRPC (with the
cluster's token) and from loop to loop, not through Ray's object store and two threads more. It halves the way to the first token."""


@dataclass(frozen=True)
class Answerer:
    """What a request's model name stands for."""

    base: str
    """Whose replicas answer: what clients call that base."""
    ref: AdapterRef | None = None
    """None: the bare base."""
    fallback: AdapterRef | None = None
    """What answers when `ref` is refused: the version before it, if a name was asked for."""
    elsewhere: Answerer | None = None
    """What answers when `ref` is refused, where the version before it belongs to another base."""
    is_changing: bool = False
    """The name came to mean `ref` a moment ago: where it is not loaded yet and `fallback` still is, that answers without waiting."""


@dataclass(frozen=True)
class Job:
    """One request, with every name resolved."""

    id: str
    tenant: str
    answerer: Answerer
    prompt: tuple[Message, ...] | tuple[int, ...] | str
    max_tokens: int | None
    """None: as much as the context holds."""
    sampling: Sampling
    stops: tuple[str, ...] = ()
    num_choices: int = 1
    constraint: Constraint | None = None
    tools: Tools | None = None
    inputs: tuple[tuple[int, ...] | str, ...] = ()
    """What is to be embedded: then there is no prompt and no answer."""
    is_streamed: bool = True
    """The client reads each token as it comes; else its pieces come a few times a second."""


@dataclass(frozen=True)
class TokenInfo:
    """A token's log-probability and the most likely ones' in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of one choice, or its end."""

    choice: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish: Finish | None = None
    num_tokens: int = 0
    """Computed for this choice since its piece before."""
    calls: tuple[CallPart, ...] = ()

    def __add__(self, later: Piece) -> Piece:
        """Two of one choice as one."""
        return Piece(
            self.choice, self.text + later.text, self.tokens + later.tokens, later.finish, self.num_tokens + later.num_tokens,
            self.calls + later.calls,
        )  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """The first thing that comes back: the request was taken, by these weights."""

    adapter: str
    """`tenant/name@digest`, in full; empty for the base."""
    base: str
    replica: str
    """The receipt key of the replica, which names it."""
    was_cold: bool
    """The adapter had to be loaded first."""
    prompt_tokens: int


@dataclass(frozen=True)
class Vector:
    """The embedding of one input."""

    index: int
    values: bytes
    """fp32, little-endian."""


@dataclass(frozen=True)
class Closing:
    """The last thing: what was used, and the receipt."""

    prompt_tokens: int
    completion_tokens: int
    receipt: dict[str, str]


Event = Opening | Piece | Vector | Closing
GATHER_S = 0.25


async def gathered(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The same answer in fewer events: the first piece at once, those of the next `GATHER_S` as one for each choice."""
    held: dict[int, Piece] = {}
    last = float("-inf")
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                before = held.get(event.choice)
                held[event.choice] = event if before is None else before + event
                if time.monotonic() - last < GATHER_S:
                    continue
                last = time.monotonic()
            for piece in held.values():
                yield piece
            held.clear()
            if not isinstance(event, Piece):
                yield event
