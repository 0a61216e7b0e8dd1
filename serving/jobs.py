"""Jobs: what the ingress hands to a replica, and what comes back; plain values, so that they travel between processes.

In: a checked request of a known caller. Out: a Job; Pieces of an answer. Runs in: ingress and replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftcore.adapters import AdapterRef
from ftcore.constraints import Constraint
from ftcore.data.types import Message
from ftcore.engines.base import Sampling
from ftcore.tool_calls import CallPart, Tools

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Job:
    """One request, with every name resolved."""

    id: str
    tenant: str
    ref: AdapterRef | None
    """None: the bare base."""
    fallback: AdapterRef | None
    """What answers while `ref` is still being loaded, or when it is refused: the version before it, if a name was asked for."""
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
