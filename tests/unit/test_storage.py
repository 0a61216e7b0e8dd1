"""Folders, local and remote alike: written whole or not at all, sealed by the last object, read back against their manifest."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ftcore.errors import IntegrityError, StorageError
from ftcore.storage import MANIFEST, Folder, canonical_json, digest_of, explain_oserror, is_sealed, seal, verify


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "box" if request.param == "local" else f"memory://{tmp_path.name}/box")


def filled(folder: Folder) -> Folder:
    folder.write("a.txt", b"first")
    folder.write("deep/b.bin", bytes(range(256)))
    return folder


def test_what_is_written_is_read(folder: Folder) -> None:
    assert (filled(folder).read("a.txt"), folder.read("deep/b.bin")) == (b"first", bytes(range(256)))


def test_names_are_direct_children_and_files_are_all(folder: Folder) -> None:
    filled(folder)
    assert (folder.names(), folder.files(), folder.files("deep")) == (["a.txt", "deep"], ["a.txt", "deep/b.bin"], ["b.bin"])


def test_a_folder_that_is_not_there_has_no_names(folder: Folder) -> None:
    assert (folder.names("nowhere"), folder.exists("nowhere")) == ([], False)


def test_a_sub_folder_is_a_folder(folder: Folder) -> None:
    filled(folder)
    assert (folder / "deep").read("b.bin") == bytes(range(256))


def test_json_keeps_its_value(folder: Folder) -> None:
    folder.write_json("v.json", {"ä": [1, 2.5, None]})
    assert folder.read_json("v.json") == {"ä": [1, 2.5, None]}


def test_files_are_copied_in_and_out(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"bytes")
    folder.put(tmp_path / "here", "there/copy")
    folder.get("there/copy", tmp_path / "back" / "copy")
    assert (tmp_path / "back" / "copy").read_bytes() == b"bytes"


def test_deleting_a_folder_takes_all_of_it(folder: Folder) -> None:
    filled(folder).delete("deep")
    assert folder.files() == ["a.txt"]


def test_a_sealed_folder_verifies(folder: Folder) -> None:
    manifest = seal(filled(folder), {"step": 7})
    assert is_sealed(folder) and verify(folder) == manifest and manifest["step"] == 7
    assert manifest["files"]["a.txt"]["bytes"] == 5


def test_a_folder_without_manifest_is_not_whole(folder: Folder) -> None:
    with pytest.raises(IntegrityError, match="never sealed"):
        verify(filled(folder))


def test_one_flipped_bit_is_found_and_named(folder: Folder) -> None:
    seal(filled(folder))
    folder.write("deep/b.bin", bytes([1, *range(1, 256)]))
    with pytest.raises(IntegrityError, match="not the one that was sealed") as caught:
        verify(folder)
    assert caught.value.where.endswith("deep/b.bin")


def test_a_missing_file_is_found_and_named(folder: Folder) -> None:
    seal(filled(folder))
    folder.delete("a.txt")
    with pytest.raises(IntegrityError, match="is gone"):
        verify(folder)


def test_reading_what_is_not_there_says_which(folder: Folder) -> None:
    with pytest.raises(StorageError, match="cannot read this") as caught:
        folder.read("nothing")
    assert caught.value.where.endswith("nothing") and caught.value.errno == errno.ENOENT


def test_damaged_json_is_an_integrity_error(folder: Folder) -> None:
    folder.write("v.json", b"{half")
    with pytest.raises(IntegrityError, match="not JSON"):
        folder.read_json("v.json")


def test_a_failed_write_leaves_the_old_object_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ftcore.storage.os.fsync", full)
    with pytest.raises(StorageError, match="free space"):
        folder.write("a", b"new")
    assert (folder.read("a"), [path.name for path in tmp_path.iterdir()]) == (b"old", ["a"])


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.1234.tmp").write_bytes(b"half")
    assert (Folder(tmp_path).names(), Folder(tmp_path).files()) == ([], [])


def test_a_file_address_is_a_local_path(tmp_path: Path) -> None:
    assert Folder(f"file://{tmp_path}").path == tmp_path


def test_no_space_says_what_to_do() -> None:
    error = explain_oserror(OSError(errno.ENOSPC, "No space left on device"), "write", "/full/x")
    assert "what is sealed stays usable" in error.remedy and error.errno == errno.ENOSPC


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_the_manifest_is_not_part_of_itself(folder: Folder) -> None:
    seal(filled(folder))
    assert MANIFEST not in seal(folder)["files"]
