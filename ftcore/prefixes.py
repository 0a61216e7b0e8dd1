"""Prefixes: keys and values of prompts that were read, for prompts that begin alike under the same adapter and salt.

In: a prompt's tokens and its keys and values. Out: those of the longest beginning that is kept. Runs in: the engine's thread.

A kept prompt is found by the digest of its beginning, cut at multiples of `BLOCK` tokens; the key holds the adapter's digest, never a name,
so that a new version of a name finds nothing of the old one's, and the tenant's salt, so that nobody learns what others asked.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

BLOCK = 32
Owner = tuple[str, str]
"""(adapter digest, salt)"""


class Prefixes:
    """Least recently used first out, within a limit of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._kept: OrderedDict[tuple[Owner, bytes], tuple[Tensor, int]] = OrderedDict()
        self._uses: Counter[int] = Counter()

    def longest(self, owner: Owner, tokens: Sequence[int]) -> Tensor | None:
        """[layers, 2, H_kv, length, D] of the longest kept beginning of `tokens`."""
        for digest in reversed(_digests(tokens)):
            if (owner, digest) in self._kept:
                self._kept.move_to_end((owner, digest))
                saved, length = self._kept[owner, digest]
                return saved[..., :length, :]
        return None

    def keep(self, owner: Owner, tokens: Sequence[int], copy: Callable[[int], Tensor]) -> None:
        """Keeps the beginning of `tokens` that is whole blocks; `copy(length)` makes it. One copy serves every shorter beginning too."""
        digests = _digests(tokens)
        if not digests or (owner, digests[-1]) in self._kept:
            return
        saved = copy(len(digests) * BLOCK)
        if saved.nbytes > self.limit:
            return  # a prompt longer than the limit holds
        self.held += saved.nbytes
        for number, digest in enumerate(digests, 1):
            if (owner, digest) not in self._kept:
                self._kept[owner, digest] = (saved, number * BLOCK)
                self._uses[id(saved)] += 1
        while self.held > self.limit:
            self._drop(next(iter(self._kept)))

    def forget(self, adapter: str) -> None:
        for key in [key for key in self._kept if key[0][0] == adapter]:
            self._drop(key)

    def _drop(self, key: tuple[Owner, bytes]) -> None:
        saved, _ = self._kept.pop(key)
        self._uses[id(saved)] -= 1
        if not self._uses[id(saved)]:
            del self._uses[id(saved)]
            self.held -= saved.nbytes


def _digests(tokens: Sequence[int]) -> list[bytes]:
    """Chained digests of each whole block of `tokens`."""
    found, state = [], hashlib.blake2b(digest_size=16)
    flat = array("q", tokens)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        state.update(flat[end - BLOCK : end].tobytes())
        found.append(state.copy().digest())
    return found
