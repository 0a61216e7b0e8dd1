"""Endpoint: an OpenAI-compatible chat endpoint as one of the systems that are judged.

In: messages. Out: Said, or an error that says whether the row or the endpoint is at fault. Runs in: workers of an evaluation, the driver.

What passes by itself is waited for: no connection, 429 (as long as Retry-After says), 5xx. A 400 or 413 is the row's own fault (too long)
and costs that row alone; anything else that is no answer ends the evaluation, which goes on where it was.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ftcore.card import printable
from ftcore.data.types import Message
from ftcore.errors import ConfigError, DataError, FtcoreError
from ftcore.evals.given import Said
from ftcore.evals.streamed import ASKING, whole

TIMEOUT_S = 300.0
NUM_TRIES = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
PASSING = (408, 425, 429, 500, 502, 503, 504)
OF_THE_ROW = (400, 413, 422)


@dataclass(frozen=True)
class Endpoint:
    """`url` up to /v1; `key_variable` names the environment variable that holds the key."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = TIMEOUT_S
    num_tries: int = NUM_TRIES
    streams: bool = False
    """Asked to answer piece by piece, so that the first one can be timed."""

    @classmethod
    def parse(cls, text: str, key_variable: str) -> Endpoint:
        url, _, model = text.partition("#")
        if not model or not urlsplit(url).netloc:
            raise ConfigError("an endpoint needs its model's name", got=text, wanted="http://host:port/v1#model")
        return cls(url.rstrip("/"), model, key_variable)

    def checked(self) -> Endpoint:
        """Asks for one token; returns the endpoint as it is best asked. Raises ConfigError or FtcoreError with the endpoint's own words."""
        try:
            streaming = replace(self, streams=True)
            replace(streaming, num_tries=3).answer([Message("user", "Hello")], (), 1)
            return streaming
        except DataError:  # not every one streams, or counts tokens as it does
            self.check()
            return self

    def check(self) -> None:
        """Asks for one token. Raises ConfigError or FtcoreError with the endpoint's own words."""
        try:
            replace(self, num_tries=3).answer([Message("user", "Hello")], (), 1)
        except DataError as error:
            raise ConfigError(
                "this endpoint refuses a plain question", where=self.url, got=error.got, remedy="check the model's name"
            ) from error

    def answer(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], max_tokens: int, schema: dict[str, Any] | None = None
    ) -> Said:
        """The most likely answer, held to a JSON schema if there is one. Raises DataError where the row is at fault."""
        body: dict[str, Any] = {
            "model": self.model, "messages": [_plain(turn) for turn in messages], "max_tokens": max_tokens, "temperature": 0,
        }  # fmt: skip
        if self.streams:
            body |= ASKING
        if tools:
            body["tools"] = list(tools)
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        started = time.monotonic()
        reply, first_token_s = self._asked(json.dumps(body).encode())
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text, finish = choice["message"]["content"] or "", choice.get("finish_reason") or ""
            counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise FtcoreError(
                "this endpoint answers with something that is no chat completion", where=self.url, got=printable(json.dumps(reply))[:300],
                wanted="choices[0].message.content", remedy="check that the URL ends in /v1 and is OpenAI-compatible",
            ) from error  # fmt: skip
        if not isinstance(text, str):
            raise FtcoreError("this endpoint answers without text", where=self.url, got=printable(json.dumps(reply))[:300])
        return Said(text, str(finish), *counts, first_token_s=first_token_s, seconds=time.monotonic() - started)

    def _asked(self, body: bytes) -> tuple[Any, float | None]:
        """The reply, and the seconds from the question that it answers to its first text."""
        headers = {"content-type": "application/json"}
        if key := os.environ.get(self.key_variable, ""):
            headers["authorization"] = f"Bearer {key}"
        wait = FIRST_WAIT_S
        for left in reversed(range(self.num_tries)):
            asked = time.monotonic()
            try:
                with urlopen(Request(f"{self.url}/chat/completions", body, headers), timeout=self.timeout_s) as reply:
                    completion, first = whole(reply)
                    return completion, None if first is None else first - asked
            except HTTPError as error:
                with error:
                    said = printable(error.read(2000).decode(errors="replace"))[:300]
                if error.code in OF_THE_ROW:
                    raise DataError("the endpoint refuses this row", where=self.url, got=f"{error.code}: {said}") from error
                if error.code not in PASSING or not left:
                    raise self._refused(error.code, said) from error
                wait = max(wait, _asked_to_wait(error.headers.get("Retry-After", "")))
            except (URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                if not left:
                    raise FtcoreError(
                        "this endpoint does not answer", where=self.url, got=str(getattr(error, "reason", error))[:300],
                        remedy="check that it runs; the same command goes on where it was",
                    ) from error  # fmt: skip
            except ValueError as error:
                raise FtcoreError("this endpoint answers with something that is not JSON", where=self.url, got=str(error)[:200]) from error
            time.sleep(min(wait, LONGEST_WAIT_S) * random.uniform(1, 1.25))
            wait *= 2
        raise AssertionError("the last try returns or raises")

    def _refused(self, code: int, said: str) -> FtcoreError:
        if code in (401, 403):
            remedy = f"put a key that it takes into {self.key_variable} (--key-variable names another)"
            return ConfigError("this endpoint takes no such key", where=self.url, got=f"{code}: {said}", remedy=remedy)
        if code == 404:
            return ConfigError("this endpoint has no such model or path", where=f"{self.url}#{self.model}", got=f"404: {said}")
        return FtcoreError("this endpoint fails", where=self.url, got=f"{code}: {said}", remedy="the same command goes on where it was")


def _asked_to_wait(text: str) -> float:
    """Seconds; 0 where it says nothing, or a date."""
    return float(text) if text.strip().isdigit() else 0.0


def _plain(turn: Message) -> dict[str, Any]:
    calls = {"tool_calls": [_call(call) for call in turn.tool_calls]} if turn.tool_calls else {}
    answered = {"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {}
    return {"role": turn.role, "content": turn.content, **calls, **answered}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI has a call's arguments as text."""
    function = call["function"]
    arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}}
