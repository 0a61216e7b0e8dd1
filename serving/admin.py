"""Admin: the server of the admin API. A port of its own, keys of its own; a thread beside `ftcore serve`, or a process.

    python -m serving.admin FILE.yaml admin.port=8001

In: ServeSettings. Out: the routes of `admin_routes`, behind a door. Runs in: the process of `ftcore serve`, or one of its own; no torch.

The door is before everything, the OpenAPI schema included. A tenant's key does not open it, and an admin's key opens no tenant's route:
each is looked up in its own table. Without admin keys only this machine may ask, and no page that a browser on it shows.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from ftcore.cli import guarded
from ftcore.errors import ConfigError
from serving.admin_routes import Desk, build_routes, refused
from serving.bodies import read_body, replayed
from serving.exposure import require_guarded
from serving.gate import Refusal, is_here
from serving.settings import Admin, ServeSettings, settings_of
from serving.tenants import bearer, is_key

MAX_BODY_KIB, BODY_S = 64, 10.0


def build_admin(desk: Desk) -> FastAPI:
    api = build_routes(desk)
    api.add_middleware(AdminDoor, admin=desk.settings.admin)
    return api


class AdminDoor:
    """Pure ASGI: who asks, then a small body that comes in time."""

    def __init__(self, app: Any, admin: Admin) -> None:
        self._app, self._admin = app, admin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            scope.setdefault("state", {})["admin"] = self._who(Request(scope))
            body = await read_body(receive, MAX_BODY_KIB, BODY_S)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self._app(scope, replayed(body, receive), send)

    def _who(self, request: Request) -> str:
        """The name of the key; empty where there are none. Raises Refusal."""
        if self._admin.keys:
            clear = bearer(request.headers.get("authorization"))
            for name, sha256 in self._admin.keys.items():
                if is_key(clear, sha256):
                    return name
            raise Refusal(401, "no valid admin key: send `Authorization: Bearer ft_...`", "invalid_api_key")
        client, host = request.client.host if request.client else "", urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if not (is_here(client) and is_here(host)) or "origin" in request.headers:  # an origin: a browser's page asks
            raise Refusal(403, "without admin keys only this machine may ask", "forbidden")
        return ""


@contextmanager
def admin_running(settings: ServeSettings) -> Iterator[str]:
    """Yields `http://host:port`, or nothing where no port is set. Raises ConfigError for an open door beyond this machine."""
    admin = settings.admin
    if admin.port is None:
        yield ""
        return
    require_guarded(settings, "admin.host", admin.host, has_keys=bool(admin.keys), make_one="ftcore serve --new-admin-key")
    listening = _listen(admin.host, admin.port)
    desk = Desk(settings)
    desk.audit.open()
    config = uvicorn.Config(
        build_admin(desk), log_level="warning", lifespan="off", proxy_headers=False, timeout_graceful_shutdown=5,
        ssl_certfile=settings.tls.cert if settings.tls else None, ssl_keyfile=settings.tls.key if settings.tls else None,
    )  # fmt: skip
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, args=([listening],), name="admin")
    thread.start()
    try:
        while not web.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http{'s' if settings.tls else ''}://{admin.host}:{listening.getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join()
        desk.audit.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            "the admin API cannot listen there",
            where="admin",
            got=f"{host}:{port}: {error.strerror}",
            remedy="another port: admin.port=8001",
        ) from error


def said(settings: ServeSettings, url: str) -> str:
    """One line for people."""
    admins = ", ".join(settings.admin.keys)
    return (
        f"admin API: {url}/admin  ({f'keys: {admins}' if admins else 'no keys: only this machine may ask; ftcore serve --new-admin-key'})"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.admin", description="the admin API alone, from the settings of `ftcore serve`")
    parser.add_argument("words", nargs="+", metavar="FILE.yaml | PATH=VALUE")
    settings = settings_of(parser.parse_args(list(arguments)).words)
    if settings.admin.port is None:
        raise ConfigError("no port is set for the admin API", where="admin.port", remedy="admin.port=8001")
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with admin_running(settings) as url:
        print(said(settings, url), flush=True)
        over.wait()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
