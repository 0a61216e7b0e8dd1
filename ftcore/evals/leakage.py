"""Leakage: test rows that were trained on too, whole or nearly word for word.

In: test rows, the content hashes and texts of the training rows. Out: Leaks. Runs in: the driver, a few thousand training rows at a time.

Near copies are estimated with the same MinHash as duplicates in training data (ftcore.data.duplicates). Words that many test rows share, an
instruction before each question, say nothing about copying: they are left out on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ftcore.data.duplicates import band_keys, shingles, sketches_of
from ftcore.evals.asked import Asked

CHUNK = 4096
NEAR_ROWS = 200_000
"""Near copies are looked for among at most so many training rows: about a minute."""
SHARED, FEWEST = 0.1, 3
"""Words that more than this share of the test rows hold, and at least so many of them, are taken for a common instruction."""


@dataclass(frozen=True)
class Leak:
    """A test row and the training row that it copies. `similarity`: 1 for the same content, else the estimated Jaccard similarity."""

    id: str
    copy_of: str
    similarity: float


def exact_copies(rows: Sequence[Asked], kept: np.ndarray, origins: Sequence[str]) -> list[Leak]:
    """`kept`: KEPT records of the training split."""
    wanted = {row.content: row.id for row in rows}
    firsts = np.array([int(content[:16], 16) for content in wanted], np.uint64)
    leaks: dict[str, str] = {}
    for record in kept[np.isin(kept["hash"], firsts)]:
        content = f"{int(record['hash']):016x}{int(record['check']):016x}"
        if content in wanted:
            leaks.setdefault(content, f"{origins[record['file']]}, row {int(record['row'])}")
    return [Leak(row.id, leaks[row.content], 1.0) for row in rows if row.content in leaks]


def near_copies(rows: Sequence[Asked], train: Iterable[tuple[str, str]], threshold: float) -> list[Leak]:
    """`train`: (place, text) of each training row. Of a test row's copies, the first one found that is most alike."""
    sets = [shingles(row.words) for row in rows]
    counts = Counter(shingle for found in sets for shingle in found)
    common = {shingle for shingle, count in counts.items() if count > max(FEWEST, SHARED * len(rows))}
    own = [at for at, found in enumerate(sets) if not common.issuperset(found)]
    if not own:
        return []
    sketches = sketches_of([_without(sets[at], common) for at in own])
    bands = band_keys(sketches, threshold)
    best: dict[int, Leak] = {}
    stream = iter(train)
    while chunk := list(islice(stream, CHUNK)):
        told = [(place, left) for place, text in chunk if (left := _without(shingles(text), common))]
        if not told:
            continue
        others = sketches_of([left for _, left in told])
        for at, other in _alike(bands, band_keys(others, threshold)):
            similarity = float((sketches[at] == others[other]).mean())
            row = rows[own[at]]
            if similarity >= threshold and (at not in best or similarity > best[at].similarity):
                best[at] = Leak(row.id, told[other][0], similarity)
    return [best[at] for at in sorted(best)]


def _without(found: Sequence[bytes], common: set[bytes]) -> list[bytes]:
    return [shingle for shingle in found if shingle not in common]


def _alike(ours: np.ndarray, theirs: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (of ours, of theirs) that share a key in some band; both [bands, N]."""
    pairs: set[tuple[int, int]] = set()
    for mine, other in zip(ours, theirs, strict=True):
        for at in np.flatnonzero(np.isin(other, mine)):
            pairs.update((int(found), int(at)) for found in np.flatnonzero(mine == other[at]))
    return pairs
