"""Records: the raw values inside one piece of a file, with the place of each, or the flaw that makes it unusable.

In: a Piece. Out: (row number, value | Flaw). Runs in: Ray Data tasks (or in-process). No torch. Memory is bounded by MAX_ROW_BYTES.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow.parquet as pq

from ftcore.data.json_stream import JsonStream, TooLong
from ftcore.data.sources import Kind, open_bytes
from ftcore.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""A longer row is rejected: it is a broken file, or nothing a model could hold."""
_BATCH_ROWS = 64
_SUSPECT = re.compile(rb"\x00|\\u[dD][89a-fA-F]|\\u0000")
_JSON_COLUMNS = frozenset({"messages", "conversations", "conversation", "tools", "history", "chosen", "rejected", "prompt"})
csv.field_size_limit(MAX_ROW_BYTES)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one task reads: bytes [start, end) of a file of lines, row groups [start, end) of Parquet, else the whole file (`end` None)."""

    label: str
    url: str
    kind: Kind
    source: int
    gzipped: bool = False
    start: int = 0
    end: int | None = None
    first_row: int = 1
    by_line: bool = True
    """Text only: a line is a document."""
    num_bytes: int = 0
    """About how much there is to read, for planning."""


@dataclass(frozen=True, slots=True)
class Flaw:
    reason: str
    detail: str = ""


_TOO_LONG = Flaw("too long", f"more than {MAX_ROW_BYTES >> 20} MiB in one row")


def _lines(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes without the line end); None for a line longer than the limit, which is skipped in small reads."""
    with open_bytes(piece.url, gzipped=piece.gzipped, start=piece.start) as stream:
        number, left = piece.first_row, (piece.end - piece.start) if piece.end is not None else None
        if not piece.start and stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        elif left is not None and not piece.start:
            left -= 3
        while left is None or left > 0:
            line = stream.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            length, too_long = len(line), False
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                too_long, line = True, stream.readline(MAX_ROW_BYTES + 1)
                length += len(line)
            while too_long and line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES + 1)
                length += len(line)
            left = None if left is None else left - length
            yield number, None if too_long else line.rstrip(b"\r\n")
            number += 1


def _read_jsonl(piece: Piece) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(piece):
        if line is None:
            yield number, _TOO_LONG
        elif line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Flaw("broken encoding", f"byte {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Flaw("broken JSON", str(error)[:200])
    return (_flaw_of(value) or value) if _SUSPECT.search(line) else value


def _read_json(piece: Piece) -> Iterator[tuple[int, Any]]:
    with open_bytes(piece.url, gzipped=piece.gzipped) as stream:
        for number, value in enumerate(JsonStream(stream, piece.label, MAX_ROW_BYTES).values(), 1):
            yield number, _TOO_LONG if isinstance(value, TooLong) else _flaw_of(value) or value


def _read_text(piece: Piece) -> Iterator[tuple[int, Any]]:
    block: list[bytes] = []
    begins = size = 0
    for number, line in _lines(piece):
        if line is None or size > MAX_ROW_BYTES:
            if line is None or not line.strip():
                yield begins or number, _TOO_LONG
                block, begins, size = [], 0, 0
            continue
        if line.strip():
            begins, size = begins or number, size + len(line)
            block.append(line)
        if block and (piece.by_line or not line.strip()):
            yield begins, _document(block)
            block, begins, size = [], 0, 0
    if block:
        yield begins, _TOO_LONG if size > MAX_ROW_BYTES else _document(block)


def _document(lines: list[bytes]) -> Any:
    try:
        text = b"\n".join(lines).decode()
    except UnicodeDecodeError as error:
        return Flaw("broken encoding", f"byte {error.start} of the document is not UTF-8")
    return Flaw("NUL characters") if "\x00" in text else {"text": text}


def _read_csv(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Cells of columns that hold turns or tools may be JSON. A record that spans lines counts as its first."""
    with open_bytes(piece.url, gzipped=piece.gzipped) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _CsvLines(text)
        header = next(csv.reader(iter([lines.first()]), delimiter="\t" if piece.kind == "tsv" else ","), [])
        delimiter = "\t" if piece.kind == "tsv" else ";" if len(header) == 1 and ";" in header[0] else ","
        names = [name.strip() for name in next(csv.reader(iter([lines.head]), delimiter=delimiter), [])]
        if not all(names) or len(set(names)) < len(names):
            raise DataError(
                "the first line must name every column once", where=piece.label, got=", ".join(names)[:200], remedy="add a header line"
            )
        reader = csv.reader(lines, delimiter=delimiter)
        while True:
            number = lines.number + 1
            lines.too_long = False
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, _TOO_LONG if "limit" in str(error) else Flaw("broken CSV", str(error))
                continue
            if lines.too_long:
                yield number, _TOO_LONG
            elif len(cells) != len(names):
                if cells:
                    yield number, Flaw("wrong number of columns", f"got {len(cells)}, wanted {len(names)}")
            else:
                value = {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
                yield number, _flaw_of(value) or value


class _CsvLines:
    """Lines for csv.reader, of bounded length, with the number of the last one handed out."""

    def __init__(self, text: IO[str]) -> None:
        self._text, self.number, self.too_long, self.head = text, 0, False, ""

    def first(self) -> str:
        self.head = next(self, "")
        return self.head

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        rest = line
        while len(rest) > MAX_ROW_BYTES and not rest.endswith("\n"):
            self.too_long, rest = True, self._text.readline(MAX_ROW_BYTES + 1)
        self.number += 1
        return '""\n' if self.too_long else line


def _cell(name: str, cell: str) -> Any:
    if name in _JSON_COLUMNS and cell[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell  # the format says what it wanted
    return cell


def _read_parquet(piece: Piece) -> Iterator[tuple[int, Any]]:
    number = piece.first_row
    with open_bytes(piece.url) as stream, pq.ParquetFile(stream) as table:
        groups = list(range(piece.start, piece.end if piece.end is not None else table.num_row_groups))
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups) if groups else ():
            for value in batch.to_pylist():
                yield number, _flaw_of(value) or value
                number += 1


def _flaw_of(value: Any) -> Flaw | None:
    """NULs, lone surrogates (broken UTF-8 reads as such), or too much text, anywhere in a value."""
    size, stack = 0, [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            size += len(part)
            if "\x00" in part:
                return Flaw("NUL characters")
            if not part.isascii():
                try:
                    part.encode()
                except UnicodeEncodeError as error:
                    lone = ord(part[error.start])
                    escaped = 0xDC80 <= lone <= 0xDCFF
                    return Flaw(
                        "broken encoding", f"byte 0x{lone - 0xDC00:02x} is not UTF-8" if escaped else f"lone surrogate U+{lone:04X}"
                    )
        elif isinstance(part, dict):
            stack += part.values()
            stack += part.keys()
        elif isinstance(part, list | tuple):
            stack += part
    return _TOO_LONG if size > MAX_ROW_BYTES else None


READERS: dict[Kind, Callable[[Piece], Iterator[tuple[int, Any]]]] = {
    "json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet, "text": _read_text,
}  # fmt: skip
