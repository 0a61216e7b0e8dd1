"""Runs, stores and prepared blocks on S3: what is killed at any request leaves the old state or the new one, never a mixture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.data.prepared import Prepared
from ftcore.errors import IntegrityError, StorageError
from ftcore.journal import Journal, read_lines
from ftcore.rundir import RunDir
from ftcore.storage import Folder
from tests.adapter_folders import make_card, make_folder
from tests.s3_crashes import DIGEST, FACTS, at_once, build, killed_at_every_request, load, prepare, publish, publish_and_promote, save
from tests.s3_faults import FaultyProxy, faulty_proxy, matching, seeded

SOME_AND_ALL = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.proof)])
OLD, NEW = {"a": b"old a" * 400, "b/c": b"old c"}, {"a": b"new a" * 400, "b/c": b"new c", "d": b"new d"}


@pytest.fixture
def proxy(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr("ftcore.patience.FIRST_WAIT_S", 0.005)
        monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "cache"))
        yield proxy


@SOME_AND_ALL
def test_a_checkpoint_upload_killed_at_any_request_leaves_the_older_or_the_new_one(proxy: FaultyProxy, s3: str, every: int) -> None:
    run = RunDir(s3, "run")
    save(run, 1, OLD)
    save(run, 2, OLD)

    def look(k: int) -> None:
        newest = run.newest_checkpoint()
        assert newest in (1, 2), f"request {k}: {newest}"
        assert load(run, newest) in ([OLD] if newest == 1 else [OLD, NEW]), f"request {k}"

    assert killed_at_every_request(proxy, save, (run, 2, NEW), look, every) > 5
    assert load(run, 2) == NEW


@SOME_AND_ALL
def test_a_publisher_killed_at_any_request_leaves_no_half_version_and_can_be_repeated(
    proxy: FaultyProxy, s3: str, tmp_path: Path, every: int
) -> None:
    folder = make_folder(tmp_path / "adapter")
    card = make_card(folder)
    ref, store = AdapterRef(card.tenant, card.name, card.digest), AdapterStore(f"{s3}/store")

    def look(k: int) -> None:
        if store.list() == [ref]:
            store.verify(ref)
            store.folder.delete(ref.key)

    assert killed_at_every_request(proxy, publish, (f"{s3}/store", folder, card), look, every) > 5
    assert store.list() == [ref] and store.verify(ref).digest == ref.digest


def test_two_processes_that_publish_and_promote_at_once_both_succeed(proxy: FaultyProxy, s3: str, tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / str(seed), float(seed + 1)) for seed in range(4)]
    codes = at_once(publish_and_promote, [(f"{s3}/store", folder, make_card(folder)) for folder in [*folders, *folders[:2]]])
    store = AdapterStore(f"{s3}/store")
    refs = store.list()
    assert codes == [0] * 6 and len(refs) == 4
    pointer = store.pointer(refs[0].tenant, refs[0].name)
    promoted = {target.digest for past in pointer.history for target in past.targets} | {target.digest for target in pointer.targets}
    assert promoted == {ref.digest for ref in refs}  # no promotion was lost


def test_a_reader_of_a_checkpoint_that_is_sealed_anew_sees_one_of_them(s3: str) -> None:
    run, over = RunDir(s3, "run"), threading.Event()
    seen: list[dict[str, bytes]] = []
    wrong: list[IntegrityError] = []
    save(run, 1, OLD)

    def read_on() -> None:
        while not over.is_set():
            try:
                seen.append(load(run, 1))
            except IntegrityError as error:
                wrong.append(error)

    reader = threading.Thread(target=read_on)
    reader.start()
    for files in [NEW, OLD] * 4:
        save(run, 1, files)
    over.set()
    reader.join()
    assert seen and all(files in (OLD, NEW) for files in seen)
    between = {  # what it is while it is being sealed anew
        "this folder was never sealed",
        "a file of this sealed folder is gone",
        "this file is not the one that was sealed",
    }
    assert {error.what for error in wrong} <= between, wrong


def test_nothing_of_the_older_one_stays_beside_what_was_fetched_anew(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one has a file that the newer one lacks, and it was fetched already."""
    run, sealed_anew, get = RunDir(s3, "run"), threading.Event(), Folder.get
    save(run, 1, NEW)

    def late(self: Folder, key: str, local: Path) -> None:
        if key == "a":
            assert sealed_anew.wait(60)
        get(self, key, local)
        if key == "d":
            save(run, 1, OLD)
            sealed_anew.set()

    monkeypatch.setattr(Folder, "get", late)
    assert load(run, 1) == OLD


def test_a_flipped_bit_in_a_remote_checkpoint_is_found_and_the_older_one_taken(s3: str) -> None:
    run, said = RunDir(s3, "run"), []
    save(run, 1, OLD)
    save(run, 2, NEW)
    data = bytearray(run.folder.read("checkpoints/step-000002/a"))
    data[7] ^= 1
    run.folder.write("checkpoints/step-000002/a", bytes(data))
    assert run.newest_checkpoint(said.append) == 1 and "step 2 is damaged" in said[0]
    run.folder.delete("checkpoints/step-000002/d")
    assert run.newest_checkpoint() == 1
    run.folder.delete("checkpoints/step-000001/manifest.json")
    assert (run.checkpoint_steps(), run.newest_checkpoint()) == ([2], None)
    run.sweep()
    assert run.folder.names("checkpoints") == ["step-000002"]


def test_the_local_copy_of_what_was_uploaded_is_removed(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = RunDir(s3, "run")
    save(run, 1, OLD)
    load(run, 1)
    with pytest.raises(ZeroDivisionError), run.sealing("final"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_no_space_for_a_checkpoint_keeps_the_older_one_and_says_so(proxy: FaultyProxy, s3: str) -> None:
    run = RunDir(s3, "run")
    save(run, 1, OLD)
    proxy.plan = matching("PUT", "step-000002", "507")
    with pytest.raises(StorageError, match="what is sealed stays usable"):
        save(run, 2, NEW)
    assert run.newest_checkpoint() == 1


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.proof), pytest.param(2, marks=pytest.mark.proof)])
def test_runs_stores_and_journals_end_right_under_faults(proxy: FaultyProxy, s3: str, tmp_path: Path, seed: int) -> None:
    proxy.plan = seeded(0.2, seed, ("500", "503", "429", "lost", "cut", "short", "slow"))
    run = RunDir(s3, "run")
    journal = Journal(run, 0)
    for step in range(1, 5):
        journal.write({"step": step, "loss": 1.0})
        journal.flush()
        save(run, step, NEW)
    assert run.checkpoint_steps() == [1, 2, 3, 4] and run.newest_checkpoint() == 4 and load(run, 4) == NEW
    assert [line["step"] for line in read_lines(run)] == [1, 2, 3, 4]
    Journal(run, 2).close()
    assert [line["step"] for line in read_lines(run)] == [1, 2]
    folder = make_folder(tmp_path / "adapter")
    publish_and_promote(f"{s3}/store", folder, make_card(folder))
    store = AdapterStore(f"{s3}/store")
    fetched = store.fetch(store.resolve("acme/support"), tmp_path / "fetched")
    assert (fetched / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert sum(bool(request.fault) for request in proxy.seen) > 10


def test_a_journal_that_cannot_be_written_hides_no_other_error(proxy: FaultyProxy, s3: str, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(RunDir(s3, "run"), 0)
    journal.write({"step": 1})
    proxy.plan = matching("PUT", "metrics.jsonl", "403")
    with pytest.raises(StorageError, match="403"):
        journal.flush()
    journal.close()
    assert "could not be written" in caplog.text


def test_of_two_preparers_at_once_both_end_with_the_same_whole_cache(proxy: FaultyProxy, s3: str) -> None:
    cache = Folder(f"{s3}/prepared")
    first, second = build(cache, "1111"), build(cache, "2222")
    mine, theirs = first.seal(FACTS), second.seal(FACTS)
    assert mine.manifest == theirs.manifest and len(list(theirs.blocks("train"))) == len(list(mine.blocks("train"))) == 3
    assert not [key for key in (cache / DIGEST).files() if key.startswith("2222")]


@SOME_AND_ALL
def test_a_preparer_killed_at_any_request_leaves_a_whole_cache_or_none(proxy: FaultyProxy, s3: str, every: int) -> None:
    cache = Folder(f"{s3}/prepared")
    place = cache / DIGEST

    def look(k: int) -> None:
        if place.exists("manifest.json"):
            assert len(list(Prepared.open(place).blocks("train"))) == 3
            place.delete("manifest.json")

    assert killed_at_every_request(proxy, prepare, (cache.url, "3333"), look, every) > 3
    assert len(list(Prepared.open(place).blocks("train"))) == 3


def test_what_killed_builds_left_is_swept_when_it_is_old(proxy: FaultyProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Folder(f"{s3}/prepared")
    build(cache, "4444")
    monkeypatch.setattr("ftcore.data.prepared.ABANDONED_S", -10.0)
    build(cache, "5555").seal(FACTS)
    assert {key.split("-")[0] for key in (cache / DIGEST).files()} == {"5555", "manifest.json"}


def test_a_missing_or_cut_shard_is_seen_when_the_cache_is_opened(s3: str) -> None:
    cache = Folder(f"{s3}/prepared")
    prepared = build(cache, "6666").seal(FACTS)
    prepared.folder.write("6666-train-00000.parquet", b"cut")
    with pytest.raises(IntegrityError, match="3 bytes"):
        Prepared.open(prepared.folder)


def test_an_object_that_is_missing_for_a_moment_costs_no_journal_and_at_most_one_checkpoint(proxy: FaultyProxy, s3: str) -> None:
    run = RunDir(s3, "run")
    save(run, 1, OLD)
    save(run, 2, NEW)
    run.folder.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
    proxy.plan = matching("GET", "step-000002/a", "404", times=1)
    assert run.newest_checkpoint() == 1
    proxy.plan = matching("HEAD", "metrics.jsonl", "404", times=1)
    Journal(run, 1).close()
    proxy.restart()
    assert [line["step"] for line in read_lines(run)] == [1]
