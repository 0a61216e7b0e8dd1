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
