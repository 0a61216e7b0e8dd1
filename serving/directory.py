"""Directory: what each tenant's names stand for now. A picture of the store's pointers, taken anew every second or so.

In: a store, the tenants served. Out: model name of a request -> AdapterRef, within the caller's tenant. Runs in: the ingress.

A client's string is looked up in the picture and never reaches the store unless the picture holds its name. While the store is away the
last picture stays, and `/readyz` says so; before the first one nobody can tell what a name means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ftcore.adapter_files import CARD
from ftcore.adapters import POINTER, AdapterRef, AdapterStore
from ftcore.errors import FtcoreError, IntegrityError
from ftcore.pointer import Pointer, Target, dealt

log = logging.getLogger(__name__)
CHANGING_S = 120.0
"""How long after a promotion the version before goes on answering where the new one is not loaded."""


@dataclass(frozen=True)
class Name:
    """One adapter name of one tenant."""

    pointer: Pointer
    versions: frozenset[str]
    """Digests that are sealed."""
    revoked: frozenset[str]

    @property
    def current(self) -> tuple[str, ...]:
        """Digests that share the traffic now, without the unusable ones."""
        return tuple(target.digest for target in self._targets)

    @property
    def _targets(self) -> list[Target]:
        return [each for each in self.pointer.targets if each.digest in self.versions and each.digest not in self.revoked]

    def digest(self, version: str, session: str = "") -> str:
        """What a version means: "", an alias, or the beginning of one digest; "" when nothing usable."""
        if version in ("", "current"):
            return dealt(self._targets, session)
        digest = self.pointer.pick(version, session)
        if not digest and len(version) >= 6:
            found = [each for each in self.versions if each.startswith(version)]
            digest = found[0] if len(found) == 1 else ""
        return digest if digest in self.versions and digest not in self.revoked else ""


@dataclass(frozen=True)
class Picture:
    """The names of one moment, by tenant."""

    tenants: dict[str, dict[str, Name]] = field(default_factory=dict)

    def models(self, tenant: str) -> list[tuple[str, AdapterRef]]:
        """(name, current version) of a tenant, sorted; names without a usable one are left out."""
        own = self.tenants.get(tenant, {})
        return [(name, AdapterRef(tenant, name, digest)) for name in sorted(own) if (digest := own[name].digest(""))]

    def find(self, tenant: str, model: str, session: str = "") -> AdapterRef | None:
        """`name`, `name@version`, `name@alias`, with or without the caller's own `tenant/` in front. None for anything else."""
        path, at, version = model.partition("@")
        owner, slash, name = path.rpartition("/")
        known = self.tenants.get(tenant, {}).get(name)
        if known is None or (slash and owner != tenant) or (at and not version):
            return None
        digest = known.digest(version, session)
        return AdapterRef(tenant, name, digest) if digest else None

    def before(self, ref: AdapterRef) -> AdapterRef | None:
        """What the name of a current version meant before; None where it meant nothing else."""
        known = self.tenants.get(ref.tenant, {}).get(ref.name)
        digest = known.digest("previous") if known is not None else ""
        return AdapterRef(ref.tenant, ref.name, digest) if digest and digest != ref.digest else None

    def is_changing(self, ref: AdapterRef) -> bool:
        """Whether replicas may still be loading what the name of a version means."""
        known = self.tenants.get(ref.tenant, {}).get(ref.name)
        return known is not None and known.pointer.changed_within(CHANGING_S, datetime.now(UTC))

    def current(self) -> Iterator[AdapterRef]:
        """What names mean now: several versions of a name that shares its traffic."""
        for tenant, names in self.tenants.items():
            for name, known in names.items():
                yield from (AdapterRef(tenant, name, digest) for digest in known.current)

    def pinned(self) -> Iterator[AdapterRef]:
        """What names and their aliases mean now, and meant before."""
        for tenant, names in self.tenants.items():
            for name, known in names.items():
                yield from (AdapterRef(tenant, name, digest) for digest in sorted(known.pointer.pinned() & known.versions - known.revoked))

    def holds(self, ref: AdapterRef) -> bool:
        """Whether that version is sealed in the store."""
        known = self.tenants.get(ref.tenant, {}).get(ref.name)
        return known is not None and ref.digest in known.versions


class Directory:
    """Takes the pictures."""

    def __init__(self, store: AdapterStore, tenants: Callable[[], list[str]]) -> None:
        self._store, self._tenants = store, tenants
        self.picture = self._blank = Picture()
        self.problem = ""
        """Why the last picture could not be taken; empty when it could."""
        self.num_followed = 0
        """Names seen to point elsewhere than before."""

    @property
    def is_blank(self) -> bool:
        """No picture was taken yet."""
        return self.picture is self._blank

    def refresh(self) -> Picture:
        """Blocks: run it in a thread. Keeps the last picture when the store is away."""
        try:
            before, self.picture, self.problem = self.picture, self._take(), ""
            self.num_followed += _num_moved(before, self.picture)
        except FtcoreError as error:
            if not self.problem:
                log.warning("the store is away; serving what is known: %s", error.what)
            self.problem = error.what
        return self.picture

    def _take(self) -> Picture:
        with self._store.folder.there():  # the replicas' receipt keys are in it before the first adapter
            return Picture({tenant: self._names(tenant) for tenant in self._tenants()})

    def _names(self, tenant: str, tries: int = 2) -> dict[str, Name]:
        """One listing, and one small file for each name. A damaged pointer takes its own name out, and no other's.

        A pointer may mean a version that was sealed after the listing: then both are read once more.
        """
        versions: dict[str, set[str]] = {}
        revoked: dict[str, set[str]] = {}
        pointed = set()
        for key in self._store.folder.files(tenant):
            parts = key.removeprefix(f"{tenant}/").split("/")
            if len(parts) == 4 and parts[1] == "versions" and parts[3] == CARD:
                versions.setdefault(parts[0], set()).add(parts[2])
            elif len(parts) == 3 and parts[1] == "revoked":
                revoked.setdefault(parts[0], set()).add(parts[2].removesuffix(".json"))
            elif len(parts) == 2 and parts[1] == POINTER:
                pointed.add(parts[0])
        names = {}
        for name in sorted(pointed & set(versions)):
            try:
                pointer = self._store.pointer(tenant, name)
            except IntegrityError as error:
                log.warning("%s/%s is not served: %s", tenant, name, error.what)
                continue
            names[name] = Name(pointer, frozenset(versions[name]), frozenset(revoked.get(name, ())))
        is_behind = any(target.digest not in known.versions for known in names.values() for target in known.pointer.targets)
        return self._names(tenant, tries - 1) if is_behind and tries > 1 else names


def _num_moved(before: Picture, after: Picture) -> int:
    pairs = ((names, after.tenants.get(tenant, {})) for tenant, names in before.tenants.items())
    return sum(new[name].pointer.targets != old[name].pointer.targets for old, new in pairs for name in old.keys() & new.keys())
