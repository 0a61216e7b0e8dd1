"""Audit: what was asked or changed, and what became of it. No content; append-only; a line altered or taken out is found.

In: entries, changes. Out: segments, sealed into the store. Runs in: the ingress and the admin API, on a thread of its own; the command
line reads.

    SPOOL/ID.jsonl              lines of a process that runs (it holds a lock on the file) or was killed
    STORE/_audit/DAY/ID.jsonl   a sealed segment
    STORE/_audit/DAY/ID.json    its seal, written after it and once: digest, lines, the segment before it, signature

Each line carries the SHA-256 of the one before, and a process's segment that of the last line of its segment before. What nothing
follows, a seal covers: signed with a key of the process that sealed, published as receipts' keys are. A segment that nobody holds (its
process ended, or the store was away when it did) is sealed by whoever looks into that spool next; a line cut in the middle is left out,
and the seal says that the segment was not ended by its own process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from ftcore.card import Digest, Text, utc_now
from ftcore.errors import FtcoreError, IntegrityError, StorageError
from ftcore.receipts import Signer, Statement, require_signature
from ftcore.storage import Folder, canonical_json, explain_oserror
from serving.published_keys import publish_key

log = logging.getLogger(__name__)
HOME, OPEN = "_audit", "open"
"""No tenant can have the first name; no day the second."""
FLUSH_S, LOOK_S = 0.5, 30.0
"""How often lines reach the disk, and how often the spool is looked through for segments to seal."""
MAX_BYTES, MAX_AGE_S = 8 << 20, 3600.0
MAX_WAITING = 100_000
"""Lines in memory; with more, nothing is answered until they are written."""
END = "end"


@dataclass(frozen=True)
class Entry:
    """One answer, or a refusal."""

    request: str
    tenant: str
    key: str
    """The key's id."""
    adapter: str
    """`tenant/name@digest` in full; empty for the base, or when no version was found."""
    base: str
    outcome: str
    """finished | length | aborted (the client left) | refused | failed."""
    code: str
    """Why it was refused or failed."""
    prompt_tokens: int
    completion_tokens: int
    duration_s: float
    time: str


@dataclass(frozen=True)
class Change:
    """What an operator changed, or tried to, over the admin API."""

    admin: str
    """Whose key; empty where there are none, and this machine alone may ask."""
    change: str
    """`key.new`, `adapter.promote` and so on."""
    of: str
    """The tenant, or `tenant/name`."""
    detail: str
    """What it was changed to; never key material."""
    result: str
    """done | refused | failed."""
    time: str


class Seal(Statement):
    """What stands behind a segment."""

    PREFIX = b"ftcore audit segment v1\n"
    segment: Text
    sha256: Digest
    lines: int
    before: Text
    """The segment before it of the same process; empty: none."""
    ended: bool
    """By its own process; False: that was killed, and its last half second may be missing."""


class AuditLog:
    """One for each process that writes. `write` never blocks; a thread does the rest."""

    def __init__(self, store: str, spool: str = "", *, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S) -> None:
        self.spool = spool_of(store, spool)
        self._store, self._max_bytes, self._max_age_s = store, max_bytes, max_age_s
        self._signer = Signer()
        self._published = False
        self._entries: queue.SimpleQueue[Entry | Change] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._segment: _Segment | None = None
        self._before = ("", "")
        self._num_lost = self._num_lost_told = 0  # each written by one thread

    def open(self) -> None:
        """Blocks. Raises StorageError when lines cannot be kept here."""
        try:
            self.spool.mkdir(parents=True, exist_ok=True)
            self._segment = _Segment(self.spool, *self._before)
        except OSError as error:
            raised = explain_oserror(error, "keep audit lines here", str(self.spool))
            raise StorageError(raised.what, where=raised.where, got=raised.got, remedy="name a folder: audit_spool=FOLDER") from error
        self._thread.start()

    @property
    def is_full(self) -> bool:
        return self._entries.qsize() >= MAX_WAITING

    def write(self, entry: Entry | Change) -> None:
        if self._entries.qsize() < 2 * MAX_WAITING:
            self._entries.put(entry)
        else:  # refusals: nothing is answered any more; how many were lost is written down
            self._num_lost += 1

    def close(self) -> None:
        """Blocks: writes what waits, ends the segment and seals it. Without a store it stays in the spool, for whoever comes next."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        looked = 0.0
        while not self._over.is_set():
            try:
                self._flush()
                if (segment := self._segment) is not None and segment.lines and segment.is_due(self._max_bytes, self._max_age_s):
                    self._end()
                    looked = 0.0
                if time.monotonic() - looked >= LOOK_S:
                    looked = time.monotonic()
                    self.seal_spool()
            except Exception as error:  # lines wait in memory meanwhile, and nothing is answered when they are too many
                log.error("the audit log cannot be written: %s", str(error).replace("\n", " "))
            self._over.wait(FLUSH_S)
        try:
            self._flush()
            self._end()
            self.seal_spool()
        except Exception as error:  # as above; what is in the spool is sealed by whoever looks there next
            log.error("the audit log could not be ended: %s", str(error).replace("\n", " "))

    def _flush(self) -> None:
        if self._segment is None:
            self._segment = _Segment(self.spool, *self._before)
        batch = [self._entries.get_nowait() for _ in range(self._entries.qsize())]
        num_lost = self._num_lost - self._num_lost_told
        try:
            self._segment.append([*map(asdict, batch), *([{"lost": num_lost}] if num_lost else [])])
            self._num_lost_told += num_lost
        except OSError:
            for entry in batch:  # in their order, behind what came meanwhile
                self._entries.put(entry)
            raise

    def _end(self) -> None:
        if (segment := self._segment) is not None:
            self._segment = None
            self._before = segment.end() or self._before

    def seal_spool(self) -> None:
        """Seals every segment there that no process holds. One that cannot be read is left where it is, and logged."""
        for path in sorted(self.spool.glob("*.jsonl")):
            try:
                with _held(path) as file:
                    if file is not None:
                        self._seal(path, file)
            except IntegrityError as error:
                log.error("an audit segment cannot be sealed: %s", str(error).replace("\n", " "))
            except StorageError as error:
                log.warning("audit segments wait in %s: %s", self.spool, str(error).replace("\n", " "))
                return

    def _seal(self, path: Path, file: IO[bytes]) -> None:
        if not self._published:
            publish_key(self._store, self._signer.key_id, self._signer.public_pem)
            self._published = True
        raw = file.read()
        raw = raw[: raw.rfind(b"\n") + 1]  # a line that was being written when its process was killed is none
        lines = read_lines(raw, str(path))
        if not lines or lines[0]["segment"] != path.stem:
            raise IntegrityError("this is not the beginning of an audit segment", where=path)
        ended = lines[-1].get(END) is True
        if ended or len(lines) > 1:
            unsigned = Seal(
                segment=path.stem, sha256=hashlib.sha256(raw).hexdigest(), lines=len(lines), before=lines[0]["before"], ended=ended,
                time=utc_now(), key=self._signer.key_id,
            )  # fmt: skip
            seal = self._signer.signed(unsigned)
            folder = Folder(self._store) / f"{HOME}/{day_of(path.stem)}"
            folder.create(path.name, raw)  # False, here and below: it was sealed by a process that was killed before it removed this file
            folder.create(f"{path.stem}.json", seal.model_dump_json(indent=1).encode())
        path.unlink()


class _Segment:
    """A file that this process holds and appends to."""

    def __init__(self, spool: Path, before: str, before_digest: str) -> None:
        self.id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}"
        self.path, arriving = spool / f"{self.id}.jsonl", spool / f".{self.id}.tmp"
        self.lines, self._size, self._digest, self._began = 0, 0, before_digest, time.monotonic()
        self._file = arriving.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.append([{"segment": self.id, "before": before}])
        arriving.rename(self.path)  # held from the moment it can be found
        self.lines = 0

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Whole or not at all; on the disk when it returns."""
        if not rows:
            return
        digest, block = self._digest, []
        for row in rows:
            line = canonical_json({**row, "chain": digest})
            digest = hashlib.sha256(line).hexdigest()
            block.append(line + b"\n")
        data = b"".join(block)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._digest, self._size, self.lines = digest, self._file.tell(), self.lines + len(rows)

    def is_due(self, max_bytes: int, max_age_s: float) -> bool:
        return self._size >= max_bytes or time.monotonic() - self._began >= max_age_s

    def end(self) -> tuple[str, str] | None:
        """(its id, the digest of its last line), for the segment after it; None when it held nothing and is gone."""
        if not self.lines:
            self.path.unlink()
            self._file.close()
            return None
        self.append([{END: True}])
        self._file.close()
        return self.id, self._digest


@contextmanager
def _held(path: Path) -> Iterator[IO[bytes] | None]:
    """The file, locked; None where another process holds it, or sealed and removed it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file if path.exists() else None


def spool_of(store: str, spool: str) -> Path:
    """Where lines wait: one folder on this machine for all processes that serve a store."""
    folder = Folder(store)
    if spool:
        return Path(spool)
    if folder.is_local:
        return folder.path / HOME / OPEN
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "ftcore" / "audit" / hashlib.sha256(folder.url.encode()).hexdigest()[:16]


def day_of(segment: str) -> str:
    return f"{segment[:4]}-{segment[4:6]}-{segment[6:8]}"


def read_lines(raw: bytes, where: str) -> list[dict[str, Any]]:
    """Raises IntegrityError unless every line carries the digest of the one before it."""
    lines: list[dict[str, Any]] = []
    digest = None
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            chain = row["chain"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError("this is not an audit line", where=f"{where}:{number}") from error
        if digest is not None and chain != digest:
            raise IntegrityError("an audit line was altered, removed or put in", where=f"{where}:{number} or the line before it")
        digest = hashlib.sha256(line).hexdigest()
        lines.append(row)
    return lines


def read_segment(folder: Folder, segment: str, public_keys: Mapping[str, str]) -> tuple[Seal, list[dict[str, Any]]]:
    """A sealed segment and its lines, header and end included. Raises IntegrityError for whatever is not as it was sealed."""
    key = f"{day_of(segment)}/{segment}"
    try:
        seal = Seal.model_validate_json(folder.read(f"{key}.json"))
    except (ValidationError, StorageError) as error:
        raise IntegrityError("this audit segment has no seal that can be read", where=f"{folder}/{key}.json") from error
    require_signature(seal, public_keys, f"audit segment {segment}")
    try:
        raw = folder.read(f"{key}.jsonl")
    except FtcoreError as error:
        raise IntegrityError("a sealed audit segment is gone", where=f"{folder}/{key}.jsonl") from error
    lines = read_lines(raw, f"{folder}/{key}.jsonl")
    if hashlib.sha256(raw).hexdigest() != seal.sha256 or len(lines) != seal.lines or seal.segment != segment:
        raise IntegrityError("this audit segment is not the one that was sealed", where=f"{folder}/{key}.jsonl")
    return seal, lines
