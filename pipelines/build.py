"""Build: prepares data that no cache holds: rows -> parts -> verdicts and audit -> packed shards -> a sealed folder.

In: a recipe, the facts that name the result. Out: Prepared; or DataError from the audit, before anything is packed.
Runs in: the driver, which holds orders, answers and one part's facts at a time; the work itself here or on the cluster (`rows.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ftcore.data.audit import Audit
from ftcore.data.building import building
from ftcore.data.duplicates import PAIR, bands, clusters, key_ranges
from ftcore.data.encode_rows import EncodeRows
from ftcore.data.prepared import KEPT, Prepared, PreparedWriter, Shard
from ftcore.data.read import Piece, plan
from ftcore.data.sources import is_local
from ftcore.data.split import SPLITS
from ftcore.data.staging import StagedPart
from ftcore.data.tasks import PARTS, Answer, Order, find_copies, pack_window, packs, staged_parts
from ftcore.data.verdict import judge
from ftcore.recipe import Data, Recipe, dump_recipe
from ftcore.storage import Folder, digest_of

Log = Callable[[str], None]
SMALL_BYTES = 8 << 20
"""`data.engine: auto` prepares less than this in one process: a cluster would take longer to answer."""
FINISH_HERE_TOKENS = 4_000_000
"""So many encoded tokens are packed by the driver itself: tens of megabytes, done before other workers have started."""
ORDER_BYTES = 8 << 20
"""Small pieces are encoded together up to this size."""
SPEAK_EVERY_S = 5.0


@dataclass(frozen=True)
class Work:
    """What every task of one preparation needs to know. Paths in the recipe are absolute."""

    recipe: Recipe
    staged: Folder
    blocks: Folder


class Progress:
    """Says how far a long piece of work is, every few seconds."""

    def __init__(self, total: int, log: Log) -> None:
        self.total, self.log, self.done, self._spoke = total, log, 0, time.monotonic()

    def step(self, what: str) -> None:
        self.done += 1
        if time.monotonic() - self._spoke > SPEAK_EVERY_S:
            self._spoke = time.monotonic()
            self.log(f"  {what} {self.done} of {self.total}")


class Tasks(Protocol):
    """Whoever does the work; answers come in the order of the orders."""

    def encode(self, orders: Sequence[Order]) -> Iterator[Answer]: ...
    def find_copies(self, orders: Sequence[Order]) -> Iterator[Answer]: ...
    def pack(self, orders: Sequence[Order]) -> Iterator[Answer]: ...


class Here:
    """The tasks one after the other in this process."""

    def __init__(self, work: Work, encoder: EncodeRows) -> None:
        self.work, self.encoder = work, encoder

    def encode(self, orders: Sequence[Order]) -> Iterator[Answer]:
        return map(self.encoder, orders)

    def find_copies(self, orders: Sequence[Order]) -> Iterator[Answer]:
        return (find_copies(self.work.staged, order) for order in orders)

    def pack(self, orders: Sequence[Order]) -> Iterator[Answer]:
        return (pack_window(self.work.recipe, self.work.staged, self.work.blocks, order) for order in orders)


def build(recipe: Recipe, cache: Folder, facts: dict[str, Any], log: Log) -> Prepared:
    """Prepares and seals `<cache>/<digest of facts>`."""
    started = time.monotonic()
    portable = _portable(recipe)
    cache = Folder(cache.path.absolute()) if cache.is_local else cache
    pieces = plan(portable.data.sources)
    with building(cache, digest_of(facts)) as scratch:
        writer = PreparedWriter(cache, digest_of(facts), scratch)
        work = Work(portable, scratch / "staged", writer.folder)
        encoder = EncodeRows(dump_recipe(portable), portable.plugins, work.staged.url)
        tasks = _tasks(work, encoder, pieces, log)
        log(encoder.chat.describe())
        audit = _encode(tasks, work, pieces, log)
        if sum(part.part.tokens for part in staged_parts(work.staged)[0]) <= FINISH_HERE_TOKENS:
            tasks = Here(work, encoder)
        _judge_and_pack(tasks, work, writer, audit, log)
        counts = {"rows": {name: facts.rows for name, facts in audit.splits.items()}}
        prepared = writer.seal({"identity": facts, "counts": counts, "audit": audit.to_json(), **encoder.facts()})
    held = ", ".join(f"{prepared.num_blocks(split):,} {split}" for split in prepared.splits)
    log(f"prepared {audit.kept:,} rows in {time.monotonic() - started:.1f} s: {held} blocks in {prepared.url}")
    return prepared


def _tasks(work: Work, encoder: EncodeRows, pieces: list[Piece], log: Log) -> Tasks:
    size = sum(piece.num_bytes * (4 if piece.gzipped else 1) for piece in pieces)
    engine = work.recipe.data.engine
    small = size < SMALL_BYTES
    reason = "data.engine" if engine != "auto" else f"{'less' if small else 'more'} than {SMALL_BYTES >> 20} MiB"
    on_ray = engine == "ray" or (engine == "auto" and not small)
    log(f"preparing {size / 2**20:,.1f} MiB of rows {'on Ray' if on_ray else 'in this process'} ({reason})")
    if not on_ray:
        return Here(work, encoder)
    from pipelines.rows import OnRay  # imports ray, which small data must not wait for

    return OnRay(work, log)


def _encode(tasks: Tasks, work: Work, pieces: list[Piece], log: Log) -> Audit:
    audit, parts = Audit(), []
    orders = _orders(pieces)
    started = time.monotonic()
    progress = Progress(len(orders), log)
    for answer in tasks.encode(orders):
        audit.merge(Audit.from_json(answer["audit"]))
        parts += answer["parts"]
        progress.step(f"{audit.read:,} rows read, {audit.read / (time.monotonic() - started):,.0f} rows/s, portion")
    work.staged.write_json(PARTS, parts)
    return audit


def _orders(pieces: list[Piece]) -> list[Order]:
    """Pieces in their order, small ones together."""
    orders: list[Order] = []
    held = ORDER_BYTES
    for piece in pieces:
        if held + piece.num_bytes > ORDER_BYTES:
            orders.append({"number": len(orders), "pieces": []})
            held = 0
        orders[-1]["pieces"].append(asdict(piece if not is_local(piece.url) else replace(piece, url=str(Path(piece.url).absolute()))))
        held += piece.num_bytes
    return orders


def _judge_and_pack(tasks: Tasks, work: Work, writer: PreparedWriter, audit: Audit, log: Log) -> None:
    """Shows the audit, and stops there if it refuses."""
    data, (parts, _) = work.recipe.data, staged_parts(work.staged)
    found = tasks.find_copies(_ranges(data, sum(part.part.items for part in parts)))
    copies = clusters(np.frombuffer(work.staged.read(answer["pairs"]), PAIR) for answer in found)
    windows = judge(parts, copies, data, audit)
    try:
        audit.check(data)
    except Exception:
        log(audit.table())
        raise
    _record_rows(parts, writer)
    orders = []
    for window in windows:
        segments = [[segment.part, segment.reading] for segment in window.segments]
        orders.append({"split": window.split, "key": writer.key(SPLITS[window.split], window.number), "segments": segments})
    progress = Progress(len(orders), log)
    for answer in tasks.pack(orders):
        progress.step("packing, window")
        shard = Shard(**answer["shard"])
        writer.add(answer["split"], shard, np.array(answer["tokens"], np.int32))
        facts = audit.split(answer["split"])
        facts.blocks += shard.blocks
        facts.room += shard.blocks * (data.block_tokens or data.max_length) if packs(work.recipe) else 0
    log(audit.table())
    for line in audit.warnings(data):
        log(f"warning: {line}")


def _record_rows(parts: Sequence[StagedPart], writer: PreparedWriter) -> None:
    """Which rows each split holds: evaluation reads its test rows by it, and looks for them among those that were trained on."""
    for part in parts:
        items, splits = part.items(), part.verdicts()["split"]
        for code, name in enumerate(SPLITS):
            chosen = items[splits == code]
            kept = np.zeros(len(chosen), KEPT)
            for field in KEPT.names or ():
                kept[field] = chosen[field]
            if len(kept):
                writer.add_rows(name, kept, part.part.files)


def _ranges(data: Data, num_rows: int) -> list[Order]:
    """One order per range of keys: of content hashes, and of each band's keys."""
    looked = [-1] if data.duplicates != "keep" or data.near_duplicates != "keep" else []
    looked += list(range(bands(data.near_threshold)[0])) if data.near_duplicates != "keep" else []
    ranges = [(band, low, high) for band in looked for low, high in key_ranges(num_rows)]
    orders = []
    for number, (band, low, high) in enumerate(ranges):
        orders.append({"number": number, "band": band, "low": low, "high": high, "threshold": data.near_threshold})
    return orders


def _portable(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths: a task runs in another folder than the driver."""
    model = recipe.model
    folder, template = Path(model.path).expanduser(), Path(model.chat_template)
    changes = {"path": str(folder.absolute())} if folder.is_dir() else {}
    changes |= {"chat_template": str(template.absolute())} if template.suffix == ".jinja" else {}
    return recipe.model_copy(update={"model": model.model_copy(update=changes)})
