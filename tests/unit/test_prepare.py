"""From rows to sealed blocks in one process, on a real tokenizer: what is kept, what is refused, what the cache does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.build
from ftcore.data.audit import Audit
from ftcore.data.prepared import Prepared
from ftcore.errors import ConfigError, DataError
from ftcore.recipe import Recipe
from ftcore.stages.base import STAGES
from pipelines.prepare import prepare

Make = Callable[..., Recipe]
REPO = Path(__file__).resolve().parents[2]


def row(number: int, answer: str = "", **extra: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number} plus {number}?", "output": answer or f"It is {number + number}, of course.", **extra}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows) + "\n")
    return path


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: Path) -> Make:
    """A recipe over the given rows, or sources."""

    def recipe(rows: list[Any] | None = None, **data: Any) -> Recipe:
        sources = data.pop("sources", None) or [{"path": str(write(tmp_path / "rows.jsonl", rows or []))}]
        section = {"sources": sources, "cache": str(tmp_path / "cache"), "max_length": 256, "engine": "process", **data}
        return Recipe.model_validate(
            {"name": "t", "model": {"path": str(tiny_model_dir)}, "data": section, "method": "lora", "stage": "sft"}
        )

    return recipe


def quiet(_: str) -> None:
    pass


def audit_of(prepared: Prepared) -> Audit:
    return Audit.from_json(prepared.manifest["audit"])


def segments(prepared: Prepared, split: str) -> list[tuple[int, tuple[int, ...]]]:
    """(row, ids) of every segment of a split, sorted."""
    found = []
    for block in prepared.blocks(split):
        ends = np.cumsum(block.lengths)
        found += [(int(row), tuple(ids.tolist())) for row, ids in zip(block.rows, np.split(block.ids, ends[:-1]), strict=True)]
    return sorted(found)


def test_every_row_is_one_segment_of_one_split(make: Make) -> None:
    prepared = prepare(make([row(i) for i in range(200)], validation=0.1, test=0.1), log=quiet)
    rows = {split: [number for number, _ in segments(prepared, split)] for split in prepared.splits}
    assert rows == {split: list(range(prepared.num_rows(split))) for split in ("train", "validation", "test")}
    assert sum(prepared.num_rows(split) for split in prepared.splits) == 200


def test_packed_blocks_are_full(make: Make) -> None:
    facts = audit_of(prepare(make([row(i, "yes " * (i % 40)) for i in range(600)], block_tokens=512), log=quiet)).splits["train"]
    assert facts.fill >= 0.97


def test_without_packing_each_row_is_a_block(make: Make) -> None:
    prepared = prepare(make([row(i) for i in range(30)], pack=False, validation=0), log=quiet)
    assert [block.rows.tolist() for block in prepared.blocks("train")] == [[i] for i in range(30)]


def test_the_same_rows_are_prepared_once(make: Make) -> None:
    recipe, said = make([row(i) for i in range(20)]), []
    first = prepare(recipe, log=quiet)
    second = prepare(recipe, log=said.append)
    assert second.url == first.url
    assert said[0].startswith("prepared before: 20 rows")


@pytest.mark.parametrize(
    "change", [{"max_length": 128}, {"train_on": "all"}, {"validation": 0.2}, {"pack": False}, {"duplicates": "keep"}, {"redact": "mask"}]
)
def test_whatever_changes_the_blocks_changes_their_name(make: Make, change: dict[str, Any]) -> None:
    rows = [row(i) for i in range(20)]
    assert prepare(make(rows), log=quiet).digest != prepare(make(rows, **change), log=quiet).digest


def test_a_changed_row_of_the_same_size_is_noticed(make: Make) -> None:
    before = prepare(make([row(1, "yes"), row(2)]), log=quiet).digest
    assert prepare(make([row(1, "yep"), row(2)]), log=quiet).digest != before


def test_a_changed_tokenizer_file_is_noticed(make: Make, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe, copy = make([row(i) for i in range(5)]), tmp_path / "model"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(copy)})})
    assert prepare(other, log=quiet).digest == prepare(recipe, log=quiet).digest
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert prepare(other, log=quiet).digest != prepare(recipe, log=quiet).digest


def test_moved_rows_are_the_same_rows(make: Make, tmp_path: Path) -> None:
    rows = [row(i) for i in range(5)]
    elsewhere = write(tmp_path / "elsewhere.jsonl", rows)
    assert prepare(make(rows), log=quiet).digest == prepare(make(sources=[{"path": str(elsewhere)}]), log=quiet).digest


def test_a_damaged_cache_is_made_again(make: Make) -> None:
    recipe, said = make([row(i) for i in range(20)]), []
    shard = Path(prepare(recipe, log=quiet).url) / "train-00000.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:-5])
    prepare(recipe, log=said.append)
    assert "made again" in said[0]
    assert shard.read_bytes() == good


def test_the_gate_holds_for_cached_blocks_too(make: Make) -> None:
    rows = [row(i) for i in range(50)] + ["{broken"]
    prepare(make(rows, max_rejected=0.1), log=quiet)
    with pytest.raises(DataError, match="rejected"):
        prepare(make(rows, max_rejected=0.01), log=quiet)


def test_a_refused_run_leaves_no_blocks_and_shows_the_table(make: Make, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(DataError, match=r"broken JSON 1x \(.*rows\.jsonl, row 3"):
        prepare(make([row(1), row(2), "{broken", row(4)]), log=said.append)
    assert any("rejected: broken JSON" in line for line in said)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_an_interrupted_build_leaves_no_blocks_and_the_next_one_succeeds(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    recipe = make([row(i) for i in range(20)])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipelines.build, "pack_window", stop)
        prepare(recipe, log=quiet)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert prepare(recipe, log=quiet).num_rows("train") > 0


def test_two_at_once_do_not_disturb_each_other(make: Make) -> None:
    recipe = make([row(i) for i in range(100)])
    found: list[Prepared] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(recipe, log=quiet))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({str(segments(prepared, "train")) for prepared in found}) == 1
    assert len(found) == 3


def test_the_same_row_twice_is_trained_on_once(make: Make) -> None:
    prepared = prepare(make([row(i % 40) for i in range(60)]), log=quiet)
    audit = audit_of(prepared)
    assert (audit.kept, audit.dropped["exact duplicate"].count) == (40, 20)
    assert "row 41 = " in audit.dropped["exact duplicate"].places[0]


def test_copies_that_are_kept_stay_in_one_split(make: Make) -> None:
    prepared = prepare(make([row(i % 40) for i in range(80)], duplicates="report", validation=0.3), log=quiet)
    audit = audit_of(prepared)
    ids = {split: {ids for _, ids in segments(prepared, split)} for split in prepared.splits}
    assert audit.kept == 80
    assert not ids["train"] & ids["validation"]
    assert not audit.leaked


def test_near_copies_are_dropped_when_asked_for(make: Make) -> None:
    story = " ".join(f"no {i} at all" for i in range(25))
    rows = [row(1, story), row(2), row(3), row(1, story + " again")]
    assert audit_of(prepare(make(rows, max_length=2048, near_duplicates="drop"), log=quiet)).dropped["near duplicate"].count == 1
    assert audit_of(prepare(make(rows, max_length=2048), log=quiet)).kept == 4


def test_a_training_row_that_is_also_held_out_leaves_training_and_is_reported(make: Make, tmp_path: Path) -> None:
    training = write(tmp_path / "train.jsonl", [row(i) for i in range(20)])
    held = write(tmp_path / "held.jsonl", [row(i) for i in range(18, 25)])
    sources = [{"path": str(training), "split": "train"}, {"path": str(held), "split": "test"}]
    prepared = prepare(make(sources=sources), log=quiet)
    leaked = audit_of(prepared).leaked
    assert (prepared.num_rows("train"), prepared.num_rows("test")) == (18, 7)
    assert [(name, tally.count) for name, tally in leaked.items()] == [("train rows, exact duplicates of test rows, dropped", 2)]


def test_small_data_still_gets_a_validation_row(make: Make) -> None:
    prepared = prepare(make([row(i) for i in range(3)], validation=0.01), log=quiet)
    assert (prepared.num_rows("train"), prepared.num_rows("validation")) == (2, 1)


def test_a_source_of_weight_two_is_passed_twice_in_training_only(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "twice.jsonl", [row(i) for i in range(40)])
    prepared = prepare(make(sources=[{"path": str(path), "weight": 2}], validation=0.2), log=quiet)
    rows = [number for number, _ in segments(prepared, "train")]
    assert rows == sorted([*range(prepared.num_rows("train"))] * 2)
    assert len(segments(prepared, "validation")) == prepared.num_rows("validation")


def test_half_a_source_is_a_stable_half(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "half.jsonl", [row(i) for i in range(400)])
    half = audit_of(prepare(make(sources=[{"path": str(path), "weight": 0.5}]), log=quiet))
    assert half.kept == pytest.approx(200, abs=40)
    assert half.kept + half.dropped["left out by its source's weight"].count == 400


def test_rows_too_long_are_dropped_or_refused_as_the_recipe_says(make: Make) -> None:
    rows = [row(i) for i in range(20)] + [row(99, "very " * 400)]
    assert audit_of(prepare(make(rows, overlong="drop"), log=quiet)).dropped["longer than max_length"].count == 1
    with pytest.raises(DataError, match=r"rows\.jsonl, row 21"):
        prepare(make(rows, overlong="refuse"), log=quiet)


def test_secrets_are_masked_before_they_become_tokens(make: Make, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(make([row(i) for i in range(4)] + [row(5, "write to ada@mail.example.org")], redact="mask", validation=0), log=quiet)
    text = AutoTokenizer.from_pretrained(tiny_model_dir).decode([token for _, ids in segments(prepared, "train") for token in ids])
    assert "[email]" in text
    assert "ada@mail" not in text
    assert audit_of(prepared).redacted["email"].count == 1


def test_a_format_of_another_stage_is_refused_by_name(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "words"}])
    with pytest.raises(ConfigError, match=r"learns from Conversation; got text"):
        prepare(make(sources=[{"path": str(path), "format": "text"}]), log=quiet)


def test_many_small_parts_pack_like_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i) for i in range(300)]
    whole = prepare(make(rows), log=quiet)
    monkeypatch.setattr("ftcore.data.staging.PART_EXAMPLES", 7)
    parts = prepare(make(rows, cache=f"{whole.folder.path.parent}-parts"), log=quiet)
    assert segments(parts, "train") == segments(whole, "train")
    assert parts.manifest["audit"] == whole.manifest["audit"]


def test_a_format_is_recognised_by_the_first_good_rows(make: Make) -> None:
    rows = ["{broken"] * 40 + [row(i) for i in range(10)]
    assert audit_of(prepare(make(rows, max_rejected=0.9), log=quiet)).kept == 10


def test_a_file_without_one_good_row_is_refused_by_the_audit(make: Make) -> None:
    with pytest.raises(DataError, match=r"100\.00% of rows rejected"):
        prepare(make(["{broken"] * 3), log=quiet)


def test_a_remote_cache_holds_the_same_blocks(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = [row(i) for i in range(50)]
    cache = f"memory://cache-{tmp_path.name}"
    here, there = prepare(make(rows), log=quiet), prepare(make(rows, cache=cache), log=quiet)
    assert segments(there, "train") == segments(here, "train")
    assert prepare(make(rows, cache=cache), log=quiet).url == there.url == f"{cache}/{here.digest}"


def test_documents_become_blocks_of_text(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Chapter {i}. " + "It was a dark night. " * (3 * i) for i in range(1, 30)))
    recipe = make(sources=[{"path": str(path)}], overlong="split").model_copy(update={"stage": STAGES["pretrain"]()})
    prepared = prepare(recipe, log=quiet)
    audit = audit_of(prepared)
    assert audit.kept == 29
    assert audit.num_examples > 29
    assert set(audit.trained) == {"text"}


def test_a_cached_start_loads_neither_torch_nor_transformers_nor_ray(make: Make, tmp_path: Path) -> None:
    recipe = make([row(i) for i in range(10)])
    prepare(recipe, log=quiet)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code = f"""
import sys
from pipelines.prepare import main
assert main([{str(tmp_path / "recipe.yaml")!r}]) == 0
print([name for name in ("torch", "transformers", "ray", "scipy", "datasketch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.splitlines()[0].startswith("prepared before")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_script_says_what_is_wrong_and_exits_with_its_code(make: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(make(["{broken"] * 3).model_dump(mode="json")))
    command = [sys.executable, str(REPO / "pipelines/prepare.py"), str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert "broken JSON 3x" in done.stderr
