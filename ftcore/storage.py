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
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftcore.errors import IntegrityError, StorageError

MANIFEST = "manifest.json"


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
            import fsspec  # only for remote paths: a local run must not pay for it

            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, key: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{key}")

    def exists(self, key: str = "") -> bool:
        if self.is_local:
            return (self.path / key).exists()
        with self._explained("look at", key):
            return bool(self._fs.exists(self._key(key)))

    def read(self, key: str) -> bytes:
        with self._explained("read", key):
            if self.is_local:
                return (self.path / key).read_bytes()
            return bytes(self._fs.cat_file(self._key(key)))

    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all: readers see the old object or the new one."""
        with self._explained("write", key):
            if not self.is_local:
                self._fs.pipe_file(self._key(key), data)
                return
            target = self.path / key
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                _write_synced(temporary, data)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

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
        with self._explained("write", key):
            if not self.is_local:
                try:
                    self._fs.pipe_file(self._key(key), data, mode="create")
                except FileExistsError:
                    return False
                return True
            target = self.path / key
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                _write_synced(temporary, data)
                os.link(temporary, target)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def replace(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Writes `new` only where the object still reads `old` (None: is not there); False when somebody else was first.

        Local: under a lock file. s3: one conditional put (If-Match). Other remote file systems: compare, then put.
        """
        if old is None:
            return self.create(key, new)
        with self._explained("replace", key):
            if not self.is_local:
                return self._replace_remote(key, old, new)
            target = self.path / key
            with target.with_name(f".{target.name}.lock.tmp").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists() or target.read_bytes() != old:
                    return False
                self.write(key, new)
                return True

    def _replace_remote(self, key: str, old: bytes, new: bytes) -> bool:
        try:
            tag = self._fs.info(self._key(key)).get("ETag")
            if bytes(self._fs.cat_file(self._key(key))) != old:
                return False
        except FileNotFoundError:
            return False
        if tag is None:
            self._fs.pipe_file(self._key(key), new)
            return True
        try:
            self._fs.pipe_file(self._key(key), new, IfMatch=tag)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBUSY):  # s3fs's names for 412 and 409: the object changed meanwhile
                return False
            raise
        return True

    def digest(self, key: str) -> str:
        """SHA-256 of an object, streamed."""
        with self._explained("read", key):
            if self.is_local:
                return file_digest(self.path / key)
            with self._fs.open(self._key(key), "rb") as file:
                whole = hashlib.sha256()
                while part := file.read(8 * 1024**2):
                    whole.update(part)
                return whole.hexdigest()

    def modified(self, key: str) -> float:
        """When the object was last written, Unix seconds."""
        with self._explained("look at", key):
            if self.is_local:
                return (self.path / key).stat().st_mtime
            return float(self._fs.modified(self._key(key)).timestamp())

    def put(self, local: Path, key: str) -> None:
        """Copies a local file in (streamed for remote folders)."""
        with self._explained("write", key):
            if self.is_local:
                target = self.path / key
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
                try:
                    shutil.copyfile(local, temporary)
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
            else:
                self._fs.put_file(str(local), self._key(key))

    def get(self, key: str, local: Path) -> None:
        with self._explained("read", key):
            local.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                shutil.copyfile(self.path / key, local)
            else:
                self._fs.get_file(self._key(key), str(local))

    def names(self, key: str = "") -> list[str]:
        """Names directly under `key` (files and folders), sorted; empty when there is no such folder."""
        if self.is_local:
            folder = self.path / key
            return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.is_dir() else []
        with self._explained("list", key):
            try:
                found = self._fs.ls(self._key(key), detail=False)
            except FileNotFoundError:
                return []
        return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found} - {""})

    def files(self, key: str = "") -> list[str]:
        """Every file under `key`, as keys relative to it, sorted."""
        if self.is_local:
            base = self.path / key
            return sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
        base_key = self._key(key)
        with self._explained("list", key):
            found = self._fs.find(base_key)
        return sorted(str(name)[len(base_key) :].lstrip("/") for name in found)

    def delete(self, key: str = "") -> None:
        """Removes a file or a folder; the manifest first, so that what is half removed is not taken for whole."""
        with self._explained("delete", key):
            if self.is_local:
                target = self.path / key
                if target.is_dir():
                    (target / MANIFEST).unlink(missing_ok=True)
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            elif self._fs.exists(self._key(key)):
                self._fs.rm(self._key(key), recursive=True)

    def _key(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/") if key else self._root

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise explain_oserror(error, verb, f"{self.url}/{key}".rstrip("/")) from error


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
    """Writes `manifest.json` last over everything in the folder; returns the manifest. Local folders only are hashed in place."""
    files = {}
    for key in folder.files():
        if key != MANIFEST:
            data_digest = file_digest(folder.path / key) if folder.is_local else hashlib.sha256(folder.read(key)).hexdigest()
            size = (folder.path / key).stat().st_size if folder.is_local else len(folder.read(key))
            files[key] = {"sha256": data_digest, "bytes": size}
    manifest = {"files": files, **(extra or {})}
    folder.write_json(MANIFEST, manifest)
    return manifest


def is_sealed(folder: Folder) -> bool:
    return folder.exists(MANIFEST)


def verify(folder: Folder) -> dict[str, Any]:
    """Reads the whole folder back against its manifest; returns the manifest.

    Raises IntegrityError naming the file that is missing, cut or altered.
    """
    if not folder.exists(MANIFEST):
        raise IntegrityError(
            "this folder was never sealed", where=folder, wanted=MANIFEST, remedy="it was left half-written; use an older one"
        )
    manifest = folder.read_json(MANIFEST)
    for key, fact in manifest["files"].items():
        if not folder.exists(key):
            raise IntegrityError(
                "a file of this sealed folder is gone", where=f"{folder}/{key}", remedy="use an older one or copy it again"
            )
        got = folder.digest(key)
        if got != fact["sha256"]:
            raise IntegrityError(
                "this file is not the one that was sealed",
                where=f"{folder}/{key}",
                got=f"sha256 {got[:16]}",
                wanted=f"sha256 {fact['sha256'][:16]}",
                remedy="it was altered or damaged; use an older one or copy it again",
            )
    return dict(manifest)
