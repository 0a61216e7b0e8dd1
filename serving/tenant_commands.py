"""`ftcore tenants`: make, rotate and revoke tenants' keys, say what each tenant may ask, and whose adapters are served to it.

In: a command line. Out: keys on the terminal. Runs in: a person's terminal; no Ray, no torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftcore.card import printable
from ftcore.errors import ConfigError
from ftcore.section import leaf_paths
from ftcore.signing import read_public
from serving.settings import Limits, changed_limits
from serving.tenants import Key, TenantStore


def main(arguments: Sequence[str]) -> int:
    """`ftcore tenants add|key|rotate|revoke|list|show|limits|publishers FOLDER ...`"""
    parser = argparse.ArgumentParser(
        prog="ftcore tenants", description="make and revoke tenants' keys; a running server follows in seconds"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(run: Any, name: str, summary: str, *words: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary)
        command.add_argument("folder", help="where tenants are kept: a folder, s3:// or another fsspec path")
        for word in words:
            command.add_argument(word)
        command.set_defaults(run=run)
        return command

    first = add(_add, "add", "a new tenant, with a first key", "name")
    another = add(_new_key, "key", "another key for a tenant", "name")
    rotate = add(_rotate, "rotate", "a new key in the place of an old one, which ends after an overlap", "name", "key")
    rotate.add_argument("--overlap-hours", type=float, default=24, help="how long the old key is taken, too (24)")
    for command in (first, another, rotate):
        command.add_argument("--days", type=float, help="the key ends after so many days")
    add(_revoke, "revoke", "end a key", "name", "key")
    add(_list, "list", "tenants, and how many keys each has")
    add(_show, "show", "its keys and limits", "name")
    limits = add(_limit, "limits", "what it may ask; what is not named stays as it is, at first the server's", "name")
    limits.add_argument("changes", nargs="+", metavar="KEY=VALUE", help=f"KEY=null: no such limit; keys: {', '.join(leaf_paths(Limits))}")
    publishers = add(_publishers, "publishers", "whose signature its adapters need; what is not signed so is not served", "name")
    publishers.add_argument("what", choices=("list", "add", "remove", "any"), help="`any`: no signature is asked for")
    publishers.add_argument("key", nargs="?", default="", help="add: a .pub.pem file; remove: a key id")
    parsed = parser.parse_args(list(arguments))
    parsed.run(TenantStore(parsed.folder), parsed)
    return 0


def _add(store: TenantStore, parsed: argparse.Namespace) -> None:
    store.add(parsed.name)
    _new_key(store, parsed)


def _new_key(store: TenantStore, parsed: argparse.Namespace) -> None:
    _print_key(parsed, *store.new_key(parsed.name, days=parsed.days))


def _rotate(store: TenantStore, parsed: argparse.Namespace) -> None:
    _print_key(parsed, *store.rotate_key(parsed.name, parsed.key, overlap_s=parsed.overlap_hours * 3600, days=parsed.days))
    print(f"{parsed.key} ends in {parsed.overlap_hours:g} h")


def _print_key(parsed: argparse.Namespace, clear: str, key: Key) -> None:
    print(f"{clear}\nkey {key.id} of {parsed.name}, shown this once: keep it; serve with tenants={parsed.folder}")


def _revoke(store: TenantStore, parsed: argparse.Namespace) -> None:
    store.revoke_key(parsed.name, parsed.key)
    print(f"revoked {parsed.key} of {parsed.name}: no server takes it within seconds")


def _list(store: TenantStore, parsed: argparse.Namespace) -> None:
    for name in store.names():
        usable = sum(not key.revoked for key in store.read(name).keys)
        print(f"{printable(name):<32} {usable} key{'s' * (usable != 1)}")


def _show(store: TenantStore, parsed: argparse.Namespace) -> None:
    tenant = store.read(parsed.name)
    for key in tenant.keys:
        until = "" if key.expires is None else time.strftime(" until %Y-%m-%d %H:%M", time.localtime(key.expires))
        print(f"{key.id}  made {printable(key.created)}{until}{'  revoked' if key.revoked else ''}")
    told = [f"{key}={'null' if value is None else value}" for key, value in tenant.limits.named.items()] if tenant.limits else []
    print("limits:", "  ".join([*told, "the rest is the server's"]) if told else "the server's own")


def _limit(store: TenantStore, parsed: argparse.Namespace) -> None:
    store.change_limits(parsed.name, lambda limits: changed_limits(limits or Limits(), parsed.changes))
    print(f"{parsed.name} has limits of its own: ftcore tenants show {parsed.folder} {parsed.name}")


def _publishers(store: TenantStore, parsed: argparse.Namespace) -> None:
    if parsed.what in ("add", "remove") and not parsed.key:
        raise ConfigError(
            "which key?", wanted="a .pub.pem file to add, a key id to remove", remedy="ftcore adapters keygen FILE makes a pair"
        )
    if parsed.what == "add":
        store.add_publisher(parsed.name, read_public(Path(parsed.key)))
    elif parsed.what == "remove":
        store.remove_publisher(parsed.name, parsed.key)
    elif parsed.what == "any":
        store.ask_no_signature(parsed.name)
    listed = store.read(parsed.name).publishers
    told = (
        "is served whoever published it" if listed is None else "is served if one of these signed it" if listed else "is not served at all"
    )
    print(f"what is {parsed.name}'s {told}")
    for publisher in listed or ():
        print(publisher)
