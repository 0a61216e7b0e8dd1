"""Folders on a real S3 API: whole, conditional, patient with what passes, and quick and clear about what does not."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ftcore.errors import StorageError
from ftcore.s3 import PART_BYTES, open_s3
from ftcore.storage import Folder, fetch, seal, verify
from tests.s3_faults import FaultyProxy, always, at, faulty_proxy, matching, seeded
from tests.s3_server import KEY_ID, SECRET


@pytest.fixture
def proxy(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr("ftcore.patience.FIRST_WAIT_S", 0.005)
        yield proxy


@pytest.fixture
def folder(s3: str) -> Folder:
    return Folder(f"{s3}/box")


def refused(action: object, *arguments: object) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action(*arguments)
    assert SECRET not in str(caught.value) and KEY_ID not in str(caught.value)
    return caught.value


def test_what_is_written_is_read_listed_and_deleted(folder: Folder) -> None:
    folder.write("a.txt", b"first")
    folder.write("deep/b.bin", bytes(range(256)))
    folder.write("empty", b"")
    assert (folder.read("a.txt"), folder.read("deep/b.bin"), folder.read("empty")) == (b"first", bytes(range(256)), b"")
    assert (folder.names(), folder.sizes()) == (["a.txt", "deep", "empty"], {"a.txt": 5, "deep/b.bin": 256, "empty": 0})
    folder.delete("deep")
    assert (folder.files(), folder.names("deep"), folder.exists("deep")) == (["a.txt", "empty"], [], False)


def test_a_large_file_goes_in_parts_and_comes_back_the_same(folder: Folder, tmp_path: Path) -> None:
    big = os.urandom(2 * PART_BYTES + 12345)
    (tmp_path / "big").write_bytes(big)
    folder.put(tmp_path / "big", "big")
    folder.get("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big and folder.fingerprint("big")[1] == len(big)


def test_of_many_creators_at_once_one_wins(folder: Folder) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: folder.create("one", f"{n}".encode()), range(8)))
    assert sum(won) == 1 and folder.read("one") == f"{won.index(True)}".encode()


def test_of_many_who_replace_the_same_old_bytes_one_wins(folder: Folder) -> None:
    folder.write("pointer", b"old")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: folder.replace("pointer", b"old", f"{n}".encode()), range(8)))
    assert sum(won) == 1 and folder.read("pointer") == f"{won.index(True)}".encode()


def test_a_conditional_put_whose_answer_was_lost_knows_that_it_won(proxy: FaultyProxy, folder: Folder) -> None:
    proxy.plan = matching("PUT", "created", "lost", times=1)
    assert folder.create("created", b"mine")
    proxy.plan = matching("PUT", "answered", "cut", times=1)
    assert folder.create("answered", b"mine")
    proxy.plan = matching("PUT", "answered", "cut", times=1)
    assert folder.replace("answered", b"mine", b"mine too") and folder.read("answered") == b"mine too"
    assert not folder.create("answered", b"yours")


@pytest.mark.parametrize("kind", ["500", "503", "429", "lost", "cut", "short", "slow"])
def test_what_passes_is_waited_for(proxy: FaultyProxy, folder: Folder, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    proxy.plan = at(kind, *range(0, 40, 2))
    folder.put(tmp_path / "file", "file")
    folder.get("file", tmp_path / "back")
    assert (folder.read("file"), (tmp_path / "back").read_bytes(), folder.files()) == (b"x" * 1000, b"x" * 1000, ["file"])
    assert any(request.fault for request in proxy.seen)


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        ("403", errno.EACCES, ["403 AccessDenied", "credentials"]),
        ("507", errno.ENOSPC, ["507 InsufficientStorage", "what is sealed stays usable"]),
        ("too-large", errno.ENOSPC, ["EntityTooLarge", "free space"]),
    ],
)
def test_what_does_not_pass_is_said_at_once(proxy: FaultyProxy, folder: Folder, kind: str, number: int, words: list[str]) -> None:
    proxy.plan = always(kind)
    error = refused(folder.write, "a", b"x")
    assert error.errno == number and len(proxy.seen) == 1
    assert error.where == f"{folder}/a" and all(word in str(error) for word in words), str(error)


def test_a_storage_that_never_recovers_ends_in_bounded_time(proxy: FaultyProxy, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCORE_STORAGE_PATIENCE_S", "1")
    proxy.plan = always("503")
    started = time.monotonic()
    error = refused(folder.read, "a")
    assert time.monotonic() - started < 30 and "503 SlowDown" in error.got and error.errno == errno.EIO


def test_an_endpoint_that_is_not_there_says_so(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCORE_STORAGE_PATIENCE_S", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = refused(Folder(folder.url).read, "a")
    assert "AWS_ENDPOINT_URL" in error.remedy and "127.0.0.1:9" in error.got


def test_an_answer_that_stalls_is_not_waited_for_for_ever(proxy: FaultyProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCORE_STORAGE_PATIENCE_S", "1")
    monkeypatch.setattr("ftcore.s3.READ_TIMEOUT_S", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # another environment, so another client, with the timeout above
    proxy.plan = always("stall")
    started = time.monotonic()
    error = refused(Folder(f"{s3}/box").read, "a")
    assert time.monotonic() - started < 60 and "imeout" in error.got


def test_a_bucket_that_does_not_exist_is_named_with_what_to_do(s3: str) -> None:
    for action, key in ((Folder("s3://no-such-bucket-here/box").read, ("a",)), (Folder("s3://no-such-bucket-here/box").write, ("a", b"x"))):
        error = refused(action, *key)
        assert error.errno == errno.ENOENT and "no-such-bucket-here" in error.where and "bucket" in error.remedy, str(error)


def test_without_credentials_it_says_where_they_are_looked_for(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "AWS_PROFILE" in refused(Folder(f"{s3}/box").read, "a").remedy
    monkeypatch.delenv("AWS_PROFILE")
    assert "AWS_PROFILE" in refused(Folder(f"{s3}/box").read, "a").remedy


def test_a_read_of_an_object_that_is_replaced_meanwhile_is_no_mixture(folder: Folder) -> None:
    folder.write("a", b"1" * (9 << 20))
    with open_s3().open(f"{folder.url.removeprefix('s3://')}/a") as file:
        assert file.read(10) == b"1" * 10
        folder.write("a", b"2" * (9 << 20))
        with pytest.raises(OSError, match="pre-conditions"):
            file.read()


def test_uploads_in_parts_that_were_left_are_ended(folder: Folder) -> None:
    fs = open_s3()
    bucket = folder.url.removeprefix("s3://").split("/")[0]
    for key in ("box/half", "box-10/another runs"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    folder.abort_uploads()
    assert [upload["Key"] for upload in fs.list_multipart_uploads(bucket)] == ["box-10/another runs"]


def test_of_more_uploads_than_one_answer_lists_all_are_ended(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, ended = open_s3(), []

    def call(method: str, **arguments: str) -> dict[str, object]:
        page = int(arguments.get("KeyMarker", "0"))
        upload = {"Key": f"box/{page}", "UploadId": f"{page}", "Initiated": datetime(2026, 1, 1, tzinfo=UTC)}
        return {"Uploads": [upload], "IsTruncated": page < 2, "NextKeyMarker": f"{page + 1}", "NextUploadIdMarker": "x"}

    monkeypatch.setattr(fs, "call_s3", call)
    monkeypatch.setattr(fs, "abort_mpu", lambda bucket, key, upload: ended.append(key))
    folder.abort_uploads()
    assert ended == ["box/0", "box/1", "box/2"]


def test_a_failed_upload_in_parts_leaves_none(proxy: FaultyProxy, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(3 * PART_BYTES))
    proxy.plan = matching("PUT", "partNumber=2", "507")
    refused(folder.put, tmp_path / "big", "big")
    bucket = folder.url.removeprefix("s3://").split("/")[0]
    assert (open_s3().list_multipart_uploads(bucket), folder.exists("big")) == ([], False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_whole_cycle_under_faults_ends_right(proxy: FaultyProxy, folder: Folder, tmp_path: Path, seed: int) -> None:
    for number in range(6):
        folder.write(f"f{number}", os.urandom(5000))
    (tmp_path / "big").write_bytes(os.urandom(3 * PART_BYTES))
    proxy.restart(seeded(0.2, seed, ("500", "503", "429", "lost", "cut", "short", "slow")))
    folder.put(tmp_path / "big", "big")
    manifest = seal(folder, {"step": 1})
    assert verify(folder) == manifest and fetch(folder, tmp_path / "copy")["step"] == 1
    assert (tmp_path / "copy" / "big").read_bytes() == (tmp_path / "big").read_bytes()
    assert sum(bool(request.fault) for request in proxy.seen) > 3
