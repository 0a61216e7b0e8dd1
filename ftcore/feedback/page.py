"""Page: the desk on one HTML page for this machine's browser, with keys and buttons; the same judgements as in the terminal.

    GET  /TOKEN/        the page, self-contained          GET /TOKEN/pair     what to judge now
    POST /TOKEN/press   {id, key}: a judgement of that pair (409 where another one is shown by now), u, or q

In: a Desk, a port. Out: judgements in the rater's file. Runs in: a person's terminal, until q or Ctrl-C.

Who knows the address may judge: it holds a random token, is told in the terminal alone, and answers on the loopback interface only, under
that interface's own name (another page's script cannot reach it by a name that leads there).
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ftcore.data.audit_table import printable_lines
from ftcore.errors import ConfigError, FtcoreError
from ftcore.feedback.desk import Desk
from ftcore.feedback.judgements import HIGHEST, LOWEST
from ftcore.report import page_environment

HOST = "127.0.0.1"
MOST_BODY, BODY_S = 4096, 10.0


class PageServer(ThreadingHTTPServer):
    """`address`: what to open. Presses of several tabs come one after another."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int) -> None:
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "the page cannot be served there", where=f"--port {port}", got=str(error), remedy="leave --port out"
            ) from error
        self.desk, self.token, self.lock = desk, secrets.token_urlsafe(24), threading.Lock()
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.address = f"http://{HOST}:{self.server_port}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """What the page shows. Texts have their control characters written out."""
        shown = self.desk.current
        if shown is None:
            return {"id": ""}
        prompt = [{role: printable_lines(text) for role, text in turn.items()} for turn in shown.prompt]
        answers = {"first": printable_lines(shown.first), "second": printable_lines(shown.second)}
        return {"id": shown.id, "number": shown.number, "total": shown.total, "prompt": prompt, **answers}

    def press(self, pair: str, key: str) -> tuple[int, dict[str, Any]]:
        """Status and answer. A pair that is not shown any more (another tab, a second click) is not judged."""
        with self.lock:
            if key != "u" and pair != self.state()["id"]:
                return 409, {"why": "this pair is not shown any more", **self.state()}
            if not self.desk.press(key):
                return 422, {"why": "nothing to undo" if key == "u" else "no such key", **self.state()}
            return 200, self.state()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: PageServer
    timeout = BODY_S
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match self._asked():
            case "":
                self._page()
            case "pair":
                with self.server.lock:
                    state = self.server.state()
                self._json(200, state)
            case _:
                self._json(404, {"why": "no such page"})

    def do_POST(self) -> None:
        if self._asked() != "press":
            self._json(404, {"why": "no such page"})
            return
        pressed = self._pressed()
        if pressed is None:
            self._json(400, {"why": "wanted {id, key}, as JSON"})
        elif pressed[1] == "q":
            self._json(200, {"id": "", "ended": True})
            self.server.shutdown()
        else:
            try:
                self._json(*self.server.press(*pressed))
            except FtcoreError as error:  # a full disk, for one: the page tells, and the pair is judged again
                self._json(500, {"why": str(error)})

    def _asked(self) -> str | None:
        """What lies behind the token; None for a stranger."""
        token, slash, rest = self.path[1:].partition("/")
        known = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        return rest if known and slash and self.headers.get("host", "") in self.server.hosts else None

    def _pressed(self) -> tuple[str, str] | None:
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MOST_BODY or self.headers.get_content_type() != "application/json":
            self.close_connection = True  # what it sends is not read
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        pair, key = (body.get(name) for name in ("id", "key")) if isinstance(body, dict) else (None, None)
        return (pair, key) if isinstance(pair, str) and isinstance(key, str) else None

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = page_environment().get_template("label.html.jinja").render(
            nonce=nonce, scored=self.server.desk.scored, scores=list(range(LOWEST, HIGHEST + 1))
        )  # fmt: skip
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        self._send(200, "text/html; charset=utf-8", page.encode(), policy + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

    def _json(self, code: int, value: dict[str, Any]) -> None:
        self._send(code, "application/json", json.dumps(value).encode(), "default-src 'none'")

    def _send(self, code: int, kind: str, body: bytes, policy: str) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy, "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
        }  # fmt: skip
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: paths hold the token."""


def serve(desk: Desk, port: int) -> None:
    """Until q on the page, or Ctrl-C here."""
    with PageServer(desk, port) as server:
        print(f"open {server.address}\n(this address lets whoever knows it judge; q on the page, or Ctrl-C here, ends)", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print()
