"""Ledger: what a tenant has taken of each limit, exact for any number of processes: one small object, changed by compare and swap alone.

In: claims. Out: grants. Runs in: threads of the ingress; no Ray, no HTTP.

    STORE/_quotas/TENANT.json    for each meter (a key of Limits): its window, what ended leases took, the total of each lease

A lease is what one process took of one meter in one window, as one total that it alone writes: more is taken by raising it, the rest given
back by lowering it. Nothing is granted before the ledger holds it, so that all processes together never grant more than the limit. A total
is absolute: one that is written again, because an answer was lost, changes nothing. A lease that ends is added to `ended`; so is, once it
expires, that of a process which was killed, whole: what it held counts as spent. A window is forgotten when a later one begins.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field, ValidationError

from ftcore.errors import IntegrityError
from ftcore.section import Section
from ftcore.storage import Folder

HOME = "_quotas"
"""No tenant can have this name."""
EXPIRES_S = 600.0
"""A lease that was not written for so long is its process's no more. Clocks that differ only make it sooner or later."""


class Held(Section):
    """One lease."""

    total: int
    until: float
    """Seconds since 1970."""


class Book(Section):
    """One meter in one window."""

    window: int
    ended: int = 0
    leases: dict[str, Held] = Field(default_factory=dict)

    @property
    def taken(self) -> int:
        return self.ended + sum(lease.total for lease in self.leases.values())


class Page(Section):
    """A tenant's ledger."""

    books: dict[str, Book] = Field(default_factory=dict)
    change: str = ""
    """Another one each time: no two states of the object are the same bytes."""


@dataclass(frozen=True)
class Claim:
    """What a process says of one lease, and what more it wants."""

    meter: str
    lease: str
    window: int
    total: int
    limit: int = 0
    wanted: int = 0
    ahead: int = 0
    """Taken beyond what is wanted, where there is plenty, so that the ledger is asked less often."""
    is_last: bool = False
    """The lease ends with this total."""


@dataclass(frozen=True)
class Grant:
    """What a claim got."""

    amount: int
    free: int
    """What nobody has taken yet."""
    window: int
    is_lost: bool = False
    """The window is over, or the lease had expired: nothing of it can be given back, and another one has to begin."""


class Ledger:
    """One tenant's."""

    def __init__(self, folder: Folder, tenant: str) -> None:
        """`folder`: HOME of a store."""
        self.folder, self.key = folder, f"{tenant}.json"

    def read(self) -> Page:
        return self._parsed(self.folder.read(self.key) if self.folder.exists(self.key) else None)

    def settle(self, claims: Sequence[Claim], now: float) -> list[Grant]:
        """A grant for each claim, all in one change. Blocks. Raises StorageError when the store is away, IntegrityError for no ledger."""
        grants: list[Grant] = []

        def changed(old: bytes | None) -> bytes:
            grants.clear()
            books = dict(self._parsed(old).books)
            for claim in claims:
                books[claim.meter], grant = _settled(books.get(claim.meter), claim, now)
                grants.append(grant)
            return Page(books=books, change=secrets.token_hex(8)).model_dump_json().encode()

        self.folder.change(self.key, changed, "this ledger")
        return grants

    def _parsed(self, raw: bytes | None) -> Page:
        try:
            return Page() if raw is None else Page.model_validate_json(raw)
        except ValidationError as error:
            raise IntegrityError(
                "this ledger cannot be read", where=f"{self.folder}/{self.key}", got=str(error)[:200],
                remedy="put back an older one; without it the tenant begins its day and month anew",
            ) from error  # fmt: skip


def _settled(book: Book | None, claim: Claim, now: float) -> tuple[Book, Grant]:
    if book is None or book.window < claim.window:
        book = Book(window=claim.window)
    others = {name: lease for name, lease in book.leases.items() if lease.until >= now and name != claim.lease}
    ended = book.ended + sum(lease.total for name, lease in book.leases.items() if name not in others and name != claim.lease)
    known = claim.lease in book.leases
    is_lost = book.window != claim.window or (not known and claim.total > 0)
    taken = ended + sum(lease.total for lease in others.values())
    if is_lost or claim.is_last:
        ended += claim.total if known and not is_lost else 0
        return Book(window=book.window, ended=ended, leases=others), Grant(0, claim.limit - taken, book.window, is_lost)
    room = max(0, claim.limit - taken - claim.total)
    amount = min(claim.wanted, room)
    amount += min(claim.ahead, (room - amount) // 4)
    mine = Held(total=claim.total + amount, until=now + EXPIRES_S)
    return Book(window=book.window, ended=ended, leases={**others, claim.lease: mine}), Grant(amount, room - amount, book.window)


def window_at(period: str, now: float) -> int:
    """The number of the minute, day or month (UTC) that a moment is in."""
    if period == "month":
        moment = datetime.fromtimestamp(now, UTC)
        return moment.year * 12 + moment.month - 1
    return int(now // LENGTH_S[period])


def window_end(period: str, number: int) -> float:
    """Seconds since 1970."""
    if period == "month":
        return datetime((number + 1) // 12, (number + 1) % 12 + 1, 1, tzinfo=UTC).timestamp()
    return float((number + 1) * LENGTH_S[period])


LENGTH_S = {"minute": 60, "day": 86400}
