"""Duplicates: rows with the same content, and rows with almost the same words (MinHash with banded LSH), without holding all rows.

In: items; then sorted key files, one part of the rows each. Out: clusters of copies, each with the row that leads it.
Runs in: Ray Data tasks (keys, pairs of one range of keys), the driver (clusters).

Broder 1997, "On the resemblance and containment of documents". Memory: one key range, then 40 bytes for each row that has a copy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import pairwise

import numpy as np
from datasketch import MinHash, MinHashLSH
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ftcore.data.types import Conversation, Item, Message, Text
from ftcore.storage import canonical_json

NUM_HASHES = 128
SHINGLE_WORDS = 3
RANGE_ROWS = 1_000_000
"""About so many keys are sorted at once."""
MAX_LEADERS = 64
"""In one LSH bucket at most so many different rows gather copies around them (boilerplate can fill a bucket with unlike rows)."""

KEY = np.dtype([("key", "u8"), ("check", "u8"), ("item", "i4"), ("split", "i1")])
"""A row's key in a sorted key file. check: the other half of its content hash; item: its index in the part; split: what its source asks."""
PAIR = np.dtype([("row", "i8", 2), ("hash", "u8", 2), ("split", "i1", 2)])
"""Two rows of one cluster, by their index among all rows."""
COPY = np.dtype([("row", "i8"), ("leader", "i8"), ("hash", "u8"), ("split", "i1"), ("near", "?")])
"""A row that follows another: hash and split are the leader's; near: their contents differ."""

_WORD = re.compile(r"\w+")


def content_hash(item: Item) -> tuple[int, int]:
    """128 bits of the item's whole content (not of where it came from), as two uint64."""
    content = {field.name: _plain(getattr(item, field.name)) for field in fields(item) if field.name != "origin"}
    digest = hashlib.blake2b(canonical_json([type(item).__name__, content]), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _plain(value: object) -> object:
    if isinstance(value, Message):
        return [value.role, value.content, value.weight, value.tool_calls]
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def item_text(item: Item) -> str:
    """All words of an item, in order."""
    if isinstance(item, Text):
        return item.text
    messages = item.messages if isinstance(item, Conversation) else (*item.prompt, item.chosen, item.rejected)
    return "\n".join(message.content for message in messages)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash of the word shingles of each text: uint32 [N, NUM_HASHES]; equal places estimate the Jaccard similarity."""
    return sketches_of([shingles(text) for text in texts])


def sketches_of(sets: Sequence[Sequence[bytes]]) -> np.ndarray:
    """The same, of sets of shingles."""
    found = [sketch.hashvalues for sketch in MinHash.generator(sets, num_perm=NUM_HASHES, seed=1)]
    return np.array(found, np.uint32).reshape(len(sets), NUM_HASHES)


def shingles(text: str) -> list[bytes]:
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return list({" ".join(words[at : at + SHINGLE_WORDS]).encode("utf-8", "replace") for at in range(last)})


def bands(threshold: float) -> tuple[int, int]:
    """(bands, hashes in each) whose S-curve lies best around the threshold, as datasketch chooses them."""
    lsh = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
    return lsh.b, lsh.r


def band_keys(sketches: np.ndarray, threshold: float) -> np.ndarray:
    """uint64 [bands, N]: rows that agree in a whole band share its key."""
    num_bands, width = bands(threshold)
    factors = np.array([pow(0x9E3779B97F4A7C15, place + 1, 1 << 64) | 1 for place in range(width)], np.uint64)
    parts = sketches[:, : num_bands * width].astype(np.uint64).reshape(-1, num_bands, width)
    mixed = ((parts ^ (parts << np.uint64(32))) * factors).sum(axis=2, dtype=np.uint64)
    return np.ascontiguousarray((mixed ^ (mixed >> np.uint64(29))).T * np.uint64(0xBF58476D1CE4E5B9))


def key_ranges(num_rows: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of uint64 keys that hold about RANGE_ROWS rows each."""
    count = max(1, -(-num_rows // RANGE_ROWS))
    edges = [(1 << 64) * at // count for at in range(count + 1)]
    return list(pairwise(edges))


def slice_of(keys: np.ndarray, low: int, high: int) -> np.ndarray:
    """The records of a sorted key file whose key lies in the range, copied out."""
    start = np.searchsorted(keys["key"], np.uint64(low))
    stop = len(keys) if high >= 1 << 64 else np.searchsorted(keys["key"], np.uint64(high))
    return np.array(keys[start:stop])


def exact_pairs(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """PAIRs of rows with the same content among KEY records of one range; `rows`: each record's index among all rows."""
    order = np.lexsort((rows, keys["check"], keys["key"]))
    keys, rows = keys[order], rows[order]
    same = (keys["key"][1:] == keys["key"][:-1]) & (keys["check"][1:] == keys["check"][:-1])
    later = np.flatnonzero(same) + 1
    return _pairs(keys["key"], keys["split"], rows, later - 1, later)


def near_pairs(keys: np.ndarray, rows: np.ndarray, hashes: np.ndarray, sketches: np.ndarray, threshold: float) -> np.ndarray:
    """PAIRs whose estimated similarity reaches the threshold among rows that share a band's key; same-content pairs are left out.

    keys: KEY records of one band; hashes: uint64 content hash of each; sketches: uint32 [N, NUM_HASHES].
    """
    order = np.lexsort((rows, keys["key"]))
    grouped = keys["key"][order]
    starts = np.flatnonzero(np.append(True, grouped[1:] != grouped[:-1])[: len(keys)])
    first: list[int] = []
    second: list[int] = []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(keys)], strict=True):
        members = order[start:stop]
        for _ in range(MAX_LEADERS):
            if len(members) < 2:
                break
            leader, rest = members[0], members[1:]
            alike = (sketches[rest] == sketches[leader]).mean(axis=1) >= threshold
            found = rest[alike & (hashes[rest] != hashes[leader])]
            first += [int(leader)] * len(found)
            second += found.tolist()
            members = rest[~alike]
    return _pairs(hashes, keys["split"], rows, np.array(first, np.int64), np.array(second, np.int64))


def _pairs(hashes: np.ndarray, splits: np.ndarray, rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    pairs = np.zeros(len(first), PAIR)
    for name, values in (("row", rows), ("hash", hashes), ("split", splits)):
        pairs[name][:, 0], pairs[name][:, 1] = values[first], values[second]
    return pairs


def clusters(pairs: Iterable[np.ndarray]) -> np.ndarray:
    """COPY records, sorted by row, of every row that follows another. A cluster is led by its held-out row if a source asks for that
    split, else by its first row."""
    joined = np.concatenate([np.zeros(0, PAIR), *pairs])
    if not len(joined):
        return np.zeros(0, COPY)
    rows, index, inverse = np.unique(joined["row"].ravel(), return_index=True, return_inverse=True)
    hashes, splits = joined["hash"].ravel()[index], joined["split"].ravel()[index]
    ends = inverse.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(rows), len(rows)))
    _, labels = connected_components(graph, directed=False)
    order = np.lexsort((rows, -splits.astype(np.int64), labels))  # test before validation before train and auto
    leaders = order[np.searchsorted(labels[order], labels)]  # the first of each row's cluster
    followers = np.flatnonzero(leaders != np.arange(len(rows)))
    copies = np.zeros(len(followers), COPY)
    lead = leaders[followers]
    copies["row"], copies["leader"], copies["hash"], copies["split"] = rows[followers], rows[lead], hashes[lead], splits[lead]
    copies["near"] = hashes[followers] != hashes[lead]
    return copies
