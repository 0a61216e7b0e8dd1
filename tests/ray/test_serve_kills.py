"""Replicas that are killed, added and taken away while clients ask: every request is answered by its own adapter, or told why not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.settings import ServeSettings
from tests.oracles import make_adapter
from tests.serve_command import free_port

pytestmark = pytest.mark.ray
NUM_ADAPTERS, NUM_CLIENTS = 4, 6
BODY = {"prompt": [5, 6, 7], "max_tokens": 24, "temperature": 0, "seed": 1}
ENGINES = {
    "fake": {"kind": "fake", "vocabulary": 250, "max_context": 128, "max_batch": 8, "token_s": 0.01},
    "torch": {"kind": "torch", "max_context": 128, "max_batch": 8, "num_threads": 1},
}


@pytest.fixture(scope="module")
def refs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, AdapterRef]]:
    home = tmp_path_factory.mktemp("kills")
    store, refs = AdapterStore(home / "adapters"), {}
    for number in range(NUM_ADAPTERS):
        made = make_adapter(tiny_model_dir, home / f"made-{number}", number)
        ref = import_adapter(made, f"demo/a{number}", Model(path=str(tiny_model_dir)), store, log=lambda _: None)
        store.promote(ref)
        refs[ref.name] = ref
    return home / "adapters", refs


@contextmanager
def serving(base: Path, refs: tuple[Path, dict[str, AdapterRef]], engine: str, replicas: Any) -> Iterator[str]:
    from ray import serve

    from serving.app import application

    port = free_port()
    settings = ServeSettings.model_validate(
        {"base": str(base), "store": str(refs[0]), "local_tenant": "demo", "replicas": replicas, "num_cpus": 0.5, "port": port,
         "queue": 64, "engine": ENGINES[engine]}
    )  # fmt: skip
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(application(settings), name="ftcore", route_prefix="/", logging_config={"log_level": "WARNING"})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@dataclass
class Told:
    """What clients were told."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Clients:
    """Ask all the while, whole and streamed, and hold each answer against what the adapter said when nobody disturbed it."""

    def __init__(self, http: httpx.AsyncClient, refs: dict[str, AdapterRef], said: dict[str, str] | None = None) -> None:
        self._http, self._refs, self.told = http, refs, Told()
        self.said: dict[str, str] = said or {}

    async def learn(self) -> None:
        for name in self._refs:
            reply = await self._http.post("/v1/completions", json={**BODY, "model": name})
            assert reply.status_code == 200, reply.text
            self.said[name] = reply.json()["choices"][0]["text"]
        assert len(set(self.said.values())) == NUM_ADAPTERS, "adapters must not say the same"

    async def all_right(self) -> bool:
        """Whether every adapter answers."""
        replies = [await self._http.post("/v1/completions", json={**BODY, "model": name}) for name in self._refs]
        texts = {
            name: reply.json()["choices"][0]["text"] for name, reply in zip(self._refs, replies, strict=True) if reply.status_code == 200
        }
        return texts == self.said

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[Told]:
        over = asyncio.Event()

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            while not over.is_set():
                await (self._whole if rng.random() < 0.5 else self._stream)(rng.choice(list(self._refs)))

        tasks = [asyncio.create_task(client(seed)) for seed in range(NUM_CLIENTS)]
        try:
            yield self.told
        finally:
            over.set()
            await asyncio.gather(*tasks)
        assert not self.told.wrong, self.told.wrong[:5]

    async def _whole(self, name: str) -> None:
        reply = await self._http.post("/v1/completions", json={**BODY, "model": name})
        if reply.status_code != 200:
            self._refused(name, reply.status_code, reply.text)
            return
        body = reply.json()
        self._note(name, "answered", reply, body["choices"][0]["text"] == self.said[name], body)
        self._note(name, "receipts", reply, body["ftcore_receipt"]["adapter"] == self._refs[name].full, body)

    async def _stream(self, name: str) -> None:
        text, ended = "", ""
        async with self._http.stream("POST", "/v1/completions", json={**BODY, "model": name, "stream": True}) as reply:
            if reply.status_code != 200:
                self._refused(name, reply.status_code, (await reply.aread()).decode())
                return
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    ended = "streamed"
                elif line:
                    body = json.loads(line.removeprefix("data: "))
                    if "error" in body:
                        ended = f"broken off: {body['error']['code']}"
                        assert set(body["error"]) == {"message", "type", "param", "code"}
                    text += "".join(choice["text"] for choice in body.get("choices", ()))
        own = self.said[name] == text if ended == "streamed" else self.said[name].startswith(text)
        self._note(name, ended or "ended without a word", reply, own and bool(ended), text)

    def _refused(self, name: str, status: int, text: str) -> None:
        try:
            error = json.loads(text)["error"]
            clear = status in (429, 503) and bool(error["message"]) and set(error) == {"message", "type", "param", "code"}
            code = error["code"]
        except (ValueError, KeyError, TypeError):
            clear, code = False, ""
        self.told.counts[f"refused {status} {code}"] += 1
        if not clear:
            self.told.wrong.append(f"{name}: {status} {text[:300]}")

    def _note(self, name: str, how: str, reply: httpx.Response, fine: bool, got: object) -> None:
        self.told.counts[how] += 1
        if not fine or reply.headers["x-ftcore-adapter"] != self._refs[name].full:
            self.told.wrong.append(f"{name} {how}: {reply.headers['x-ftcore-adapter'][:30]} {str(got)[:300]}")


def engine_pids() -> set[int]:
    """Processes of engine replicas under this one, and of nobody else's Ray."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_text()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
    found = set()
    for pid, name in names.items():
        parent = pid
        while name.startswith("ray::ServeReplica:ftcore:engine") and parent in parents and parent != os.getpid():
            parent = parents[parent]
        if parent == os.getpid() and pid != parent:
            found.add(pid)
    return found


def num_running() -> int:
    from ray import serve

    states = serve.status().applications["ftcore"].deployments["engine"].replica_states
    return int(states.get("RUNNING", 0))


async def until(num: int, limit_s: float = 400) -> None:
    """So many replicas serve, each with a live process."""
    async with asyncio.timeout(limit_s):
        while not (await asyncio.to_thread(num_running) == num == len(await asyncio.to_thread(engine_pids))):
            await asyncio.sleep(0.2)


async def kill_one(rng: random.Random) -> None:
    if pids := sorted(await asyncio.to_thread(engine_pids)):
        os.kill(rng.choice(pids), signal.SIGKILL)


@pytest.mark.parametrize(
    ("engine", "num_replicas", "num_kills", "every_s"),
    [("fake", 4, 60, 5.0), ("torch", 2, 30, None)],
)  # fmt: skip
@pytest.mark.proof
def test_a_killed_replica_costs_no_wrong_answer_and_no_silence(
    local_ray: None, tiny_model_dir: Path, refs: tuple[Path, dict[str, AdapterRef]],
    engine: str, num_replicas: int, num_kills: int, every_s: float | None,
) -> None:  # fmt: skip
    """`every_s` None: the next kill comes when all replicas are ready again."""

    async def go(url: str) -> None:
        rng = random.Random(0)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            clients = Clients(http, refs[1])
            await clients.learn()
            async with clients.asking() as told:
                for _ in range(num_kills):
                    await asyncio.sleep(every_s or 1.0)
                    if every_s is None:
                        await until(num_replicas)
                    await kill_one(rng)
                await until(num_replicas)
            assert await clients.all_right()
        assert told.counts["answered"] > 0 and told.counts["streamed"] > 0
        print(f"{engine}: {num_kills} kills, {dict(told.counts)}, 0 wrong")

    with serving(tiny_model_dir, refs, engine, num_replicas) as url:
        asyncio.run(asyncio.wait_for(go(url), 3000))


def test_replicas_come_are_killed_and_go_while_clients_ask(
    local_ray: None, tiny_model_dir: Path, refs: tuple[Path, dict[str, AdapterRef]]
) -> None:
    """1 -> 2 as clients come, 2 -> 1 as most of them leave: who stays hears nothing of it. Between, one of the two is killed."""
    scale = {"min": 1, "max": 2, "target": 2, "up_after_s": 1, "down_after_s": 1}

    async def go(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            many = Clients(http, refs[1])
            await many.learn()
            through, few = Clients(http, refs[1], many.said), Clients(http, dict(list(refs[1].items())[:1]), many.said)
            async with many.asking() as told:
                await until(2)
            async with through.asking() as met:
                await until(2)
                await kill_one(random.Random(0))
                await asyncio.sleep(1)
                await until(2)
                assert await many.all_right()
            assert met.counts["answered"] > 0 and met.counts["streamed"] > 0
            over = asyncio.create_task(until(1))
            while not over.done():
                await few._stream("a0")
            await over
        for counts in (told.counts, few.told.counts):
            assert set(counts) <= {"answered", "receipts", "streamed"}, counts
        assert not few.told.wrong, few.told.wrong
        print(f"1 -> 2: {dict(told.counts)}, a kill: {dict(met.counts)}, -> 1: {dict(few.told.counts)}")

    with serving(tiny_model_dir, refs, "fake", scale) as url:
        asyncio.run(asyncio.wait_for(go(url), 1500))
