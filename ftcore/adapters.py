"""AdapterRef and AdapterStore: immutable adapter versions named by their content, and one small pointer file per name.

In: verified adapter folders. Out: refs, fetched folders, pointers. Runs in: the driver, serving replicas, the command line; no torch.

    TENANT/NAME/versions/DIGEST/{adapter_model.safetensors, adapter_config.json, probes.*, [tokenizer files], README.md, card.json last}
    TENANT/NAME/current.json        targets (digest and share), aliases, history; replaced whole, by compare and swap
    TENANT/NAME/revoked/DIGEST.json why, when; never removed

`card.json` is created once and never written again: no card, no version. Two publishers of the same content both succeed.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftcore.adapter_files import CARD, NOT_CONTENT, README, check_adapter, content_digest, content_files, read_probe_facts
from ftcore.card import Card, utc_now
from ftcore.errors import ConfigError, IntegrityError
from ftcore.export.modelcard import render_card
from ftcore.pointer import MAX_HISTORY, Pointer
from ftcore.storage import Folder, canonical_json

PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SHORT = re.compile(r"[0-9a-f]{6,64}")
POINTER = "current.json"
MAX_CARD = 4 << 20
"""Bytes of a card: whoever can write to a store does not fill the memory of who reads it."""
YOUNG_S = 24 * 3600
"""An unsealed version younger than this may still be on its way in."""


@dataclass(frozen=True, order=True)
class AdapterRef:
    """`acme/support@3f2a9c1…`: a tenant, a name and the full digest of the content."""

    tenant: str
    name: str
    digest: str

    def __post_init__(self) -> None:
        if not (PART.fullmatch(self.tenant) and PART.fullmatch(self.name) and len(self.digest) == 64 and SHORT.fullmatch(self.digest)):
            raise _bad_ref(f"{self.tenant}/{self.name}@{self.digest}")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.digest[:12]}"

    @property
    def full(self) -> str:
        return f"{self.tenant}/{self.name}@{self.digest}"

    @property
    def key(self) -> str:
        """The version's folder in a store."""
        return f"{self.tenant}/{self.name}/versions/{self.digest}"


def split_ref(text: str) -> tuple[str, str, str]:
    """`tenant/name[@version]` -> tenant, name, version ("" when absent; a digest or an alias). Raises ConfigError otherwise."""
    path, _, version = text.partition("@")
    tenant, _, name = path.partition("/")
    sound = PART.fullmatch(tenant) and PART.fullmatch(name) and ("@" not in text or PART.fullmatch(version) or SHORT.fullmatch(version))
    if not sound:
        raise _bad_ref(text)
    return tenant, name, version


def _bad_ref(text: str) -> ConfigError:
    return ConfigError(
        "this is not an adapter name",
        got=ascii(text[:200]),
        wanted="tenant/name or tenant/name@version (lower-case letters, digits, '.', '_', '-')",
    )


def _revoked_key(ref: AdapterRef) -> str:
    return f"{ref.tenant}/{ref.name}/revoked/{ref.digest}.json"


def _altered(where: str | Path, got: str, wanted: str) -> IntegrityError:
    remedy = "it was altered or damaged; publish or fetch it again"
    return IntegrityError(
        "this file is not the one that was published", where=where, got=f"sha256 {got[:16]}", wanted=f"sha256 {wanted[:16]}", remedy=remedy
    )


def _require_content(folder: Path, card: Card) -> None:
    """A fetched folder holds exactly what its card names, byte for byte."""
    files = content_files(folder)
    for name, fact in card.files.items():
        if name not in files:
            raise IntegrityError("a file of this version is gone", where=folder / name, remedy=f"remove {folder} and fetch again")
        if files[name].sha256 != fact.sha256:
            raise _altered(folder / name, files[name].sha256, fact.sha256)
    if strangers := sorted(set(files) - set(card.files)):
        raise IntegrityError("this folder holds something its card does not name", where=folder, got=strangers[0], remedy="remove it")
    check_adapter(folder)
    if card.model_dump(include={"probes"})["probes"] != read_probe_facts(folder):
        raise IntegrityError("this card says something else of its probes than they do", where=folder, remedy="publish the version again")


class AdapterStore:
    """A store on a local folder or any fsspec path. Client strings reach it only through `split_ref`, so they never become other paths."""

    def __init__(self, url: str | Path) -> None:
        self.folder = Folder(url)

    def __str__(self) -> str:
        return str(self.folder)

    # ---- versions

    def publish(self, folder: Path, card: Card) -> AdapterRef:
        """Copies a verified adapter folder in and seals it with its card. The same content gives the same ref and changes nothing.

        Raises IntegrityError when the folder is not what the card says, or when that digest was revoked.
        """
        files = content_files(folder)
        check_adapter(folder)
        if files != card.files or content_digest(files) != card.digest:
            raise IntegrityError(
                "this folder is not the one its card describes", where=folder, got=content_digest(files)[:12], wanted=card.digest[:12]
            )
        ref = AdapterRef(card.tenant, card.name, card.digest)
        self._refuse_revoked(ref)
        if self.is_sealed(ref):
            return ref
        self.folder.at_once(lambda name: self.folder.put(folder / name, f"{ref.key}/{name}"), files)
        self.folder.write(f"{ref.key}/{README}", render_card(card).encode())
        self._read_back(ref, card)
        self.folder.create(f"{ref.key}/{CARD}", card.to_json())  # False: another publisher of the same content sealed it first
        return ref

    def is_sealed(self, ref: AdapterRef) -> bool:
        return self.folder.exists(f"{ref.key}/{CARD}")

    def card(self, ref: AdapterRef) -> Card:
        """The card of a sealed version, held against the ref."""
        if not self.is_sealed(ref):
            raise IntegrityError("there is no such sealed version", where=f"{self}/{ref.key}", remedy="list them: ftcore adapters list")
        card = Card.from_json(self.folder.read(f"{ref.key}/{CARD}", MAX_CARD), f"{self}/{ref.key}/{CARD}")
        if (card.tenant, card.name, card.digest) != (ref.tenant, ref.name, ref.digest):
            raise IntegrityError(
                "this card belongs to another version", where=f"{self}/{ref.key}", got=f"{card.tenant}/{card.name}@{card.digest[:12]}"
            )
        return card

    def fetch(self, ref: AdapterRef, into: str | Path) -> Path:
        """Brings a version to `into/TENANT/NAME/DIGEST`, every hash verified; returns that plain PEFT folder, with card and README.

        Raises IntegrityError for what is unsealed, revoked, altered or unexpected. Processes that fetch at once do not disturb each other.
        """
        self._refuse_revoked(ref)
        card = self.card(ref)
        target = Path(into) / ref.tenant / ref.name / ref.digest  # the same content of another tenant has another card
        if target.is_dir():
            _require_content(target, card)
            return target
        self._require_listed(ref, card)
        temporary = target.with_name(f".{ref.digest}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.mkdir(parents=True)
            self.folder.at_once(lambda name: self.folder.get(f"{ref.key}/{name}", temporary / name), card.files)
            _require_content(temporary, card)
            (temporary / README).write_text(render_card(card), encoding="utf-8")
            (temporary / CARD).write_bytes(card.to_json())
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                _require_content(target, card)  # another process was first
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def verify(self, ref: AdapterRef) -> Card:
        """Reads a whole version back against its card. Raises IntegrityError; returns the card."""
        card = self.card(ref)
        self._require_listed(ref, card)
        self._read_back(ref, card)
        return card

    def list(self, tenant: str | None = None) -> list[AdapterRef]:
        """Every sealed version, sorted; of one tenant when given."""
        if tenant is not None and not PART.fullmatch(tenant):
            raise _bad_ref(tenant)
        refs = []
        for owner in [tenant] if tenant else self._parts(""):
            for name in self._parts(owner):
                refs += [ref for ref in self._versions(owner, name) if self.is_sealed(ref)]
        return sorted(refs)

    # ---- names

    def resolve(self, text: str, key: str = "") -> AdapterRef:
        """`tenant/name` (its current version), `tenant/name@short`, `@alias`, `@current` or `@previous` -> the ref.

        Where a name is split between versions, `key` (a conversation, say) sticks to one of them. Raises ConfigError when nothing or more
        than one matches, IntegrityError when what matches was revoked.
        """
        tenant, name, version = split_ref(text)
        pointer = self.pointer(tenant, name)
        digest = pointer.pick(version, key)
        if not digest and SHORT.fullmatch(version):
            digest = self._match_short(tenant, name, version)
        if not digest:
            raise self._unknown(text, tenant, name)
        ref = AdapterRef(tenant, name, digest)
        self._refuse_revoked(ref)
        if not self.is_sealed(ref):
            raise IntegrityError(
                "this version was never sealed or was removed", where=f"{self}/{ref.key}", remedy="list them: ftcore adapters list"
            )
        return ref

    def find(self, text: str) -> AdapterRef:
        """Like `resolve`, for what must also reach revoked versions."""
        tenant, name, version = split_ref(text)
        pointed = self.pointer(tenant, name).pick(version)
        sealed = [ref for ref in self._versions(tenant, name) if self.is_sealed(ref)]
        found = [ref for ref in sealed if ref.digest == pointed or (not pointed and version and ref.digest.startswith(version))]
        if len(found) != 1:
            raise ConfigError(
                "this fits several versions" if found else "no such version", where=self, got=text, remedy="ftcore adapters list"
            )
        return found[0]

    def pointer(self, tenant: str, name: str) -> Pointer:
        key = f"{tenant}/{name}/{POINTER}"
        return Pointer.from_json(self.folder.read(key), f"{self}/{key}") if self.folder.exists(key) else Pointer()

    def targets(self, tenant: str, name: str) -> dict[AdapterRef, float]:
        """What a name points at now, and each version's share of the traffic."""
        return {AdapterRef(tenant, name, target.digest): target.share for target in self.pointer(tenant, name).targets}

    def promote(self, ref: AdapterRef, share: float = 1.0) -> Pointer:
        """Points the name at this version; `share` < 1 leaves the rest to what was current (a canary)."""
        if not 0 < share <= 1:
            raise ConfigError("a share of traffic lies between 0 and 1", got=str(share), wanted="0 < share <= 1")
        self._refuse_revoked(ref)
        self.card(ref)
        return self._change(ref.tenant, ref.name, lambda pointer: pointer.promoted(ref.digest, share, utc_now()))

    def rollback(self, name: str) -> AdapterRef:
        """Points `tenant/name` back at what it pointed at before, past revoked and removed versions; returns the new current one."""
        tenant, short, _ = split_ref(name)

        def usable(digest: str) -> bool:
            ref = AdapterRef(tenant, short, digest)
            return self.is_sealed(ref) and self.revocation(ref) is None

        self._change(tenant, short, lambda pointer: pointer.rolled_back(usable, f"{tenant}/{short}"))
        return self.resolve(f"{tenant}/{short}")

    def tag(self, ref: AdapterRef, alias: str) -> None:
        """Gives a version a second name: `tenant/name@alias`. Not one that could be read as a digest."""
        if not PART.fullmatch(alias) or SHORT.fullmatch(alias) or alias in ("current", "previous"):
            raise ConfigError(
                "this cannot be an alias", got=alias[:80], wanted="letters, digits, '.', '_', '-', and not a digest", remedy="try `stable`"
            )
        self.card(ref)
        self._change(ref.tenant, ref.name, lambda pointer: pointer.model_copy(update={"aliases": {**pointer.aliases, alias: ref.digest}}))

    # ---- ends

    def revoke(self, ref: AdapterRef, reason: str) -> None:
        """Marks a digest as never to be served or published again. What the name points at is left: roll it back."""
        self.folder.create(_revoked_key(ref), canonical_json({"reason": reason, "time": utc_now()}))

    def revocation(self, ref: AdapterRef) -> str | None:
        """Why a version was revoked; None when it was not."""
        key = _revoked_key(ref)
        return str(self.folder.read_json(key).get("reason", "")) if self.folder.exists(key) else None

    def gc(self, keep_last: int = 3, *, dry_run: bool = True, tenant: str | None = None) -> Sequence[AdapterRef]:
        """The versions that may go (removed unless `dry_run`): all but the newest `keep_last` of a name, and never one that is current,
        aliased, the one to roll back to, or unsealed but young."""
        if keep_last < 1:
            raise ConfigError("gc keeps at least one version of a name", got=str(keep_last), wanted="keep_last >= 1")
        doomed: list[AdapterRef] = []
        for owner in [split_ref(f"{tenant}/x")[0]] if tenant else self._parts(""):
            for name in self._parts(owner):
                pinned = self.pointer(owner, name).pinned()
                versions = self._versions(owner, name)
                sealed = sorted((ref for ref in versions if self.is_sealed(ref)), key=self._sealed_at, reverse=True)
                doomed += [ref for ref in sealed[keep_last:] if ref.digest not in pinned]
                doomed += [ref for ref in versions if ref not in sealed and time.time() - self._touched_at(ref) > YOUNG_S]
        if not dry_run:
            for ref in doomed:
                self.folder.delete(f"{ref.key}/{CARD}")  # unseal first: what is half removed is no version
                self.folder.delete(ref.key)
        return doomed

    # ---- inside

    def _change(self, tenant: str, name: str, change: Callable[[Pointer], Pointer]) -> Pointer:
        """Compare and swap on the pointer. Raises StorageError after many tries."""
        key = f"{tenant}/{name}/{POINTER}"
        made: list[Pointer] = []

        def changed(old: bytes | None) -> bytes:
            pointer = change(Pointer.from_json(old, f"{self}/{key}") if old is not None else Pointer())
            made.append(pointer.model_copy(update={"history": pointer.history[-MAX_HISTORY:]}))
            return made[-1].to_json()

        self.folder.change(key, changed, "this pointer")
        return made[-1]

    def _refuse_revoked(self, ref: AdapterRef) -> None:
        reason = self.revocation(ref)
        if reason is not None:
            raise IntegrityError(
                "this version was revoked",
                where=ref,
                got=reason,
                remedy=f"ftcore adapters rollback {ref.tenant}/{ref.name}, or publish anew",
            )

    def _require_listed(self, ref: AdapterRef, card: Card) -> None:
        """By the listing alone, before a byte is copied: every file that the card names, in its size, and no other file, folder or link."""
        sizes = self.folder.sizes(ref.key)
        strangers = sorted(set(sizes) - {*card.files, *NOT_CONTENT})
        if self.folder.is_local:
            strangers += [path.name for path in (self.folder.path / ref.key).iterdir() if path.is_symlink() or path.is_dir()]
        if strangers:
            raise IntegrityError(
                "this version holds something its card does not name",
                where=f"{self}/{ref.key}",
                got=ascii(strangers[0][:200]),
                remedy="remove it",
            )
        for name, fact in card.files.items():
            if sizes.get(name) != fact.bytes:
                got = f"{sizes[name]} bytes" if name in sizes else "no such file"
                raise IntegrityError(
                    "a file of this version is gone, or of another size", where=f"{self}/{ref.key}/{name}", got=got,
                    wanted=f"{fact.bytes} bytes", remedy="publish the version again",
                )  # fmt: skip

    def _read_back(self, ref: AdapterRef, card: Card) -> None:
        digests = self.folder.at_once(lambda name: self.folder.digest(f"{ref.key}/{name}"), card.files)
        for (name, fact), got in zip(card.files.items(), digests, strict=True):
            if got != fact.sha256:
                raise _altered(f"{self}/{ref.key}/{name}", got, fact.sha256)

    def _match_short(self, tenant: str, name: str, short: str) -> str:
        found = [ref.digest for ref in self._versions(tenant, name) if ref.digest.startswith(short) and self.is_sealed(ref)]
        if len(found) > 1:
            raise ConfigError(
                "this short digest fits several versions",
                got=short,
                wanted=" | ".join(digest[:16] for digest in found),
                remedy="type more of it",
            )
        return found[0] if found else ""

    def _unknown(self, text: str, tenant: str, name: str) -> ConfigError:
        versions = [ref for ref in self._versions(tenant, name) if self.is_sealed(ref)]
        if versions and not split_ref(text)[2]:
            wanted, remedy = f"one of {len(versions)} versions", f"ftcore adapters promote {versions[-1]}"
        else:
            wanted, remedy = ", ".join(str(ref) for ref in versions[:5]), "list them: ftcore adapters list"
        return ConfigError(
            "the store knows no such adapter" if not versions else "this name points at no version",
            where=self,
            got=text,
            wanted=wanted,
            remedy=remedy,
        )

    def _versions(self, tenant: str, name: str) -> Sequence[AdapterRef]:
        found = self.folder.names(f"{tenant}/{name}/versions")
        return [AdapterRef(tenant, name, digest) for digest in found if len(digest) == 64 and SHORT.fullmatch(digest)]

    def _parts(self, key: str) -> Sequence[str]:
        return [name for name in self.folder.names(key) if PART.fullmatch(name)]

    def _sealed_at(self, ref: AdapterRef) -> float:
        return self.folder.modified(f"{ref.key}/{CARD}")

    def _touched_at(self, ref: AdapterRef) -> float:
        return max((self.folder.modified(f"{ref.key}/{name}") for name in self.folder.files(ref.key)), default=time.time())
