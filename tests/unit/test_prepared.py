"""Prepared blocks at rest: read back in any order, and never taken for whole when they are not."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import numpy as np
import pytest

from ftcore.data.building import building, sweep
from ftcore.data.prepared import Prepared, PreparedWriter, write_shard
from ftcore.data.types import Block
from ftcore.errors import IntegrityError
from ftcore.storage import Folder, verify


def make_blocks(count: int, seed: int = 0, tokens: int = 64) -> list[Block]:
    random = np.random.default_rng(seed)
    blocks = []
    for number in range(count):
        lengths = random.integers(2, tokens // 2, 2).astype(np.int32)
        total = int(lengths.sum())
        ids, mask = random.integers(0, 1000, total).astype(np.int32), random.integers(0, 2, total).astype(np.uint8)
        blocks.append(Block(ids, mask, lengths, np.array([2 * number, 2 * number + 1], np.int64)))
    return blocks


def store(cache: Folder, shards: dict[str, list[list[Block]]], digest: str = "d" * 64) -> Prepared:
    with building(cache, digest) as scratch:
        writer = PreparedWriter(cache, digest, scratch)
        for split, found in shards.items():
            for number, blocks in enumerate(found):
                writer.add(split, *write_shard(writer.folder, writer.key(split, number), blocks, 64))
        return writer.seal({"counts": {"rows": dict.fromkeys(shards, 7)}})


def same(left: Block, right: Block) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("ids", "mask", "lengths", "rows"))


def test_blocks_come_back_equal_in_any_order(tmp_path: Path) -> None:
    first, second = make_blocks(300), make_blocks(50, seed=1)
    prepared = store(Folder(tmp_path), {"train": [first, second]})
    order = np.random.default_rng(2).permutation(350)
    assert all(same(prepared.block("train", int(i)), (first + second)[i]) for i in order)


def test_a_reader_that_may_hold_almost_nothing_still_reads_every_block(tmp_path: Path) -> None:
    blocks = make_blocks(600)
    url = store(Folder(tmp_path), {"train": [blocks]}).url
    prepared = Prepared.open(url, held_bytes=1)
    assert all(same(prepared.block("train", i), blocks[i]) for i in (0, 599, 1, 300, 598, 0))
    assert len(prepared._groups) == 1


def test_lengths_are_known_without_reading_blocks(tmp_path: Path) -> None:
    blocks = make_blocks(30)
    prepared = store(Folder(tmp_path), {"train": [blocks[:10], blocks[10:]]})
    assert prepared.block_lengths("train").tolist() == [block.num_tokens for block in blocks]


def test_a_split_without_rows_is_empty_and_not_an_error(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(2)]})
    assert (prepared.splits, prepared.num_blocks("test"), prepared.block_lengths("test").tolist()) == (("train",), 0, [])


def test_a_block_past_the_end_is_an_index_error(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(2)]})
    with pytest.raises(IndexError, match="block 2 of 2"):
        prepared.block("train", 2)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(2)]})
    (Path(prepared.url) / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="no folder of prepared blocks"):
        Prepared.open(prepared.url)


def test_a_cut_shard_is_refused_when_the_folder_is_opened(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(20)]})
    shard = Path(prepared.url) / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet"):
        Prepared.open(prepared.url)


def test_an_altered_shard_is_refused_before_its_first_block(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(20)]})
    shard = Path(prepared.url) / "train-00000.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="sha256"):
        Prepared.open(prepared.url).block("train", 0)


def test_the_manifest_proves_the_whole_folder(tmp_path: Path) -> None:
    prepared = store(Folder(tmp_path), {"train": [make_blocks(20)], "validation": [make_blocks(3)]})
    assert set(verify(prepared.folder)["files"]) == {
        "train-00000.parquet", "validation-00000.parquet", "train-lengths.npy", "validation-lengths.npy",
    }  # fmt: skip


def test_two_builds_of_the_same_blocks_at_once_both_end_with_whole_blocks(tmp_path: Path) -> None:
    blocks, digest = make_blocks(5), "e" * 64
    with building(Folder(tmp_path), digest) as scratch:
        slow = PreparedWriter(Folder(tmp_path), digest, scratch)
        slow.add("train", *write_shard(slow.folder, slow.key("train", 0), blocks, 64))
        store(Folder(tmp_path), {"train": [blocks]}, digest)  # the other one, from start to end
        prepared = slow.seal({"counts": {"rows": {}}})
    assert same(prepared.block("train", 4), blocks[4])


def test_a_half_made_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ("d" * 64)).mkdir()
    (tmp_path / ("d" * 64) / "train-00000.parquet").write_bytes(b"half")
    blocks = make_blocks(3)
    assert same(store(Folder(tmp_path), {"train": [blocks]}).block("train", 0), blocks[0])


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(Folder(tmp_path), "f" * 64) as scratch:
        (scratch.path / "staged" / "00000-000.ids").write_bytes(b"1234")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".building-dead-1"
    dead.mkdir()
    (dead / "lock").touch()
    with building(Folder(tmp_path), "a" * 64) as scratch:
        assert not dead.exists()
        assert sweep(tmp_path) == []
        assert (scratch.path / "staged").is_dir()


def test_many_builds_that_begin_and_end_at_once_never_sweep_each_other(tmp_path: Path) -> None:
    lost: list[str] = []

    def build(number: int) -> None:
        for turn in range(20):
            with building(Folder(tmp_path), f"{number}{turn}") as scratch:
                if not (scratch.path / "blocks").is_dir():
                    lost.append(scratch.url)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(tmp_path.iterdir()) == []


def test_blocks_on_remote_storage_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    blocks = make_blocks(10)
    cache = Folder(f"memory://prepared-{uuid.uuid4().hex}")
    prepared = store(cache, {"train": [blocks]}, uuid.uuid4().hex * 2)
    assert all(same(block, blocks[i]) for i, block in enumerate(prepared.blocks("train")))
    assert [name for name in cache.names() if name.startswith(".building")] == []
