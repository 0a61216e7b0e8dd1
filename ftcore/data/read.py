"""Read: sources -> pieces -> rows, streaming; bad rows come out as Rejected with file and row, never as a crash or a silent loss.

In: the recipe's sources. Out: Row | Rejected. Runs in: `plan` in the driver, `read` in Ray Data tasks (or in-process). No torch.

How each kind reads: JSON: the elements of an array, or one object, or several in a row (row = their number). JSONL, CSV: a line (row = its
line). Parquet: a row. Text: documents are blocks separated by blank lines (row = the line they start on); in a file without any blank line
near its beginning each line is a document. `.gz` of all but Parquet. Files of lines are cut in pieces at line ends, Parquet by row groups.
In a remote file that is cut, rows count from the byte the piece starts at, which its name then says: counting would mean reading it twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from ftcore.data.records import READERS, Flaw, Piece
from ftcore.data.sources import SourceFile, list_files, open_bytes
from ftcore.data.types import Origin, Rejected, Row
from ftcore.errors import DataError, FtcoreError
from ftcore.storage import explain_oserror

if TYPE_CHECKING:
    from ftcore.recipe import Source

PIECE_BYTES = 8 << 20
_SNIFF_BYTES = 1 << 20


def plan(sources: Sequence[Source]) -> list[Piece]:
    """The pieces of all sources, in a fixed order."""
    return [piece for index, source in enumerate(sources) for file in list_files(source.path) for piece in _cut(file, index)]


def read(piece: Piece) -> Iterator[Row | Rejected]:
    """The rows of a piece. Raises DataError where nothing after a fault can be read, StorageError where the storage fails."""
    num_rows = 0
    try:
        for number, value in READERS[piece.kind](piece):
            num_rows += 1
            origin = Origin(piece.label, number, piece.source)
            if isinstance(value, dict):
                yield Row(value, origin)
            elif isinstance(value, Flaw):
                yield Rejected(origin, value.reason, value.detail)
            else:
                yield Rejected(origin, "not an object", f"got {type(value).__name__}, wanted an object")
    except OSError as error:
        if isinstance(error, FtcoreError):
            raise
        raise explain_oserror(error, "read", piece.label) from error
    except (EOFError, pa.ArrowException) as error:
        raise DataError("this file is damaged", where=piece.label, got=str(error)[:300], remedy="copy it again") from error
    if num_rows == 0 and piece.start == 0:
        raise DataError("this file holds no rows", where=piece.label, got="blanks only", wanted="rows", remedy="remove it or fill it")


def num_passes(key: str, weight: float) -> int:
    """How often a row is used per epoch under its source's `weight`: the whole part, and once more for a stable share of the rows.

    `key` must name the row's content, so that the same rows are taken whatever order or piece they come in.
    """
    whole = int(weight)
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"ftcore-passes").digest(), "big") / 2**64
    return whole + (share < weight - whole)


def _cut(file: SourceFile, source: int) -> list[Piece]:
    whole = Piece(file.label, file.url, file.kind, source, file.gzipped, num_bytes=file.size)
    if file.kind == "parquet":
        return _cut_row_groups(whole)
    if file.kind == "text":
        with open_bytes(file.url, gzipped=file.gzipped) as stream:
            head = stream.read(_SNIFF_BYTES)
        whole = replace(whole, by_line=re.search(rb"\n[ \t\r]*\n", head.strip()) is None)
    lines = file.kind == "jsonl" or (file.kind == "text" and whole.by_line)
    return _cut_lines(whole, file) if lines and not file.gzipped and file.size > PIECE_BYTES else [whole]


def _cut_row_groups(whole: Piece) -> list[Piece]:
    try:
        with open_bytes(whole.url) as stream, pq.ParquetFile(stream) as table:
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except pa.ArrowException as error:
        raise DataError("this is no whole Parquet file", where=whole.label, got=str(error)[:300], remedy="copy it again") from error
    pieces, start, row, held, rows = [], 0, 1, 0, 0
    for i, (num_rows, num_bytes) in enumerate(sizes):
        held, rows = held + num_bytes, rows + num_rows
        if held >= PIECE_BYTES or i == len(sizes) - 1:
            pieces.append(replace(whole, start=start, end=i + 1, first_row=row, num_bytes=held))
            start, row, held, rows = i + 1, row + rows, 0, 0
    return pieces or [replace(whole, end=0)]


def _cut_lines(whole: Piece, file: SourceFile) -> list[Piece]:
    """At line ends, about every PIECE_BYTES. Local files are counted through, so rows keep their line numbers."""
    cuts: list[tuple[int, int]] = [(0, 1)]
    with open_bytes(file.url) as stream:
        if file.is_local:
            at, line = 0, 1
            while chunk := stream.read(_SNIFF_BYTES):
                newline = chunk.find(b"\n") if at - cuts[-1][0] >= PIECE_BYTES else -1
                if newline >= 0:
                    cuts.append((at + newline + 1, line + 1))
                line += chunk.count(b"\n")
                at += len(chunk)
        else:
            for target in range(PIECE_BYTES, file.size, PIECE_BYTES):
                if target > cuts[-1][0]:
                    stream.seek(target)
                    cuts.append((target + len(stream.readline()), 1))
    cuts = [cut for cut in cuts if cut[0] < file.size]
    ends = [start for start, _ in cuts[1:]] + [file.size]
    return [
        replace(
            whole, start=start, end=end, first_row=line, num_bytes=end - start,
            label=whole.label if file.is_local or start == 0 else f"{whole.label} from byte {start}",
        )
        for (start, line), end in zip(cuts, ends, strict=True)
    ]  # fmt: skip
