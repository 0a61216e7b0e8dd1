"""Tenants and their keys: who may ask. A key is shown once and kept as a hash; every change is seen by all replicas within seconds.

In: a folder with one JSON file a tenant. Out: a key made; the tenant whose key this is. Runs in: the command line (make, revoke), the
ingress (check); no Ray, no torch.

A key is `ft_` and 43 characters: 256 random bits. What is stored is its SHA-256: a random key needs no slow hash, and the table is looked
up by that hash, so that the time an answer takes says nothing about how much of a key was right.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints, ValidationError

from ftcore.adapters import PART
from ftcore.card import Digest, Name, Text, utc_now
from ftcore.errors import ConfigError, IntegrityError
from ftcore.section import Section
from ftcore.signing import key_id, public_key
from ftcore.storage import Folder
from serving.settings import Limits, ServeSettings

log = logging.getLogger(__name__)
KEY = re.compile(r"ft_[A-Za-z0-9_-]{43}")


KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Key(Section):
    """One key of a tenant."""

    id: Name
    sha256: Digest
    created: Text
    expires: float | None = None
    """Seconds since 1970; None: never."""
    revoked: bool = False


class Tenant(Section):
    """A tenant as it is stored."""

    name: Name
    keys: tuple[Key, ...] = ()
    limits: Limits | None = None
    """What was named is its own, what was not the server's; None: all."""
    publishers: dict[KeyId, Text] | None = None
    """Key id -> public key (PEM) of those whose signature a version of its adapters has to carry. None: no signature is asked for; empty:
    nobody's will do."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant: str
    key: str
    """The key's id; empty where there are no keys."""
    limits: Limits


class TenantStore:
    """The folder of tenants."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)

    def names(self) -> list[str]:
        """Raises StorageError when the folder is away: that does not mean that there are no tenants."""
        with self.folder.there():
            found = [name.removesuffix(".json") for name in self.folder.files() if name.endswith(".json")]
        return sorted(name for name in found if PART.fullmatch(name))

    def has(self, name: str) -> bool:
        return self.folder.exists(_file(name))

    def read(self, name: str) -> Tenant:
        key = _file(name)
        if not self.has(name):
            raise _unknown(name)
        return self._parse(self.folder.read(key), key)

    def add(self, name: str, limits: Limits | None = None) -> None:
        tenant = Tenant(name=name, limits=limits)
        if not self.folder.create(_file(name), _stored(tenant)):
            raise ConfigError("there is such a tenant already", got=name)

    def new_key(self, name: str, *, days: float | None = None) -> tuple[str, Key]:
        """(the key in the clear, its record). It is never to be had again."""
        clear, key = _made(days)
        self._change(name, lambda tenant: tenant.model_copy(update={"keys": (*tenant.keys, key)}))
        return clear, key

    def rotate_key(self, name: str, key_id: str, *, overlap_s: float, days: float | None = None) -> tuple[str, Key]:
        """As `new_key`, in one change with the end of an old key: that one is taken for `overlap_s` more, or until it ends by itself."""
        clear, key = _made(days)
        until = time.time() + overlap_s

        def change(tenant: Tenant) -> Tenant:
            old = _key(tenant, key_id)
            if old.revoked or (old.expires is not None and old.expires <= time.time()):
                raise ConfigError("this key has ended: there is nothing to rotate", got=key_id, remedy=f"ftcore tenants key FOLDER {name}")
            ended = _with_key(tenant, key_id, expires=min(until, old.expires or until))
            return ended.model_copy(update={"keys": (*ended.keys, key)})

        self._change(name, change)
        return clear, key

    def change_limits(self, name: str, change: Callable[[Limits | None], Limits | None]) -> None:
        self._change(name, lambda tenant: tenant.model_copy(update={"limits": change(tenant.limits)}))

    def add_publisher(self, name: str, pem: str) -> str:
        """From now on every version needs a signature by this key, or by another that is listed. Returns its id."""
        publisher = key_id(public_key(pem.encode(), name))
        self._change(name, lambda tenant: tenant.model_copy(update={"publishers": {**(tenant.publishers or {}), publisher: pem}}))
        return publisher

    def remove_publisher(self, name: str, publisher: str) -> None:
        """The last one leaves an empty list, under which nothing is served."""

        def change(tenant: Tenant) -> Tenant:
            listed = dict(tenant.publishers or {})
            if listed.pop(publisher, None) is None:
                raise ConfigError("this tenant lists no such publisher", got=ascii(publisher)[:40], wanted=", ".join(listed))
            return tenant.model_copy(update={"publishers": listed})

        self._change(name, change)

    def ask_no_signature(self, name: str) -> None:
        self._change(name, lambda tenant: tenant.model_copy(update={"publishers": None}))

    def revoke_key(self, name: str, key_id: str) -> None:
        self._change(name, lambda tenant: _with_key(tenant, key_id, revoked=True))

    def snapshot(self, limits: Limits) -> KeyTable:
        """Every tenant and usable key now. A damaged file takes out its own tenant alone. Raises StorageError when the folder is away."""
        table: dict[str, tuple[Caller, float | None]] = {}
        tenants: dict[str, Limits] = {}
        with self.folder.there():
            for name in self.names():
                try:
                    tenant = self.read(name)
                except (IntegrityError, ConfigError) as error:
                    log.warning("the keys of tenant %s are not served: %s", name, error.what)
                    continue
                own = tenants[tenant.name] = limits if tenant.limits is None else limits.model_copy(update=tenant.limits.named)
                table |= {key.sha256: (Caller(tenant.name, key.id, own), key.expires) for key in tenant.keys if not key.revoked}
        return KeyTable(table, tenants)

    def _change(self, name: str, change: Callable[[Tenant], Tenant]) -> None:
        key = _file(name)

        def changed(old: bytes | None) -> bytes:
            if old is None:
                raise _unknown(name)
            return _stored(change(self._parse(old, key)))

        self.folder.change(key, changed, "this tenant")

    def _parse(self, raw: bytes, key: str) -> Tenant:
        try:
            tenant = Tenant.model_validate_json(raw)
        except ValidationError as error:
            raise IntegrityError("this tenant's file cannot be read", where=f"{self.folder}/{key}", got=str(error)[:200]) from error
        if _file(tenant.name) != key:
            raise IntegrityError("this file holds another tenant", where=f"{self.folder}/{key}", got=tenant.name)
        return tenant


@dataclass(frozen=True)
class KeyTable:
    """Usable keys by hash."""

    keys: Mapping[str, tuple[Caller, float | None]]
    tenants: Mapping[str, Limits]
    """All there are, also those without a key."""

    def caller(self, header: str | None) -> Caller | None:
        """Whose key an `Authorization` header holds; None when it holds none that is good now."""
        clear = bearer(header)
        found = self.keys.get(key_hash(clear)) if clear else None
        if found is None:
            return None
        caller, expires = found
        return None if expires is not None and expires <= time.time() else caller


def tenant_names(settings: ServeSettings) -> Callable[[], list[str]]:
    """Tells whose adapters are served now; raises StorageError when the folder of tenants is away."""
    return (lambda: [settings.local_tenant]) if settings.is_local_only else TenantStore(settings.tenants).names


def new_clear_key() -> str:
    return "ft_" + secrets.token_urlsafe(32)


def is_key(clear: str, sha256: str) -> bool:
    """Whether this is the key of that hash, in constant time."""
    return hmac.compare_digest(key_hash(clear), sha256)


def bearer(header: str | None) -> str:
    """The key in an `Authorization` header; empty when it holds none."""
    scheme, _, clear = (header or "").partition(" ")
    clear = clear.strip()
    return clear if scheme.lower() == "bearer" and KEY.fullmatch(clear) else ""


def key_hash(clear: str) -> str:
    return hashlib.sha256(clear.encode()).hexdigest()


def _made(days: float | None) -> tuple[str, Key]:
    """(a new key in the clear, its record)."""
    clear = new_clear_key()
    expires = None if days is None else time.time() + days * 86400
    return clear, Key(id=secrets.token_hex(4), sha256=key_hash(clear), created=utc_now(), expires=expires)


def _key(tenant: Tenant, key_id: str) -> Key:
    for key in tenant.keys:
        if key.id == key_id:
            return key
    raise ConfigError("this tenant has no such key", got=ascii(key_id)[:40], remedy=f"ftcore tenants show FOLDER {tenant.name}")


def _with_key(tenant: Tenant, key_id: str, **facts: object) -> Tenant:
    """The tenant with other facts about one of its keys. Raises ConfigError where it has none of that id."""
    old = _key(tenant, key_id)
    return tenant.model_copy(update={"keys": tuple(key.model_copy(update=facts) if key is old else key for key in tenant.keys)})


def _stored(tenant: Tenant) -> bytes:
    """Of its limits those that were named."""
    return tenant.model_dump_json(indent=1, exclude_unset=True).encode()


def _unknown(name: str) -> ConfigError:
    return ConfigError("there is no such tenant", got=ascii(name)[:80], remedy=f"ftcore tenants add FOLDER {name}")


def _file(name: str) -> str:
    if not PART.fullmatch(name):
        raise ConfigError("this is not a tenant's name", got=ascii(name)[:80], wanted="lower-case letters, digits, '.', '_', '-'")
    return f"{name}.json"
