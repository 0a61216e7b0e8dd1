"""Pointer: what an adapter's name stands for now, the aliases beside it, and what it stood for before.

In: digests. Out: current.json, replaced whole. Runs in: the command line (promote), serving replicas (desired state); no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime

from pydantic import Field, ValidationError, model_validator

from ftcore.card import Digest, Name, Text
from ftcore.errors import ConfigError, IntegrityError
from ftcore.section import Section

MAX_HISTORY = 50
MAX_BYTES = 1024**2


class Target(Section):
    """One version and its share of the traffic."""

    digest: Digest
    share: float = Field(1.0, gt=0, le=1)


class Past(Section):
    """What the name pointed at until `until`."""

    targets: tuple[Target, ...]
    until: Text


class Pointer(Section):
    """`targets` share the traffic (one, unless a canary runs); `history` is oldest first."""

    targets: tuple[Target, ...] = ()
    aliases: dict[Name, Digest] = Field(default_factory=dict)
    history: tuple[Past, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Pointer:
        if self.targets and abs(sum(target.share for target in self.targets) - 1) > 1e-6:
            raise ValueError("the shares of a name's versions must add up to 1")
        return self

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def from_json(raw: bytes, where: object) -> Pointer:
        try:
            if len(raw) > MAX_BYTES:
                raise ValueError(f"{len(raw)} bytes")
            return Pointer.model_validate_json(raw)
        except (ValidationError, ValueError) as error:
            raise IntegrityError(
                "this pointer cannot be read", where=where, got=str(error)[:300], remedy="promote a version again after removing it"
            ) from error

    def pick(self, version: str, key: str = "") -> str:
        """The digest that `version` means ("" and `current`: the targets; `previous`; an alias); "" when it means none of these.

        Between several targets, the largest; with a `key` the one that the key's hash falls to, always the same.
        """
        if version in ("", "current"):
            return dealt(self.targets, key)
        if version == "previous":
            return dealt(self.history[-1].targets, key) if self.history else ""
        return self.aliases.get(version, "")

    def pinned(self) -> set[str]:
        """Digests that must stay: current, aliased, and the one to roll back to."""
        kept = {target.digest for target in self.targets} | set(self.aliases.values())
        return kept | {target.digest for past in self.history[-1:] for target in past.targets}

    def changed_within(self, seconds: float, now: datetime) -> bool:
        """Whether it was promoted to what it means now so short a time ago, by the clock of whoever did; also where that cannot be read."""
        if not self.history:
            return False
        try:
            return (now - datetime.fromisoformat(self.history[-1].until)).total_seconds() < seconds
        except (ValueError, TypeError):
            return True

    def promoted(self, digest: str, share: float, now: str) -> Pointer:
        """This version takes `share`; the others keep their proportions in the rest. Unchanged when it is so already."""
        others = [target for target in self.targets if target.digest != digest]
        rest = sum(target.share for target in others)
        if share < 1 and not others:
            raise ConfigError(
                "a canary needs a current version beside it",
                got=f"share {share}",
                wanted="a promoted version",
                remedy="promote one fully first",
            )
        kept = tuple(Target(digest=target.digest, share=target.share / rest * (1 - share)) for target in others) if share < 1 else ()
        targets = (*kept, Target(digest=digest, share=share))
        if targets == self.targets:
            return self
        history = (*self.history, Past(targets=self.targets, until=now)) if self.targets else self.history
        return self.model_copy(update={"targets": targets, "history": history})

    def rolled_back(self, usable: Callable[[str], bool], name: str) -> Pointer:
        """Points at the newest past whose versions are all usable; that past and all after it leave the history."""
        for at in range(len(self.history) - 1, -1, -1):
            past = self.history[at]
            if past.targets != self.targets and all(usable(target.digest) for target in past.targets):
                return self.model_copy(update={"targets": past.targets, "history": self.history[:at]})
        raise ConfigError(
            "there is nothing to roll back to", where=name, wanted="an earlier promoted version that is sealed and not revoked"
        )


def dealt(targets: Sequence[Target], key: str = "") -> str:
    """The digest that the key's hash falls to, by their shares; without a key that of the largest; empty where there are none."""
    if not targets:
        return ""
    if not key:
        return max(targets, key=lambda target: target.share).digest
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * sum(target.share for target in targets)
    for target in targets:
        point -= target.share
        if point < 0:
            return target.digest
    return targets[-1].digest
