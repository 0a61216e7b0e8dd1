"""Patience: the one place that decides which failures of a storage pass, how long to wait for them, and what to say when they do not.

In: an action on remote storage. Out: its result after bounded tries, or a StorageError. Runs in: everywhere; no fsspec, no botocore.

Tried again: 500, 502-504, 429 and other throttling, cut or refused connections, timeouts, cut bodies. Never: refusals (403), what is not
there (404, no such bucket), wrong requests, no space. Waits double from a quarter of a second, with full jitter, and end after
FTCORE_STORAGE_PATIENCE_S (30 s) or MAX_TRIES, whichever is first.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from ftcore.errors import ConfigError, FtcoreError, StorageError

T = TypeVar("T")
Verdict = Literal["passes", "missing", "refused", "full", "unreachable", "wrong"]
VARIABLE = "FTCORE_STORAGE_PATIENCE_S"
PATIENCE_S, MAX_TRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 30.0, 10, 0.25, 8.0
OUR_MISTAKES = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
PASSING = {
    "InternalError", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests",
    "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "RequestTimeout", "RequestTimeoutException",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
FULL = {"EntityTooLarge", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "StorageFull", "507"}
MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404", "NotFound"}
UNREACHABLE = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError", "SSLError",
    "ProxyConnectionError", "ResponseParserError", "ResponseStreamingError", "IncompleteReadError", "IncompleteRead", "FSTimeoutError",
    "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "ClientConnectionError", "ServerTimeoutError", "ConnectionError",
    "FlexibleChecksumError",
}  # fmt: skip
"""Class names (of botocore, aiohttp, fsspec and urllib3, none of which a local run imports) of what a network does."""
PASSING_ERRNO = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.ETIMEDOUT, errno.EAGAIN}


class CutShort(OSError):
    """Fewer bytes came than were announced."""

    def __init__(self, got: int, wanted: int) -> None:
        super().__init__(errno.EIO, f"the answer was cut: {got} of {wanted} bytes came")


def answer_of(error: BaseException) -> tuple[str, int]:
    """(code, HTTP status) of the answer that an S3 error was made from; ("", 0) for every other error."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            fault, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
            return str(fault.get("Code", "")), int(meta.get("HTTPStatusCode") or 0)
    return "", 0


def judge(error: BaseException) -> Verdict:
    """What kind of failure this is. `passes` and `unreachable` are worth another try."""
    code, status = answer_of(error)
    if code in FULL or status == 507 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EMSGSIZE):
        return "full"
    if code in PASSING or status == 429 or (500 <= status < 600 and status != 501):
        return "passes"
    if status:
        return "refused" if status in (401, 403) else "missing" if status == 404 or code in MISSING else "wrong"
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__ or type(error).__name__ == "ProfileNotFound":
        return "refused"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, CutShort | TimeoutError | ConnectionError | asyncio.TimeoutError):
        return "unreachable"
    if UNREACHABLE & {kind.__name__ for kind in type(error).__mro__}:
        return "unreachable"
    return "passes" if isinstance(error, OSError) and error.errno in PASSING_ERRNO else "wrong"


@dataclass
class Patience:
    """The waits between the tries of one action."""

    budget_s: float
    tries: int = 0
    started: float = 0.0

    def wait_after(self, error: BaseException) -> float | None:
        """Seconds to wait before the next try; None when there shall be none. Full jitter keeps many clients from coming back at once."""
        self.tries += 1
        self.started = self.started or time.monotonic()
        if isinstance(error, FtcoreError) or judge(error) not in ("passes", "unreachable") or self.tries >= MAX_TRIES:
            return None
        wait = random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**self.tries))
        return wait if time.monotonic() - self.started + wait < self.budget_s else None


def patience_s() -> float:
    asked = os.environ.get(VARIABLE, "")
    try:
        return float(asked or PATIENCE_S)
    except ValueError:
        raise ConfigError(f"{VARIABLE} is not a number of seconds", got=asked, wanted="30, 120, ...") from None


def patiently(action: Callable[[], T]) -> T:
    """The action's result, tried again while its failures are of the kind that passes. Raises the last of them."""
    patience = Patience(patience_s(), started=time.monotonic())
    while True:
        try:
            return action()
        except Exception as error:
            wait = patience.wait_after(error)
            if wait is None:
                raise
        time.sleep(wait)


async def patiently_async(action: Callable[[], Awaitable[T]]) -> T:
    """The same for a coroutine."""
    patience = Patience(patience_s(), started=time.monotonic())
    while True:
        try:
            return await action()
        except Exception as error:
            wait = patience.wait_after(error)
            if wait is None:
                raise
        await asyncio.sleep(wait)


REMEDIES: dict[Verdict, str] = {
    "full": "free space there or choose another place with output.runs / output.store / data.cache; what is sealed stays usable",
    "passes": f"the storage keeps failing: look at its state, try again later, or wait longer with {VARIABLE}=120",
    "unreachable": "check that the endpoint (AWS_ENDPOINT_URL) is right and reachable from this machine; "
    f"what is sealed stays usable; {VARIABLE}=120 waits longer",
    "refused": "check which credentials this machine finds (AWS_PROFILE, ~/.aws, instance role), and their rights to read, write, "
    "list and delete there",
    "wrong": "check the path and the storage",
    "missing": "check the path for a typing error",
}  # fmt: skip
ERRNO: dict[Verdict, int] = {
    "full": errno.ENOSPC, "passes": errno.EIO, "unreachable": errno.EIO, "refused": errno.EACCES, "wrong": errno.EINVAL,
    "missing": errno.ENOENT,
}  # fmt: skip
WANTED: dict[Verdict, str] = {"full": "enough free space", "refused": "the right to do it", "missing": "an existing path"}


def explain_remote(error: BaseException, verb: str, where: str) -> StorageError:
    """What happened to a remote object, for a person. The server's words are kept, on one line and short."""
    verdict = judge(error)
    code, status = answer_of(error)
    text = str(error).strip().split("\n")[0][:300] or type(error).__name__
    named = " ".join(str(part) for part in (status or "", code if code != str(status) else "") if part)
    got = f"{named}: {text}" if named else text if isinstance(error, StorageError) else f"{type(error).__name__}: {text}"
    wanted, remedy = WANTED.get(verdict, "an answer" if verdict in ("passes", "unreachable") else ""), REMEDIES[verdict]
    if code == "NoSuchBucket" or "bucket does not exist" in text:
        wanted, remedy = "an existing bucket", "make the bucket first, or correct its name; buckets are never made by a run"
    if code == "PreconditionFailed" and verb == "read":
        wanted, remedy = (
            "one version of it from beginning to end",
            "it was replaced while it was read: start again when nobody writes there",
        )
    raised = StorageError(f"cannot {verb} this", where=where, got=got, wanted=wanted, remedy=remedy)
    raised.errno = ERRNO[verdict]
    return raised
