"""Over real HTTP, by log-probabilities: each answer is plain PEFT's with its own adapter, whatever is dropped and replaced meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.engines.base import Request, Token
from ftcore.layers import multi_lora
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from tests.live_engines import NUM_ADAPTERS, require_own
from tests.live_http import loop_thread, on_a_port
from tests.oracles import Truth, make_adapter
from tests.served import Server, Store, served

NUM_NAMES = NUM_ADAPTERS // 2
"""Each name has two versions."""


@dataclass
class Said:
    """One answer as HTTP gave it."""

    digest: str
    prompt: tuple[int, ...]
    texts: list[str]
    logprobs: list[float]

    def tokens(self, truth: Truth, ids: dict[str, list[int]]) -> list[Token]:
        """As the engine made them. The API gives texts: of several tokens with one text, the one whose number fits, and those after it."""
        paths: list[list[int]] = [[]]
        for text, logprob in zip(self.texts, self.logprobs, strict=True):
            longer = [[*path, id_] for path in paths for id_ in ids[text]]
            if len(longer) > 1:
                own = {id(path): truth.logps(self.digest, [*self.prompt, *path])[-1] for path in paths}
                fits = [[*path, id_] for path in paths for id_ in ids[text] if abs(float(own[id(path)][id_]) - logprob) <= 1e-4]
                longer = fits or longer[:1]
            paths = longer
        return [Token(id_, self.digest, logprob) for id_, logprob in zip(paths[0], self.logprobs, strict=True)]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    home = tmp_path_factory.mktemp("oracle")
    place, refs, folders = AdapterStore(home / "adapters"), {}, {}
    for number in range(NUM_ADAPTERS):
        key, name = f"{number}", f"acme/n{number % NUM_NAMES}"
        folders[key] = make_adapter(tiny_model_dir, home / f"made-{number}", number)
        refs[key] = import_adapter(folders[key], name, Model(path=str(tiny_model_dir)), place, log=lambda _: None)
        place.promote(refs[key])
    return Store(home / "adapters", tiny_model_dir, refs, folders)


@pytest.fixture(scope="module")
def truth(store: Store) -> Truth:
    return Truth(store.base, {ref.digest: store.folders[key] for key, ref in store.refs.items()})


def ids_of(tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of each text."""
    ids = defaultdict(list)
    for id_ in range(len(tokenizer)):
        ids[tokenizer.decode([id_])].append(id_)
    return ids


@pytest.mark.parametrize("num_requests", [96, pytest.param(10_000, marks=pytest.mark.proof)])
def test_no_answer_over_http_is_another_adapters(store: Store, truth: Truth, tmp_path: Path, num_requests: int) -> None:
    """Four clients ask by name, by name and digest, and for the bare base, while versions are dropped and names are promoted at random."""
    opened = served(store, tmp_path, engine={"max_batch": 8, "max_context": 256, "num_threads": 1, "max_lanes": 24}, poll_s=0.01)
    with loop_thread() as do:
        server: Server = do(opened.__aenter__())
        with on_a_port(server, do) as port:
            said, num_changes = asyncio.run(_under_churn(server, do, port, list(store.refs.values()), num_requests))
        tokenizer = server.replica.base.tokenizer
        do(opened.__aexit__(None, None, None))
    ids = ids_of(tokenizer)
    for number, answer in enumerate(said):
        require_own(truth, Request(f"r{number}", answer.prompt, answer.digest), answer.tokens(truth, ids))
    met = Counter(answer.digest for answer in said)
    assert len(said) == num_requests and set(met) == {"", *truth.digests}
    print(f"{num_requests} answers over HTTP, {num_changes} versions dropped or promoted meanwhile, 0 wrong; {sorted(met.values())}")


async def _under_churn(server: Server, do: Any, port: int, refs: list[AdapterRef], num_requests: int) -> tuple[list[Said], int]:
    said: list[Said] = []
    changes, over = Counter[str](), asyncio.Event()

    async def churn() -> None:
        own = random.Random(0)
        while not over.is_set():
            ref = own.choice(refs)
            if own.random() < 0.5:
                await asyncio.to_thread(server.store.promote, ref)
            else:
                await asyncio.to_thread(do, _dropped(server, ref))
            changes["all"] += 1
            await asyncio.sleep(own.random() * 0.4)

    async def client(seed: int, http: httpx.AsyncClient) -> None:
        own = random.Random(seed)
        for number in range(num_requests // 4):
            ref = own.choice(refs)
            model = own.choice([ref.name, ref.name, f"{ref.name}@{ref.digest[:16]}", ref.full, "base"])
            prompt = tuple(own.randrange(5, 250) for _ in range(own.randrange(1, 40)))
            body = {
                "model": model, "prompt": prompt, "max_tokens": own.randrange(4, 9), "logprobs": 0, "seed": number,
                "temperature": own.choice([0.0, 1.0]), "logit_bias": {str(special): -100 for special in range(3)},
            }  # fmt: skip
            reply = await http.post("/v1/completions", headers=server.headers("acme"), json=body)
            assert reply.status_code == 200, reply.text
            told, logprobs = reply.headers["x-ftcore-adapter"], reply.json()["choices"][0]["logprobs"]
            wanted = {each.full for each in refs if each.name == ref.name} if model == ref.name else {"" if model == "base" else ref.full}
            assert told in wanted
            said.append(Said(told.rpartition("@")[2], prompt, logprobs["tokens"], logprobs["token_logprobs"]))

    churning = asyncio.create_task(churn())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        await asyncio.gather(*(client(seed, http) for seed in range(4)))
    over.set()
    await churning
    return said, changes["all"]


async def _dropped(server: Server, ref: AdapterRef) -> None:
    server.replica.slots.drop(ref)


def test_eight_adapters_and_the_base_in_one_step_over_http_are_each_their_own(
    store: Store, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighteen clients at once, two for each version and two for the base."""
    steps: list[set[int | None]] = []
    real = multi_lora.batches_of

    def watched(slots: Any, device: Any) -> Any:
        steps.append({None if slot is None else id(slot) for slot in slots})
        return real(slots, device)

    monkeypatch.setattr(multi_lora, "batches_of", watched)
    engine = {"max_batch": 20, "max_context": 256, "num_threads": 1, "max_lanes": 512}
    models = ["base", *(f"{ref.name}@{ref.digest}" for ref in store.refs.values())] * 2

    async def ask(http: httpx.AsyncClient, server: Server, number: int) -> Said:
        prompt = tuple(5 + (7 * number + at) % 240 for at in range(5 + number))
        body = {"model": models[number], "prompt": prompt, "max_tokens": 24, "logprobs": 0, "temperature": 0,
                "logit_bias": {str(special): -100 for special in range(3)}}  # fmt: skip
        reply = await http.post("/v1/completions", headers=server.headers("acme"), json=body)
        assert reply.status_code == 200, reply.text
        logprobs = reply.json()["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == 24
        return Said(reply.headers["x-ftcore-adapter"].rpartition("@")[2], prompt, logprobs["tokens"], logprobs["token_logprobs"])

    async def at_once(server: Server, port: int) -> list[Said]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            await asyncio.gather(*(ask(http, server, number) for number in range(len(models))))  # loads them all
            return await asyncio.gather(*(ask(http, server, number) for number in range(len(models))))

    opened = served(store, tmp_path, engine=engine, limits={"max_concurrent": 20})
    with loop_thread() as do:
        server: Server = do(opened.__aenter__())
        with on_a_port(server, do) as port:
            said = asyncio.run(at_once(server, port))
        tokenizer = server.replica.base.tokenizer
        do(opened.__aexit__(None, None, None))
    assert max(map(len, steps)) == NUM_ADAPTERS + 1 and any(None in step and len(step) > NUM_ADAPTERS for step in steps)
    ids = ids_of(tokenizer)
    assert [answer.digest for answer in said] == [model.partition("@")[2] for model in models]
    for number, answer in enumerate(said):
        require_own(truth, Request(f"r{number}", answer.prompt, answer.digest), answer.tokens(truth, ids))
