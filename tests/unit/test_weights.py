"""Base folders: whole or refused by name, before anything is loaded; the digest names the weights and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ftcore.errors import IntegrityError, ModelError
from ftcore.safetensors_header import check_safetensors
from ftcore.weights import INDEX, base_folder, check_base, weights_digest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def shard(base: Path) -> list[Path]:
    """Splits model.safetensors in two with an index, as large models are saved."""
    from safetensors.torch import load_file

    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    paths = [base / f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path)
    weight_map = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
    (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return paths


def test_a_whole_base_gives_every_tensor_s_shape(base: Path) -> None:
    facts = check_base(base)
    assert facts["model.norm.weight"].shape == (32,)
    assert facts == check_base(base) and len(facts) > 10


def test_a_sharded_base_is_whole_with_all_its_shards(base: Path) -> None:
    whole = check_base(base)
    shard(base)
    assert check_base(base) == whole


@pytest.mark.parametrize("cut", [1, 1000, -1], ids=["last byte", "last kilobyte", "all but the header's length"])
def test_a_truncated_file_is_named(base: Path, cut: int) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut] if cut > 0 else path.read_bytes()[:8])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        check_base(base)


def test_a_missing_shard_is_named(base: Path) -> None:
    shard(base)[1].unlink()
    with pytest.raises(IntegrityError, match="model-00002-of-00002"):
        check_base(base)


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(base: Path) -> None:
    shard(base)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.weight"] = "model-00001-of-00002.safetensors"
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"layers\.7"):
        check_base(base)


def test_an_index_cannot_name_a_file_elsewhere(base: Path) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(IntegrityError, match="outside"):
        check_base(base)


def test_a_base_with_only_a_pickle_is_refused_by_its_name(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        check_base(base)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("model.safetensors", ModelError, "no weights"), ("config.json", ModelError, "config.json"), (".", ModelError, "no such")],
)
def test_what_is_missing_is_said(base: Path, name: str, error: type[Exception], message: str) -> None:
    if name == ".":
        shutil.rmtree(base)
    else:
        (base / name).unlink()
    with pytest.raises(error, match=message):
        check_base(base)


def test_a_folder_that_is_not_there_is_never_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        base_folder(str(tmp_path / "absent"))


def test_a_hub_name_without_a_hub_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="give the path of a folder"):
        base_folder("nobody/nothing-here")


# ---- headers


def header(entries: Any, num_bytes: int = 0) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * num_bytes


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BROKEN = {
    "empty file": b"",
    "no header": b"\0" * 7,
    "a header longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "not JSON": header(b"{,}"),
    "not an object": header([]),
    "deep JSON": header(b"[" * 100_000),
    "a name twice": header(
        b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4
    ),
    "metadata of numbers": header({"__metadata__": {"a": 1}}),
    "unknown dtype": header({"a": {**F4, "dtype": "PICKLE"}}, 4),
    "negative shape": header({"a": {**F4, "shape": [-1]}}, 4),
    "a shape of truth": header({"a": {**F4, "shape": [True]}}, 4),
    "a shape of fractions": header({"a": {**F4, "shape": [1.0]}}, 4),
    "size against shape": header({"a": {**F4, "shape": [2]}}, 4),
    "overlap": header({"a": F4, "b": F4}, 4),
    "a hole": header({"a": {**F4, "data_offsets": [4, 8]}}, 8),
    "trailing bytes": header({"a": F4}, 5),
    "cut short": header({"a": F4}, 3),
    "too many dimensions": header({"a": {**F4, "shape": [1] * 9}}, 4),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "an entry that is a list": header({"a": [1]}, 4),
    "a pickle": b"\x80\x04\x95" + b"x" * 100,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_before_any_library_reads_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(IntegrityError, match="damaged"):
        check_safetensors(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8, torch.float64])
def test_what_safetensors_writes_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.zeros(3, 2, dtype=dtype), "scalar": torch.zeros((), dtype=dtype), "empty": torch.zeros(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    facts = check_safetensors(tmp_path / "x.safetensors")
    assert facts["a"].shape == (3, 2) and facts["scalar"].num_elements == 1 and facts["empty"].num_elements == 0


# ---- the digest


def test_the_digest_names_the_weights_whatever_the_folder_is_called(base: Path, tiny_model_dir: Path) -> None:
    assert weights_digest(base) == weights_digest(tiny_model_dir)


def test_one_changed_byte_changes_the_digest(base: Path) -> None:
    before = weights_digest(base)
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(bytes(raw))
    assert weights_digest(base) != before


def test_the_digest_does_not_depend_on_the_shards_names(base: Path) -> None:
    one, two = shard(base)
    before = weights_digest(base)
    text = (base / INDEX).read_text().replace(one.name, "tmp").replace(two.name, one.name).replace("tmp", two.name)
    (base / INDEX).write_text(text)
    one.rename(base / "swap")
    two.rename(one)
    (base / "swap").rename(two)
    assert weights_digest(base) == before


def test_a_large_base_is_hashed_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ftcore.weights

    before = weights_digest(base)
    monkeypatch.setattr(ftcore.weights, "file_digest", lambda path: pytest.fail("hashed again"))
    assert weights_digest(base) == before


def test_a_cache_that_cannot_be_written_costs_only_time(base: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert weights_digest(base) == weights_digest(base)
