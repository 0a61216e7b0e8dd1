"""Reading: every kind of file, the place of every row, and what happens to bad ones."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftcore.data import json_stream, records
from ftcore.data import read as reading
from ftcore.data.read import num_passes, plan, read
from ftcore.data.types import Rejected, Row
from ftcore.errors import DataError, StorageError
from ftcore.recipe import Source

ROWS = [{"text": f"row {number}"} for number in range(1, 6)]


def rows_of(path: Path | str) -> list[Row | Rejected]:
    return [row for piece in plan((Source(path=str(path)),)) for row in read(piece)]


def values_of(path: Path | str) -> list[dict[str, Any]]:
    return [row.value for row in rows_of(path) if isinstance(row, Row)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def parquet(path: Path, values: list[dict[str, Any]], group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    texts = [row["text"] for row in ROWS]
    if kind == "parquet":
        parquet(path, ROWS)
    else:
        content = {"json": json.dumps(ROWS), "jsonl": lines(*ROWS), "txt": "\n\n".join(texts)}
        written(path, content.get(kind) or "\n".join(["text", *texts]))
    assert values_of(path) == ROWS


def test_a_single_json_object_is_one_row_and_several_are_several(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]
    assert values_of(written(tmp_path / "b.json", lines(*ROWS))) == ROWS


def test_gzip_and_a_byte_order_mark_are_taken_off(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "rows.jsonl.gz", gzip.compress(lines(*ROWS).encode()))) == ROWS
    for name, content in (("a.jsonl", lines(*ROWS)), ("a.json", json.dumps(ROWS)), ("a.csv", "text\nrow 1\n"), ("a.txt", "row 1")):
        assert values_of(written(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))[0] == ROWS[0]


def test_rows_are_numbered_by_their_line_in_jsonl_and_csv(tmp_path: Path) -> None:
    jsonl = rows_of(written(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n'))
    assert [row.origin.row for row in jsonl] == [1, 3]
    table = rows_of(written(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n3,4\n'))
    assert [row.origin.row for row in table] == [2, 4]
    assert str(table[0].origin) == f"{tmp_path / 'a.csv'}, row 2"


def test_text_without_blank_lines_is_a_document_a_line(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.txt", "one\ntwo\n")) == [{"text": "one"}, {"text": "two"}]


def test_text_with_blank_lines_is_a_document_a_block(tmp_path: Path) -> None:
    found = rows_of(written(tmp_path / "a.txt", "one\nmore\n\n\ntwo\n"))
    assert [(row.value["text"], row.origin.row) for row in found if isinstance(row, Row)] == [("one\nmore", 1), ("two", 5)]


def test_broken_json_in_one_line_rejects_that_row_and_reads_on(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    found = rows_of(written(tmp_path / "b.jsonl", "\n".join([good] * 6 + ['{"text": '] + [good])))
    bad = [row for row in found if isinstance(row, Rejected)]
    assert [(row.origin.row, row.reason) for row in bad] == [(7, "broken JSON")]
    assert len(found) == 8


def test_broken_json_in_row_seven_of_an_array_is_named(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    path = written(tmp_path / "b.json", "[" + ",".join([good] * 6 + ['{"text": oops}', good]) + "]")
    with pytest.raises(DataError, match="broken JSON") as caught:
        rows_of(path)
    assert caught.value.where == f"{path}, row 7"
    assert "oops" in caught.value.got


@pytest.mark.parametrize("tail", ["", ', {"text": "cut o', ", "])
def test_an_array_that_was_cut_off_says_so(tmp_path: Path, tail: str) -> None:
    with pytest.raises(DataError, match="broken JSON"):
        rows_of(written(tmp_path / "cut.json", f'[{{"text": "one"}}{tail}'))


def test_a_json_array_is_read_across_chunk_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": "x" * length, "deep": [{"a": [length, True, None, 1.5e3, '\\"é日😀']}]} for length in range(120)]
    path = written(tmp_path / "a.json", json.dumps(values, ensure_ascii=False, indent=1))
    for chunk in (1, 7, 64):
        monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
        assert values_of(path) == values


def test_a_number_across_a_chunk_border_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 3)
    found = rows_of(written(tmp_path / "a.json", "[12345, 67890]"))
    assert [row.reason for row in found if isinstance(row, Rejected)] == ["not an object", "not an object"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt"])
def test_a_row_too_long_to_be_one_is_rejected_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1000)
    long, short = {"text": 'a "quoted\\" [brace} ' * 1000}, {"text": "short"}
    content = {
        "json": json.dumps([short, long, short]),
        "jsonl": lines(short, long, short),
        "csv": f"text\nshort\n{'a' * 20_000}\nshort\n",
        "txt": f"short\n{'a' * 20_000}\nshort\n",
    }[kind]
    found = rows_of(written(tmp_path / f"a.{kind}", content))
    assert [row.value if isinstance(row, Row) else row.reason for row in found] == [short, "too long", short]


def test_a_hundred_megabytes_in_one_row_are_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "row 1"}\n')
    tracemalloc.start()
    found = rows_of(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(row) for row in found] == [Rejected, Row]
    assert peak_bytes < 64 << 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "\\ud800"}', "broken encoding"),
        (b'{"text": "caf\xe9"}', "broken encoding"),
        (b'{"text": "a\\u0000b"}', "NUL characters"),
        (b'{"deep": [{"text": "\\udc00 alone"}]}', "broken encoding"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"a": ' + b"[" * 100_000, "broken JSON"),
    ],
)
def test_a_damaged_row_is_rejected_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    found = rows_of(written(tmp_path / "a.jsonl", content + b'\n{"text": "\\ud83d\\ude00 \\u65e5"}\n'))
    assert isinstance(found[0], Rejected)
    assert found[0].reason == reason
    assert isinstance(found[1], Row)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_bytes_that_are_no_utf8_reject_their_row_in_every_kind(tmp_path: Path, name: str) -> None:
    content = {"a.json": b'[{"text": "caf\xe9"}, {"text": "ok"}]', "a.csv": b"text\ncaf\xe9\nok\n", "a.txt": b"caf\xe9\nok\n"}[name]
    first, second = rows_of(written(tmp_path / name, content))
    assert isinstance(first, Rejected)
    assert first.reason == "broken encoding"
    assert isinstance(second, Row)


def test_a_csv_row_with_too_few_columns_is_rejected(tmp_path: Path) -> None:
    found = rows_of(written(tmp_path / "a.csv", "a,b\n1,2\n3\n"))
    assert [row.reason for row in found if isinstance(row, Rejected)] == ["wrong number of columns"]


def test_turns_in_a_csv_cell_are_read_as_json(tmp_path: Path) -> None:
    cell = json.dumps([{"role": "user", "content": "hi"}]).replace('"', '""')
    assert values_of(written(tmp_path / "a.csv", f'messages,id\n"{cell}",7\n')) == [
        {"messages": [{"role": "user", "content": "hi"}], "id": "7"}
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="this file is empty") as caught:
        rows_of(written(tmp_path / name, b""))
    assert name in caught.value.where


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "text\n"), ("a.txt", "\n")])
def test_a_file_without_a_row_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        rows_of(written(tmp_path / name, content))


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="nothing at this path"):
        plan((Source(path="no/such/file.jsonl"),))


def test_a_folder_of_one_kind_is_read_whole_and_hidden_or_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "a.jsonl", lines(ROWS[0]))
    written(tmp_path / "sub" / "b.jsonl", lines(ROWS[1]))
    written(tmp_path / ".c.jsonl", lines(ROWS[2]))
    written(tmp_path / "README.md", "about")
    assert values_of(tmp_path) == ROWS[:2]


def test_a_folder_of_mixed_kinds_is_refused_and_a_glob_picks(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", lines(ROWS[0]))
    written(tmp_path / "b.csv", "text\nrow 2\n")
    with pytest.raises(DataError, match="mixes formats") as caught:
        plan((Source(path=str(tmp_path)),))
    assert "a.jsonl" in caught.value.got
    assert "b.csv" in caught.value.got
    assert values_of(f"{tmp_path}/*.csv") == [ROWS[1]]


def test_a_file_of_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.parquet"):
        plan((Source(path=str(written(tmp_path / "a.docx", "x"))),))


def test_big_line_files_are_cut_and_every_row_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    monkeypatch.setattr(reading, "_SNIFF_BYTES", 97)
    values = [{"text": "é" * (number % 40), "n": number} for number in range(1, 301)]
    path = written(tmp_path / "a.jsonl", lines(*values))
    pieces = plan((Source(path=str(path)),))
    found = [row for piece in pickle.loads(pickle.dumps(pieces)) for row in read(piece)]
    assert len(pieces) > 10
    assert [(row.origin.row, row.value["n"]) for row in found if isinstance(row, Row)] == [(n, n) for n in range(1, 301)]


def test_parquet_is_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 1)
    pieces = plan((Source(path=str(parquet(tmp_path / "a.parquet", ROWS))),))
    assert [(piece.start, piece.end, piece.first_row) for piece in pieces] == [(0, 1, 1), (1, 2, 3), (2, 3, 5)]
    assert [row.origin.row for piece in pieces for row in read(piece)] == [1, 2, 3, 4, 5]


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(DataError, match="no whole Parquet file"):
        plan((Source(path=str(written(path, path.read_bytes()[:-20]))),))


def test_a_remote_file_reads_like_a_local_one_and_pieces_say_their_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 40)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/a.jsonl", lines(*ROWS).encode())
    found = rows_of("memory://bucket/a.jsonl")
    assert [row.value for row in found if isinstance(row, Row)] == ROWS
    assert "from byte" in found[-1].origin.file
    assert values_of("memory://bucket/") == ROWS
    assert values_of("memory://bucket/*.jsonl") == ROWS
    fs.rm("/bucket", recursive=True)


def test_a_file_that_vanishes_between_plan_and_read_is_a_storage_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(*ROWS))
    pieces = plan((Source(path=str(path)),))
    path.unlink()
    with pytest.raises(StorageError, match="cannot read this"):
        list(read(pieces[0]))


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    with pytest.raises((DataError, StorageError)):
        rows_of(written(tmp_path / "a.jsonl.gz", gzip.compress(lines(*ROWS).encode())[:-9]))


def test_weights_repeat_whole_passes_and_take_a_stable_share() -> None:
    keys = [f"row {number}" for number in range(4000)]
    assert {num_passes(key, 3.0) for key in keys} == {3}
    half = {key for key in keys if num_passes(key, 0.5)}
    assert 1850 < len(half) < 2150
    assert half < {key for key in keys if num_passes(key, 0.6)}
    assert sum(num_passes(key, 1.5) for key in keys) == 4000 + len(half)


def test_a_big_json_array_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1 << 16)
    path = written(tmp_path / "a.json", "[" + ",".join([json.dumps({"text": "x" * 10_000})] * 500) + "]")
    (piece,) = plan((Source(path=str(path)),))
    tracemalloc.start()
    num_rows = sum(1 for _ in read(piece))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 500
    assert peak_bytes < path.stat().st_size // 4


def test_a_folder_one_may_not_look_into_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(StorageError, match="cannot read this"):
        plan((Source(path=str(tmp_path)),))
