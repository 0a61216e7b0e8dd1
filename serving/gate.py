"""Gate: who asks, what a model's name means to them, and whether there is room. All of it before anything is computed.

In: an Authorization header, a model name. Out: a Caller, an AdapterRef, a place; or a Refusal. Runs in: the ingress.

Authorise before lookup: a name that does not exist and one that belongs to somebody else give the same 404.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import FtcoreError
from serving.directory import Directory
from serving.settings import ServeSettings
from serving.tenants import Caller, KeyTable, TenantStore

log = logging.getLogger(__name__)
STALE_KEYS_S = 60.0
"""Keys that could not be read again for this long are no longer trusted: a revoked one could be among them."""


class Refusal(Exception):
    """Becomes an HTTP answer in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str, *, kind: str = "invalid_request_error", retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind, self.retry_after_s = status, message, code, kind, retry_after_s


class Gate:
    """One for each ingress process."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._tenants = TenantStore(settings.tenants) if settings.tenants else None
        self._keys, self._keys_read = KeyTable({}), 0.0
        self.directory = Directory(AdapterStore(settings.store), self._served)
        self._under_way: Counter[str] = Counter()
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Reads keys and names once, then again and again."""
        await asyncio.to_thread(self._read)
        self._watch = asyncio.create_task(self._keep_reading())

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def caller(self, header: str | None) -> Caller:
        """Raises Refusal 401 without a good key."""
        if self._tenants is None:
            return Caller(self.settings.local_tenant, "", self.settings.limits)
        if time.monotonic() - self._keys_read > STALE_KEYS_S:
            raise Refusal(503, "the keys cannot be read at the moment", "keys_unavailable", kind="server_error", retry_after_s=5)
        caller = self._keys.caller(header)
        if caller is None:
            raise Refusal(401, "no valid key: send `Authorization: Bearer ft_...`", "invalid_api_key", kind="authentication_error")
        return caller

    def find(self, caller: Caller, model: str, session: str) -> AdapterRef | None:
        """None for the bare base. Raises Refusal 404 for anything that is not the caller's."""
        if model == self.settings.base_name:
            return None
        ref = self.directory.picture.find(caller.tenant, model, f"{caller.tenant}:{session}" if session else "")
        if ref is None:
            raise Refusal(404, "this model does not exist, or is not yours: see /v1/models", "model_not_found")
        return ref

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """One of the tenant's places. Raises Refusal 429 when all are taken."""
        if self._under_way[caller.tenant] >= caller.limits.max_concurrent:
            raise Refusal(
                429, f"{caller.limits.max_concurrent} answers are under way for this tenant", "rate_limit_exceeded",
                kind="rate_limit_error", retry_after_s=1,
            )  # fmt: skip
        self._under_way[caller.tenant] += 1
        try:
            yield
        finally:
            self._under_way[caller.tenant] -= 1
            if not self._under_way[caller.tenant]:
                del self._under_way[caller.tenant]

    def _served(self) -> list[str]:
        return [self.settings.local_tenant] if self._tenants is None else self._tenants.names()

    def _read(self) -> None:
        if self._tenants is not None:
            try:
                self._keys, self._keys_read = self._tenants.snapshot(self.settings.limits), time.monotonic()
            except FtcoreError as error:
                log.warning("keys cannot be read: %s", error.what)
        self.directory.refresh()

    async def _keep_reading(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await asyncio.to_thread(self._read)
            except Exception:  # whatever it is, the next second may be better; stale keys are refused
                log.exception("reading keys and names failed")
