"""What one tenant feels of the others: a stream while adapters are loaded cold beside it, short requests while a hog asks for everything.

    python benchmarks/neighbours.py [--tokens 2000] [--asks 200] [--threads 1]

One replica of the demo's base in this process, as Serve runs it. Loads: the gaps between a stream's tokens, in turns of 100 tokens with
and without another tenant's adapters being loaded one after another (fetched, hashed, bound, proven by their probes), so that both meet
the same minutes. Hog: seconds of 8 tokens for a light tenant, asked one after another, alone and while another keeps 64 answers of 200
tokens under way, in five rounds. Goals: median <= 1.05x and p99 <= 1.3x; p95 <= 1.5x. `at equal load` is the light tenant's p95 over that
among as many rows of other tenants of its own size, where nobody is held back.
"""

# ruff: noqa: E402 (the checkout is put on the path first)
from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.engines.base import Sampling
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.jobs import Answerer, Job, Piece
from serving.replica import Replica
from serving.settings import ServeSettings
from tests.oracles import make_adapter

BASE = ROOT / "ftcore/demo/base"
TURN, NUM_COLD, BATCH, ROUNDS = 100, 6, 16, 5
ENDLESS = Sampling(temperature=0, logit_bias=dict.fromkeys(range(4), -100.0))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="of the stream, with loads and without (2000)")
    parser.add_argument("--asks", type=int, default=200, help="of the light tenant, alone and beside others (200)")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (1)")
    return parser.parse_args()


def job(name: str, tenant: str, ref: AdapterRef | None, max_tokens: int) -> Job:
    return Job(name, tenant, Answerer("base", ref), tuple(range(10, 40)), max_tokens, ENDLESS)


async def finished(replica: Replica, asked: Job) -> float:
    started = time.perf_counter()
    async with aclosing(replica.answer(asked)) as events:
        async for _ in events:
            pass
    return time.perf_counter() - started


async def beside_loads(replica: Replica, own: AdapterRef, cold: list[AdapterRef], num_tokens: int) -> dict[str, list[float]]:
    gaps: dict[str, list[float]] = {"quiet": [], "loads": []}
    loading, over = asyncio.Event(), asyncio.Event()
    num_loads = 0

    async def load() -> None:
        nonlocal num_loads
        while not over.is_set():
            if not loading.is_set():
                await asyncio.sleep(0.005)
                continue
            ref = cold[num_loads % len(cold)]
            await replica.slots.load(ref)
            replica.slots.drop(ref)
            num_loads += 1

    loader = asyncio.create_task(load())
    while min(map(len, gaps.values())) < num_tokens:
        last = 0.0
        async with aclosing(replica.answer(job("stream", "acme", own, 4 * TURN))) as events:
            async for event in events:
                now = time.perf_counter()
                if isinstance(event, Piece):
                    if last:
                        made = gaps["loads" if loading.is_set() else "quiet"]
                        made.append(now - last)
                        if len(made) % TURN == 0:
                            (loading.clear if loading.is_set() else loading.set)()
                            await asyncio.sleep(0.05)  # what is under way ends, or begins
                            now = 0.0
                    last = now
    over.set()
    await loader
    print(f"{num_loads} adapters were loaded beside the stream")
    return gaps


async def light(replica: Replica, ref: AdapterRef, asks: int) -> list[float]:
    found = []
    for number in range(asks):
        found.append(await finished(replica, job(f"light{number}", "light", ref, 8)))
        await asyncio.sleep(0.02)
    return found


async def beside(replica: Replica, ref: AdapterRef, asks: int, other: Callable[[int], Job], num: int) -> tuple[list[float], float]:
    """Seconds of each ask of the light tenant; tokens a second of all together meanwhile."""
    over = asyncio.Event()

    async def keep_asking(number: int) -> None:
        while not over.is_set():
            await finished(replica, other(number))

    busy = [asyncio.create_task(keep_asking(number)) for number in range(num)]
    await asyncio.sleep(1)
    before, started = replica.engine.stats().num_tokens, time.perf_counter()
    found = await light(replica, ref, asks)
    speed = (replica.engine.stats().num_tokens - before) / (time.perf_counter() - started)
    over.set()
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    return found, speed


def at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * len(ordered)))]


async def compare(args: argparse.Namespace, home: Path) -> None:
    store, refs = AdapterStore(home / "adapters"), []
    for number in range(NUM_COLD + 2):
        made = make_adapter(BASE, home / f"made-{number}", number)
        tenant = ("acme", "light")[number] if number < 2 else "other"
        refs.append(import_adapter(made, f"{tenant}/a{number}", Model(path=str(BASE)), store, log=lambda _: None))
    engine: dict[str, Any] = {"num_threads": args.threads, "max_context": 512, "max_batch": BATCH}
    replica = await Replica.open(ServeSettings.model_validate({"base": str(BASE), "store": str(home / "adapters"), "engine": engine}))
    acme, lights, cold = refs[0], refs[1], refs[2:]
    await finished(replica, job("warm", "acme", acme, 50))
    gaps = await beside_loads(replica, acme, cold, args.tokens)
    for name, each in gaps.items():
        p50, p99 = statistics.median(each) * 1e3, at(each, 0.99) * 1e3
        print(f"stream, {name:8} {len(each):6} tokens   median {p50:7.2f} ms   p99 {p99:7.2f} ms   longest {max(each) * 1e3:7.2f} ms")
    median, tail = (float(of(gaps["loads"]) / of(gaps["quiet"])) for of in (statistics.median, lambda each: at(each, 0.99)))
    print(f"beside loads over quiet: median {median:.2f}x (goal 1.05), p99 {tail:.2f}x (goal 1.3)")

    await light(replica, lights, 10)
    alone, full, hogged = list[float](), list[float](), list[float]()
    speeds: dict[str, list[float]] = {"full": [], "hogged": []}
    for _ in range(ROUNDS):  # in turns: all three meet the same minutes
        asks = args.asks // ROUNDS
        alone += await light(replica, lights, asks)
        found, speed = await beside(replica, lights, asks, lambda n: job(f"peer{n}", f"peer{n}", lights, 8), BATCH - 1)
        full += found
        speeds["full"].append(speed)
        found, speed = await beside(replica, lights, asks, lambda n: job(f"hog{n}", "hog", acme, 200), 64)
        hogged += found
        speeds["hogged"].append(speed)
    stepped = replica.engine.stats().num_preempted
    for name, each in (("alone", alone), (f"among {BATCH - 1} like it", full), ("beside a hog", hogged)):
        p50, p95 = statistics.median(each) * 1e3, at(each, 0.95) * 1e3
        print(f"light tenant, {name:18} {len(each):4} asks   median {p50:7.1f} ms   p95 {p95:7.1f} ms")
    over_alone, over_full = (at(hogged, 0.95) / at(each, 0.95) for each in (alone, full))
    print(f"p95 beside a hog: {over_alone:.2f}x of alone (goal 1.5), {over_full:.2f}x at equal load; {stepped} rows stepped back")
    among, with_hog = (statistics.mean(each) for each in speeds.values())
    print(f"tokens a second of all: {among:.0f} among its like, {with_hog:.0f} beside a hog, whose rows wait for the light tenant's")
    await replica.close()


def main() -> int:
    args = parsed()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(args, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
