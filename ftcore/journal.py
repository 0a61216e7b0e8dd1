"""Journal: metrics.jsonl, one line a step or validation, with no step twice and none missing across restarts.

In: dicts with a `step`. Out: lines. Runs in: rank 0 of the train workers; read by reports.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from ftcore.errors import Interrupted, StorageError
from ftcore.rundir import RunDir
from ftcore.storage import explain_oserror

FILE = "metrics.jsonl"
log = logging.getLogger(__name__)


class Journal:
    """Opened at the step a run (re)starts from: later lines, written by a run that was killed after its last checkpoint, are cut off."""

    def __init__(self, run: RunDir, step: int) -> None:
        self._run, self._folder = run, run.folder
        self._text = ""
        if not self._folder.create(FILE, b""):
            kept = [line for line in _parsed(self._folder.read(FILE)) if line["step"] <= step]
            self._text = "".join(_dumped(line) for line in kept)
            self._folder.write(FILE, self._text.encode())
        self._file = (self._folder.path / FILE).open("a") if self._folder.is_local else None

    def write(self, record: dict[str, Any]) -> None:
        line = _dumped(record)
        if not self._file:
            self._text += line
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise explain_oserror(error, "write the journal", f"{self._folder}/{FILE}") from error

    def flush(self) -> None:
        """Makes the lines durable, before the checkpoint that covers them is sealed. Remote folders get the whole file, as one object."""
        if self._file is None:
            self._run.refuse_if_taken()
            self._folder.write(FILE, self._text.encode())

    def close(self) -> None:
        """The end, also after an error: one of its own is logged, so that neither hides the other. `flush` first where it must be known."""
        try:
            self.flush()
        except (StorageError, Interrupted) as error:
            log.warning("the journal's last lines could not be written: %s", error)
        finally:
            if self._file:
                self._file.close()


def _dumped(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_lines(run: RunDir) -> list[dict[str, Any]]:
    """The journal so far; a line that a killed process left half-written is dropped."""
    return _parsed(run.folder.read(FILE)) if run.folder.exists(FILE) else []


def _parsed(text: bytes) -> list[dict[str, Any]]:
    lines = []
    for line in text.decode().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
