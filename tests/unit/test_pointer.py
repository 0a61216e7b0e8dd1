"""Pointers: shares, rollback, and the compare-and-swap under them, on a local folder and on stores with and without ETags."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ftcore.errors import ConfigError, IntegrityError, StorageError
from ftcore.pointer import Past, Pointer, Target
from ftcore.storage import Folder

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class TaggedMemory(MemoryFileSystem):
    """An object store with ETags and conditional puts, as s3fs shows them: If-Match that fails raises OSError(EINVAL)."""

    protocol = "taggedmemory"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own shape
    pseudo_dirs = [""]  # noqa: RUF012
    between: Any = None

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = dict(super().info(path, **options))
        if found["type"] == "file":
            found["ETag"] = str(hash(self.cat_file(path)))
        return found

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        tag = options.pop("IfMatch", None)
        if tag is not None:
            if TaggedMemory.between:
                TaggedMemory.between, act = None, TaggedMemory.between
                act()
            if self.info(path)["ETag"] != tag:
                raise OSError(22, "PreconditionFailed")
        super().pipe_file(path, value, mode=mode)


fsspec.register_implementation("taggedmemory", TaggedMemory, clobber=True)


@pytest.fixture(params=["local", "memory", "taggedmemory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    yield Folder(tmp_path if request.param == "local" else f"{request.param}://{uuid.uuid4().hex}")


def test_an_object_is_created_once(folder: Folder) -> None:
    assert folder.create("a/x", b"1")
    assert not folder.create("a/x", b"2")
    assert folder.read("a/x") == b"1"


def test_an_object_is_replaced_only_while_it_reads_as_expected(folder: Folder) -> None:
    assert folder.replace("x", None, b"1")
    assert not folder.replace("x", None, b"2")
    assert not folder.replace("x", b"0", b"2")
    assert folder.replace("x", b"1", b"2")
    assert folder.read("x") == b"2"
    assert not folder.replace("absent", b"1", b"2")


def test_who_is_second_at_an_object_store_is_told(tmp_path: Path) -> None:
    folder = Folder(f"taggedmemory://{uuid.uuid4().hex}")
    folder.write("x", b"1")
    TaggedMemory.between = lambda: folder.write("x", b"theirs")
    assert not folder.replace("x", b"1", b"ours")
    assert folder.read("x") == b"theirs"


def test_digest_and_time_of_an_object_are_known(folder: Folder) -> None:
    import hashlib
    import time

    folder.write("x", b"abc")
    assert folder.digest("x") == hashlib.sha256(b"abc").hexdigest()
    assert abs(folder.modified("x") - time.time()) < 60
    with pytest.raises(StorageError):
        folder.modified("absent")


# ---- the pointer itself


def test_a_canary_of_a_canary_keeps_the_proportions() -> None:
    pointer = Pointer().promoted(A, 1.0, "t0").promoted(B, 0.2, "t1").promoted(C, 0.5, "t2")
    assert {target.digest: round(target.share, 6) for target in pointer.targets} == {A: 0.4, B: 0.1, C: 0.5}


def test_a_canary_needs_something_to_stand_beside() -> None:
    with pytest.raises(ConfigError, match="needs a current version"):
        Pointer().promoted(A, 0.1, "t")


def test_a_canary_made_whole_ends_the_split() -> None:
    pointer = Pointer().promoted(A, 1.0, "t0").promoted(B, 0.1, "t1").promoted(B, 1.0, "t2")
    assert [target.digest for target in pointer.targets] == [B]
    assert pointer.rolled_back(lambda digest: True, "x").targets[0].share == pytest.approx(0.9)


def test_rolling_back_with_nothing_usable_behind_is_refused() -> None:
    pointer = Pointer().promoted(A, 1.0, "t0").promoted(B, 1.0, "t1")
    with pytest.raises(ConfigError, match="nothing to roll back to"):
        pointer.rolled_back(lambda digest: digest != A, "x")


def test_a_pointer_reads_back_as_it_was_written() -> None:
    pointer = Pointer(targets=(Target(digest=A),), aliases={"stable": B}, history=(Past(targets=(Target(digest=C),), until="t"),))
    assert Pointer.from_json(pointer.to_json(), "") == pointer
    assert pointer.pinned() == {A, B, C}


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b'{"targets": [{"digest": "../x"}]}', b'{"targets": [{"digest": "%s", "share": 0.5}]}' % A.encode(),
     b'{"x": 1}', b" " * 2_000_000],
)  # fmt: skip
def test_a_damaged_pointer_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError, match="pointer"):
        Pointer.from_json(raw, "here")


def test_it_is_known_how_long_ago_it_changed() -> None:
    first = Pointer().promoted("a" * 64, 1.0, "2026-01-01T00:00:00Z")
    now = datetime(2026, 1, 2, 0, 1, tzinfo=UTC)
    assert not first.changed_within(120, now), "it never meant anything else"
    second = first.promoted("b" * 64, 1.0, "2026-01-02T00:00:00Z")
    assert second.changed_within(120, now) and not second.changed_within(59, now)
    assert first.promoted("b" * 64, 1.0, "yesterday").changed_within(59, now)
