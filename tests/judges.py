"""A small OpenAI-compatible server whose models judge: fairly, by the place of an answer, in prose, too late, or not at all."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.answering import listening

PART = re.compile(r"<<(\w+(?: \d)?) ([0-9a-f]{16})>>\n(.*?)\n<<end \2>>", re.DOTALL)


def parts_of(body: dict[str, Any]) -> dict[str, str]:
    """What is judged, as the marks of the first user's message have it."""
    return {what: text for what, _, text in PART.findall(body["messages"][1]["content"])}


def is_trial(body: dict[str, Any]) -> bool:
    return parts_of(body).get("reference") == "4"


class Judges:
    """`bodies`: every request that was answered, in order."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.busy = 0
        """So many requests are told to come back."""
        self.silent_s = 0.0
        self.gone_after = -1
        """After so many requests the server fails for good; -1: never."""
        self.counts = True
        """Whether it says how many tokens it read and wrote."""
        self.url = ""
        self.lock = threading.Lock()

    def of(self, model: str) -> list[dict[str, Any]]:
        """Requests about rows: those without the trial's."""
        return [body for body in self.bodies if body["model"] == model and not is_trial(body)]

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if self.busy:
            self.busy -= 1
            return 429, {"Retry-After": "0"}, {"error": "busy"}
        if 0 <= self.gone_after <= len(self.bodies):
            return 500, {}, {"error": "out of order"}
        if body["model"] == "closed":
            return 400, {}, {"error": "unknown field max_tokens"}
        if body["model"] == "prose" and "response_format" in body:
            return 400, {}, {"error": "unknown field response_format"}
        self.bodies.append(body)
        said = self.said(body["model"], body)
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 10}} if self.counts else {}
        return 200, {}, {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}], **usage}

    def said(self, model: str, body: dict[str, Any]) -> str:
        parts, again = parts_of(body), len(body["messages"]) > 2
        number = int((re.search(r"\d+", parts.get("question", "")) or ["0"])[0])
        verdict = self.verdict(model, body, number)
        if model == "babble" or (model == "mumble" and number % 5 == 0 and not is_trial(body)) or (model == "slow-witted" and not again):
            return "I would rather not say, but 1 is a fine number."
        if model == "hostile":
            return json.dumps({"reason": "<script>alert(1)</script>\x1b[31m", "verdict": verdict})
        if "response_format" in body:
            return json.dumps({"reason": f"because of {number}", "verdict": verdict})
        return f"I thought of it.\nVerdict: 2, some would say.\n\n**Verdict: {verdict}**"

    def verdict(self, model: str, body: dict[str, Any], number: int) -> str:
        parts = parts_of(body)
        if model == "obedient" and "Ignore the rubric" in PART.sub("", body["messages"][1]["content"]):
            return "1"
        if "source" in parts:
            return "yes" if parts["answer"].strip(".") in parts["source"] or "nine" in parts["answer"] else "no"
        if model == "first" or (model == "wavering" and number % 4 == 0):
            return "1"
        if model == "half-hearted" and number % 4 == 0 and parts["answer 1"] == "No idea.":
            return "tie"
        right = [parts["reference"].strip(".") in parts[name] for name in ("answer 1", "answer 2")]
        return "tie" if right[0] == right[1] else "1" if right[0] else "2"


@contextmanager
def judging() -> Iterator[Judges]:
    told = Judges()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.keys.add(self.headers.get("authorization", ""))
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            time.sleep(told.silent_s)
            with told.lock:
                code, headers, answer = told.reply(body)
            data = json.dumps(answer).encode()
            try:
                self.send_response(code)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:
                self.close_connection = True  # who asked did not wait

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as told.url:
        yield told
