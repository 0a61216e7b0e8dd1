"""Spending: what a judge may cost, what it has cost, and whether one more question fits: a limit is met before it is passed.

In: a limit (calls, tokens, money), prices, what each reply took. Out: yes or no before a question is asked. Runs in: the driver.

How many tokens a question has is known only afterwards. Before, it counts as its bytes and some for the chat template: no byte-level
tokenizer makes more of it. What is in the air is counted so, what has come back as the endpoint says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ftcore.data.types import Message
from ftcore.errors import ConfigError
from ftcore.evals.given import Said

TOKENS_A_MESSAGE = 16
"""For the chat template, before an endpoint has counted."""
MILLION = 1_000_000


@dataclass(frozen=True)
class Spent:
    """`uncounted`: calls whose tokens the endpoint did not tell; they are taken at their most."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.calls + other.calls, self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens, self.uncounted + other.uncounted,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Prices:
    """Money a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, spent: Spent) -> float:
        return (spent.prompt_tokens * self.prompt + spent.completion_tokens * self.completion) / MILLION


@dataclass(frozen=True)
class Limit:
    """Of everything that one judgement costs, over all the commands that it took; None: no limit."""

    calls: float | None = None
    tokens: float | None = None
    money: float | None = None

    @classmethod
    def parse(cls, words: Sequence[str], prices: Prices) -> Limit:
        """`400` (calls), `calls=400`, `tokens=200000`, `money=2.50`. Raises ConfigError."""
        wanted, limit = "--judge-limit 400, or calls=400 tokens=200000 money=2.50", cls()
        for word in words:
            name, _, text = word.rpartition("=")
            name = name or "calls"
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if name not in ("calls", "tokens", "money") or not 0 < value < float("inf"):
                raise ConfigError("this is no limit", where="--judge-limit", got=word, wanted=wanted)
            limit = replace(limit, **{name: value})
        if limit.money is not None and prices == Prices():
            raise ConfigError(
                "money is counted by prices", where="--judge-limit", got="no prices",
                remedy="--judge-prices IN OUT: of a million tokens of questions, and of replies",
            )  # fmt: skip
        return limit

    def allows(self, spent: Spent, prices: Prices) -> bool:
        return all(
            most is None or used <= most
            for most, used in ((self.calls, spent.calls), (self.tokens, spent.tokens), (self.money, prices.of(spent)))
        )

    def __str__(self) -> str:
        named = {"calls": self.calls, "tokens": self.tokens, "money": self.money}
        return ", ".join(f"{value:,g} {name}" for name, value in named.items() if value is not None) or "none"


class Purse:
    """Counts what is spent and what is in the air."""

    def __init__(self, limit: Limit, prices: Prices, before: Iterable[Spent] = ()) -> None:
        self.limit, self.prices = limit, prices
        self.spent = sum(before, Spent())
        self._held = Spent()

    @property
    def is_waiting(self) -> bool:
        """For calls in the air."""
        return self._held.calls > 0

    def take(self, messages: Sequence[Message], max_tokens: int) -> Spent | None:
        """Holds what a call may cost at most; None where that could pass the limit."""
        most = Spent(1, sum(len(turn.content.encode()) + TOKENS_A_MESSAGE for turn in messages), max_tokens)
        if not self.limit.allows(self.spent + self._held + most, self.prices):
            return None
        self._held += most
        return most

    def settle(self, held: Spent, said: Said | None) -> Spent:
        """What the call took in the end; nothing where there is no answer."""
        self._held += Spent(-held.calls, -held.prompt_tokens, -held.completion_tokens)
        if said is None:
            return Spent()
        counted = said.prompt_tokens + said.completion_tokens > 0
        took = Spent(1, said.prompt_tokens, said.completion_tokens) if counted else replace(held, uncounted=1)
        if said.error:
            took = Spent(1)  # refused: nothing was made
        self.spent += took
        return took
