"""Admin routes: what an operator can look at and change. Each calls what the command line calls; each change leaves an audit line.

In: HTTP. Out: JSON; `{"error": {what, where, got, wanted, remedy}}` where it is refused. Runs in: the admin API's threads.

A tenant cannot be removed, since its adapters and its counts would pass to whoever got the name next: revoke its keys.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

import ftcore
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import Name, Text, utc_now
from ftcore.errors import ConfigError, FtcoreError, IntegrityError, StorageError
from ftcore.pointer import Pointer
from ftcore.section import Section
from serving.audit import AuditLog, Change
from serving.gate import Refusal
from serving.settings import Limits, ServeSettings
from serving.tenants import Key, KeyId, Tenant, TenantStore

log = logging.getLogger(__name__)
Days = Annotated[float, Field(gt=0, le=36_500)]
Version = Annotated[str, Field(min_length=1, max_length=64)]


class NewTenant(Section):
    name: Name
    limits: Limits | None = None
    """What is not named is the server's."""


class NewKey(Section):
    days: Days | None = None
    """The key ends after so many; None: never."""


class Rotation(NewKey):
    overlap_hours: float = Field(24, ge=0, le=8760)
    """How long the old key is taken beside the new one."""


class KeyFacts(Section):
    id: Name
    created: Text
    expires: float | None
    """Seconds since 1970."""
    revoked: bool


class FreshKey(KeyFacts):
    key: str
    """Shown this once."""


class NewPublisher(Section):
    pem: Text
    """The public half of a key of `ftcore adapters keygen`."""


class TenantFacts(Section):
    name: Name
    keys: tuple[KeyFacts, ...]
    limits: dict[str, int | None] | None
    """Its own; the rest is the server's. None: all."""
    publishers: tuple[str, ...] | None
    """Ids of the keys of which one has to have signed what is served; None: no signature is asked for; empty: nobody's will do."""


class Promotion(Section):
    version: Version
    """The beginning of a digest, or an alias."""
    share: float = Field(1.0, gt=0, le=1)
    """Below 1: a canary; the rest stays with what was current."""


class Revocation(Section):
    version: Version
    reason: str = Field(min_length=1, max_length=500)


class VersionFacts(Section):
    ref: str
    """`tenant/name@digest`."""
    created: Text
    share: float
    """Of the name's traffic now."""
    revoked: str | None
    """Why; None: it is not."""


class NameFacts(Section):
    pointer: Pointer
    versions: tuple[VersionFacts, ...]


class Desk:
    """What the routes work with. `change` writes the audit lines."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.adapters = settings, AdapterStore(settings.store)
        self.audit = AuditLog(settings.store, settings.audit_spool)

    @property
    def tenants(self) -> TenantStore:
        if self.settings.is_local_only:
            raise ConfigError("this server has no tenants", where="tenants", remedy="serve with tenants=FOLDER")
        return TenantStore(self.settings.tenants)

    @contextmanager
    def change(self, request: Request, change: str, of: str, body: Section | None = None, **detail: str) -> Iterator[None]:
        """Writes who changed what, and whether it was done, however the block ends."""
        if self.audit.is_full:
            raise StorageError("the audit log cannot be written at the moment", where=self.audit.spool, remedy="look into the log")
        told = {**(body.model_dump(mode="json", exclude_unset=True) if body else {}), **detail}
        result = "failed"
        try:
            yield
            result = "done"
        except FtcoreError:
            result = "refused"
            raise
        finally:
            self.audit.write(Change(request.state.admin, change, of, json.dumps(told, sort_keys=True), result, utc_now()))

    def name(self, tenant: str, name: str) -> NameFacts:
        refs = [ref for ref in self.adapters.list(tenant) if ref.name == name]
        if not refs:
            raise ConfigError("the store knows no such adapter", where=self.adapters, got=f"{tenant}/{name}")
        return NameFacts(pointer=self.adapters.pointer(tenant, name), versions=tuple(map(self.version, refs)))

    def version(self, ref: AdapterRef) -> VersionFacts:
        share = self.adapters.targets(ref.tenant, ref.name).get(ref, 0.0)
        return VersionFacts(ref=ref.full, created=self.adapters.card(ref).created, share=share, revoked=self.adapters.revocation(ref))


def build_routes(desk: Desk) -> FastAPI:
    api = FastAPI(title="ftcore admin", version=ftcore.__version__, docs_url=None, redoc_url=None)
    _add_tenants(api, desk)
    _add_keys(api, desk)
    _add_publishers(api, desk)
    _add_adapters(api, desk)
    _add_errors(api)
    return api


def _add_tenants(api: FastAPI, desk: Desk) -> None:
    @api.get("/admin/tenants")
    def tenants() -> list[str]:
        return desk.tenants.names()

    @api.post("/admin/tenants", status_code=201)
    def add(new: NewTenant, request: Request) -> TenantFacts:
        with desk.change(request, "tenant.new", new.name, new.limits):
            desk.tenants.add(new.name, new.limits)
        return _shown(desk.tenants.read(new.name))

    @api.get("/admin/tenants/{tenant}")
    def show(tenant: Name) -> TenantFacts:
        return _shown(desk.tenants.read(tenant))

    @api.patch("/admin/tenants/{tenant}/limits")
    def limit(tenant: Name, changes: Limits, request: Request) -> TenantFacts:
        """Changes what is named and leaves the rest, at first the server's; `null` takes a limit away."""
        with desk.change(request, "tenant.limits", tenant, changes):
            desk.tenants.change_limits(tenant, lambda limits: (limits or Limits()).model_copy(update=changes.named))
        return _shown(desk.tenants.read(tenant))

    @api.delete("/admin/tenants/{tenant}/limits")
    def unlimit(tenant: Name, request: Request) -> TenantFacts:
        """Back to the server's own."""
        with desk.change(request, "tenant.limits", tenant):
            desk.tenants.change_limits(tenant, lambda _: None)
        return _shown(desk.tenants.read(tenant))


def _add_keys(api: FastAPI, desk: Desk) -> None:
    @api.post("/admin/tenants/{tenant}/keys", status_code=201)
    def make(tenant: Name, new: NewKey, request: Request) -> FreshKey:
        with desk.change(request, "key.new", tenant, new):
            return _fresh(*desk.tenants.new_key(tenant, days=new.days))

    @api.post("/admin/tenants/{tenant}/keys/{key}/rotate", status_code=201)
    def rotate(tenant: Name, key: Name, how: Rotation, request: Request) -> FreshKey:
        """A new key; the old one ends after the overlap."""
        with desk.change(request, "key.rotate", tenant, how, key=key):
            return _fresh(*desk.tenants.rotate_key(tenant, key, overlap_s=how.overlap_hours * 3600, days=how.days))

    @api.delete("/admin/tenants/{tenant}/keys/{key}")
    def revoke(tenant: Name, key: Name, request: Request) -> TenantFacts:
        """No server takes it within seconds."""
        with desk.change(request, "key.revoke", tenant, key=key):
            desk.tenants.revoke_key(tenant, key)
        return _shown(desk.tenants.read(tenant))


def _add_publishers(api: FastAPI, desk: Desk) -> None:
    @api.post("/admin/tenants/{tenant}/publishers", status_code=201)
    def trust(tenant: Name, new: NewPublisher, request: Request) -> TenantFacts:
        """From now on what is served needs a signature by this key, or by another that is listed."""
        with desk.change(request, "publisher.new", tenant, new):
            desk.tenants.add_publisher(tenant, new.pem)
        return _shown(desk.tenants.read(tenant))

    @api.delete("/admin/tenants/{tenant}/publishers/{publisher}")
    def distrust(tenant: Name, publisher: KeyId, request: Request) -> TenantFacts:
        """Without the last one nothing of the tenant's is served."""
        with desk.change(request, "publisher.remove", tenant, publisher=publisher):
            desk.tenants.remove_publisher(tenant, publisher)
        return _shown(desk.tenants.read(tenant))

    @api.delete("/admin/tenants/{tenant}/publishers")
    def ask_nobody(tenant: Name, request: Request) -> TenantFacts:
        """No signature is asked for any more."""
        with desk.change(request, "publisher.any", tenant):
            desk.tenants.ask_no_signature(tenant)
        return _shown(desk.tenants.read(tenant))


def _add_adapters(api: FastAPI, desk: Desk) -> None:
    @api.get("/admin/adapters")
    def versions(tenant: Name | None = None) -> list[VersionFacts]:
        return [desk.version(ref) for ref in desk.adapters.list(tenant)]

    @api.get("/admin/adapters/{tenant}/{name}")
    def show(tenant: Name, name: Name) -> NameFacts:
        return desk.name(tenant, name)

    @api.post("/admin/adapters/{tenant}/{name}/promote")
    def promote(tenant: Name, name: Name, wanted: Promotion, request: Request) -> NameFacts:
        with desk.change(request, "adapter.promote", f"{tenant}/{name}", wanted):
            desk.adapters.promote(desk.adapters.resolve(f"{tenant}/{name}@{wanted.version}"), wanted.share)
        return desk.name(tenant, name)

    @api.post("/admin/adapters/{tenant}/{name}/rollback")
    def rollback(tenant: Name, name: Name, request: Request) -> NameFacts:
        """To what the name pointed at before."""
        with desk.change(request, "adapter.rollback", f"{tenant}/{name}"):
            desk.adapters.rollback(f"{tenant}/{name}")
        return desk.name(tenant, name)

    @api.post("/admin/adapters/{tenant}/{name}/revoke")
    def revoke(tenant: Name, name: Name, why: Revocation, request: Request) -> NameFacts:
        """For good: no replica serves it within seconds. A name that points at it is to be rolled back."""
        with desk.change(request, "adapter.revoke", f"{tenant}/{name}", why):
            desk.adapters.revoke(desk.adapters.find(f"{tenant}/{name}@{why.version}"), why.reason)
        return desk.name(tenant, name)


def _facts(key: Key) -> dict[str, Any]:
    return key.model_dump(exclude={"sha256"})


def _fresh(clear: str, key: Key) -> FreshKey:
    return FreshKey(key=clear, **_facts(key))


def _shown(tenant: Tenant) -> TenantFacts:
    listed = None if tenant.publishers is None else tuple(tenant.publishers)
    return TenantFacts(
        name=tenant.name,
        keys=tuple(KeyFacts(**_facts(key)) for key in tenant.keys),
        limits=tenant.limits.named if tenant.limits else None,
        publishers=listed,
    )


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(FtcoreError)
    @api.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, FtcoreError):
            log.error("unexpected: %s", type(error).__name__, exc_info=error)
            return _told(500, "the server made a mistake")
        status = {ConfigError: 400, IntegrityError: 409, StorageError: 503}.get(type(error), 500)
        return _told(status, error.what, error.facts())

    @api.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        return _told(400, first["msg"][:500], {"where": where, "wanted": "see /openapi.json"})

    @api.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        return _told(error.status_code, str(error.detail))


def refused(refusal: Refusal) -> JSONResponse:
    """What the door says."""
    return _told(refusal.status, refusal.message, headers={"www-authenticate": "Bearer"} if refusal.status == 401 else {})


def _told(status: int, what: str, facts: Mapping[str, str] = {}, headers: Mapping[str, str] = {}) -> JSONResponse:
    return JSONResponse({"error": {"what": what, **{key: text for key, text in facts.items() if text}}}, status, headers=headers)
