"""A small OpenAI-compatible server whose models are right a known share of the time, and some that misbehave."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRONG_OF_TEN = {"good": 1, "poor": 6, "streaming": 1, "whole": 1, "breaking": 1}
FIRST_S, REST_S = 0.02, 1.0
"""What the model `streaming` takes to its first piece, and from there to the end."""


class Answering:
    """`asked`: questions each model was asked, with repeats; `keys`: what came as authorization."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.keys: set[str] = set()
        self.busy = 0
        """So many questions are told to come back."""
        self.stranger_after = -1
        """After so many questions no model is known any more; -1: never."""
        self.url = ""

    def questions(self, model: str) -> list[str]:
        return [question for (name, question), count in self.asked.items() if name == model and question != "Hello" for _ in range(count)]

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        question, model = body["messages"][-1]["content"], body["model"]
        if self.busy and question != "Hello":
            self.busy -= 1
            return 429, {"Retry-After": "0"}, {"error": "busy"}
        self.asked[model, question] += 1
        if 0 <= self.stranger_after < self.asked.total():
            return 404, {}, {"error": "all models are gone"}
        if model == "whole" and body.get("stream"):
            return 400, {}, {"error": "no streaming here"}
        if model == "nonsense":
            return 200, {}, {"weather": "fine"}
        if model == "strict" and question != "Hello":
            return 400, {}, {"error": "too long"}
        if model not in WRONG_OF_TEN and model != "strict":
            return 404, {}, {"error": f"no model {model}"}
        found = re.search(r"(\d+) plus (\d+)", question)
        right = f"It is {int(found[1]) + int(found[2])}." if found else "Hello."
        said = "No idea." if found and int(found[1]) % 10 < WRONG_OF_TEN[model] else right
        usage = {"prompt_tokens": 9, "completion_tokens": 4}
        return 200, {}, {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}], "usage": usage}


@contextmanager
def answering() -> Iterator[Answering]:
    told = Answering()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.keys.add(self.headers.get("authorization", ""))
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            code, headers, body = told.reply(asked)
            if asked.get("stream") and asked["model"] in ("streaming", "breaking") and code == 200:
                self.stream(body, ends=asked["model"] == "streaming" or asked["max_tokens"] == 1)
                return
            data = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def stream(self, body: dict[str, Any], *, ends: bool) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            text, time_s = body["choices"][0]["message"]["content"], FIRST_S
            chunks: list[Any] = [{"choices": [{"delta": {"role": "assistant"}}]}]
            chunks += [{"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in (text[:3], text[3:])]
            if ends:
                chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": body["usage"]}]
            for number, chunk in enumerate(chunks):
                time.sleep(time_s if number in (1, 2) else 0)
                time_s = REST_S
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if ends:
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as told.url:
        yield told


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread of its own; its address, up to `/v1`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
