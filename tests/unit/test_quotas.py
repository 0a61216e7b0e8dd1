"""Quotas are exact: among requests, processes, kills and restarts, lost answers and windows; and they say what they refuse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ftcore.errors import StorageError
from ftcore.storage import Folder
from serving import quotas as quotas_module
from serving.gate import Refusal
from serving.ledger import EXPIRES_S, HOME, Ledger, window_at, window_end
from serving.quotas import Quotas, Reservation
from serving.settings import Limits
from serving.tenants import Caller

REPO = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 3, 31, 12, 0, 0, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no ledger that is away."""
    monkeypatch.setattr(quotas_module, "PATIENCE_S", 60.0)


def taken(store: str, meter: str = "tokens_per_month") -> int:
    return Ledger(Folder(store) / HOME, "acme").read().books[meter].taken


def caller(**limits: int) -> Caller:
    return Caller("acme", "k", Limits(**limits))


async def refused(quotas: Quotas, who: Caller, tokens: int) -> Refusal:
    with pytest.raises(Refusal) as raised:
        await quotas.reserve(who, tokens)
    return raised.value


class Unsteady(Folder):
    """Sometimes fails before a change is written, sometimes after."""

    rng = random.Random(0)

    def change(self, key: str, change: Callable[[bytes | None], bytes], what: str) -> None:
        fate = self.rng.random()
        if fate > 0.15:
            super().change(key, change, what)
        if fate < 0.3:
            raise StorageError("the answer was lost")


async def interleaved(store: str, seed: int, *, is_unsteady: bool, has_kills: bool) -> None:
    """Three processes' worth of requests, settlements, pauses and kills, in any order."""
    rng, limit = random.Random(seed), 3000
    who = caller(tokens_per_month=limit)
    open_: dict[Reservation, Quotas] = {}
    used_by: Counter[Quotas] = Counter()
    dead: dict[Quotas, int] = {}

    def begin() -> Quotas:
        quotas = Quotas(store, lambda: NOON)
        if is_unsteady:
            quotas._folder = Unsteady(quotas._folder.url)
        return quotas

    def settle(reservation: Reservation) -> None:
        used = rng.randrange(reservation.tokens + 1)
        used_by[open_.pop(reservation)] += used
        reservation.settle(used)

    async def ask(quotas: Quotas) -> None:
        with contextlib.suppress(Refusal):
            open_[await quotas.reserve(who, rng.randrange(1, 120))] = quotas

    alive = [begin() for _ in range(3)]
    for _ in range(100):
        fate, quotas = rng.random(), rng.choice(alive)
        if fate < 0.4:
            await asyncio.gather(*(ask(rng.choice(alive)) for _ in range(rng.randrange(1, 8))))
        elif fate < 0.85 and open_:
            settle(rng.choice(list(open_)))
        elif fate < 0.95 or not has_kills:
            if rng.random() < 0.5:  # this one comes to rest: its leases end
                for reservation in [each for each, owner in open_.items() if owner is quotas]:
                    settle(reservation)
            for _ in range(4):
                for purse in quotas._purses.values():
                    purse.tidy()
                await asyncio.sleep(0.01)
        else:
            for reservation in [each for each, owner in open_.items() if owner is quotas]:
                del open_[reservation]
            dead[quotas] = used_by.pop(quotas, 0)
            alive[alive.index(quotas)] = begin()
        assert sum(used_by.values()) + sum(dead.values()) + sum(each.tokens for each in open_) <= limit
    for reservation in list(open_):
        settle(reservation)
    for quotas in alive:
        if is_unsteady:
            for purse in quotas._purses.values():
                purse._ledger.folder = Folder(quotas._folder.url)
        await quotas.close()
    spent = sum(used_by.values())
    assert spent + sum(dead.values()) > 50
    if has_kills:
        assert spent + sum(dead.values()) <= taken(store) <= limit
    else:
        assert taken(store) == spent


@pytest.mark.parametrize(("is_unsteady", "has_kills"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("seed", [0, 1, pytest.param(range(2, 30), marks=pytest.mark.proof)])
def test_no_interleaving_grants_more_than_the_quota_or_loses_count(
    seed: int | range, is_unsteady: bool, has_kills: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas_module, "DRY_S", 0.05)
    monkeypatch.setattr(quotas_module, "IDLE_S", 0.0)
    for each in seed if isinstance(seed, range) else [seed]:
        asyncio.run(interleaved(str(tmp_path / str(each)), each, is_unsteady=is_unsteady, has_kills=has_kills))


class Client:
    """One process of tests/quota_clients.py."""

    def __init__(self, folder: Path, limit: int, share: int, seed: int) -> None:
        self.printed = folder / f"printed-{seed}"
        command = [sys.executable, "-m", "tests.quota_clients", str(folder / "store"), str(limit), str(share), str(seed)]
        with self.printed.open("w") as file:
            environment = {**os.environ, "PYTHONPATH": str(REPO)}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, text=True, cwd=REPO, env=environment)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.printed.read_text().split("\n")[:-1]]

    def until(self, reached: Callable[[list[list[str]]], bool]) -> None:
        while not reached(self.lines()):
            assert self.process.poll() is None
            time.sleep(0.02)

    def counted(self) -> tuple[int, int]:
        """(used, granted and never settled)"""
        granted = {line[1]: int(line[2]) for line in self.lines() if line[0] == "G"}
        settled = {line[1]: int(line[2]) for line in self.lines() if line[0] == "S"}
        return sum(settled.values()), sum(amount for name, amount in granted.items() if name not in settled)


def test_two_processes_one_killed_one_restarted_and_the_ledger_is_exact(tmp_path: Path) -> None:
    store, limit, share = str(tmp_path / "store"), 60_000, 15_000
    doomed, other = Client(tmp_path, limit, share, 1), Client(tmp_path, limit, share, 2)
    doomed.until(lambda lines: len(lines) > 300)
    doomed.process.kill()
    doomed.process.communicate()
    living = [other, Client(tmp_path, limit, share, 3)]
    for client in living:
        client.until(lambda lines: ["P"] in lines)
    for client in living:
        assert client.process.stdin
        client.process.stdin.write("\n")
        client.process.stdin.flush()
    for client in living:
        client.process.communicate(timeout=100)
        assert client.process.returncode == 0
    killed_used, killed_open = doomed.counted()
    spent = sum(client.counted()[0] for client in living)
    assert [client.counted()[1] for client in living] == [0, 0]
    ledger = taken(store)
    assert killed_used + killed_open <= ledger - spent, "what a killed process was granted counts as spent"
    assert 2 * share <= spent < ledger <= limit

    async def rest() -> None:
        quotas, who = Quotas(store), caller(tokens_per_month=limit)
        if limit > ledger:
            (await quotas.reserve(who, limit - ledger)).settle(limit - ledger)
        assert (await refused(quotas, who, 1)).code == "insufficient_quota"
        await quotas.close()

    asyncio.run(rest())
    assert taken(store) == limit


def test_hundreds_at_once_get_what_there_is_and_ask_the_ledger_a_few_times(tmp_path: Path) -> None:
    async def go() -> None:
        first, second = Quotas(str(tmp_path), lambda: NOON), Quotas(str(tmp_path), lambda: NOON)
        who = caller(tokens_per_minute=100, requests_per_minute=1000)
        asked = [asyncio.create_task((first, second)[number % 2].reserve(who, 1)) for number in range(600)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        granted = [each for each in done if isinstance(each, Reservation)]
        refusals = [each for each in done if isinstance(each, Refusal)]
        assert (len(granted), len(refusals)) == (100, 500)
        assert {each.status for each in refusals} == {429}
        for reservation in granted:
            reservation.settle(1)
        await asyncio.gather(first.close(), second.close())
        assert (taken(str(tmp_path), "tokens_per_minute"), taken(str(tmp_path), "requests_per_minute")) == (100, 100)

    asyncio.run(go())


def test_a_refusal_says_which_limit_and_when_to_come_back(tmp_path: Path) -> None:
    now = NOON + 12

    async def go() -> None:
        nonlocal now
        quotas = Quotas(str(tmp_path), lambda: now)
        who = caller(requests_per_minute=2, tokens_per_minute=1000, tokens_per_day=1500)
        first = await quotas.reserve(who, 900)
        told = await refused(quotas, who, 200)
        assert (told.status, told.code, told.headers["retry-after"]) == (429, "rate_limit_exceeded", "1"), "what is reserved may come back"
        first.settle(900)
        told = await refused(quotas, who, 200)
        requests = {"limit-requests": "2", "remaining-requests": "1", "reset-requests": "48s"}
        tokens = {"limit-tokens": "1000", "remaining-tokens": "100", "reset-tokens": "48s"}
        assert told.headers == {"retry-after": "48", **{f"x-ratelimit-{name}": value for name, value in (requests | tokens).items()}}
        assert "retry-after" not in (await refused(quotas, who, 1001)).headers, "it would never fit"
        (await quotas.reserve(who, 100)).settle(0)
        assert "2 requests a minute" in (await refused(quotas, who, 1)).message
        now += 48
        told = await refused(quotas, who, 601)
        assert (told.code, told.headers["retry-after"], told.headers["x-ratelimit-reset-tokens"]) == (
            "insufficient_quota",
            "43140",
            "11h59m0s",
        )
        (await quotas.reserve(who, 600)).settle(600)
        now += 86400
        (await quotas.reserve(who, 900)).settle(900)
        await quotas.close()

    asyncio.run(go())
    assert taken(str(tmp_path), "tokens_per_day") == 900


def test_windows_are_of_utc() -> None:
    for period, wanted in (("minute", NOON + 60), ("day", NOON + 43200), ("month", NOON + 43200)):
        assert window_end(period, window_at(period, NOON)) == wanted
        assert window_at(period, wanted) == window_at(period, NOON) + 1
    december = datetime(2026, 12, 31, 23, 59, tzinfo=UTC).timestamp()
    assert window_end("month", window_at("month", december)) == december + 60


def test_an_answer_counts_in_the_window_it_was_admitted_in_and_clocks_may_differ(tmp_path: Path) -> None:
    async def go() -> None:
        slow, fast = Quotas(str(tmp_path), lambda: NOON - 1), Quotas(str(tmp_path), lambda: NOON)
        who = caller(tokens_per_minute=100)
        old = await slow.reserve(who, 60)
        new = await fast.reserve(who, 80)
        old.settle(10)  # of a minute that the ledger no longer knows
        await slow.reserve(who, 40)  # still from what it holds of that minute
        assert (await refused(slow, who, 90)).status == 429, "the ledger is in the next minute: so is everybody who asks it"
        new.settle(80)
        assert (await refused(fast, who, 21)).status == 429
        await fast.close()
        assert taken(str(tmp_path), "tokens_per_minute") <= 100

    asyncio.run(go())


def test_a_lease_that_expired_is_spent_and_its_process_begins_another(tmp_path: Path) -> None:
    now = NOON

    async def go() -> None:
        nonlocal now
        asleep, awake = Quotas(str(tmp_path), lambda: now), Quotas(str(tmp_path), lambda: now)
        who = caller(tokens_per_day=100)
        first = await asleep.reserve(who, 60)
        now += EXPIRES_S + 1
        (await awake.reserve(who, 10)).settle(10)
        first.settle(0)
        (await asleep.reserve(who, 20)).settle(20)  # of the sixty, which the ledger counts as spent
        assert (await refused(asleep, who, 70)).status == 429
        (await asleep.reserve(who, 25)).settle(25)
        await asyncio.gather(asleep.close(), awake.close())

    asyncio.run(go())
    assert 95 <= taken(str(tmp_path), "tokens_per_day") <= 100


def test_without_the_store_it_serves_what_it_holds_then_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        quotas, who = Quotas(str(tmp_path / "store"), lambda: NOON), caller(tokens_per_day=100_000)
        first = await quotas.reserve(who, 10)
        await asyncio.sleep(0.2)  # it takes some ahead
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("in its place")
        served = [await quotas.reserve(who, 10) for _ in range(50)]
        told = await refused(quotas, who, 5000)
        assert (told.status, told.code, told.headers["retry-after"]) == (503, "quota_unavailable", "5")
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
        served += [first, await quotas.reserve(who, 5000)]
        for reservation in served:
            reservation.settle(3)
        await quotas.close()
        assert taken(str(tmp_path / "store"), "tokens_per_day") == 3 * len(served)

    asyncio.run(go())
    assert "cannot be changed" in caplog.text


def test_on_s3_two_processes_share_one_ledger(s3: str) -> None:
    async def go() -> None:
        first, second = Quotas(s3), Quotas(s3)
        who = caller(tokens_per_month=1000)
        asked = await asyncio.gather(*((first, second)[n % 2].reserve(who, 30) for n in range(60)), return_exceptions=True)
        granted = [each for each in asked if isinstance(each, Reservation)]
        assert 25 <= len(granted) <= 33
        for reservation in granted:
            reservation.settle(7)
        await asyncio.gather(first.close(), second.close())
        assert taken(s3) == 7 * len(granted)

    asyncio.run(go())
