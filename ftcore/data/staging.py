"""Staging: encoded rows between reading and packing, as flat arrays in numbered parts of bounded size.

In: one item's facts and Examples at a time. Out: parts on storage, read back as arrays without loading what is not asked for.
Runs in: Ray Data tasks (write, read), the driver (read).

    <building>/staged/00003-000.{items,lengths,ids,mask,keys,sketches,bands}    raw arrays, no pickle
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftcore.data.duplicates import KEY, NUM_HASHES, band_keys, bands, signatures
from ftcore.data.types import ROLES, Example
from ftcore.storage import Folder, explain_oserror

PART_EXAMPLES = 10_000
PART_TOKENS = 4_000_000
"""A part is written when it holds so many; a task holds one part in memory."""

ITEM = np.dtype(
    [
        ("hash", "u8"), ("check", "u8"), ("split", "i1"), ("passes", "u2"), ("file", "i4"), ("row", "i8"),
        ("examples", "i4"), ("tokens", "i8"), ("trained", "i8", (len(ROLES),)), ("truncated", "i4"), ("answers", "i4"), ("stopped", "i4"),
    ]
)  # fmt: skip
"""One record an item. hash, check: of its content; split: the code its source asks for; passes: by its source's weight; file, row: its
origin; then sums over its examples, `trained` by role."""

VERDICT = np.dtype([("split", "i1"), ("copies", "u2"), ("row", "i8")])
"""What became of an item: its split's code (or DROPPED), how often an epoch passes over it, and its index in its split."""


@dataclass(frozen=True)
class Part:
    """A written part. `files`: the names `ITEM.file` counts."""

    key: str
    items: int
    examples: int
    tokens: int
    files: tuple[str, ...]


class PartWriter:
    """Collects items; writes a part when one is full. `parts` after `close` says what was written, in order.

    near_threshold: also write what near duplicates are found by; None: they are not looked for.
    """

    def __init__(self, folder: Folder, prefix: str, near_threshold: float | None = None) -> None:
        self.folder, self.prefix, self.near_threshold = folder, prefix, near_threshold
        self.parts: list[Part] = []
        self._begin()

    def _begin(self) -> None:
        self._items: list[np.ndarray] = []
        self._examples: list[Example] = []
        self._texts: list[str] = []
        self._files: dict[str, int] = {}
        self._tokens = 0

    def add(self, content: tuple[int, int], split: int, passes: int, examples: Sequence[Example], text: str = "") -> None:
        """One item: its content hash, what its source asks for, its Examples (at least one), and its words if near duplicates count."""
        origin = examples[0].origin
        record = np.zeros((), ITEM)
        record["hash"], record["check"] = content
        record["split"], record["passes"] = split, passes
        record["file"], record["row"] = self._files.setdefault(origin.file, len(self._files)), origin.row
        record["examples"] = len(examples)
        record["tokens"] = sum(len(example.ids) for example in examples)
        for example in examples:
            labels = example.roles[1:][example.mask[1:] == 1]
            record["trained"] += np.bincount(labels, minlength=len(ROLES))
            record["truncated"] += example.truncated
            record["answers"] += example.num_answers
            record["stopped"] += example.num_stopped
        self._items.append(record)
        self._examples += examples
        self._tokens += int(record["tokens"])
        if self.near_threshold is not None:
            self._texts.append(text)
        if len(self._examples) >= PART_EXAMPLES or self._tokens >= PART_TOKENS:
            self.close()

    def close(self) -> None:
        """Writes what is held, if anything."""
        if not self._items:
            return
        key = f"{self.prefix}-{len(self.parts):03d}"
        items = np.array(self._items, ITEM)
        lengths = np.array([len(example.ids) for example in self._examples], np.int32)
        _store(self.folder, f"{key}.items", items)
        _store(self.folder, f"{key}.lengths", lengths)
        _store(self.folder, f"{key}.ids", np.concatenate([example.ids for example in self._examples]).astype(np.int32, copy=False))
        _store(self.folder, f"{key}.mask", np.concatenate([example.mask for example in self._examples]).astype(np.uint8, copy=False))
        _store(self.folder, f"{key}.keys", _sorted_keys(items, items["hash"]))
        if self.near_threshold is not None:
            sketches = signatures(self._texts)
            _store(self.folder, f"{key}.sketches", sketches)
            _store(self.folder, f"{key}.bands", np.stack([_sorted_keys(items, keys) for keys in band_keys(sketches, self.near_threshold)]))
        self.parts.append(Part(key, len(items), len(lengths), self._tokens, tuple(self._files)))
        self._begin()


class StagedPart:
    """Reads one part. Arrays are mapped from local files; remote ones are fetched whole."""

    def __init__(self, folder: Folder, part: Part) -> None:
        self.folder, self.part = folder, part

    def items(self) -> np.ndarray:
        return self._load("items", ITEM)

    def lengths(self) -> np.ndarray:
        return self._load("lengths", np.dtype(np.int32))

    def ids(self) -> np.ndarray:
        return self._load("ids", np.dtype(np.int32))

    def mask(self) -> np.ndarray:
        return self._load("mask", np.dtype(np.uint8))

    def keys(self) -> np.ndarray:
        """KEY records of all items, sorted by content hash."""
        return self._load("keys", KEY)

    def sketches(self) -> np.ndarray:
        """uint32 [items, NUM_HASHES]."""
        return self._load("sketches", np.dtype(np.uint32)).reshape(-1, NUM_HASHES)

    def band(self, number: int, threshold: float) -> np.ndarray:
        """KEY records of all items, sorted by the key of one band."""
        return self._load("bands", KEY).reshape(bands(threshold)[0], -1)[number]

    def verdicts(self) -> np.ndarray:
        """VERDICT records of all items, once `write_verdicts` has stored them."""
        return self._load("verdicts", VERDICT)

    def write_verdicts(self, verdicts: np.ndarray) -> None:
        _store(self.folder, f"{self.part.key}.verdicts", verdicts)

    def origin(self, item: np.void) -> str:
        return f"{self.part.files[int(item['file'])]}, row {int(item['row'])}"

    def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
        key = f"{self.part.key}.{name}"
        if self.folder.is_local:
            try:
                return np.asarray(np.memmap(self.folder.path / key, dtype, mode="r"))
            except OSError as error:
                raise explain_oserror(error, "read", f"{self.folder}/{key}") from error
        return np.frombuffer(self.folder.read(key), dtype)


def _sorted_keys(items: np.ndarray, keys: np.ndarray) -> np.ndarray:
    records = np.zeros(len(items), KEY)
    records["key"], records["check"], records["split"], records["item"] = keys, items["check"], items["split"], np.arange(len(items))
    return np.sort(records, order=["key", "item"])


def _store(folder: Folder, key: str, array: np.ndarray) -> None:
    if not folder.is_local:
        folder.write(key, array.tobytes())
        return
    try:  # without Folder's fsync and rename: a half-written part is never read
        (folder.path / key).write_bytes(array.tobytes())
    except OSError as error:
        raise explain_oserror(error, "write", f"{folder}/{key}") from error
