"""Fairness: whose row is let in next, so that who asks much does not delay who asks little. The virtual token counter of Sheng et al. 2024
("Fairness in Serving Large Language Models", arXiv:2401.00588, algorithm 2).

In: rows that wait, tokens as they are read and made. Out: an order. Runs in: the engine's thread.

Each owner (a request's salt: the tenant) has a counter of the work done for it; the owner with the smallest counter goes first. Who comes
back after a pause is lifted to the least of those at work, so that a pause saves nothing up.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator

from ftcore.batching import Row

READ, MADE = 1.0, 2.0
"""Cost of a prompt token and of an answer's token: an answer's cost a step each."""


class Fairness:
    """Counters of the owners that have rows."""

    def __init__(self) -> None:
        self._work: dict[str, float] = {}

    def joins(self, owner: str, at_work: Collection[str]) -> None:
        """A row of `owner` comes; `at_work`: owners that have rows already. Owners without any are forgotten."""
        least = min((self._work[each] for each in at_work if each in self._work), default=0.0)
        if owner not in at_work:
            kept = {each: work for each, work in self._work.items() if each in at_work}
            self._work = kept | {owner: max(self._work.get(owner, 0.0), least)}
        self._work.setdefault(owner, least)

    def read(self, owner: str, num_tokens: int) -> None:
        self._work[owner] = self._work.get(owner, 0.0) + READ * num_tokens

    def made(self, owner: str) -> None:
        self._work[owner] = self._work.get(owner, 0.0) + MADE

    def gives_way(self, waiting: str, held: Counter[str]) -> str:
        """The owner with the most places, of `held` by each, if one of them is better given to `waiting`, which has two fewer at least (so
        that it is not taken back) and for which less work was done. Empty otherwise."""
        owner, most = max(held.items(), key=lambda each: each[1], default=("", 0))
        is_due = most - held[waiting] >= 2 and self._work.get(waiting, 0.0) <= self._work.get(owner, 0.0)
        return owner if is_due else ""

    def order(self, waiting: Iterable[Row]) -> Iterator[Row]:
        """Oldest row of the owner with the least work, of those with as little the one with fewest rows that wait, again and again; what is
        charged meanwhile counts."""
        queues: dict[str, deque[Row]] = {}
        for row in waiting:
            queues.setdefault(row.request.salt, deque()).append(row)
        heap = [(self._work.get(owner, 0.0), len(queue), number, owner) for number, (owner, queue) in enumerate(queues.items())]
        heapq.heapify(heap)
        while heap:
            _, _, number, owner = heapq.heappop(heap)
            yield queues[owner].popleft()
            if queue := queues[owner]:
                heapq.heappush(heap, (self._work.get(owner, 0.0), len(queue), number, owner))
