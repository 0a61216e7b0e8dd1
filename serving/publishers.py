"""Publishers: which versions a tenant lets be served. Where it lists publishers, those alone that one of them signed.

In: cards. Out: nothing, or an IntegrityError with the reason. Runs in: serving replicas; no Ray, no HTTP.
"""

from __future__ import annotations

import time

from ftcore.card import Card
from ftcore.signing import public_key, require_signed
from serving.settings import ServeSettings
from serving.tenants import TenantStore

Listed = dict[str, str] | None


class Publishers:
    """One for each replica. A list is read again when it is older than `poll_s`."""

    def __init__(self, settings: ServeSettings) -> None:
        self._tenants = TenantStore(settings.tenants) if settings.tenants else None
        self._poll_s = settings.poll_s
        self._read: dict[str, tuple[float, Listed]] = {}

    def require(self, card: Card) -> None:
        """Blocks. Raises IntegrityError for a version that its tenant does not let be served; StorageError where the list is away."""
        listed = self._listed(card.tenant)
        if listed is not None:
            require_signed(card, [public_key(pem.encode(), f"publisher {name} of {card.tenant}") for name, pem in listed.items()])

    def _listed(self, tenant: str) -> Listed:
        if self._tenants is None:
            return None
        until, listed = self._read.get(tenant, (0.0, None))
        if time.monotonic() >= until:
            with self._tenants.folder.there():  # one that is gone is no tenant that is gone
                listed = self._tenants.read(tenant).publishers
            self._read[tenant] = (time.monotonic() + self._poll_s, listed)
        return listed
