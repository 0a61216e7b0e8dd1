"""History: a shell history of the user's own as rows; secrets and personal data masked, nothing written outside the given folder.

In: a history file. Out: rows to train on (the older four fifths) and conversations to judge by (the newest). Runs in: the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftcore.data.redact import mask, scan
from ftcore.data.types import Conversation
from ftcore.demo.rows import write_rows
from ftcore.demo.shell import SESSION_COMMANDS, history_commands, history_rows
from ftcore.demo.tenants import to_conversation
from ftcore.errors import DataError

TEST_SHARE = 0.2
MIN_COMMANDS = 5 * SESSION_COMMANDS


@dataclass(frozen=True)
class HistoryDay:
    rows: Path
    train: list[Conversation]
    test: list[Conversation]
    num_commands: int
    num_redacted: int


def write_history(file: Path, folder: Path) -> HistoryDay:
    """Reads, masks, splits in time. Raises DataError for a file that is missing or too short."""
    if not file.is_file():
        raise DataError("there is no such history file", where=file, wanted="a history of bash, zsh or fish", remedy="check HISTORY=")
    commands = history_commands(file.read_text(encoding="utf-8", errors="replace"))
    if len(commands) < MIN_COMMANDS:
        raise DataError(
            "this history is too short to learn from", where=file, got=f"{len(commands)} commands", wanted=f"at least {MIN_COMMANDS}",
            remedy="raise HISTSIZE and HISTFILESIZE, work for a while, try again",
        )  # fmt: skip
    findings = [scan(command) for command in commands]
    masked = [mask(command, found) for command, found in zip(commands, findings, strict=True)]
    rows = history_rows(masked)
    held_out = max(1, round(TEST_SHARE * len(rows)))
    path = write_rows(rows[:-held_out], folder / "my-shell.rows.jsonl")
    conversations = [to_conversation(row, path, number) for number, row in enumerate(rows, 1)]
    return HistoryDay(path, conversations[:-held_out], conversations[-held_out:], len(commands), sum(map(bool, findings)))
