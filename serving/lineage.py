"""Lineage: which base each adapter version was trained on. Its card says so, and is read once.

In: a store, a picture of its names. Out: Origins. Runs in: the ingress and the replicas, where there are several bases.

What is known of a version is forgotten with the version, and stays while the store is away.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import IntegrityError, StorageError
from serving.directory import Picture


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained on, or what a base is: digests."""

    weights: str
    tokenizer: str
    template: str
    """Empty: none."""

    def is_on(self, base: Origin) -> bool:
        """To the last token: of two bases with the same weights, one may speak by another template."""
        return (self.weights, self.tokenizer) == (base.weights, base.tokenizer) and self.template in ("", base.template)


class Lineage:
    """One for each process."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._known: dict[AdapterRef, Origin] = {}

    def known(self, ref: AdapterRef) -> Origin | None:
        """None: it was not read yet."""
        return self._known.get(ref)

    def read(self, ref: AdapterRef) -> Origin:
        """Blocks. Raises IntegrityError for a card that cannot be read, StorageError while the store is away."""
        origin = self._known.get(ref)
        if origin is None:
            try:
                card = self._store.card(ref)
            except IntegrityError:
                self._store.folder.require_something()  # where the store is gone, this version is not
                raise
            origin = self._known[ref] = Origin(card.base.weights, card.tokenizer, card.template)
        return origin

    def follow(self, picture: Picture) -> None:
        """Blocks. Reads what names mean now and meant before; other versions are read when they are asked for."""
        for ref in self._known.copy():
            if not picture.holds(ref):
                self._known.pop(ref, None)
        for ref in picture.pinned():
            try:
                self.read(ref)
            except IntegrityError:
                continue  # told to whoever asks for it
            except StorageError:
                return
