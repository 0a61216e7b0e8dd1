"""Folder: one way to read and write a local folder or any fsspec path (s3://, gs://, memory://), and the seal that makes it whole.

In: a path or URL. Out: bytes, files, verified manifests. Runs in: everywhere; no torch, fsspec only for remote paths.

A folder is *sealed* by its last object: `manifest.json` lists every other file with size and SHA-256. No manifest, not whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ftcore.errors import IntegrityError, StorageError

T = TypeVar("T")
MANIFEST = "manifest.json"
FILES_AT_ONCE = 8
SEALED_ANEW_TRIES, SEALING_S = 20, 0.25
"""How often, and how long apart, a reader looks again at a folder that is being sealed anew."""


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folder:
    """A local folder or fsspec prefix; keys are relative, '/'-separated. Local writes are atomic (temporary file, fsync, rename)."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.is_local = "://" not in self.url or self.url.startswith("file://")
        if self.is_local:
            self.path = Path(self.url.removeprefix("file://"))
            self.url = str(self.path)
        else:
            from ftcore.remote import RemoteFolder  # fsspec only for remote paths: a local run must not pay for it

            self._remote = RemoteFolder(self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, key: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{key}")

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:  # a client does not travel between processes: the other one opens its own
        return Folder, (self.url,)

    def exists(self, key: str = "") -> bool:
        return (self.path / key).exists() if self.is_local else self._remote.exists(key)

    def read(self, key: str, most: int | None = None) -> bytes:
        """`most`: bytes that it may have; IntegrityError for a larger one, of which no more is read."""
        end = None if most is None else most + 1
        if not self.is_local:
            data = self._remote.read(key, end)
        else:
            with self._explained("read", key):
                if not stat.S_ISREG((self.path / key).stat().st_mode):  # a pipe could keep its reader for ever
                    raise OSError(errno.EINVAL, "not a regular file")
                with (self.path / key).open("rb") as file:
                    data = file.read(-1 if end is None else end)
        if most is not None and len(data) > most:
            raise IntegrityError("this file is larger than such a file may be", where=f"{self}/{key}", wanted=f"at most {most} bytes")
        return data

    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all: readers see the old object or the new one."""
        if not self.is_local:
            self._remote.write(key, data)
            return
        with self._explained("write", key), arriving(self.path / key) as temporary:
            _write_synced(temporary, data)
            temporary.replace(self.path / key)

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise IntegrityError(
                "this file is not JSON", where=f"{self}/{key}", got=str(error), remedy="it was damaged; remove it"
            ) from error

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object that must not exist yet, whole; False (and nothing written) when it does. Of two at once, one wins."""
        if not self.is_local:
            return self._remote.create(key, data)
        with self._explained("write", key), arriving(self.path / key) as temporary:
            _write_synced(temporary, data)
            try:
                os.link(temporary, self.path / key)
            except FileExistsError:
                return False
            return True

    def replace(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Writes `new` only where the object still reads `old` (None: is not there); False when somebody else was first.

        Local: under a lock file. s3: one conditional put (If-Match). Other remote file systems: compare, then put.
        """
        if old is None:
            return self.create(key, new)
        if not self.is_local:
            return self._remote.swap(key, old, new)
        with self._explained("replace", key):
            target = self.path / key
            with target.with_name(f".{target.name}.lock.tmp").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists() or target.read_bytes() != old:
                    return False
                self.write(key, new)
                return True

    def change(self, key: str, change: Callable[[bytes | None], bytes], what: str) -> None:
        """Replaces an object by what `change` makes of it (None: is not there), again when somebody else was first.

        Raises StorageError after many tries; `what` names the object in it.
        """
        for attempt in range(20):
            old = self.read(key) if self.exists(key) else None
            if self.replace(key, old, change(old)):
                return
            time.sleep(0.01 * (attempt + 1))  # whoever was first is done by then
        raise StorageError(f"others kept changing {what}", where=f"{self}/{key}", remedy="try again; find out who changes it in a loop")

    def fingerprint(self, key: str) -> tuple[str, int]:
        """(SHA-256, bytes) of an object, in one streamed reading."""
        if not self.is_local:
            return self._remote.fingerprint(key)
        with self._explained("read", key):
            return file_digest(self.path / key), (self.path / key).stat().st_size

    def digest(self, key: str) -> str:
        return self.fingerprint(key)[0]

    def modified(self, key: str) -> float:
        """When the object was last written, Unix seconds."""
        if not self.is_local:
            return self._remote.modified(key)
        with self._explained("look at", key):
            return (self.path / key).stat().st_mtime

    def put(self, local: Path, key: str) -> None:
        """Copies a local file in (streamed for remote folders)."""
        if not self.is_local:
            self._remote.put(local, key)
            return
        with self._explained("write", key), arriving(self.path / key) as temporary:
            shutil.copyfile(local, temporary)
            temporary.replace(self.path / key)

    def get(self, key: str, local: Path) -> None:
        with self._explained("read", key):
            local.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                shutil.copyfile(self.path / key, local)
            else:
                self._remote.get(key, local)

    def names(self, key: str = "") -> list[str]:
        """Names directly under `key` (files and folders), sorted; empty when there is no such folder."""
        if not self.is_local:
            return self._remote.names(key)
        folder = self.path / key
        return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.is_dir() else []

    def require_something(self) -> None:
        """Raises StorageError where there is nothing at all: removed, or not mounted. To a listing that looks like a folder emptied."""
        if not self.names():
            raise StorageError("there is nothing here", where=self, wanted="a folder that holds something", remedy="is it mounted?")

    @contextmanager
    def there(self) -> Iterator[None]:
        """Around what would mistake a folder that is away for an empty one. Looks before and after: it may come back, or go, meanwhile."""
        self.require_something()
        yield
        self.require_something()

    def files(self, key: str = "") -> list[str]:
        """Every file under `key`, as keys relative to it, sorted."""
        return sorted(self.sizes(key))

    def sizes(self, key: str = "") -> dict[str, int]:
        """Every file under `key` with its bytes; one listing where it is remote."""
        if not self.is_local:
            return {name: size for name, (size, _) in self._remote.tags(key).items()}
        base = self.path / key
        found = (p for p in base.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
        return {p.relative_to(base).as_posix(): p.stat().st_size for p in found}

    def tags(self) -> dict[str, tuple[int, str]]:
        """Of a remote folder: every file's bytes, and a tag that changes when its content does; one listing."""
        return self._remote.tags("")

    def md5(self, key: str) -> str:
        """Of a remote file: its MD5 where the storage knows it, else ""."""
        return self._remote.md5(key)

    def delete(self, key: str = "") -> None:
        """Removes a file or a folder; the manifest first, so that what is half removed is not taken for whole."""
        if not self.is_local:
            self._remote.delete(key, first=MANIFEST)
            return
        with self._explained("delete", key):
            target = self.path / key
            if target.is_dir():
                (target / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def at_once(self, action: Callable[[str], T], keys: Iterable[str]) -> list[T]:
        """[action(key) for key in keys]; where the folder is remote, several at a time. The first failure is raised when all have ended."""
        keys = list(keys)
        if self.is_local or len(keys) < 2:
            return [action(key) for key in keys]
        with ThreadPoolExecutor(min(FILES_AT_ONCE, len(keys)), "ftcore-transfer") as pool:
            return list(pool.map(action, keys))

    def abort_uploads(self, older_than_s: float = 0.0) -> None:
        """Ends what killed processes left of uploads in parts under this folder."""
        if not self.is_local:
            self._remote.abort_uploads(older_than_s)

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise explain_oserror(error, verb, f"{self.url}/{key}".rstrip("/")) from error


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A name beside the target to write to; whatever is left there at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def explain_oserror(error: OSError, verb: str, where: str) -> StorageError:
    remedies = {
        errno.ENOSPC: "free space there or choose another place with output.runs / output.store / data.cache; what is sealed stays usable",
        errno.EDQUOT: "your quota there is used up; free space or choose another place",
        errno.EACCES: "you may not do that there; choose another place or fix its permissions",
        errno.ENOENT: "check the path for a typing error",
    }
    number = error.errno
    if number is None:  # fsspec raises the standard kinds without a number
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES if isinstance(error, PermissionError) else None
    wanted = {errno.ENOENT: "an existing path", errno.ENOSPC: "enough free space"}.get(number or 0, "")
    got = error.strerror or str(error) or type(error).__name__
    raised = StorageError(
        f"cannot {verb} this", where=where, got=got, wanted=wanted, remedy=remedies.get(number or 0, "check the path and the storage")
    )
    raised.errno = number
    return raised


def seal(folder: Folder, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes `manifest.json` last over everything in the folder; returns the manifest."""
    keys = [key for key in folder.files() if key != MANIFEST]
    facts = folder.at_once(folder.fingerprint, keys)
    files = {key: {"sha256": digest, "bytes": size} for key, (digest, size) in zip(keys, facts, strict=True)}
    manifest = {"files": files, **(extra or {})}
    folder.write_json(MANIFEST, manifest)
    return manifest


def is_sealed(folder: Folder) -> bool:
    return folder.exists(MANIFEST)


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Raises IntegrityError for a folder that was never sealed."""
    try:
        manifest = folder.read_json(MANIFEST)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        raise IntegrityError(
            "this folder was never sealed", where=folder, wanted=MANIFEST, remedy="it was left half-written; use an older one"
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise IntegrityError("this manifest is damaged", where=f"{folder}/{MANIFEST}", remedy="use an older one or copy it again")
    return manifest


def verify(folder: Folder) -> dict[str, Any]:
    """Reads the whole folder back against its manifest, each file once, as a stream; returns the manifest.

    Raises IntegrityError naming the file that is missing, cut or altered.
    """
    manifest = read_manifest(folder)
    sizes = folder.sizes()
    for key, fact in manifest["files"].items():
        if key not in sizes:
            raise _gone(folder, key)
        if sizes[key] != fact["bytes"]:
            raise _altered(folder, key, f"{sizes[key]} bytes", f"{fact['bytes']} bytes")
    for key, digest in zip(manifest["files"], folder.at_once(partial(_digest, folder), manifest["files"]), strict=True):
        if digest != (wanted := manifest["files"][key]["sha256"]):
            raise _altered(folder, key, f"sha256 {digest[:16]}", f"sha256 {wanted[:16]}")
    return manifest


def _digest(folder: Folder, key: str) -> str:
    try:
        return folder.digest(key)
    except StorageError as error:
        raise _gone(folder, key) if error.errno == errno.ENOENT else error from error


def fetch(folder: Folder, into: Path) -> dict[str, Any]:
    """Copies a sealed folder to an empty local one, every file held against the one manifest that was read; returns the manifest.

    A remote folder that is sealed anew meanwhile is fetched again: the result is the old one or the new one, never a mixture.
    """
    failed_with: dict[str, Any] | None = None
    problem: IntegrityError | None = None
    for _ in range(SEALED_ANEW_TRIES):
        manifest: dict[str, Any] | None = None
        try:
            manifest = read_manifest(folder)
            folder.at_once(partial(_fetch_one, folder, into, manifest["files"]), manifest["files"])
            (into / MANIFEST).write_bytes(json.dumps(manifest).encode())
            return manifest
        except IntegrityError as error:
            if manifest == failed_with:
                raise  # it was never sealed, or it is damaged: nobody seals it anew
            problem, failed_with = error, manifest or failed_with
        _emptied(into)
        time.sleep(SEALING_S)
    raise problem or AssertionError("unreachable")


def _emptied(into: Path) -> None:
    """What was fetched of the older one goes: a file that the newer one lacks would stay beside it."""
    for entry in into.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _fetch_one(folder: Folder, into: Path, files: dict[str, dict[str, Any]], key: str) -> None:
    try:
        folder.get(key, into / key)
    except StorageError as error:
        raise _gone(folder, key) if error.errno == errno.ENOENT else error from error
    if (digest := file_digest(into / key)) != (wanted := files[key]["sha256"]):
        raise _altered(folder, key, f"sha256 {digest[:16]}", f"sha256 {wanted[:16]}")


def _gone(folder: Folder, key: str) -> IntegrityError:
    return IntegrityError("a file of this sealed folder is gone", where=f"{folder}/{key}", remedy="use an older one or copy it again")


def _altered(folder: Folder, key: str, got: str, wanted: str) -> IntegrityError:
    return IntegrityError(
        "this file is not the one that was sealed", where=f"{folder}/{key}", got=got, wanted=wanted,
        remedy="it was altered or damaged; use an older one or copy it again",
    )  # fmt: skip
