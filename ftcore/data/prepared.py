"""Prepared: Blocks at rest. Parquet shards and a manifest written last, in a folder named by everything the blocks were made from.

In: Blocks per split. Out: the same Blocks by (split, number), in any order, and the facts of their making. Runs in: Ray Data tasks (write),
the driver (open, seal), train workers (read).

    <cache>/<digest>/train-00000.parquet ...   ids list<int32>, mask list<uint8>, lengths list<int32>, rows list<int64>: one record a block
    <cache>/<digest>/train-lengths.npy         int32, tokens in each block of the split
    <cache>/<digest>/train-rows.npy            KEPT records: which rows the split is made of, in the order that `Block.rows` counts
    <cache>/<digest>/manifest.json             files with sizes and SHA-256, shards, counts, audit, digests
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftcore.data.types import Block, Split
from ftcore.errors import IntegrityError, StorageError
from ftcore.mirror import mirror
from ftcore.storage import MANIFEST, Folder, arriving, canonical_json, explain_oserror, file_digest, is_sealed

SCHEMA = pa.schema(
    {"ids": pa.list_(pa.int32()), "mask": pa.list_(pa.uint8()), "lengths": pa.list_(pa.int32()), "rows": pa.list_(pa.int64())}
)
KEPT = np.dtype([("hash", "u8"), ("check", "u8"), ("file", "i4"), ("row", "i8")])
"""A row of a split. hash, check: of its content; file: index into the manifest's `origins`; row: its number there."""
GROUP_TOKENS = 1 << 17
"""About so many tokens are decoded to read one block (a parquet row group)."""
log = logging.getLogger(__name__)
ABANDONED_S = 24 * 3600
"""A remote object that no manifest names may still belong to a build under way until it is this old."""
HELD_BYTES = 256 << 20
"""Decoded row groups a reader keeps; a smaller split is decoded once."""


@dataclass(frozen=True)
class Shard:
    """One parquet file of a split. `group_blocks`: blocks in each of its row groups (the last may hold fewer)."""

    key: str
    blocks: int
    group_blocks: int
    bytes: int
    sha256: str


def write_shard(folder: Folder, key: str, blocks: Iterable[Block], block_tokens: int) -> tuple[Shard, np.ndarray]:
    """Streams blocks into one parquet file of the folder, a row group in memory at a time; returns its facts and each block's tokens."""
    if folder.is_local:  # nobody reads it before the folder is sealed, so it is written in its place
        return _write_parquet(folder.path / key, key, blocks, block_tokens)
    with tempfile.TemporaryDirectory(prefix="ftcore-shard-") as temporary:
        local = Path(temporary) / "shard.parquet"
        written = _write_parquet(local, key, blocks, block_tokens)
        folder.put(local, key)
        return written


def _write_parquet(path: Path, key: str, blocks: Iterable[Block], block_tokens: int) -> tuple[Shard, np.ndarray]:
    group_blocks = min(256, max(1, GROUP_TOKENS // block_tokens))
    tokens: list[int] = []
    stream = iter(blocks)
    how = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    try:
        with pq.ParquetWriter(path, SCHEMA, **how) as writer:
            while group := list(islice(stream, group_blocks)):
                writer.write_table(_table(group), row_group_size=group_blocks)
                tokens += [block.num_tokens for block in group]
    except OSError as error:
        raise explain_oserror(error, "write", str(path)) from error
    return Shard(key, len(tokens), group_blocks, path.stat().st_size, file_digest(path)), np.array(tokens, np.int32)


def _table(blocks: list[Block]) -> pa.Table:
    columns = []
    for field in SCHEMA:
        arrays = [getattr(block, field.name) for block in blocks]
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
        values = _arrow(np.concatenate(arrays), field.type.value_type)
        columns.append(pa.ListArray.from_arrays(_arrow(offsets, pa.int32()), values))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _arrow(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Without `pa.array` and, the other way, `to_numpy`: either would import pandas, half a second in every process."""
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(np.ascontiguousarray(array, kind.to_pandas_dtype()))])


def _numpy(array: pa.Array) -> np.ndarray:
    kind = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array)]


class PreparedWriter:
    """Collects the shards of one prepared folder and seals it; until `seal` nobody takes the folder for prepared data.

    `folder` is where tasks write shards; `seal` moves it to `<cache>/<digest>` when local. On remote storage, which cannot rename, shards
    are written in place under names of this build alone, so that two builds at once never share an object.
    """

    def __init__(self, cache: Folder, digest: str, building: Folder) -> None:
        self.cache, self.digest, self.building = cache, digest, building
        self.folder = building / "blocks" if building.is_local else cache / digest
        self._prefix = "" if building.is_local else f"{building.url.rsplit('/', 1)[-1].rsplit('-', 1)[-1]}-"
        self.shards: dict[str, list[Shard]] = {}
        self._tokens: dict[str, list[np.ndarray]] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._origins: dict[str, int] = {}

    def key(self, split: Split, number: int) -> str:
        return f"{self._prefix}{split}-{number:05d}.parquet"

    def add(self, split: Split, shard: Shard, tokens: np.ndarray) -> None:
        """Blocks are numbered in the order their shards are added; `tokens`: of each block, as `write_shard` returned them."""
        self.shards.setdefault(split, []).append(shard)
        self._tokens.setdefault(split, []).append(tokens)

    def add_rows(self, split: Split, kept: np.ndarray, files: Sequence[str]) -> None:
        """KEPT records of further rows, in the split's order, whose `file` counts `files`."""
        origins = np.array([self._origins.setdefault(file, len(self._origins)) for file in files], np.int32)
        kept = kept.copy()
        kept["file"] = origins[kept["file"]]
        self._rows.setdefault(split, []).append(kept)

    def seal(self, facts: dict[str, Any]) -> Prepared:
        """Writes the manifest last and opens the result. `facts` are added to the manifest (counts, audit, digests).

        Where another build of the same blocks was first, theirs are as good: they are opened, and ours removed.
        """
        shards = {split: [asdict(shard) for shard in found] for split, found in self.shards.items()}
        files = {shard.key: {"sha256": shard.sha256, "bytes": shard.bytes} for found in self.shards.values() for shard in found}
        lengths = {split: f"{self._prefix}{split}-lengths.npy" for split in self._tokens}
        rows = {split: f"{self._prefix}{split}-rows.npy" for split in self._rows}
        arrays = {key: np.concatenate(self._tokens[split]).astype(np.int32) for split, key in lengths.items()}
        for key, array in {**arrays, **{key: np.concatenate(self._rows[split]) for split, key in rows.items()}}.items():
            data = _npy(array)
            self.folder.write(key, data)
            files[key] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest = {
            **facts, "files": files, "digest": self.digest, "shards": shards, "lengths": lengths, "rows": rows, "origins": [*self._origins],
        }  # fmt: skip
        target = self.cache / self.digest
        if not self.folder.is_local:
            return self._seal_remote(files, manifest)
        self.folder.write_json(MANIFEST, manifest)
        if target.exists() and not is_sealed(target):
            target.delete()
        try:
            self.folder.path.rename(target.path)
        except OSError:
            if not is_sealed(target):  # else another process sealed the same blocks first: theirs are as good
                raise
        return Prepared.open(target)

    def _seal_remote(self, files: dict[str, Any], manifest: dict[str, Any]) -> Prepared:
        """Of two manifests of the same digest one is created; the other build's objects, which nobody names, go."""
        was_first = self.folder.create(MANIFEST, canonical_json(manifest))
        try:
            if not was_first:
                self.folder.at_once(self.folder.delete, files)
            self._sweep_strangers()
        except StorageError as error:  # the blocks are sealed: what could not be tidied costs room, not the build
            log.warning("objects that no manifest names are left in %s: %s", self.folder, error)
        return Prepared.open(self.folder)

    def _sweep_strangers(self) -> None:
        """Removes what killed builds left here: what the manifest does not name, once it is too old to be on its way in."""
        named = {MANIFEST, *self.folder.read_json(MANIFEST)["files"]}
        left = [key for key in self.folder.files() if key not in named and time.time() - self.folder.modified(key) > ABANDONED_S]
        self.folder.at_once(self.folder.delete, left)


@dataclass(frozen=True)
class _Group:
    """A decoded row group: each column flat, with where each block starts in it."""

    values: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]
    bytes: int

    def block(self, index: int) -> Block:
        parts = {name: self.values[name][starts[index] : starts[index + 1]] for name, starts in self.starts.items()}
        return Block(**parts)


class Prepared:
    """A sealed folder of blocks, open for reading. `url` opens it again in another process."""

    def __init__(self, folder: Folder, manifest: dict[str, Any], held_bytes: int = HELD_BYTES) -> None:
        self.folder, self.manifest, self.url = folder, manifest, folder.url
        self.digest: str = manifest["digest"]
        self._shards: dict[str, list[Shard]] = {split: [Shard(**fact) for fact in found] for split, found in manifest["shards"].items()}
        self._ends = {split: np.cumsum([shard.blocks for shard in found]) for split, found in self._shards.items()}
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], _Group] = OrderedDict()
        self._held, self._held_bytes = 0, held_bytes

    @classmethod
    def open(cls, folder: Folder | str | os.PathLike[str], *, held_bytes: int = HELD_BYTES) -> Prepared:
        """Raises IntegrityError for a folder that was never sealed or misses a shard; shards are hashed when first read."""
        place = folder if isinstance(folder, Folder) else Folder(folder)
        if not is_sealed(place):
            raise IntegrityError("this is no folder of prepared blocks", where=place, wanted=MANIFEST, remedy="prepare the data again")
        manifest = place.read_json(MANIFEST)
        if "shards" not in manifest:
            raise IntegrityError("this manifest is not of prepared blocks", where=f"{place}/{MANIFEST}", remedy="prepare the data again")
        sizes = place.sizes()
        for key, fact in manifest["files"].items():
            if sizes.get(key) != fact["bytes"]:
                got = f"{sizes[key]} bytes" if key in sizes else "no such file"
                raise _damaged(f"{place}/{key}", got, f"{fact['bytes']} bytes")
        return cls(place, manifest, held_bytes)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold at least one block."""
        return tuple(split for split in self._shards if self.num_blocks(split))

    def num_blocks(self, split: str) -> int:
        return int(self._ends[split][-1]) if self._shards.get(split) else 0

    def num_rows(self, split: str) -> int:
        """Items (not passes over them) of the split."""
        return int(self.manifest["counts"]["rows"].get(split, 0))

    def block_lengths(self, split: str) -> np.ndarray:
        """int64 [num_blocks]: tokens in each block."""
        if split not in self.manifest["lengths"]:
            return np.zeros(0, np.int64)
        return self._array(self.manifest["lengths"][split]).astype(np.int64)

    def rows(self, split: str) -> np.ndarray:
        """KEPT records of the split's rows; `origins` names their files."""
        return self._array(self.manifest["rows"][split]) if split in self.manifest["rows"] else np.zeros(0, KEPT)

    @property
    def origins(self) -> list[str]:
        """The files rows came from, as messages name them."""
        return list(self.manifest["origins"])

    def _array(self, key: str) -> np.ndarray:
        data = self.folder.read(key)
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][key]["sha256"]:
            raise _damaged(f"{self.folder}/{key}", "other bytes", "the bytes that were sealed")
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))

    def block(self, split: str, index: int) -> Block:
        """The block at `index`; its arrays are read-only views."""
        if not 0 <= index < self.num_blocks(split):
            raise IndexError(f"block {index} of {self.num_blocks(split)} in split {split}")
        number = int(np.searchsorted(self._ends[split], index, side="right"))
        shard = self._shards[split][number]
        within = index - (int(self._ends[split][number]) - shard.blocks)
        return self._group(shard, within // shard.group_blocks).block(within % shard.group_blocks)

    def blocks(self, split: str) -> Iterator[Block]:
        """Every block, in order."""
        return (self.block(split, index) for index in range(self.num_blocks(split)))

    def _group(self, shard: Shard, number: int) -> _Group:
        key = (shard.key, number)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._file(shard).read_row_group(number, use_threads=False)
        columns = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
        values = {name: _numpy(column.values) for name, column in columns.items()}
        starts = {name: _numpy(column.offsets) for name, column in columns.items()}
        group = _Group(values, starts, table.nbytes)
        self._groups[key] = group
        self._held += group.bytes
        while self._held > self._held_bytes and len(self._groups) > 1:
            self._held -= self._groups.popitem(last=False)[1].bytes
        return group

    def _file(self, shard: Shard) -> pq.ParquetFile:
        if shard.key not in self._files:
            path = self.folder.path / shard.key if self.folder.is_local else self._mirrored(shard)
            digest = file_digest(path)
            if digest != shard.sha256:
                raise _damaged(str(path), f"sha256 {digest[:16]}", f"sha256 {shard.sha256[:16]}")
            self._files[shard.key] = pq.ParquetFile(path, memory_map=True)
        return self._files[shard.key]

    def _mirrored(self, shard: Shard) -> Path:
        """A remote shard, copied once to this machine and shared by its processes; a copy that is not the shard is made again."""
        local = mirror("prepared", self.digest) / shard.key
        if not local.is_file() or local.stat().st_size != shard.bytes or file_digest(local) != shard.sha256:
            with arriving(local) as temporary:
                self.folder.get(shard.key, temporary)
                if (digest := file_digest(temporary)) != shard.sha256:
                    raise _damaged(f"{self.folder}/{shard.key}", f"sha256 {digest[:16]}", f"sha256 {shard.sha256[:16]}")
                temporary.replace(local)
        return local


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _damaged(where: str, got: str, wanted: str) -> IntegrityError:
    remedy = "remove its folder and prepare again"
    return IntegrityError("a file of prepared blocks is damaged", where=where, got=got, wanted=wanted, remedy=remedy)
