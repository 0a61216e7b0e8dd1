"""Judgements: what raters said of pairs, a file each, written down the moment it is said.

In: judgements of one rater. Out: raters/NAME.jsonl, and the same read back. Runs in: a person's terminal; one process a rater.

    labels/label.json            what is judged, and how
    labels/pairs.jsonl           the pairs
    labels/raters/ann.jsonl      one line a judgement, or an undoing of the last one; appended and synced, so a kill loses none
    labels/preferences.jsonl     what they come to, written anew at the end of each sitting
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftcore.errors import ConfigError, DataError, IntegrityError
from ftcore.storage import explain_oserror

RATERS = "raters"
RATER = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
Choice = Literal["a", "b", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "skip")
LOWEST, HIGHEST = 1, 5
"""Scores of an answer."""


@dataclass(frozen=True)
class Judgement:
    """`choice` and `scores` are of the pair's own a and b; `shown` says in which order the rater saw them."""

    pair: str
    rater: str
    choice: Choice
    shown: Literal["ab", "ba"]
    scores: tuple[int, int] | None = None
    """Of a and of b; None where preferences were asked for, or for a skip."""
    seconds: float = 0.0
    """From showing it to the judgement."""
    time: str = ""
    """UTC, ISO 8601."""


class RaterFile:
    """One rater's file, open for appending; made by `open`, which holds it against a second sitting of the same rater."""

    def __init__(self, folder: Path, rater: str) -> None:
        if not RATER.match(rater):
            raise ConfigError("a rater's name must do as a file's", where="--rater", got=rater, wanted="a-z, 0-9, '.', '_', '-'")
        self.rater, self.path = rater, folder / RATERS / f"{rater}.jsonl"
        self.kept: list[Judgement] = []

    def open(self) -> None:
        """Reads what is there. A last line that was cut short by a kill was never confirmed, and goes."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise explain_oserror(error, "write", str(self.path)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ConfigError(
                "this rater is labelling already", where=self.path, got=self.rater, remedy="end that sitting, or give another --rater"
            ) from error
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        self.kept = _standing(whole, self.path)

    def close(self) -> None:
        os.close(self._file)

    def add(self, judgement: Judgement) -> None:
        self._append(asdict(judgement))
        self.kept.append(judgement)

    def undo(self) -> Judgement | None:
        """Takes the last one back; None where there is none."""
        if not self.kept:
            return None
        self._append({"undo": self.kept[-1].pair})
        return self.kept.pop()

    def _append(self, record: dict[str, Any]) -> None:
        try:
            os.write(self._file, json.dumps(record).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            raise explain_oserror(error, "write", str(self.path)) from error


def read_judgements(paths: Iterable[str]) -> dict[str, list[Judgement]]:
    """By rater, without those taken back. `paths`: files of raters, or folders of labels. Raises DataError where there are none."""
    found: dict[str, list[Judgement]] = {}
    for path in _files(paths):
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise explain_oserror(error, "read", str(path)) from error
        for judgement in _standing(raw[: raw.rfind(b"\n") + 1], path):
            found.setdefault(judgement.rater, []).append(judgement)
    return found


def _files(paths: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        inside = sorted((path / RATERS).glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise DataError("nobody has judged anything here yet", where=path, wanted=f"{RATERS}/NAME.jsonl", remedy="ftcore label")
        files += inside
    return files


def _standing(raw: bytes, path: Path) -> list[Judgement]:
    """Those of a file that were not taken back, in order; the last one of a pair counts."""
    kept: dict[str, Judgement] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            record = json.loads(line)
            if "undo" in record:
                kept.pop(record["undo"], None)
                continue
            judgement = Judgement(**{**record, "scores": tuple(record["scores"]) if record.get("scores") else None})
            if judgement.choice not in CHOICES or judgement.shown not in ("ab", "ba"):
                raise ValueError(f"choice {judgement.choice}, shown {judgement.shown}")
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(
                "a line of a rater's file is no judgement", where=f"{path}, line {number}", got=str(error)[:200],
                wanted="what ftcore label wrote", remedy="take that line out",
            ) from error  # fmt: skip
        kept.pop(judgement.pair, None)
        kept[judgement.pair] = judgement
    return list(kept.values())
