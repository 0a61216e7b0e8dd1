"""Directory: what each tenant's names stand for now. A picture of the store's pointers, taken anew every second or so.

In: a store, the tenants served. Out: model name of a request -> AdapterRef, within the caller's tenant. Runs in: the ingress.

A client's string is looked up in the picture and never reaches the store unless the picture holds its name. While the store is away the
last picture stays, and says how old it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ftcore.adapters import PART, AdapterRef, AdapterStore
from ftcore.errors import FtcoreError
from ftcore.pointer import Pointer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """The pointers of one moment."""

    names: dict[tuple[str, str], Pointer] = field(default_factory=dict)
    revoked: frozenset[AdapterRef] = frozenset()
    versions: frozenset[AdapterRef] = frozenset()
    taken: float = 0.0

    def models(self, tenant: str) -> list[tuple[str, AdapterRef]]:
        """(name, current version) of a tenant, sorted; names without a usable one are left out."""
        found = []
        for (owner, name), pointer in sorted(self.names.items()):
            digest = pointer.pick("")
            if owner == tenant and digest and (ref := AdapterRef(owner, name, digest)) not in self.revoked:
                found.append((name, ref))
        return found

    def find(self, tenant: str, model: str, session: str = "") -> AdapterRef | None:
        """`name`, `name@version`, `name@alias`, with or without the caller's own `tenant/` in front. None for anything else."""
        path, at, version = model.partition("@")
        owner, slash, name = path.rpartition("/")
        if (slash and owner != tenant) or not PART.fullmatch(name) or (at and not version):
            return None
        pointer = self.names.get((tenant, name))
        if pointer is None:
            return None
        digest = pointer.pick(version, session)
        if not digest and version:
            found = [ref for ref in self.versions if (ref.tenant, ref.name) == (tenant, name) and ref.digest.startswith(version)]
            digest = found[0].digest if len(found) == 1 and len(version) >= 6 else ""
        ref = AdapterRef(tenant, name, digest) if digest else None
        return None if ref is None or ref in self.revoked else ref


class Directory:
    """Takes the pictures."""

    def __init__(self, store: AdapterStore, tenants: Callable[[], list[str]]) -> None:
        self._store, self._tenants = store, tenants
        self.picture = Picture()
        self.problem = ""
        """Why the last picture could not be taken; empty when it could."""

    def refresh(self) -> Picture:
        """Blocks: run it in a thread. Keeps the last picture when the store is away."""
        try:
            self.picture, self.problem = self._take(), ""
        except FtcoreError as error:
            if not self.problem:
                log.warning("the store is away; serving what is known: %s", error.what)
            self.problem = error.what
        return self.picture

    def _take(self) -> Picture:
        names: dict[tuple[str, str], Pointer] = {}
        versions: set[AdapterRef] = set()
        revoked: set[AdapterRef] = set()
        for tenant in self._tenants():
            for ref in self._store.list(tenant):
                versions.add(ref)
                if self._store.revocation(ref) is not None:
                    revoked.add(ref)
                if (tenant, ref.name) not in names:
                    names[tenant, ref.name] = self._store.pointer(tenant, ref.name)
        return Picture(names, frozenset(revoked), frozenset(versions), time.time())
