"""Split: which rows are trained on and which are held out, by a stable hash of their content, and the check that nothing straddles.

In: content hashes, the splits that sources ask for, and which rows are copies of which. Out: a verdict per row. Runs in: the driver.

A row's share is its hash / 2^64, so the same row lands in the same split whatever else is in the data; copies and near copies follow
their cluster's first row, and a held-out source's row wins over its copy in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ftcore.data.types import Split

if TYPE_CHECKING:
    from ftcore.recipe import Data, Source

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
AUTO, DROPPED = -1, -2
"""Codes beside the index into SPLITS: not yet dealt, and left out."""


def asked(source: Source) -> int:
    """The split code a source asks for."""
    return AUTO if source.split == "auto" else SPLITS.index(source.split)


def deal(hashes: np.ndarray, splits: np.ndarray, data: Data) -> np.ndarray:
    """int8 codes: rows marked AUTO are dealt by `hashes` (uint64), the others stay where their source put them."""
    share = hashes / 2.0**64
    dealt = np.where(share < data.test, SPLITS.index("test"), SPLITS.index("train"))
    dealt = np.where((share >= data.test) & (share < data.test + data.validation), SPLITS.index("validation"), dealt)
    return np.where(splits == AUTO, dealt, splits).astype(np.int8)


def lacking(held: np.ndarray, data: Data) -> list[int]:
    """Splits that are wanted by share but hold no row although others could spare one. `held`: rows per split."""
    wanted = {"train": 1.0 - data.validation - data.test, "validation": data.validation, "test": data.test}
    if not any(source.split == "auto" for source in data.sources):
        return []
    empty = [code for code, name in enumerate(SPLITS) if wanted[name] > 0 and not held[code]]
    spare = int(held.sum()) - (len(SPLITS) - len(empty))
    return empty[: max(0, spare)]


def nearest(hashes: np.ndarray, split: int, data: Data) -> np.ndarray:
    """How far each row's share lies from the split's range of shares."""
    ends = {"test": (0.0, data.test), "validation": (data.test, data.test + data.validation), "train": (data.test + data.validation, 1.0)}
    low, high = ends[SPLITS[split]]
    share = hashes / 2.0**64
    return np.maximum(np.maximum(low - share, share - high), 0.0)
