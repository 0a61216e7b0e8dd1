"""Tasks: what is done to staged parts, in pieces of bounded size that are safe to repeat: find copies, pack.

In: small JSON-able orders; parts from storage. Out: pairs and shards on storage, small JSON-able answers.
Runs in: Ray Data tasks, or one after the other in the driver; no torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from ftcore.data.duplicates import KEY, PAIR, exact_pairs, near_pairs, slice_of
from ftcore.data.pack import plan_blocks
from ftcore.data.prepared import write_shard
from ftcore.data.split import SPLITS
from ftcore.data.staging import Part, StagedPart
from ftcore.data.types import Block
from ftcore.recipe import Recipe
from ftcore.storage import Folder

PARTS = "parts.json"
"""In the staging folder: every part, in order; written once all rows are encoded."""

Order = dict[str, Any]
Answer = dict[str, Any]


def find_copies(staged: Folder, order: Order) -> Answer:
    """Pairs of copies in one range of keys: of content hashes, or of one band's (`band` >= 0). Written to `pairs-<number>`."""
    parts, starts = staged_parts(staged)
    band, threshold = order["band"], order["threshold"]
    found = [slice_of(part.keys() if band < 0 else part.band(band, threshold), order["low"], order["high"]) for part in parts]
    keys = np.concatenate([np.zeros(0, KEY), *found])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in found])
    rows = np.array([*starts, 0], np.int64)[owners] + keys["item"]
    if band < 0:
        pairs = exact_pairs(keys, rows)
    else:
        shared = _shared(keys["key"])
        pairs = _near(parts, keys[shared], owners[shared], rows[shared], threshold)
    name = f"pairs-{order['number']:05d}"
    staged.write(name, pairs.tobytes())
    return {"pairs": name}


def _near(parts: list[StagedPart], keys: np.ndarray, owners: np.ndarray, rows: np.ndarray, threshold: float) -> np.ndarray:
    if not len(keys):
        return np.zeros(0, PAIR)
    items = [(parts[owner], keys["item"][owners == owner]) for owner in np.unique(owners)]
    hashes = np.concatenate([part.items()["hash"][chosen] for part, chosen in items])
    sketches = np.concatenate([part.sketches()[chosen] for part, chosen in items])
    return near_pairs(keys, rows, hashes, sketches, threshold)


def _shared(keys: np.ndarray) -> np.ndarray:
    """Where a key occurs more than once."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)


def pack_window(recipe: Recipe, staged: Folder, blocks: Folder, order: Order) -> Answer:
    """Packs the examples of some segments and writes them as one shard."""
    data = recipe.data
    parts, _ = staged_parts(staged)
    members = [_chosen(parts[part], order["split"], reading) for part, reading in order["segments"]]
    lengths = np.concatenate([lengths for _, lengths, _ in members])
    block_tokens = data.block_tokens or data.max_length
    if packs(recipe):
        plan: Iterable[list[int]] = plan_blocks(lengths, block_tokens)
    else:
        plan = _by_item(np.concatenate([rows + (index << 40) for index, (_, _, rows) in enumerate(members)]))
        block_tokens = int(lengths.max())
    made = _blocks(plan, [parts[part] for part, _ in order["segments"]], members)
    shard, tokens = write_shard(blocks, order["key"], made, block_tokens)
    return {"shard": asdict(shard), "tokens": tokens.tolist(), "split": SPLITS[order["split"]]}


def packs(recipe: Recipe) -> bool:
    return recipe.data.pack and recipe.stage.packs


def staged_parts(staged: Folder) -> tuple[list[StagedPart], list[int]]:
    """Every part in order, and the index of its first item among all."""
    facts = staged.read_json(PARTS)
    parts = [StagedPart(staged, Part(**{**fact, "files": tuple(fact["files"])})) for fact in facts]
    ends = np.cumsum([part.part.items for part in parts]).tolist()
    return parts, [0, *ends[:-1]]


Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of the examples of one segment: where each starts in its part's ids, its length, its item's row."""


def _chosen(part: StagedPart, split: int, reading: int) -> Chosen:
    items, verdicts, lengths = part.items(), part.verdicts(), part.lengths()
    kept = np.repeat((verdicts["split"] == split) & (verdicts["copies"] > reading), items["examples"])
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return starts[kept], lengths[kept], np.repeat(verdicts["row"], items["examples"])[kept]


def _by_item(rows: np.ndarray) -> list[list[int]]:
    """The examples of each item, where nothing is packed."""
    edges = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    return [list(range(first, after)) for first, after in zip(edges.tolist(), [*edges[1:].tolist(), len(rows)], strict=True)]


def _blocks(plan: Iterable[list[int]], parts: list[StagedPart], members: list[Chosen]) -> Iterator[Block]:
    ids, masks = [part.ids() for part in parts], [part.mask() for part in parts]
    owners = np.repeat(np.arange(len(members)), [len(rows) for _, _, rows in members])
    starts, lengths, rows = (np.concatenate([member[at] for member in members]) for at in range(3))
    for chosen in plan:
        spans = [(int(owners[i]), int(starts[i]), int(starts[i] + lengths[i])) for i in chosen]
        yield Block(
            ids=np.concatenate([ids[owner][start:end] for owner, start, end in spans]),
            mask=np.concatenate([masks[owner][start:end] for owner, start, end in spans]),
            lengths=lengths[chosen].astype(np.int32), rows=rows[chosen].astype(np.int64),
        )  # fmt: skip
