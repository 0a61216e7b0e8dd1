"""A torch engine over the oracles' adapters, and the check that an answer is its own adapter's; for tests of engines."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcore.engines.base import LiveEngine, Request, Sampling, Token
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError
from tests.oracles import Truth, make_adapter

NUM_ADAPTERS = 8
DIGESTS = [f"{number:064x}" for number in range(1, NUM_ADAPTERS + 1)]


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {digest: make_adapter(tiny_model_dir, home / digest[-2:], i) for i, digest in enumerate(DIGESTS)}


@pytest.fixture(scope="module")
def truth(tiny_model_dir: Path, adapters: dict[str, Path]) -> Truth:
    return Truth(tiny_model_dir, adapters)


@asynccontextmanager
async def opened(base: Path, **keys: Any) -> AsyncIterator[LiveEngine]:
    engine = await Torch(**{"max_batch": 6, "max_context": 128, "chunk_tokens": 16, "num_threads": 1, **keys}).open(str(base))
    try:
        yield engine
    finally:
        await engine.close()


def run(task: Coroutine[Any, Any, Any], limit_s: float = 0) -> Any:
    return asyncio.run(asyncio.wait_for(task, max(limit_s, 300)))


async def answer(engine: LiveEngine, request: Request) -> list[Token]:
    return [token async for token in engine.generate(request)]


def some_request(rng: random.Random, number: int, adapter: str, **keys: Any) -> Request:
    prompt = tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 60)))
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=number, num_logprobs=0)
    return Request(f"r{number}", prompt, adapter, **{"max_tokens": rng.randrange(1, 12), "sampling": sampling, **keys})


async def mixed(engine: LiveEngine, rng: random.Random) -> list[tuple[Request, list[Token]]]:
    """36 rows at once, in turn of no adapter and of each."""
    requests = [some_request(rng, i, ["", *DIGESTS][i % 9], max_tokens=10) for i in range(36)]
    answers = await asyncio.gather(*(answer(engine, request) for request in requests))
    return list(zip(requests, answers, strict=True))


async def come_and_go(
    engine: LiveEngine, adapters: dict[str, Path], num_requests: int, pause_s: float
) -> list[tuple[Request, list[Token]]]:
    """Eight clients, while two others load and unload adapters at random, each with a pause of at most `pause_s` between."""
    done: list[tuple[Request, list[Token]]] = []
    over = asyncio.Event()

    async def churn(seed: int) -> None:
        own = random.Random(seed)
        while not over.is_set():
            digest = own.choice(DIGESTS)
            await engine.load_adapter(digest, adapters[digest])
            await asyncio.sleep(own.random() * pause_s)
            await engine.unload_adapter(digest)

    async def client(seed: int) -> None:
        own = random.Random(seed)
        for i in range(num_requests // 8):
            request = some_request(own, seed * 100_000 + i, own.choice(["", *DIGESTS]))
            while True:
                try:
                    if request.adapter:
                        await engine.load_adapter(request.adapter, adapters[request.adapter])
                    done.append((request, await answer(engine, request)))
                    break
                except ConfigError as error:
                    assert "not loaded" in str(error)

    churning = [asyncio.create_task(churn(seed)) for seed in (101, 102)]
    await asyncio.gather(*(client(seed) for seed in range(1, 9)))
    over.set()
    await asyncio.gather(*churning)
    return done


def require_own(truth: Truth, request: Request, tokens: list[Token]) -> None:
    """Each log-probability is the adapter's own to 1e-4, and not any other's."""
    ids = [token.id for token in tokens]
    assert {token.adapter for token in tokens} == {request.adapter}
    got = torch.tensor([token.logprob for token in tokens])
    apart = {}
    for digest in ("", *truth.digests):
        logps = truth.answer_logps(digest, request.prompt, ids)
        apart[digest] = float((logps[range(len(ids)), ids] - got).abs().max())
    assert apart.pop(request.adapter) <= 1e-4
    if len(ids) >= 4:  # one token's number can be near another adapter's by chance, four cannot
        assert min(apart.values()) > 1e-3


def spoiled(folder: Path, copy: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "adapter_model.safetensors")
    return copy
