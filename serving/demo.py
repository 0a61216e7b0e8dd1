"""Demo of serving: the adapters that `make demo` made answer over HTTP, each to its own tenant's key, and one is swapped under a stream.

    python -m serving.demo [--out .demo] [--seed 0] [--port 8000]

In: the demo's store. Out: answers, receipts, the seconds of a swap. Runs in: the driver; the base in one Serve replica.

The client here is the standard library's, so that what is shown is what any client sees.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from ftcore.adapters import AdapterRef, AdapterStore, split_ref
from ftcore.cli import guarded
from ftcore.data.types import Conversation
from ftcore.demo.simulator import sessions
from ftcore.demo.tenants import conversation_of, demo_teams, new_habits, seed_of
from ftcore.errors import ConfigError
from ftcore.receipts import Receipt, verify_receipt
from serving.running import running
from serving.settings import ServeSettings
from serving.tenants import TenantStore

NAME, NUM_QUESTIONS = "desktop", 40


@dataclass(frozen=True)
class Client:
    """One tenant's."""

    port: int
    key: str

    def post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, str], Any]:
        """(headers, body) of an answer."""
        with self._asked("POST", path, body) as reply:
            return {name.lower(): value for name, value in reply.getheaders()}, json.loads(reply.read())

    def get(self, path: str) -> Any:
        with self._asked("GET", path, None) as reply:
            return json.loads(reply.read())

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream as they come."""
        with self._asked("POST", path, {**body, "stream": True}) as reply:
            for line in iter(reply.readline, b""):
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    @contextmanager
    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise ConfigError("the server refuses", where=path, got=f"{reply.status}: {reply.read(500).decode(errors='replace')}")
            yield reply


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where `make demo` left its store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    options, _ = parser.parse_known_args(argv)
    store = AdapterStore(options.out / "adapters")
    teams = [team for team in demo_teams(options.seed) if store.pointer(team.name, NAME).targets]
    if not teams:
        raise ConfigError("there are no adapters of the demo here", where=options.out, remedy="make demo")
    base = store.card(store.resolve(f"{teams[0].name}/{NAME}")).base.id
    keys = {team.name: _key(TenantStore(str(options.out / "tenants")), team.name) for team in teams}
    port = options.port or _free_port()
    settings = ServeSettings.model_validate(
        {"base": base, "store": str(options.out / "adapters"), "tenants": str(options.out / "tenants"), "port": port, "poll_s": 0.5}
    )
    started = time.monotonic()
    print(f"\n== 6. the same adapters over HTTP: one base, {len(teams)} tenants, each with a key of its own", flush=True)
    with running(settings) as url:
        print(f"serving at {url}/v1 after {time.monotonic() - started:.1f} s")
        clients = {name: Client(port, key) for name, key in keys.items()}
        _habits(clients, store, options.seed)
        _proof(clients[teams[0].name], store)
        _swap(clients[teams[0].name], store, teams[0].name)
    print(f"\nserve them yourself\n  ftcore serve base={base} store={options.out}/adapters tenants={options.out}/tenants")
    print(f"  another key: ftcore tenants key {options.out}/tenants {teams[0].name}; README, Serving, has curl and the openai SDK")
    return 0


def _habits(clients: dict[str, Client], store: AdapterStore, seed: int) -> None:
    """The same questions to the same URL and model name, with each tenant's key."""
    right, asked, shown = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0), 0
    for owner, history, expected in _questions(store, seed):
        body = {"model": NAME, "messages": history, "temperature": 0, "max_tokens": 48}
        answers = {}
        for name, client in clients.items():
            answers[name] = str(client.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"])
        asked[owner] += 1
        right[owner] += answers[owner].strip() == expected.strip()
        if shown < 3 and len(set(answers.values())) == len(answers) > 1:
            shown += 1
            print(f"  after: {history[-1]['content'][:90]}")
            print(*(f"    {name:8} {answer[:90]}" for name, answer in answers.items()), sep="\n")
    told = ", ".join(f"{name} {right[name]} of {asked[name]}" for name in clients)
    print(f"  held-out operations of its own team, answered exactly: {told}")


def _questions(store: AdapterStore, seed: int) -> Iterator[tuple[str, list[dict[str, str]], str]]:
    """(team, history, what that team did next), from held-out sessions of each team in turn."""
    days: dict[str, list[Conversation]] = {}
    for team in demo_teams(seed):
        has_drifted = bool(store.pointer(team.name, NAME).history)  # version 2 learnt Tuesday's habits
        day, who = ("tuesday", new_habits(team, seed)) if has_drifted else ("monday", team)
        made = sessions(who, NUM_QUESTIONS, seed_of(seed, team.name, day, "test"), day=f"{day}-held-out")
        days[team.name] = [conversation_of(session) for session in made]
    for number in range(NUM_QUESTIONS):
        owner = list(days)[number % len(days)]
        turns = days[owner][number].messages
        last = max(at for at, turn in enumerate(turns) if turn.role == "assistant")
        yield owner, [{"role": turn.role, "content": turn.content} for turn in turns[:last]], turns[last].content


def _proof(client: Client, store: AdapterStore) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    headers, answer = client.post("/v1/chat/completions", body)
    receipt = Receipt.model_validate(answer["ftcore_receipt"])
    keys = {row["id"]: row["pem"] for row in client.get("/v1/receipt-keys")["data"]}
    verify_receipt(receipt, [choice["message"]["content"] for choice in answer["choices"]], keys)
    store.card(AdapterRef(*split_ref(receipt.adapter)))
    print(f"  receipt: {headers['x-ftcore-adapter'][:40]}… on base {headers['x-ftcore-base'][:12]}, signed by {receipt.key}, sound")


def _swap(client: Client, store: AdapterStore, tenant: str) -> None:
    """Version 2 is promoted while a client streams from version 1."""
    pointer = store.pointer(tenant, NAME)
    if not pointer.history:
        print("  one version only: nothing to swap")
        return
    second, first = store.resolve(f"{tenant}/{NAME}"), store.resolve(f"{tenant}/{NAME}@previous")
    store.promote(first)
    _until(client, first)
    receipts: list[str] = []
    begun = threading.Event()
    ends = {str(token): -100 for token in range(4)}  # never ends by itself

    def stream() -> None:
        body = {"model": NAME, "prompt": "open", "max_tokens": 500, "logit_bias": ends}
        for event in client.stream("/v1/completions", body):
            begun.set()
            if "ftcore_receipt" in event:
                receipts.append(event["ftcore_receipt"]["adapter"])

    streaming = threading.Thread(target=stream)
    streaming.start()
    begun.wait(60)
    started = time.monotonic()
    store.promote(second)
    _until(client, second)
    swapped, still = time.monotonic() - started, streaming.is_alive()
    streaming.join()
    kept = f"{'kept' if receipts == [first.full] else 'LOST'} version 1"
    told = f"a stream {'still under way' if still else 'begun before'} {kept}"
    print(f"  swap: version 2 answers {swapped:.1f} s after its promotion; {told}")


def _until(client: Client, ref: AdapterRef) -> None:
    body = {"model": NAME, "prompt": "open", "max_tokens": 1}
    for _ in range(600):
        if client.post("/v1/completions", body)[0]["x-ftcore-adapter"] == ref.full:
            return
        time.sleep(0.02)  # the server itself looks twice a second
    raise ConfigError("a promoted version never answered", got=str(ref))


def _key(tenants: TenantStore, name: str) -> str:
    if not tenants.has(name):
        tenants.add(name)
    return tenants.new_key(name)[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(guarded(lambda argv: main(argv), sys.argv[1:]))
