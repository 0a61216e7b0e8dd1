"""A process that spends a tenant's quota as fast as it may: `python -m tests.quota_clients STORE LIMIT SHARE SEED`; for tests that kill it.

It prints `G id amount` for what it was granted and `S id used` when that is settled. Once it has used its share it prints `P` and waits
for a line; then it goes on until it was refused for a while.
"""

from __future__ import annotations

import asyncio
import random
import sys

from serving import quotas as quotas_module
from serving.gate import Refusal
from serving.quotas import Quotas
from serving.settings import Limits
from serving.tenants import Caller

TASKS = 100
quotas_module.PATIENCE_S = 60.0


async def spend(store: str, limit: int, share: int, seed: int) -> None:
    caller, rng = Caller("acme", "k", Limits(tokens_per_month=limit)), random.Random(seed)
    quotas = Quotas(store)
    quotas.open()
    go_on, spent = asyncio.Event(), 0

    async def pause() -> None:
        print("P", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        go_on.set()

    async def one(number: int) -> None:
        nonlocal spent
        refused = asked = 0
        while refused < 3:
            amount = rng.randrange(1, 60)
            try:
                reservation = await quotas.reserve(caller, amount)
            except Refusal as refusal:
                assert refusal.status == 429, refusal.message
                refused += 1
                await asyncio.sleep(0.2)
                continue
            asked += 1
            print(f"G {number}-{asked} {amount}", flush=True)
            await asyncio.sleep(rng.random() * 0.02)
            used = rng.randrange(amount + 1)
            print(f"S {number}-{asked} {used}", flush=True)
            reservation.settle(used)
            if spent < share <= spent + used:
                pausing.append(asyncio.create_task(pause()))
            spent += used
            if spent >= share:
                await go_on.wait()

    pausing: list[asyncio.Task[None]] = []
    await asyncio.gather(*(one(number) for number in range(TASKS)))
    await quotas.close()


if __name__ == "__main__":
    asyncio.run(spend(sys.argv[1], *map(int, sys.argv[2:])))
