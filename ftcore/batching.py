"""Batching: which rows take part in the next step of an engine. Continuous: a row joins as soon as a place is free and leaves when it ends.

In: rows that wait. Out: a Step: all rows that decode, and a chunk of prompt of the rows that do not yet. Runs in: the engine's thread.

Places are numbered. Rows that decode hold the places 0..n-1 without a gap, so that their keys and values are one contiguous part of the
cache: who ends gives its place to the last one (`moves` says which rows to copy where before the step). Rows that still read their prompt
hold places from the top. No torch here.

Who asks little is not slowed by who asks much: beside an owner with at most half as many rows as the one with most, the rows of those with
more take part as many at a time as `beside` allows, in turns.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from ftcore.constraints import Walk
from ftcore.engines.base import Request

PROOF_EVERY, PROOF_TOKENS = 8, 24
"""While rows decode: steps between two chunks of the prompts that prove a new adapter, and tokens of one: who streams does not feel it."""
TURN = 16
"""Steps that a row takes part in before another's turn comes, where not all may: each change copies keys and values."""
Wants = Literal["answer", "embedding", "logits"]


@dataclass(eq=False)
class Row:
    """A request under way; two rows are never the same one."""

    request: Request
    max_total: int
    """Tokens of prompt and answer at most."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    num_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    place: int = -1
    seed: int = 0
    key: int = 0
    """The engine's own name for it."""
    num_passed: int = 0
    """Rows that came later and were let in before it."""
    came: float = field(default_factory=time.monotonic)
    kept: Any = None
    """Its keys and values while it stepped back for another owner's row."""
    walk: Walk | None = None
    """Its way through the request's constraint."""
    wants: Wants = "answer"
    turn: int = 0
    """Of rows that take turns: the lowest goes first."""
    num_taken: int = 0
    """Steps of its turn that it has had."""
    found: Future[Any] = field(default_factory=Future)
    """Of a row that is only read: the [H] embedding of its prompt, or the [V] logits after it."""

    def __post_init__(self) -> None:
        if self.request.constraint is not None:
            self.walk = self.request.constraint.begin()

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        return self.num_cached == len(self.tokens) - 1 and self.num_cached >= self.num_prompt


@dataclass(frozen=True)
class Chunk:
    """A part of one row's prompt to read."""

    row: Row
    count: int

    @property
    def is_last(self) -> bool:
        return self.row.num_cached + self.count == len(self.row.tokens)


@dataclass(frozen=True)
class Step:
    """What one forward pass computes: a token for each decoding row (at place 0, 1, ...), then chunks of prompts, end to end."""

    decoding: tuple[Row, ...]
    chunks: tuple[Chunk, ...]
    num_heavy: int = 0
    """Decoding rows of who asks much, where somebody asks little beside them."""

    @property
    def is_empty(self) -> bool:
        return not self.decoding and not self.chunks

    @property
    def due(self) -> list[Row]:
        """Rows whose last token so far is computed."""
        return [*self.decoding, *(chunk.row for chunk in self.chunks if chunk.is_last)]


class Batcher:
    """Rows that wait, rows that read, rows that decode."""

    def __init__(self, num_places: int, chunk_tokens: int) -> None:
        """`chunk_tokens`: prompt tokens a step reads at most beside the decoding rows, so that nobody's next token waits long."""
        self.num_places, self.chunk_tokens = num_places, chunk_tokens
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.decoding: list[Row] = []
        self.proofs: deque[Row] = deque()
        """Rows that want logits. The first is read at a place of its own, beside all others."""
        self.num_admitted, self.waited_s = 0, 0.0
        self._num_steps = 0
        self._num_turns = 0
        self._num_going: int | None = None
        self._heavy: frozenset[str] = frozenset()
        self._heavy_tokens = 0

    @property
    def rows(self) -> list[Row]:
        return [*self.decoding, *self.reading]

    @property
    def under_way(self) -> list[Row]:
        """Every row that has a place."""
        return self.rows + [row for row in self.proofs if row.place >= 0]

    @property
    def is_idle(self) -> bool:
        return not self.decoding and not self.reading and not self.waiting and not self.proofs

    @property
    def spare(self) -> int:
        """The place behind the last, which nobody holds."""
        return self.num_places

    @property
    def next_proof(self) -> Row | None:
        """One that waits for the place of proofs, which is free."""
        return self.proofs[0] if self.proofs and self.proofs[0].place < 0 else None

    @property
    def has_room(self) -> bool:
        return len(self.decoding) + len(self.reading) < self.num_places

    def admit(self, row: Row) -> None:
        """Gives a row the highest free place."""
        taken = {each.place for each in self.reading}
        row.place = next(place for place in range(self.num_places - 1, -1, -1) if place not in taken)
        assert row.place >= len(self.decoding)
        self.reading.append(row)
        if row.kept is None:
            self.num_admitted += 1
            self.waited_s += time.monotonic() - row.came

    def admit_proof(self) -> None:
        """Gives the first proof its place."""
        self.proofs[0].place = self.num_places + 1

    def hold(self, beside: Callable[[int], int]) -> list[tuple[int, int]]:
        """Who takes part in the next step. `beside`: others' rows that may, in a step of so many. Returns (from, to) places to copy."""
        held = Counter(row.request.salt for row in self.rows)
        most = max(held.values(), default=0)
        heavy = frozenset(owner for owner, count in held.items() if 2 * count > most)
        self._heavy = heavy if len(heavy) < len(held) else frozenset()
        self._num_going = None
        if not self._heavy:
            return []
        own = [row for row in self.decoding if row.request.salt not in heavy]
        others = [row for row in self.decoding if row.request.salt in heavy]
        fitting = beside(len(own))
        self._heavy_tokens = max(0, fitting - len(others))
        if fitting >= len(others):
            return []
        going = sorted(others, key=lambda row: row.turn)[:fitting]
        for row in going:
            row.num_taken += 1
            if row.num_taken % TURN == 0:
                self._num_turns += 1
                row.turn = self._num_turns
        return self._to_front([*own, *going])

    def _to_front(self, going: list[Row]) -> list[tuple[int, int]]:
        """Has these of the decoding rows hold the first places, and them alone decode."""
        self._num_going = len(going)
        chosen = set(map(id, going))
        staying = iter([row for row in self.decoding[: len(going)] if id(row) not in chosen])
        moves = []
        for row in [row for row in going if row.place >= len(going)]:
            other = next(staying)
            moves += [(other.place, self.spare), (row.place, other.place), (self.spare, row.place)]
            row.place, other.place = other.place, row.place
        self.decoding.sort(key=lambda row: row.place)
        return moves

    def step(self) -> Step:
        """The next step; call after `hold`."""
        chunks = [Chunk(row, count) for row, count in self._dealt().items() if count]
        self._num_steps += 1
        if self.proofs and self.proofs[0].place >= 0:
            row = self.proofs[0]
            most = self.chunk_tokens if not self.decoding else 0 if self._num_steps % PROOF_EVERY else PROOF_TOKENS
            if count := min(most, len(row.tokens) - row.num_cached):
                chunks.append(Chunk(row, count))
        decoding = tuple(self.decoding[: self._num_going])
        return Step(decoding, tuple(chunks), sum(row.request.salt in self._heavy for row in decoding))

    def _dealt(self) -> dict[Row, int]:
        """How many tokens of each prompt are read now: each owner's share of a step first, then whoever came first."""
        counts, left, heavy_left = dict.fromkeys(self.reading, 0), self.chunk_tokens, self._heavy_tokens
        num_owners = len({row.request.salt for row in self.reading})
        for share in (self.chunk_tokens // max(1, num_owners), self.chunk_tokens):
            given: Counter[str] = Counter()
            for row in self.reading:
                owner = row.request.salt
                count = min(left, share - given[owner], len(row.tokens) - row.num_cached - counts[row])
                if owner in self._heavy:
                    count = min(count, heavy_left)
                    heavy_left -= count
                counts[row] += count
                given[owner] += count
                left -= count
        return counts

    def settle(self) -> list[tuple[int, int]]:
        """Rows that have read their prompt join those that decode. Returns (from, to) places to copy, in this order."""
        moves = []
        for row in [row for row in self.reading if row.decodes]:
            self.reading.remove(row)
            goal = len(self.decoding)
            sitter = next((each for each in self.reading if each.place == goal), None)
            if sitter is not None:  # they change places by way of the spare one
                moves += [(goal, self.spare), (row.place, goal), (self.spare, row.place)]
                sitter.place = row.place
            elif row.place != goal:
                moves.append((row.place, goal))
            row.place = goal
            self.decoding.append(row)
        return moves

    def remove(self, row: Row) -> list[tuple[int, int]]:
        """Takes a row out wherever it is. Returns the copies that close the gap."""
        if row in self.waiting:
            self.waiting.remove(row)
            return []
        if row in self.reading:
            self.reading.remove(row)
            return []
        if row in self.proofs:
            self.proofs.remove(row)
            return []
        self.decoding.remove(row)
        last = len(self.decoding)
        mover = next((each for each in self.decoding if each.place == last), None)
        if mover is None:
            return []
        mover.place = row.place
        self.decoding.sort(key=lambda each: each.place)
        return [(last, row.place)]
