"""What a recipe may name on S3: sources of every kind, a base model, places that are tried before any work."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftcore.data.identity import identity
from ftcore.data.read import plan, read
from ftcore.data.types import Row
from ftcore.errors import ConfigError, IntegrityError, ModelError, StorageError
from ftcore.mirror import _copied, local_copy
from ftcore.models import load_base, model_type
from ftcore.places import check_places
from ftcore.recipe import Model, Recipe, Source, dump_recipe, parse_recipe
from ftcore.s3 import open_s3
from ftcore.storage import Folder
from tests.s3_faults import faulty_proxy, matching, seeded

ROWS = [{"instruction": f"say {index}", "output": f"{index} it is"} for index in range(20)]


def recipe_of(bucket: str, **output: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "a", "model": {"path": f"{bucket}/base"}, "method": "lora", "stage": "sft",
            "data": {"sources": f"{bucket}/rows.jsonl", "cache": f"{bucket}/blocks"},
            "output": {"runs": f"{bucket}/runs", "store": f"{bucket}/store", "adapter": "acme/a", **output},
        }
    )  # fmt: skip


def write_sources(bucket: str, folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.csv").write_text("instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    for path in folder.glob("rows.*"):
        Folder(bucket).put(path, path.name)


def test_rows_of_every_kind_read_the_same_from_s3_also_under_faults(
    s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(s3, tmp_path)
    monkeypatch.setattr("ftcore.patience.FIRST_WAIT_S", 0.005)
    with faulty_proxy(s3_endpoint, seeded(0.2, 5, ("500", "503", "lost", "cut", "short"))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for kind in ("json", "jsonl", "csv", "parquet"):
            pieces = plan([Source(path=f"{s3}/rows.{kind}")])
            rows = [row for piece in pieces for row in read(piece)]
            assert [row.value for row in rows if isinstance(row, Row)] == ROWS, kind
        assert any(request.fault for request in proxy.seen)


def test_a_source_that_is_not_there_is_named(s3: str) -> None:
    with pytest.raises(Exception, match=r"nothing\.jsonl"):
        plan([Source(path=f"{s3}/nothing.jsonl")])


@pytest.fixture
def base(s3: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "cache"))
    for path in tiny_model_dir.iterdir():
        Folder(f"{s3}/base").put(path, path.name)
    _copied.cache_clear()
    return Model(path=f"{s3}/base", dtype="fp32")


def test_a_base_on_s3_is_copied_once_and_loads(base: Model, s3: str, tiny_model_dir: Path) -> None:
    Folder(base.path).write("pytorch_model.bin", b"a pickle")
    assert model_type(base) == "qwen2" and load_base(base) is not None
    whole, light = Path(local_copy(base.path)), Path(local_copy(base.path, weights=False))
    assert {path.name for path in whole.iterdir()} == {path.name for path in tiny_model_dir.iterdir()}
    assert {path.name for path in whole.iterdir()} - {path.name for path in light.iterdir()} == {"model.safetensors"}
    Folder(s3).write("rows.jsonl", json.dumps(ROWS[0]).encode())
    assert identity(recipe_of(s3), Folder(f"{s3}/blocks"))["tokenizer"]


def test_a_base_that_changed_is_another_copy(base: Model) -> None:
    first = local_copy(base.path)
    Folder(base.path).write("added_tokens.json", b"{}")
    _copied.cache_clear()
    assert local_copy(base.path) != first


def test_a_base_that_arrives_damaged_is_refused_and_not_kept(base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get = Folder.get

    def damaged(folder: Folder, key: str, local: Path) -> None:
        get(folder, key, local)
        if key == "config.json":
            local.write_bytes(local.read_bytes()[::-1])

    monkeypatch.setattr(Folder, "get", damaged)
    with pytest.raises(IntegrityError, match="not the one in its storage"):
        local_copy(base.path)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_place_without_a_model_says_what_is_there(s3: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        local_copy(f"{s3}/nothing")


def test_good_places_pass_and_nothing_is_left_there(s3: str) -> None:
    check_places(recipe_of(s3))
    assert Folder(s3).files() == []


@pytest.mark.parametrize("place", ["runs", "store"])
def test_a_bucket_that_does_not_exist_is_found_before_any_work(s3: str, place: str) -> None:
    with pytest.raises(StorageError, match=rf"output\.{place} cannot be used") as refused:
        check_places(recipe_of(s3, **{place: "s3://no-such-bucket-at-all/x"}))
    assert "make the bucket first" in refused.value.remedy and refused.value.errno == errno.ENOENT


def test_a_bucket_that_refuses_is_found_before_any_work(s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    open_s3().call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    with pytest.raises(StorageError, match="403") as refused:
        check_places(recipe_of(s3))
    assert "credentials" in refused.value.remedy and refused.value.errno == errno.EACCES


def test_a_place_that_is_full_is_found_before_any_work(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(s3_endpoint, matching("PUT", "/blocks/", "507")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match=r"data\.cache cannot be used") as refused:
            check_places(recipe_of(s3))
    assert refused.value.errno == errno.ENOSPC


def test_a_password_in_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="password in a URL"):
        parse_recipe(dump_recipe(recipe_of("s3://bucket")), overrides=["output.runs=s3://key:hush@bucket/runs"])
