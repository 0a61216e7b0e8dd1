"""S3: s3fs with our own patience: every request and every body tried again within bounds, reads pinned to one version of an object.

In: s3:// paths. Out: an fsspec file system, one a process. Runs in: everywhere an s3:// path is used; nowhere else.

A read is of one version: ranges carry If-Match, so an object that is replaced meanwhile is an error, never a mixture. A conditional put
whose answer was lost is looked at before it is called lost: when the object holds our bytes, we were the one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from fsspec.asyn import sync_wrapper
from fsspec.spec import AbstractBufferedFile
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from ftcore.patience import CutShort, answer_of, explain_remote, patiently_async

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 15
SLOWEST_BYTES_PER_S = 64 * 1024
"""A body that comes slower than this (beyond READ_TIMEOUT_S) has stalled, though a byte drips now and then."""
PART_BYTES = 16 << 20
STREAM_BYTES = 8 << 20
PARTS_AT_ONCE = 4
LOST_RACE = {"PreconditionFailed", "412"}


@dataclass(frozen=True)
class Body:
    """What one read brought: the bytes, the size of the whole object, and which version of it this was."""

    data: bytes
    total: int
    etag: str


class PatientS3(S3FileSystem):
    """`num_requests` counts what was sent, tries included, by the name of the operation."""

    retries = 1  # ours are the only ones: two layers would multiply
    num_requests: Counter[str]

    def __init__(self, **options: Any) -> None:
        config = {
            "connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S, "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }  # fmt: skip
        super().__init__(config_kwargs=config, use_listings_cache=False, max_concurrency=PARTS_AT_ONCE, **options)
        self.num_requests = Counter()

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *akwarglist, **kwargs)

        async def tried() -> Any:
            self.num_requests[method] += 1
            try:
                return await call(**arguments)
            except ClientError as error:
                if await self._was_ours(method, arguments, error):
                    return {}
                raise

        try:
            return await patiently_async(tried)
        except ClientError as error:
            raise translate_boto_error(error) from error

    call_s3 = sync_wrapper(_call_s3)

    async def _was_ours(self, method: str, arguments: dict[str, Any], error: ClientError) -> bool:
        """Whether an earlier try whose answer was lost (ours, or one aiohttp makes on its own) did what this one is told is done."""
        code, _ = answer_of(error)
        at = {"Bucket": arguments.get("Bucket"), "Key": arguments.get("Key")}
        if method == "put_object" and code in LOST_RACE:
            return await self._cat_file(f"{at['Bucket']}/{at['Key']}") == bytes(arguments["Body"])
        if method == "complete_multipart_upload" and code == "NoSuchUpload":
            parts = len(arguments["MultipartUpload"]["Parts"])
            return str((await self._call_s3("head_object", **at)).get("ETag", "")).strip('"').endswith(f"-{parts}")
        return method == "abort_multipart_upload" and code == "NoSuchUpload"

    async def _body(self, path: str, start: int = 0, end: int | None = None, etag: str = "") -> Body:
        """Bytes [start, end) of an object (of the version that `etag` names): request and bytes are tried again together.

        Always as a range, because such an answer says how long the whole is, so a body that is cut politely is noticed too.
        """
        bucket, key, _ = self.split_path(path)
        await self.set_session()
        client = await self.get_s3(bucket)
        how = {"Range": f"bytes={start}-{'' if end is None else end - 1}", **({"IfMatch": etag} if etag else {})}

        async def tried() -> Body:
            self.num_requests["get_object"] += 1
            answer = await client.get_object(Bucket=bucket, Key=key, **how, **self.req_kw)
            stream, length = answer["Body"], int(answer["ContentLength"])
            try:
                data = await asyncio.wait_for(stream.read(), READ_TIMEOUT_S + length / SLOWEST_BYTES_PER_S)
            finally:
                stream.close()
            total = int(str(answer.get("ContentRange", f"/{length}")).rsplit("/", 1)[-1])
            wanted = min(total, total if end is None else end) - start
            if len(data) != wanted:
                raise CutShort(len(data), wanted)
            return Body(data, total, str(answer.get("ETag", "")))

        try:
            return await patiently_async(tried)
        except ClientError as error:
            if answer_of(error)[0] in ("InvalidRange", "416") and start == 0:
                return Body(b"", 0, "")  # an empty object has no first byte to give
            raise translate_boto_error(error) from error

    async def _cat_file(self, path: str, version_id: str | None = None, start: Any = None, end: Any = None, **_: Any) -> bytes:
        if (start or 0) < 0 or (end or 0) < 0:
            size = int((await self._info(path))["size"])
            start, end = (at + size if at is not None and at < 0 else at for at in (start, end))
        return (await self._body(path, start or 0, end)).data

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        first = await self._body(rpath, 0, PART_BYTES)
        slots = asyncio.Semaphore(PARTS_AT_ONCE)
        with Path(lpath).open("wb") as file:
            file.write(first.data)

            async def fetch(start: int) -> None:
                async with slots:
                    body = await self._body(rpath, start, min(start + PART_BYTES, first.total), first.etag)
                    file.seek(start)  # no other task runs between these two
                    file.write(body.data)

            await _all([fetch(start) for start in range(PART_BYTES, first.total, PART_BYTES)])

    read_body = sync_wrapper(_body)

    def stream(self, path: str) -> Iterator[bytes]:
        """One version of an object, piece by piece, without asking for its size first."""
        body = self.read_body(path, 0, STREAM_BYTES)
        yield body.data
        for start in range(STREAM_BYTES, body.total, STREAM_BYTES):
            yield self.read_body(path, start, min(start + STREAM_BYTES, body.total), body.etag).data

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        options |= {"chunksize": max(PART_BYTES, -(-Path(lpath).stat().st_size // 9_000)), "max_concurrency": PARTS_AT_ONCE}
        await super()._put_file(lpath, rpath, **options)

    async def _bulk_delete(self, pathlist: list[str], **kwargs: Any) -> list[str]:
        """s3fs does not look at what could not be deleted, which comes in an answer of 200."""
        if not pathlist:
            return []
        bucket = self.split_path(pathlist[0])[0]
        keys = {"Objects": [{"Key": self.split_path(path)[1]} for path in pathlist], "Quiet": True}
        answer = await self._call_s3("delete_objects", Bucket=bucket, Delete=keys)
        for error in answer.get("Errors", []):
            kind = PermissionError if error.get("Code") == "AccessDenied" else OSError
            raise kind(errno.EACCES, f"{error.get('Code')}: {error.get('Message')}", error.get("Key"))
        return pathlist

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode=mode, **options)
        return PinnedReader(self, path, block_size=8 << 20, cache_type="readahead")

    def swap(self, path: str, old: bytes, new: bytes) -> bool:
        """Puts `new` where the object still reads `old`, by one conditional put; false when somebody else was first."""
        try:
            etag = self.info(path)["ETag"]
            if self.cat_file(path) != old:
                return False
            self.pipe_file(path, new, IfMatch=etag)
        except FileNotFoundError:
            return False
        except OSError as error:
            if answer_of(error)[0] in LOST_RACE:
                return False
            raise
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Puts an object that must not be there yet, by one conditional put; false when it is."""
        try:
            self.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or answer_of(error)[0] in LOST_RACE:
                return False
            raise
        return True

    def md5(self, path: str) -> str:
        """The MD5 that an ETag is, unless the object came in parts or is encrypted with a key that is not the store's own."""
        bucket, key, _ = self.split_path(path)
        head = self.call_s3("head_object", Bucket=bucket, Key=key)
        etag = str(head.get("ETag", "")).strip('"')
        foreign = "kms" in str(head.get("ServerSideEncryption", "")) or head.get("SSECustomerAlgorithm")
        return "" if foreign or not re.fullmatch(r"[0-9a-f]{32}", etag) else etag

    def abort_uploads(self, path: str, older_than_s: float = 0.0) -> int:
        """Ends multipart uploads under a path that a killed process left; their parts cost until somebody does. Returns how many."""
        bucket, prefix, _ = self.split_path(path)
        listing: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/" if prefix else ""}
        found: list[dict[str, Any]] = []
        while True:  # a thousand an answer
            answer = self.call_s3("list_multipart_uploads", **listing)
            found += answer.get("Uploads", [])
            if not answer.get("IsTruncated"):
                break
            listing |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
        left = [upload for upload in found if time.time() - upload["Initiated"].timestamp() >= older_than_s]
        for upload in left:
            self.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        return len(left)


async def _all(work: list[Any]) -> None:
    """All of it, or the first failure with the rest cancelled and over: nothing goes on writing behind the caller's back."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class PinnedReader(AbstractBufferedFile):
    """Reads one version of an object, in blocks ahead."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        size, etag = int(self.details["size"]), str(self.details["ETag"])
        end = min(end, size)
        try:
            return self.fs.read_body(self.path, start, end, etag).data if start < end else b""
        except Exception as error:  # botocore's and aiohttp's are no OSErrors, which is what readers of files expect
            raise explain_remote(error, "read", f"s3://{self.path}") from error


def open_s3() -> PatientS3:
    """This process's S3, as its environment says. One for all threads: a client of its own for each would cost 0.1 s and a connection."""
    return _open_s3(os.getpid(), tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@cache
def _open_s3(pid: int, environment: tuple[tuple[str, str], ...]) -> PatientS3:
    return PatientS3(skip_instance_cache=True)
