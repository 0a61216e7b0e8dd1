"""Clients that people already use, against the serving API on a real port: the `openai` SDK, in a proof LiteLLM.

FTCORE_LITELLM_PYTHON    a Python that has tests/litellm.txt; unset: .venv-litellm, which `make proof` builds
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.live_http import loop_thread, on_a_port
from tests.oracles import Truth
from tests.served import Store, served
from tests.served import store as store
from tests.served import truth as truth

REPO = Path(__file__).resolve().parents[2]
LITELLM = Path(os.environ.get("FTCORE_LITELLM_PYTHON") or REPO / ".venv-litellm/bin/python")
ASK: Any = [{"role": "user", "content": "What is your name?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}
SCHEMA: Any = {
    "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def at(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Address and key, as every client takes them."""
    opened = served(store, tmp_path_factory.mktemp("clients"), engine={"max_batch": 8, "max_context": 500, "num_threads": 1})
    with loop_thread() as do:
        server = do(opened.__aenter__())
        with on_a_port(server, do) as port:
            yield {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": server.keys["acme"]}
        do(opened.__aexit__(None, None, None))


def test_the_openai_sdk_asks_whole_and_streamed_and_reads_every_field(at: dict[str, Any], store: Store) -> None:
    with openai.OpenAI(**at, max_retries=0) as client:
        assert [(model.id, model.model_dump()["parent"]) for model in client.models.list()] == [
            ("base", None), ("sales", "base"), ("support", "base")
        ]  # fmt: skip
        whole = client.chat.completions.create(model="support", messages=ASK, logprobs=True, top_logprobs=2, **GREEDY)
        (choice,) = whole.choices
        assert choice.finish_reason == "length" and whole.usage is not None and whole.usage.completion_tokens == 12
        assert choice.logprobs is not None and [len(token.top_logprobs) for token in choice.logprobs.content or ()] == [2] * 12
        assert whole.model_dump()["ftcore_receipt"]["adapter"] == store.refs["acme/support"].full
        stream = client.chat.completions.create(
            model="support", messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
        assert chunks[-1].usage == whole.usage and chunks[-1].system_fingerprint == whole.system_fingerprint
        plain = list(client.chat.completions.create(model="support", messages=ASK, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in plain) == choice.message.content
        assert plain[-1].model_dump()["ftcore_receipt"]["adapter"] == store.refs["acme/support"].full
        two = client.completions.create(model="sales", prompt="open", n=2, seed=1, max_tokens=5)
        assert len({each.text for each in two.choices}) == 2
        form: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA, "strict": True}}
        held = client.chat.completions.create(model="support", messages=ASK, response_format=form, max_tokens=200)
        assert json.loads(held.choices[0].message.content or "")["colour"] in ("red", "blue")
        raw = client.chat.completions.with_raw_response.create(model="support", messages=ASK, **GREEDY)
        assert raw.headers["x-ftcore-adapter"] == store.refs["acme/support"].full


def test_the_openai_sdk_asks_many_at_once_and_each_hears_its_own_adapter(at: dict[str, Any]) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(**at, max_retries=0) as client:

            async def text(model: str) -> str:
                stream = await client.chat.completions.create(model=model, messages=ASK, stream=True, **GREEDY)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

            models = ["support", "sales", "base"]
            alone = [await text(model) for model in models]
            assert len(set(alone)) == 3
            assert await asyncio.gather(*(text(model) for model in 4 * models)) == 4 * alone

    asyncio.run(go())


def test_the_openai_sdk_embeds(at: dict[str, Any], store: Store, truth: Truth) -> None:
    with openai.OpenAI(**at, max_retries=0) as client:
        rows = client.embeddings.create(model="support", input=[[5, 6, 7], [9, 9]]).data  # it asks for base64
    want = [truth.embedding(store.refs["acme/support"].digest, ids) for ids in ([5, 6, 7], [9, 9])]
    assert float((torch.tensor([row.embedding for row in rows]) - torch.stack(want)).abs().max()) <= 1e-5


def test_the_openai_sdk_raises_its_own_errors(at: dict[str, Any]) -> None:
    with openai.OpenAI(**at, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="no valid key"):
            client.with_options(api_key="ft_no").models.list()
        for foreign in ("legal", "bolt/support", "nothing"):
            with pytest.raises(openai.NotFoundError, match="does not exist, or is not yours"):
                client.chat.completions.create(model=foreign, messages=ASK)
        with pytest.raises(openai.BadRequestError, match="max_tokenz"):
            client.chat.completions.create(model="support", messages=ASK, extra_body={"max_tokenz": 3})
        with pytest.raises(openai.BadRequestError, match="does not fit the context"):
            client.completions.create(model="support", prompt=[5] * 600)


@pytest.mark.proof
@pytest.mark.skipif(not LITELLM.exists(), reason="no environment with LiteLLM: FTCORE_LITELLM_PYTHON names one, `make proof` builds it")
def test_litellm_and_the_sdk_it_wants_ask_too(at: dict[str, Any]) -> None:
    script = """
import asyncio, json, sys, litellm
at, ask, greedy = json.load(sys.stdin)
keys = dict(model="openai/support", api_base=at["base_url"], api_key=at["api_key"], messages=ask, **greedy)
whole = litellm.completion(**keys).choices[0].message.content
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **keys) if chunk.choices)
again = asyncio.run(litellm.acompletion(**keys)).choices[0].message.content
try:
    litellm.completion(**{**keys, "model": "openai/nothing"})
except litellm.NotFoundError:
    print(json.dumps([whole, streamed, again]))
"""
    asked = json.dumps([at, ASK, GREEDY])
    done = subprocess.run([LITELLM, "-c", script], input=asked, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    with openai.OpenAI(**at, max_retries=0) as client:
        own = client.chat.completions.create(model="support", messages=ASK, **GREEDY).choices[0].message.content
    assert json.loads(done.stdout.splitlines()[-1]) == [own] * 3
