"""The audit log: nothing altered or taken out goes unseen, nothing is lost with a killed process, no content and no key is in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftcore.cli import main
from ftcore.storage import Folder
from serving.audit import HOME, AuditLog, Entry, read_segment
from serving.published_keys import published_keys

REPO = Path(__file__).resolve().parents[2]


def entry(number: int, tenant: str = "acme") -> Entry:
    return Entry(f"r{number}", tenant, "k1", "", "b" * 64, "finished", "", number, 1, 0.5, "2026-01-01T00:00:00Z")


def written(store: Path, numbers: range, **sizes: int) -> None:
    log = AuditLog(str(store), **sizes)
    log.open()
    for number in numbers:
        log.write(entry(number))
    log.close()


def segments(store: Path, ending: str) -> list[Path]:
    return sorted(path for path in (store / HOME).rglob(f"*.{ending}") if path.parent.name != "open")


def test_what_was_written_is_sealed_signed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, range(1, 101))
    keys = published_keys(str(tmp_path))
    (only,) = segments(tmp_path, "jsonl")
    seal, lines = read_segment(Folder(tmp_path) / HOME, only.stem, keys)
    assert (seal.ended, [line["request"] for line in lines[1:-1]]) == (True, [f"r{number}" for number in range(1, 101)])
    assert not list((tmp_path / HOME / "open").iterdir())
    written(tmp_path, range(0))  # nothing was asked: no segment
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert main(["audit", "usage", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sound: 1 segments, 100 lines" in printed
    assert re.search(r"^acme +100 +5050 +100 +0 +0 +0$", printed, re.MULTILINE)


def alter_a_byte(store: Path) -> None:
    path = segments(store, "jsonl")[0]
    path.write_bytes(path.read_bytes().replace(b'"prompt_tokens":7', b'"prompt_tokens":1'))


def remove_a_line(store: Path) -> None:
    path = segments(store, "jsonl")[0]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))


def cut_the_end(store: Path) -> None:
    path = segments(store, "jsonl")[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def alter_a_seal(store: Path) -> None:
    path = segments(store, "json")[0]
    path.write_text(path.read_text().replace('"lines": ', '"lines": 1'))


def remove_a_segment(store: Path) -> None:
    for ending in ("jsonl", "json"):
        segments(store, ending)[0].unlink()


def remove_a_seal(store: Path) -> None:
    segments(store, "json")[0].unlink()


def forge_with_another_key(store: Path) -> None:
    for path in (store / "_receipts").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "forge", [alter_a_byte, remove_a_line, cut_the_end, alter_a_seal, remove_a_segment, remove_a_seal, forge_with_another_key]
)
def test_whatever_is_altered_or_taken_out_is_found(
    forge: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AuditLog(str(tmp_path), max_bytes=1)
    log.open()
    for first in (0, 10):
        for number in range(first, first + 10):
            log.write(entry(number))
        while len(segments(tmp_path, "json")) <= first // 10:
            time.sleep(0.02)
    log.close()
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert "sound: 2 segments, 20 lines" in capsys.readouterr().out
    forge(tmp_path)
    assert main(["audit", "verify", str(tmp_path)]) == 6
    assert "NOT SOUND" in capsys.readouterr().out


KILLED = """
import os, sys, time
from tests.unit.test_audit_log import entry
from serving.audit import AuditLog
log = AuditLog(sys.argv[1]); log.open()
for number in range(50): log.write(entry(number, "bolt"))
while log._segment is None or log._segment.lines < 50: time.sleep(0.05)
print("written", flush=True)
time.sleep(100)
"""


def test_a_killed_processs_segment_is_sealed_by_the_next_and_a_living_ones_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment, cwd=REPO)
    assert process.stdout
    try:
        assert process.stdout.readline() == "written\n"
        written(tmp_path, range(3))
        (open_,) = (tmp_path / HOME / "open").glob("*.jsonl")
        assert len(segments(tmp_path, "jsonl")) == 1
        main(["audit", "list", str(tmp_path)])
        assert re.search(rf"{open_.stem} +50 lines  open", capsys.readouterr().out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open_.open("ab") as file:
        file.write(b'{"a line that was cut')
    written(tmp_path, range(3))
    assert not list((tmp_path / HOME / "open").iterdir())
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert "sound: 3 segments, 56 lines; 1 of a process that was killed" in capsys.readouterr().out


def test_without_the_store_segments_wait_on_this_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, spool = tmp_path / "store", str(tmp_path / "spool")
    store.write_text("in its place")
    log = AuditLog(str(store), spool)
    log.open()
    log.write(entry(1))
    log.close()
    assert "audit segments wait" in caplog.text
    assert len(list(Path(spool).glob("*.jsonl"))) == 1
    store.unlink()
    log = AuditLog(str(store), spool)
    log.open()
    log.close()
    assert main(["audit", "verify", str(store)]) == 0
    assert not list(Path(spool).iterdir())


def test_with_a_full_disk_lines_wait_and_answers_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import audit as module

    log = AuditLog(str(tmp_path))
    log.open()
    real, is_full, num_failed = os.fsync, True, 0

    def fsync(number: int) -> None:
        nonlocal num_failed
        if is_full:
            num_failed += 1
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "MAX_WAITING", 20)
    for number in range(50):
        log.write(entry(number))
    assert log.is_full
    deadline = time.monotonic() + 60
    while num_failed < 2 or not log.is_full:
        assert time.monotonic() < deadline, num_failed
        time.sleep(0.01)
    is_full = False
    log.close()
    (only,) = segments(tmp_path, "jsonl")
    _, lines = read_segment(Folder(tmp_path) / HOME, only.stem, published_keys(str(tmp_path)))
    kept, lost = sorted(line["prompt_tokens"] for line in lines if "outcome" in line), sum(line.get("lost", 0) for line in lines)
    assert kept == list(range(len(kept))) and len(kept) >= 40
    assert lost == 50 - len(kept) > 0, "memory is bounded; that something is missing is said"
