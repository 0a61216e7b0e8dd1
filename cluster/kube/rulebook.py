"""The rulebook: every rule by its name, with the reason for it in one line.

In: the rule files, which sign in. Out: the table. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.kube.flaws import Flaw
from cluster.kube.scene import Scene

Look = Callable[[Scene], Iterator[Flaw]]


@dataclass(frozen=True)
class Rule:
    reason: str
    look: Look


TABLE: dict[str, Rule] = {}


def rule(name: str, reason: str) -> Callable[[Look], Look]:
    """Signs a function in. It yields flaws without a name; the name is set where they are gathered."""

    def sign_in(look: Look) -> Look:
        if name in TABLE:
            raise ValueError(f"two rules are called {name}")
        TABLE[name] = Rule(reason, look)
        return look

    return sign_in
