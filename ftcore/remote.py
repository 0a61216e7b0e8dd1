"""Remote: one folder on an fsspec file system: what `Folder` does where there is no rename, no lock and no fsync.

In: a URL. Out: bytes, listings, conditional puts; every failure as a StorageError that says what to do. Runs in: everywhere; imports
fsspec, and s3fs for s3:// only.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from ftcore.errors import ConfigError, FtcoreError
from ftcore.patience import OUR_MISTAKES, CutShort, explain_remote, patiently

T = TypeVar("T")
STREAM_BYTES = 8 << 20
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "sha256", "checksum", "LastModified", "mtime", "created")


def open_filesystem(url: str) -> tuple[Any, str]:
    """(file system, path on it). s3:// gets our own patience; other kinds their own ways, and ours around them."""
    try:
        if is_s3(url):
            from ftcore.s3 import open_s3  # half a second, for s3:// alone

            return open_s3(), url.split("://", 1)[1].rstrip("/")
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            "this kind of URL cannot be opened", where=url, got=str(error)[:300], remedy="install the fsspec package it needs"
        ) from error
    return fs, root.rstrip("/")


def is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


@contextmanager
def explained(verb: str, where: str) -> Iterator[None]:
    """Makes whatever a file system raises a StorageError; mistakes of ours stay what they are."""
    try:
        yield
    except (FtcoreError, *OUR_MISTAKES):
        raise
    except Exception as error:  # every fsspec package has errors of its own kind
        raise explain_remote(error, verb, where) from error


class RemoteFolder:
    """Keys are relative to the URL. Reads and writes are whole or fail."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_s3 = is_s3(url)
        with explained("open", url):
            self._fs, self.root = open_filesystem(url)

    @property
    def fs(self) -> Any:
        """Asked for each time: a client does not survive a fork, and follows the process's environment."""
        return open_filesystem(self.url)[0] if self.is_s3 else self._fs

    def path(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/") if key else self.root

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        with explained(verb, f"{self.url}/{key}".rstrip("/")):
            return action() if self.is_s3 else patiently(action)  # PatientS3 is patient itself, request by request

    def exists(self, key: str) -> bool:
        return self._do("look at", key, lambda: bool(self.fs.exists(self.path(key))))

    def read(self, key: str, end: int | None = None) -> bytes:
        return self._do("read", key, lambda: bytes(self.fs.cat_file(self.path(key), end=end)))

    def write(self, key: str, data: bytes) -> None:
        self._do("write", key, lambda: self.fs.pipe_file(self.path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        def make() -> bool:
            if self.is_s3:
                return bool(self.fs.create(self.path(key), data))
            try:
                self.fs.pipe_file(self.path(key), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self._do("write", key, make)

    def swap(self, key: str, old: bytes, new: bytes) -> bool:
        def change() -> bool:
            if self.is_s3:
                return bool(self.fs.swap(self.path(key), old, new))
            try:
                tag = self.fs.info(self.path(key)).get("ETag")
                if bytes(self.fs.cat_file(self.path(key))) != old:
                    return False
                self.fs.pipe_file(self.path(key), new, **({"IfMatch": tag} if tag else {}))
            except FileNotFoundError:
                return False
            except OSError as error:
                if tag and error.errno in (errno.EINVAL, errno.EBUSY):  # what fsspec calls 412 and 409: it changed meanwhile
                    return False
                raise
            return True

        return self._do("replace", key, change)

    def fingerprint(self, key: str) -> tuple[str, int]:
        """(SHA-256, bytes) of an object, read once as a stream."""

        def hashed() -> tuple[str, int]:
            whole, size = hashlib.sha256(), 0
            for part in self._stream(self.path(key)):
                whole.update(part)
                size += len(part)
            return whole.hexdigest(), size

        return self._do("read", key, hashed)

    def _stream(self, path: str) -> Iterator[bytes]:
        if self.is_s3:
            yield from self.fs.stream(path)
            return
        with self.fs.open(path, "rb") as file:
            while part := file.read(STREAM_BYTES):
                yield part

    def modified(self, key: str) -> float:
        return self._do("look at", key, lambda: float(self.fs.modified(self.path(key)).timestamp()))

    def put(self, local: Path, key: str) -> None:
        self._do("write", key, lambda: self.fs.put_file(str(local), self.path(key)))

    def get(self, key: str, local: Path) -> None:
        def fetch() -> None:
            self.fs.get_file(self.path(key), str(local))
            if not self.is_s3 and (size := int(self.fs.size(self.path(key)) or 0)) != local.stat().st_size:
                raise CutShort(local.stat().st_size, size)

        self._do("read", key, fetch)

    def names(self, key: str) -> list[str]:
        def listed() -> list[str]:
            try:
                found = self.fs.ls(self.path(key), detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found} - {""})

        return self._do("list", key, listed)

    def tags(self, key: str) -> dict[str, tuple[int, str]]:
        """Every object under `key` with its bytes and what changes when its content does (an ETag, or a time where there is none)."""
        base = self.path(key)
        found = self._do("list", key, lambda: self.fs.find(base, detail=True))
        return {
            str(name)[len(base) :].lstrip("/"): (int(fact.get("size") or 0), next((str(fact[tag]) for tag in TAGS if fact.get(tag)), ""))
            for name, fact in sorted(found.items())
            if str(name) != base
        }

    def md5(self, key: str) -> str:
        """An object's MD5 as its storage knows it; "" where it does not."""
        return self._do("look at", key, lambda: str(self.fs.md5(self.path(key)))) if self.is_s3 else ""

    def delete(self, key: str, first: str) -> None:
        """Removes an object, or all under it, `first` before the others."""

        def remove() -> None:
            path = self.path(key)
            if not self.is_s3:  # there may be folders to remove, too
                for name in self.fs.find(path):
                    if str(name).endswith(f"/{first}"):
                        self._remove([name])
                if self.fs.exists(path):
                    self.fs.rm(path, recursive=True)
                return
            found = sorted(self.fs.find(path))
            last = [name for name in found if not str(name).endswith(f"/{first}")]
            for name in found:
                if name not in last:
                    self._remove([name])
            self._remove(last)

        self._do("delete", key, remove)

    def _remove(self, names: list[str]) -> None:
        for start in range(0, len(names), 1000):
            try:
                self.fs.rm(names[start : start + 1000])
            except FileNotFoundError:
                continue  # somebody else removed it: what was wanted

    def abort_uploads(self, older_than_s: float) -> None:
        """Ends uploads in parts that a killed process left."""
        if self.is_s3:
            self._do("clean", "", lambda: self.fs.abort_uploads(self.root, older_than_s))
