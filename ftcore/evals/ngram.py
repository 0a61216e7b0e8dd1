"""A back-off n-gram over whole turns: what frequencies alone can foretell, one table for each user.

In: conversations. Out: Forecasts without probabilities. Runs in: everywhere; no model.

The next answer is the most frequent one after the longest context seen before (Katz 1987, without discounts: only the first choice counts):
the user's own counts before everybody's, whole turns before the first words of the last one, then no context at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from ftcore.data.types import Conversation
from ftcore.evals.predictors import Forecast

Context = tuple[str, ...]


class BackoffNgram:
    """`order` whole turns make the longest n-gram, the answer included."""

    def __init__(self, name: str = "n-gram", order: int = 4) -> None:
        self.name, self.order = name, order
        self.counts: defaultdict[Context, Counter[str]] = defaultdict(Counter)

    def fit(self, conversations: Sequence[Conversation]) -> BackoffNgram:
        for conversation in conversations:
            for past, answer in answers(conversation):
                for context in self.contexts(user_of(conversation), past):
                    self.counts[context][answer] += 1
        return self

    def contexts(self, user: str, past: Sequence[str]) -> Iterator[Context]:
        """What may have been counted, the most telling first. Each names the user, or nobody."""
        for who in (user, ""):
            for length in range(min(self.order - 1, len(past)), 0, -1):
                yield (who, *past[-length:])
            if past:
                yield who, "begins", kind_of(past[-1])
            yield (who,)

    def predict(self, user: str, past: Sequence[str]) -> str:
        for context in self.contexts(user, past):
            if context in self.counts:
                return min(self.counts[context].items(), key=lambda item: (-item[1], item[0]))[0]
        return ""

    def forecast(self, conversations: Sequence[Conversation]) -> list[Forecast]:
        forecasts = []
        for conversation in conversations:
            hits = [self.predict(user_of(conversation), past) == answer for past, answer in answers(conversation)]
            forecasts.append(Forecast(np.array(hits, bool), np.full(len(hits), np.nan), np.zeros(len(hits), np.int64)))
        return forecasts


def answers(conversation: Conversation) -> Iterator[tuple[tuple[str, ...], str]]:
    """(all turns before it, answer) for every answer that counts."""
    past: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant" and message.weight != 0:
            yield tuple(past), message.content
        if message.role != "system":
            past.append(message.content)


def user_of(conversation: Conversation) -> str:
    """Whose conversation it is: its system turn."""
    return next((message.content for message in conversation.messages if message.role == "system"), "")


def kind_of(observation: str) -> str:
    """The first word of the last thing observed: `download` of `+ mutt 431, download plan4.doc`."""
    return observation.rsplit(", ", 1)[-1].split(" ", 1)[0]
