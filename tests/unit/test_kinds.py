"""Results by kind, and rows that are alike resampled together: `ftcore evaluate --by COLUMN --group COLUMN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import ConfigError
from ftcore.evals.columns import Columns
from ftcore.evals.heldout import held_out
from ftcore.evals.records import Records
from ftcore.recipe import load_recipe
from pipelines import evaluate
from pipelines.prepare import prepare
from tests.answering import answering

TOPICS = ("sums", "time", "places")


def row(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is {number} plus {number}?"}, {"role": "assistant", "content": f"It is {2 * number}."}]
    return {"messages": turns, "topic": TOPICS[number % 7 % 3], "meta": {"session": number // 10}} | ({} if number % 7 else {"topic": None})


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(140)))
    return path


def told(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def test_each_kind_has_its_own_values_and_asking_for_them_later_asks_no_system_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with answering() as server:
        systems = [f"{server.url}#poor", f"{server.url}#good"]
        command = ["--rows", str(write(tmp_path / "rows.jsonl")), "--systems", *systems, "--out", str(out), "--here"]
        assert evaluate.main(command) == 0
        assert told(out)["kinds"] == [] and len(server.questions("good")) == 140
        assert evaluate.main([*command, "--by", "topic", "--group", "meta.session"]) == 0
        assert len(server.questions("good")) == 140
    results = told(out)
    shown = capsys.readouterr().out
    right: dict[str, list[bool]] = {}
    for line in results["lines"]:
        by_id = {answer.id: answer.text for answer in Records(str(out)).answers(line["key"])}
        for number, text in enumerate(by_id[f"{tmp_path}/rows.jsonl, row {number + 1}"] for number in range(140)):
            right.setdefault(f"{row(number)['topic'] or '(none)'} {line['name']}", []).append(text == f"It is {2 * number}.")
    found = {
        f"{kind['name']} {system}": (kind["num_rows"], one["interval"]["value"])
        for kind in results["kinds"] for system, one in kind["measured"]["exact_match"].items()
    }  # fmt: skip
    assert found == {name: (len(hits), pytest.approx(sum(hits) / len(hits))) for name, hits in right.items()} and len(found) == 8
    assert [kind["num_rows"] for kind in results["kinds"]] == sorted((kind["num_rows"] for kind in results["kinds"]), reverse=True)
    assert "exact match, by topic" in shown and "on 140 rows in 14 groups" in shown
    for name in ("results.md", "results.html"):
        assert all(part in (out / name).read_text() for part in ("exact match, by topic", "places"))


def test_rows_that_are_alike_make_an_interval_wider(tmp_path: Path) -> None:
    """Ten copies of each question are no ten questions."""
    lines = [json.dumps({**row(number), "copy": copy}) for number in range(14) for copy in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    ends = []
    with answering() as server:
        command = ["--rows", str(tmp_path / "rows.jsonl"), "--systems", f"{server.url}#poor", "--out", str(tmp_path / "out"), "--here"]
        for more in ([], ["--group", "meta.session"], ["--group", "messages"]):
            assert evaluate.main([*command, "--metrics", "exact_match", *more]) == 0
            ends.append(told(tmp_path / "out")["lines"][0]["measured"]["exact_match"])
    assert [one["num_groups"] for one in ends] == [140, 2, 14]
    alone, _, grouped = (one["interval"]["high"] - one["interval"]["low"] for one in ends)
    assert grouped > 2 * alone  # sqrt(10) in the limit


def test_a_column_that_is_not_there_or_of_too_many_kinds_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    with answering() as server:
        command = [
            "--rows",
            str(write(tmp_path / "rows.jsonl")),
            "--systems",
            f"{server.url}#good",
            "--out",
            str(tmp_path / "out"),
            "--here",
        ]
        for more, said in (
            (["--by", "topics"], "did you mean `topic`"), (["--group", "meta.day"], "no test row has this column"),
            (["--by", "messages"], "too many kinds"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=said):
                evaluate.main([*command, *more])
        assert not server.questions("good")


def test_the_test_rows_of_a_recipe_have_their_kinds_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    section = {"sources": [{"path": str(write(tmp_path / "rows.jsonl"))}], "cache": str(tmp_path / "cache"), "max_length": 256,
               "engine": "process", "validation": 0, "test": 0.3}  # fmt: skip
    values = {"name": "t", "model": {"path": str(tiny_model_dir)}, "data": section, "method": "lora", "stage": "sft"}
    (tmp_path / "t.yaml").write_text(json.dumps(values))
    recipe = load_recipe(tmp_path / "t.yaml")
    tests = held_out(recipe, prepare(recipe, log=lambda _: None), Columns("topic", "meta.session"))
    assert len(tests.rows) > 20
    for one in tests.rows:
        number = int(one.id.rpartition(" ")[2]) - 1
        assert (one.kind, one.group) == (row(number)["topic"] or "", str(number // 10))
