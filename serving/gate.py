"""Gate: who asks, what a model's name means to them, and whether there is room. All of it before anything is computed.

In: an Authorization header, a model name. Out: a Caller, an AdapterRef, a place; or a Refusal. Runs in: the ingress.

Authorise before lookup: a name that does not exist and one that belongs to somebody else give the same 404.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from ipaddress import ip_address

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import FtcoreError
from serving.directory import Directory
from serving.jwts import Issuer, token_of
from serving.settings import ServeSettings
from serving.tenants import Caller, KeyTable, TenantStore, bearer, is_key, tenant_names

log = logging.getLogger(__name__)
STALE_KEYS_S = 60.0
"""Keys that could not be read again for this long are no longer trusted: a revoked one could be among them."""


class Refusal(Exception):
    """Becomes an HTTP answer in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str, *, kind: str = "invalid_request_error", retry_after_s: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind
        self.headers = {**({"retry-after": str(retry_after_s)} if retry_after_s else {}), **(headers or {})}


class Gate:
    """One for each ingress process."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._tenants = TenantStore(settings.tenants) if settings.tenants else None
        self._keys, self._keys_read = KeyTable({}, {}), 0.0
        self._issuer = Issuer(settings.jwt) if settings.jwt is not None else None
        self.directory = Directory(AdapterStore(settings.store), tenant_names(settings))
        self._under_way: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._watches: list[asyncio.Task[None]] = []
        self._reading = ThreadPoolExecutor(3, thread_name_prefix="gate")
        """One for each watch: nothing else that is slow makes keys or names old."""

    async def open(self) -> None:
        """Reads keys and names once, then again and again."""
        for read in (self._read_keys, self.directory.refresh, *([self._issuer.refresh] if self._issuer is not None else [])):
            await asyncio.get_running_loop().run_in_executor(self._reading, read)
            self._watches.append(asyncio.create_task(self._again(read)))  # apart: a slow store does not make keys old

    def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self._reading.shutdown(wait=False)

    def caller(self, header: str | None, client: str, host: str) -> Caller:
        """Raises Refusal 401 without a good key; 403, where there are no keys, to whoever is not on this machine.

        `client`: the address that asks; `host`: the name it asked for (a page elsewhere could point its own name at this machine).
        """
        if self._tenants is None:
            if not (is_here(client) and is_here(host)):
                raise Refusal(403, "without keys only this machine may ask", "forbidden", kind="permission_error")
            return Caller(self.settings.local_tenant, "", self.settings.limits)
        if time.monotonic() - self._keys_read > STALE_KEYS_S:
            raise Refusal(503, "the keys cannot be read at the moment", "keys_unavailable", kind="server_error", retry_after_s=5)
        caller = self._keys.caller(header)
        if caller is None and self._issuer is not None and (token := token_of(header)):
            if self._issuer.is_stale:
                raise Refusal(503, "tokens cannot be checked at the moment", "keys_unavailable", kind="server_error", retry_after_s=5)
            caller = self._issuer.caller(token, self._keys.tenants)
        if caller is None:
            raise Refusal(401, "no valid key: send `Authorization: Bearer ft_...`", "invalid_api_key", kind="authentication_error")
        return caller

    def operator(self, header: str | None, client: str, host: str) -> None:
        """Raises Refusal 401 or 403 to whoever may not see figures of all tenants: a tenant's own key does not open them."""
        wanted = self.settings.metrics.key_sha256
        if wanted:
            if not is_key(bearer(header), wanted):
                raise Refusal(401, "this needs the metrics key", "invalid_api_key", kind="authentication_error")
        elif self._tenants is not None:  # behind a proxy every client has this machine's address
            raise Refusal(403, "no metrics key is set: ftcore serve --new-metrics-key", "forbidden", kind="permission_error")
        elif not (is_here(client) and is_here(host)):
            raise Refusal(403, "without keys only this machine may ask", "forbidden", kind="permission_error")

    def find(self, caller: Caller, model: str, session: str) -> AdapterRef | None:
        """None for a bare base. `session`: deals one of the versions that share a name.

        Raises Refusal 404 for what is not the caller's, 503 before the store was read once.
        """
        if model in self.settings.bases_of(caller.tenant):
            return None
        if self.directory.is_blank:
            raise Refusal(503, "the adapter store cannot be reached", "store_unavailable", kind="server_error", retry_after_s=5)
        ref = self.directory.picture.find(caller.tenant, model, f"{caller.tenant}:{session}")
        if ref is None:
            raise Refusal(404, "this model does not exist, or is not yours: see /v1/models", "model_not_found")
        return ref

    def places(self, caller: Caller, num: int) -> AbstractContextManager[None]:
        """Some of the tenant's places, one for each answer. Raises Refusal 429 when there are too few."""
        return _held(self._under_way, caller, num, "answers")

    def uploading(self, caller: Caller) -> AbstractContextManager[None]:
        """Who sends slowly holds a place of the ingress: a tenant may send as many requests at once as it may have answers."""
        return _held(self._uploads, caller, 1, "uploads")

    def _read_keys(self) -> None:
        if self._tenants is not None:
            try:
                self._keys, self._keys_read = self._tenants.snapshot(self.settings.limits), time.monotonic()
            except FtcoreError as error:
                log.warning("keys cannot be read: %s", error.what)

    async def _again(self, read: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await asyncio.get_running_loop().run_in_executor(self._reading, read)
            except Exception:  # whatever it is, the next second may be better; stale keys are refused
                log.exception("reading keys and names failed")


@contextmanager
def _held(held: Counter[str], caller: Caller, num: int, what: str) -> Iterator[None]:
    if held[caller.tenant] + num > caller.limits.max_concurrent:
        raise Refusal(
            429, f"at most {caller.limits.max_concurrent} {what} at once for this tenant", "rate_limit_exceeded",
            kind="rate_limit_error", retry_after_s=1,
        )  # fmt: skip
    held[caller.tenant] += num
    try:
        yield
    finally:
        held[caller.tenant] -= num
        if not held[caller.tenant]:
            del held[caller.tenant]


def is_here(host: str) -> bool:
    """Whether a name or address, without a port, means this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
