"""Quotas: requests and tokens a tenant may still ask for. Reserved when an answer is admitted, settled when it ends, served from memory.

In: a Caller, what an answer may come to use. Out: a Reservation, rate-limit headers; or a Refusal. Runs in: the ingress.

Each process holds leases of the tenant's ledger in the store (serving/ledger.py) and admits from them without I/O. It takes more off the
event loop when it is short, before that when it soon would be, and gives back what it does not need: above a few answers' worth within a
second, everything once a tenant was idle, and at the end. While the store is away it serves from what it holds; then it refuses. What an
answer uses counts in the window it was admitted in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ftcore.storage import Folder
from serving.gate import Refusal
from serving.ledger import HOME, Claim, Grant, Ledger, window_at, window_end
from serving.tenants import Caller

log = logging.getLogger(__name__)
TICK_S = 1.0
IDLE_S = 3.0
"""After so long without a request everything is given back."""
DRY_S = 1.0
"""How long a ledger that was empty is not asked again."""
PATIENCE_S = 5.0
"""How long a request waits for the ledger."""
RENEW_S = 240.0
"""A lease is written again after so long, long before it expires."""
MOST_AHEAD = 16_384


@dataclass(eq=False)
class Lease:
    """What this process has taken of one meter in one window: `total` = left + reserved + what was used."""

    meter: str
    id: str
    window: int
    ends: float
    free: int
    """What nobody had taken when the ledger was last asked; the whole limit before."""
    total: int = 0
    left: int = 0
    reserved: int = 0
    dry_until: float = 0.0
    renewed: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Reservation:
    """What one answer may use."""

    purse: Purse
    meters: Mapping[str, int]
    tokens: int
    parts: list[tuple[Lease, int]]

    async def at_least(self, tokens: int) -> None:
        """More, when it turns out that the answer may use more. Raises Refusal."""
        if tokens > self.tokens:
            self.parts += await self.purse.take(self.meters, {"requests": 0, "tokens": tokens - self.tokens})
            self.tokens = tokens

    def settle(self, tokens: int) -> None:
        """The end: what was not used comes back. A request counts, whatever became of it."""
        rest = dict.fromkeys(self.meters, tokens)
        for lease, amount in self.parts:
            used = amount if _unit(lease.meter) == "requests" else min(amount, rest[lease.meter])
            rest[lease.meter] -= used
            lease.reserved -= amount
            lease.left += amount - used
        self.purse.num_open -= 1
        self.purse.touched = time.monotonic()


class Quotas:
    """One for each ingress process."""

    def __init__(self, store: str, now: Callable[[], float] = time.time) -> None:
        """`now`: seconds since 1970."""
        self._folder, self._now = Folder(store) / HOME, now
        self._purses: dict[str, Purse] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="quotas")
        self._watch: asyncio.Task[None] | None = None

    def open(self) -> None:
        """On the event loop that will use it."""
        self._watch = asyncio.create_task(self._tidy())

    async def close(self) -> None:
        """Gives everything back; what cannot be given back counts as spent."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(purse.give_all_back() for purse in self._purses.values()))
        self._threads.shutdown(wait=False)

    async def reserve(self, caller: Caller, tokens: int) -> Reservation:
        """For one request that may use so many tokens. Raises Refusal 429 over a limit, 503 when the ledger is needed and away."""
        meters = caller.limits.meters
        purse = self._purses.get(caller.tenant)
        if purse is None:
            purse = Purse(Ledger(self._folder, caller.tenant), self._threads, self._now)
            if meters:  # else there is nothing to keep
                self._purses[caller.tenant] = purse
        parts = await purse.take(meters, {"requests": 1, "tokens": tokens})
        purse.num_open += 1
        return Reservation(purse, meters, tokens, parts)

    def headers(self, caller: Caller) -> dict[str, str]:
        """OpenAI's x-ratelimit-*; of several limits on one thing, the one with the least left."""
        purse = self._purses.get(caller.tenant)
        return purse.headers(caller.limits.meters) if purse is not None else {}

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for tenant, purse in list(self._purses.items()):
                if purse.tidy():
                    del self._purses[tenant]


class Purse:
    """One tenant's leases in this process."""

    def __init__(self, ledger: Ledger, threads: ThreadPoolExecutor, now: Callable[[], float]) -> None:
        self.num_open = 0
        self.touched = time.monotonic()
        self._ledger, self._threads, self._now = ledger, threads, now
        self._meters: Mapping[str, int] = {}
        self._leases: dict[str, Lease] = {}
        self._ending: list[Claim] = []
        self._waiting: Counter[str] = Counter()
        self._syncing: asyncio.Task[None] | None = None
        self._problem = ""

    async def take(self, meters: Mapping[str, int], needs: Mapping[str, int]) -> list[tuple[Lease, int]]:
        """All that is needed of every meter, or nothing. Raises Refusal."""
        self._meters, self.touched = meters, time.monotonic()
        if meters and (short := self._short(meters, needs)) is not None:
            for meter, limit in meters.items():
                if needs[_unit(meter)] > limit:
                    raise self._refusal(meter, limit, needs)
            self._waiting.update(needs)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    while short is not None:
                        if self._leases[short].dry_until > time.monotonic():
                            raise self._refusal(short, meters[short], needs)
                        await self._sync()
                        short = self._short(meters, needs)
                        if short is not None and self._problem:
                            raise _away()
            except TimeoutError as error:
                raise _away() from error
            finally:
                self._waiting.subtract(needs)
        parts = [(self._leases[meter], needs[_unit(meter)]) for meter in meters]
        for lease, need in parts:
            lease.left -= need
            lease.reserved += need
        if any(self._ahead(lease) for lease, _ in parts):
            self._begin()
        return parts

    def _short(self, meters: Mapping[str, int], needs: Mapping[str, int]) -> str | None:
        """The first meter that holds too little; leases of windows that are over make room for new ones."""
        now, found = self._now(), None
        for meter, limit in meters.items():
            lease = self._leases.get(meter)
            if lease is None or now >= lease.ends:
                lease = self._leases[meter] = _new_lease(meter, window_at(_period(meter), now), limit)
            if found is None and lease.left < needs[_unit(meter)]:
                found = meter
        return found

    def _ahead(self, lease: Lease) -> int:
        """What to take beyond what is asked for now: a hundredth of the limit, once half of that is used up."""
        most = min(self._meters.get(lease.meter, 0) // 100, MOST_AHEAD)
        spare = lease.left - self._waiting[_unit(lease.meter)]
        has_more = lease.free >= 4 and lease.dry_until <= time.monotonic()  # of less, the ledger gives nothing ahead
        return most - max(0, spare) if has_more and spare < (most + 1) // 2 else 0

    def _surplus(self, lease: Lease) -> int:
        most = 2 * min(self._meters.get(lease.meter, 0) // 100, MOST_AHEAD)
        return max(0, lease.left - self._waiting[_unit(lease.meter)] - most)

    # ---- the ledger, one change at a time

    async def _sync(self) -> None:
        """Waits for a change that is under way, or makes one."""
        await asyncio.shield(self._begin())

    def _begin(self) -> asyncio.Task[None]:
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._settle())
        return self._syncing

    async def _settle(self) -> None:
        """Tells the ledger what each lease holds now, and takes what is short. What it gives back is gone here before it is there."""
        ending, leases = list(self._ending), list(self._leases.values())
        if not (ending or leases):
            return
        claims = []
        for lease in leases:
            surplus = self._surplus(lease)
            lease.left -= surplus
            lease.total -= surplus
            wanted = max(0, self._waiting[_unit(lease.meter)] - lease.left)
            limit = self._meters.get(lease.meter, 0)
            claims.append(Claim(lease.meter, lease.id, lease.window, lease.total, limit, wanted, self._ahead(lease)))
        try:
            grants = await asyncio.get_running_loop().run_in_executor(self._threads, self._ledger.settle, [*ending, *claims], self._now())
        except Exception as error:  # whatever it is, nothing was granted; who waits is refused
            if not self._problem:
                log.warning("the ledger %s cannot be changed: %s", self._ledger.key, str(error).replace("\n", " "))
            self._problem = type(error).__name__
            return
        self._problem = ""
        del self._ending[: len(ending)]
        for lease, claim, grant in zip(leases, claims, grants[len(ending) :], strict=True):
            self._granted(lease, claim, grant)

    def _granted(self, lease: Lease, claim: Claim, grant: Grant) -> None:
        if self._leases.get(lease.meter) is not lease:
            return  # its window ended meanwhile
        if grant.is_lost:
            self._leases[lease.meter] = _new_lease(lease.meter, max(lease.window, grant.window), claim.limit)
            return
        lease.total += grant.amount
        lease.left += grant.amount
        lease.free, lease.renewed = grant.free, time.monotonic()
        lease.dry_until = time.monotonic() + DRY_S if grant.amount < claim.wanted else 0.0

    def tidy(self) -> bool:
        """Gives back what is not needed. True when nothing is held any more."""
        now = time.monotonic()
        if not self._is_asked and now - self.touched > IDLE_S:
            self._end_leases()
        is_due = any(self._surplus(lease) or now - lease.renewed > RENEW_S for lease in self._leases.values())
        if self._ending or is_due:
            self._begin()
        return not (self._is_asked or self._leases or self._ending)

    async def give_all_back(self) -> None:
        """At the end. A lease under answers that are still open stays, and expires."""
        if self._syncing is not None:
            await self._syncing
        if not self.num_open:
            self._end_leases()
        await self._settle()

    @property
    def _is_asked(self) -> bool:
        return self.num_open > 0 or self._waiting.total() > 0 or (self._syncing is not None and not self._syncing.done())

    def _end_leases(self) -> None:
        for lease in self._leases.values():
            self._ending.append(Claim(lease.meter, lease.id, lease.window, lease.total - lease.left, is_last=True))
        self._leases.clear()

    # ---- what a client is told

    def headers(self, meters: Mapping[str, int]) -> dict[str, str]:
        told: dict[str, str] = {}
        held = [(self._leases[meter], limit) for meter, limit in meters.items() if meter in self._leases]
        for lease, limit in sorted(held, key=lambda pair: pair[0].left + pair[0].free, reverse=True):  # the least comes last, and stays
            unit, left = _unit(lease.meter), max(0, min(limit, lease.left + lease.free))
            told |= {f"x-ratelimit-limit-{unit}": str(limit), f"x-ratelimit-remaining-{unit}": str(left)}
            told[f"x-ratelimit-reset-{unit}"] = _span(max(0.0, lease.ends - self._now()))
        return told

    def _refusal(self, meter: str, limit: int, needs: Mapping[str, int]) -> Refusal:
        """429, in OpenAI's words. Reservations that would make room come back sooner than the window ends."""
        lease, need = self._leases[meter], needs[_unit(meter)]
        wait = 1 if lease.left + lease.reserved >= need else max(1, math.ceil(lease.ends - self._now()))
        what = f"this tenant's limit is {limit} {_unit(meter)} a {_period(meter)}"
        code, kind = (
            ("rate_limit_exceeded", "rate_limit_error") if _period(meter) == "minute" else ("insufficient_quota", "insufficient_quota")
        )
        message = f"{what}: this request may need {need} of them" + ("" if need > limit else f", and fewer are left; try again in {wait} s")
        after = 0 if need > limit else wait
        return Refusal(429, message, code, kind=kind, retry_after_s=after, headers=self.headers(self._meters))


def _away() -> Refusal:
    return Refusal(503, "this tenant's quota cannot be read at the moment", "quota_unavailable", kind="server_error", retry_after_s=5)


def _new_lease(meter: str, window: int, limit: int) -> Lease:
    return Lease(meter, secrets.token_hex(8), window, window_end(_period(meter), window), free=limit)


def _unit(meter: str) -> str:
    return meter.partition("_")[0]


def _period(meter: str) -> str:
    return meter.rpartition("_")[2]


def _span(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1h2m3s, 12s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
