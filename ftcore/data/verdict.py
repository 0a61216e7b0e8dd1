"""Verdict: what becomes of each staged row: its split, or dropped as a copy; and the windows that are packed together.

In: staged parts, the clusters of copies, the recipe's data section. Out: a verdict file beside each part, the audit of kept rows, Windows.
Runs in: the driver, one part in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftcore.data.audit import PLACES, Audit, Tally
from ftcore.data.pack import WINDOW
from ftcore.data.split import AUTO, DROPPED, SPLITS, deal, lacking, nearest
from ftcore.data.staging import VERDICT, StagedPart
from ftcore.data.types import ROLES

if TYPE_CHECKING:
    from ftcore.recipe import Data

TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Segment:
    """The items of one part that belong to a split and are read at least `reading` + 1 times an epoch."""

    part: int
    reading: int


@dataclass(frozen=True)
class Window:
    """What one task packs into one shard: at least WINDOW examples where the split has so many."""

    split: int
    number: int
    segments: tuple[Segment, ...]


def judge(parts: Sequence[StagedPart], copies: np.ndarray, data: Data, audit: Audit) -> list[Window]:
    """Decides on every row, writes the verdicts, fills the audit. `copies`: COPY records, sorted by row."""
    starts = np.concatenate([[0], np.cumsum([part.part.items for part in parts])]).astype(np.int64)
    held = np.zeros(len(SPLITS), np.int64)
    for number, part in enumerate(parts):
        first, after = np.searchsorted(copies["row"], starts[number : number + 2])
        splits = _decide(parts, starts, number, copies[first:after], data, audit)
        held += np.bincount(splits[splits >= 0], minlength=len(SPLITS))
        part.write_verdicts(_verdicts(part, splits))
    for split in lacking(held, data):
        giver = int(held.argmax())
        _move_nearest(parts, split, giver, data, audit)
        held[giver] -= 1
    return _windows(_number(parts, audit))


def _decide(parts: Sequence[StagedPart], starts: np.ndarray, number: int, copies: np.ndarray, data: Data, audit: Audit) -> np.ndarray:
    """int8 split codes of a part's items."""
    items = parts[number].items()
    at = copies["row"] - starts[number]
    hashes, asked = items["hash"].copy(), items["split"].copy()
    hashes[at] = copies["hash"]
    asked[at] = np.where(asked[at] == AUTO, copies["split"], asked[at])
    splits = deal(hashes, asked, data)
    leading = deal(copies["hash"], copies["split"], data)
    gone = np.where(copies["near"], data.near_duplicates == "drop", data.duplicates == "drop")

    def tally(group: dict[str, Tally], name: str, chosen: np.ndarray) -> None:
        found = np.flatnonzero(chosen)
        places = [f"{_place(parts, starts, copies[i]['row'])} = {_place(parts, starts, copies[i]['leader'])}" for i in found[:PLACES]]
        if len(found):
            group.setdefault(name, Tally()).merge(Tally(len(found), places))

    for near, name in ((False, "exact duplicate"), (True, "near duplicate")):
        chosen = copies["near"] == near
        tally(audit.dropped, name, chosen & gone)
        tally(audit.duplicates, f"{name}, left in", chosen & ~gone)
        for split, other in ((a, b) for a in range(len(SPLITS)) for b in range(len(SPLITS)) if a != b):
            straddles = chosen & (splits[at] == split) & (leading == other)
            tally(audit.leaked, f"{SPLITS[split]} rows, {name}s of {SPLITS[other]} rows, dropped", straddles & gone)
            tally(audit.leaked, f"{SPLITS[split]} rows, {name}s of {SPLITS[other]} rows, left in", straddles & ~gone)
    splits[at[gone]] = DROPPED
    return splits


def _place(parts: Sequence[StagedPart], starts: np.ndarray, row: int) -> str:
    number = int(np.searchsorted(starts, row, side="right")) - 1
    return parts[number].origin(parts[number].items()[int(row - starts[number])])


def _verdicts(part: StagedPart, splits: np.ndarray) -> np.ndarray:
    verdicts = np.zeros(len(splits), VERDICT)
    verdicts["split"] = splits
    verdicts["copies"] = np.where(splits == DROPPED, 0, np.where(splits == TRAIN, part.items()["passes"], 1))
    return verdicts


def _move_nearest(parts: Sequence[StagedPart], split: int, giver: int, data: Data, audit: Audit) -> None:
    """Small data: of the split that has most rows, the row whose hash lies nearest to a split that would be empty moves there."""
    best: tuple[float, int, str] | None = None
    for part in parts:
        items = part.items()
        movable = items[(items["split"] == AUTO) & (part.verdicts()["split"] == giver)]
        if len(movable):
            distance = nearest(movable["hash"], split, data)
            item = movable[distance.argmin()]
            best = min(filter(None, (best, (float(distance.min()), int(item["hash"]), part.origin(item)))))
    if best is None:
        return
    for part in parts:  # rows of the same content (where copies are kept) move together
        splits = part.verdicts()["split"].copy()
        moved = (part.items()["hash"] == best[1]) & (splits == giver)
        if moved.any():
            splits[moved] = split
            part.write_verdicts(_verdicts(part, splits))
    audit.note(f"{SPLITS[split]}: no row fell there by its hash, so the nearest was taken: {best[2]}")


def _number(parts: Sequence[StagedPart], audit: Audit) -> dict[int, dict[Segment, int]]:
    """Counts each split's rows from 0 and fills the audit; returns split -> segment -> examples."""
    next_row = np.zeros(len(SPLITS), np.int64)
    segments: dict[int, dict[Segment, int]] = {code: {} for code in range(len(SPLITS))}
    for number, part in enumerate(parts):
        items, verdicts = part.items(), np.array(part.verdicts())
        for code, name in enumerate(SPLITS):
            chosen = np.flatnonzero(verdicts["split"] == code)
            if not len(chosen):
                continue
            verdicts["row"][chosen] = next_row[code] + np.arange(len(chosen))
            next_row[code] += len(chosen)
            kept, copies = items[chosen], verdicts["copies"][chosen].astype(np.int64)
            facts = audit.split(name)
            facts.rows += len(chosen)
            facts.repeats += int(copies.sum()) - len(chosen)
            facts.examples += int((kept["examples"] * copies).sum())
            facts.tokens += int((kept["tokens"] * copies).sum())
            facts.trained += int((kept["trained"].sum(axis=1) * copies).sum())
            for reading in range(int(copies.max())):
                segments[code][Segment(number, reading)] = int(kept["examples"][copies > reading].sum())
        part.write_verdicts(verdicts)
        _audit_kept(part, items, verdicts["split"] >= 0, audit)
    return segments


def _audit_kept(part: StagedPart, items: np.ndarray, chosen: np.ndarray, audit: Audit) -> None:
    kept = items[chosen]
    audit.add_lengths(part.lengths()[np.repeat(chosen, items["examples"])])
    audit.add_trained(kept["trained"].sum(axis=0) if len(kept) else [0] * len(ROLES))
    audit.answers += int(kept["answers"].sum())
    audit.stopped += int(kept["stopped"].sum())
    cut = kept[kept["truncated"] > 0]
    audit.truncated.merge(Tally(int(cut["truncated"].sum()), [part.origin(item) for item in cut[:PLACES]]))


def _windows(segments: dict[int, dict[Segment, int]]) -> list[Window]:
    """Whole segments, in order, until a window holds WINDOW examples; what is left over joins the last window."""
    return [Window(code, number, tuple(members)) for code, found in segments.items() for number, members in enumerate(_gathered(found))]


def _gathered(segments: dict[Segment, int]) -> Iterator[list[Segment]]:
    gathered: list[list[Segment]] = []
    held = WINDOW
    for segment, examples in segments.items():
        if held >= WINDOW:
            gathered.append([])
            held = 0
        gathered[-1].append(segment)
        held += examples
    if len(gathered) > 1 and held < WINDOW:
        rest = gathered.pop()
        gathered[-1] += rest
    return iter(gathered)
