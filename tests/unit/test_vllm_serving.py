"""Serving over the vllm engine, HTTP and all: formats and tool calls as the torch engine gives them, and what is refused before a header.

Runs in an environment that has vLLM (tests/contract/test_vllm.py).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import make_tiny_model
from tests.served import Store, run, served
from tests.served import store as store
from tests.unit.test_serving_tools import COLOUR, NOW, PAINT, TEMPLATE, chat, deltas, streamed_choice

pytest.importorskip("vllm", reason="vLLM is not installed here: tests/contract/test_vllm.py runs this in its own environment")


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wider-model"), hidden=128)  # heads of 32, vLLM's least


def test_formats_and_tools_hold_on_vllm_and_what_it_cannot_do_is_a_400(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tools.jinja").write_text(TEMPLATE)
    engine = {"kind": "vllm", "max_batch": 8, "max_context": 512, "dtype": "fp32", "kv_cache_mib": 64, "max_loras": 2, "max_rank": 16}

    async def go() -> None:
        async with served(store, tmp_path, chat_template=str(tmp_path / "tools.jinja"), engine=engine) as server:

            async def content(**body: Any) -> str:
                reply = await chat(server, model="support", **body)
                assert reply.status_code == 200, reply.text
                assert reply.headers["x-ftcore-adapter"].startswith("acme/support@")
                choice = reply.json()["choices"][0]
                assert choice["finish_reason"] == "stop"
                return str(choice["message"]["content"])

            schema = {"type": "json_schema", "json_schema": {"name": "paint", "schema": COLOUR}}
            texts = await asyncio.gather(*(content(response_format=schema, seed=seed) for seed in range(8)))
            for text in texts:
                Draft202012Validator(COLOUR).validate(json.loads(text))
            assert len(set(texts)) > 1
            assert set(await content(structured_outputs={"regex": "[ab]{3,5}"})) <= set("ab")
            assert await content(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")

            asked = {"tools": [PAINT, NOW], "tool_choice": "required", "parallel_tool_calls": False, "n": 4}
            called = set()
            for choice in (await chat(server, **asked)).json()["choices"]:
                (call,) = choice["message"]["tool_calls"]
                called.add(call["function"]["name"])
                if call["function"]["name"] == "paint":
                    Draft202012Validator(COLOUR).validate(json.loads(call["function"]["arguments"]))
            assert called == {"paint", "now"}
            named = {"tools": [PAINT, NOW], "tool_choice": {"type": "function", "function": {"name": "paint"}}, "stream": True}
            _, (call,), finish = streamed_choice(deltas((await chat(server, **named)).text), 0)
            assert (call["name"], finish) == ("paint", "tool_calls")
            Draft202012Validator(COLOUR).validate(json.loads(call["arguments"]))

            for body, reason in (
                ({"response_format": schema, "logprobs": True}, "no log-probabilities of constrained answers"),
                ({"structured_outputs": {"regex": "(a"}}, "cannot be compiled"),
            ):
                reply = await chat(server, **body, stream=True)
                assert (reply.status_code, reason in reply.json()["error"]["message"]) == (400, True), reply.text
            headers = server.headers("acme")
            reply = await server.http.post("/v1/embeddings", headers=headers, json={"model": "support", "input": "Hi"})
            assert (reply.status_code, "gives no embeddings" in reply.text) == (400, True)

    run(go(), 300)
