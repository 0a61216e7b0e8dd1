"""`ftcore evaluate` and `ftcore compare` in one process: who is judged on what, what is refused beforehand, what a stop costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapters import AdapterStore
from ftcore.cli import main
from ftcore.data.duplicates import item_text
from ftcore.data.types import Message
from ftcore.errors import ConfigError, FtcoreError
from ftcore.evals import endpoint
from ftcore.evals.endpoint import Endpoint
from ftcore.evals.heldout import held_out, items_of
from ftcore.evals.records import Records
from ftcore.evals.tasks.labels import named
from ftcore.export.merge import merge_adapter
from ftcore.publish import import_adapter
from ftcore.recipe import Model, load_recipe
from pipelines import evaluate
from pipelines.prepare import prepare
from tests.answering import FIRST_S, REST_S, Answering, answering
from tests.oracles import Truth, make_adapter


def conversation(number: int, answer: str = "") -> dict[str, Any]:
    question = f"What is {number} plus {number}?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or f"It is {2 * number}."}]
    return {"messages": turns}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server() -> Iterator[Answering]:
    with answering() as told:
        yield told


def test_the_better_system_is_found_and_a_stopped_evaluation_asks_nobody_again(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(150)]), tmp_path / "out"
    good, poor = f"{server.url}#good", f"{server.url}#poor"
    command = ["--rows", str(rows), "--systems", poor, good, "--out", str(out), "--here"]
    assert evaluate.main(command) == 0
    told = capsys.readouterr().out
    assert f"{good} is better than {poor} by 50.0 points (exact match)" in told and "cannot tell" not in told
    assert " of 300 answers, " in told and " left\n" in told
    results = json.loads((out / "results.json").read_text())
    assert [line["measured"]["exact_match"]["interval"]["value"] for line in results["lines"]] == [0.4, 0.9]
    assert len(server.questions("good")) == 150
    parts = sorted((out / "answers" / results["lines"][1]["key"]).glob("*.parquet"))
    assert len(parts) == 2
    parts[1].unlink()
    assert evaluate.main(command) == 0
    assert len(server.questions("good")) == 150 + 22 and len(server.questions("poor")) == 150
    capsys.readouterr()
    assert main(["compare", str(out), good, poor]) == 0
    assert f"{good} is better than {poor} by 50.0 points" in capsys.readouterr().out


def recipe_of(tmp_path: Path, base: Path, sources: list[dict[str, Any]], **data: Any) -> Path:
    section = {"sources": sources, "cache": str(tmp_path / "cache"), "max_length": 256, "engine": "process", "validation": 0, **data}
    values = {"name": "t", "model": {"path": str(base)}, "data": section, "method": "lora", "stage": "sft"}
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(values))
    return path


def test_a_recipes_test_rows_are_exactly_those_that_training_never_sees(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(60)] + [{"messages": []}])
    recipe = load_recipe(recipe_of(tmp_path, tiny_model_dir, [{"path": str(rows)}], test=0.3, max_rejected=0.5))
    prepared = prepare(recipe, log=lambda _: None)
    trained = {item_text(item) for item in items_of(recipe, prepared.rows("train"), prepared.origins)}
    tests = held_out(recipe, prepared)
    held = {row.words for row in tests.rows}
    assert len(held) == prepared.num_rows("test") >= 10 and len(trained) == prepared.num_rows("train")
    assert not held & trained and len(held | trained) == 60
    assert [turn.role for turn in tests.rows[0].turns] == ["user"] and tests.rows[0].reference.startswith("It is")


def test_planted_leaks_are_found_word_for_word_and_nearly(server: Answering, tiny_model_dir: Path, tmp_path: Path) -> None:
    long = "The quarterly report of the northern branch was sent to the archive by the new clerk on a rainy Monday in the late autumn of"
    train = [conversation(n) for n in range(40)] + [conversation(99, f"{long} 1998, they say.")]
    tests = [conversation(n) for n in range(100, 120)] + [conversation(7), conversation(99, f"{long} 1998, we think.")]
    sources = [{"path": str(write(tmp_path / "train.jsonl", train)), "split": "train"}]
    sources += [{"path": str(write(tmp_path / "test.jsonl", tests)), "split": "test"}]
    recipe = recipe_of(tmp_path, tiny_model_dir, sources, duplicates="keep")
    command = [str(recipe), "--systems", f"{server.url}#good", "--here"]
    assert evaluate.main([*command, "--out", str(tmp_path / "out")]) == 0
    leaks = json.loads((tmp_path / "out" / "results.json").read_text())["about"]["leaks"]
    places = [(leak["id"].rpartition(" ")[2], leak["copy_of"].rpartition(" ")[2]) for leak in leaks]
    assert places == [("21", "8"), ("22", "41")] and leaks[0]["similarity"] == 1 > leaks[1]["similarity"] >= 0.8
    assert len(server.questions("good")) == 20
    assert evaluate.main([*command, "--out", str(tmp_path / "kept"), "--leaks", "keep"]) == 0
    assert len(server.questions("good")) == 20 + 22


def test_base_examples_and_adapter_share_one_engine_and_likelihoods_are_the_models_own(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = make_adapter(tiny_model_dir, tmp_path / "made", 1), AdapterStore(tmp_path / "store")
    ref = import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None)
    store.promote(ref)
    rows = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(40)])
    recipe = recipe_of(tmp_path, tiny_model_dir, [{"path": str(rows)}], test=0.3)
    command = [str(recipe), f"output.store={store}", "--systems", "base", "base+2", "acme/support", "--here", "--limit", "5"]
    command += ["--max-tokens", "4", "--context", "256"]
    assert evaluate.main([*command, "--out", str(tmp_path / "said")]) == 0
    lines = json.loads((tmp_path / "said" / "results.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["base", "base+2", "acme/support"]
    assert lines[2]["adapter_bytes"] > 0 == lines[0]["adapter_bytes"]
    assert all(line["first_token_s"] > 0 and line["num_failed"] == 0 for line in lines)
    said = [[row.text for row in Records(str(tmp_path / "said")).answers(line["key"])] for line in lines]
    assert len({tuple(texts) for texts in said}) == 3

    capsys.readouterr()
    added = ["base+1" if word == "base+2" else word for word in command]
    assert evaluate.main([*added, "--out", str(tmp_path / "said")]) == 0
    assert capsys.readouterr().out.count("5 answers, ") == 2  # of base+1, the only one not asked before

    assert evaluate.main([*command, "--out", str(tmp_path / "weighed"), "--task", "likelihood"]) == 0
    records = Records(str(tmp_path / "weighed"))
    truth = Truth(tiny_model_dir, {ref.digest: folder})
    first = records.questions()[0]
    for digest, line in (("", lines[0]), (ref.digest, lines[2])):
        given = records.answers(line["key"])[0]
        before, whole = token_ids(tiny_model_dir, first.turns[0].content, first.reference)
        logps = truth.logps(digest, whole)
        nll = -sum(float(logps[at - 1][whole[at]]) for at in range(before, len(whole)))
        assert given.nll == pytest.approx(nll, abs=1e-3) and given.num_tokens == len(whole) - before
    assert "perplexity per token" in capsys.readouterr().out


def token_ids(base: Path, question: str, answer: str) -> tuple[int, list[int]]:
    """How many ids come before the answer, and all of them with the stop token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(before), tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]


def test_labels_are_weighed_by_the_engine_and_read_from_an_endpoints_words(server: Answering, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [*conversation(n)["messages"][:1], {"role": "assistant", "content": "even" if n % 2 else "odd"}]} for n in range(12)
    ]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = ["--rows", str(path), "--base", str(tiny_model_dir), "--out", str(out), "--here"]
    assert evaluate.main([*command, "--systems", "base"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["about"]["task"] == "labels" and set(results["about"]["metrics"]) == {"accuracy", "f1_macro", "auc", "ece"}
    given = Records(str(out)).answers(results["lines"][0]["key"])
    assert {row.chosen for row in given} <= {"even", "odd"} and all(
        row.scores[row.chosen or ""] == max(row.scores.values()) for row in given
    )
    assert evaluate.main([*command, "--systems", "base", f"{server.url}#good"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["about"]["metrics"] == ["accuracy", "f1_macro"]
    assert {row.chosen for row in Records(str(out)).answers(results["lines"][1]["key"])} == {""}


@pytest.mark.parametrize(
    ("text", "label"),
    [("positive", "positive"), ("Positive.", "positive"), ("It is not positive", "not positive"), ("positive or negative", ""), ("", ""),
     ("I think negative!", "negative"), ("+", "+"), ("nonpositive", "")],
)  # fmt: skip
def test_a_label_is_read_from_words_only_where_one_is_named(text: str, label: str) -> None:
    assert named(text, ["positive", "negative", "not positive", "+"]) == label


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"


def test_hostile_rows_are_shown_as_what_they_are(server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [conversation(n, f"{HOSTILE} {n} | `x` *y*") for n in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert evaluate.main(["--rows", str(path), "--systems", f"{server.url}#good", "--out", str(tmp_path / "out"), "--here"]) == 0
    page = (tmp_path / "out" / "results.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "<img" not in page and "\u202e" not in page and "\x1b" not in page
    assert "\x1b" not in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses."""
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--here"]) != 0
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def test_what_cannot_be_judged_is_refused_before_anything_is_asked(
    server: Answering, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(9)]), str(tmp_path / "out")
    recipe = str(recipe_of(tmp_path, tiny_model_dir, [{"path": str(rows)}]))
    good, common = f"{server.url}#good", ["--rows", str(rows), "--out", out]
    assert "did you mean `exact_match`?" in refused(capsys, *common, "--systems", good, "--metrics", "exact_mach")
    assert "metric `accuracy` cannot be computed from task `answers`" in refused(
        capsys, *common, "--systems", good, "--metrics", "accuracy"
    )
    assert "did you mean `labels`?" in refused(capsys, *common, "--systems", good, "--task", "lables")
    assert "does not tell how likely" in refused(capsys, *common, "--systems", good, "--task", "likelihood")
    assert "none of the labels" in refused(capsys, *common, "--systems", good, "--labels", "yes", "no")
    assert "named twice" in refused(capsys, *common, "--systems", good, good)
    assert "which base?" in refused(capsys, *common, "--systems", "base")
    assert "tenant/name[@digest]" in refused(capsys, *common, "--systems", "bse")
    assert "no such system" in refused(capsys, *common, "--systems", "./merged")
    assert "needs its model's name" in refused(capsys, *common, "--systems", server.url)
    assert "come from a recipe's training split" in refused(capsys, *common, "--systems", "base+2", "--base", str(tiny_model_dir))
    assert "holds no test rows out" in refused(capsys, recipe, "--systems", "base", "--out", out)
    assert "which rows?" in refused(capsys, "--systems", good, "--out", out)
    unanswered = write(tmp_path / "unanswered.jsonl", [{"messages": [{"role": "user", "content": "And?"}]}])
    assert "no row has a question and an answer" in refused(capsys, "--rows", str(unanswered), "--systems", good, "--out", out)
    assert "no such model or path" in refused(capsys, *common, "--systems", good, f"{server.url}#stranger")
    assert "no chat completion" in refused(capsys, *common, "--systems", good, f"{server.url}#nonsense")
    assert server.questions("good") == [] and not (tmp_path / "out" / "evaluation.json").exists()


def test_an_endpoint_that_is_away_is_said_so_and_one_that_is_busy_is_waited_for(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(9)]), str(tmp_path / "out")
    command = ["--rows", str(rows), "--out", out]
    capsys.readouterr()
    assert main(["evaluate", *command, "--here", "--systems", "http://127.0.0.1:9/v1#any"]) == 1
    assert "this endpoint does not answer" in capsys.readouterr().err
    monkeypatch.setenv("SECRET_OF_MINE", "k-123")
    server.busy = 3
    assert evaluate.main([*command, "--here", "--systems", f"{server.url}#good", "--key-variable", "SECRET_OF_MINE"]) == 0
    assert server.keys == {"Bearer k-123"} and len(server.questions("good")) == 9
    for file in Path(out).rglob("*"):
        assert file.is_dir() or b"k-123" not in file.read_bytes()


def test_the_first_token_of_an_endpoint_that_streams_is_timed_and_one_that_does_not_is_asked_otherwise(
    server: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(9)]), tmp_path / "out"
    systems = [f"{server.url}#{model}" for model in ("streaming", "whole", "good")]
    assert evaluate.main(["--rows", str(rows), "--out", str(out), "--here", "--systems", *systems]) == 0
    lines = json.loads((out / "results.json").read_text())["lines"]
    said = [[row.text for row in Records(str(out)).answers(line["key"])] for line in lines]
    assert said[0] == said[1] == said[2] and all(line["num_failed"] == 0 and line["tokens_per_s"] > 0 for line in lines)
    assert FIRST_S / 2 <= lines[0]["first_token_s"] <= lines[0]["answer_s"] - REST_S / 2
    assert lines[1]["first_token_s"] is None is lines[2]["first_token_s"]
    with pytest.raises(FtcoreError, match="does not answer"):
        replace(Endpoint(server.url, "breaking"), streams=True, num_tries=2).answer([Message("user", "What is 3 plus 3?")], (), 9)


def test_rows_that_an_endpoint_refuses_count_as_wrong_and_are_told(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(9)]), tmp_path / "out"
    assert evaluate.main(["--rows", str(rows), "--out", str(out), "--here", "--systems", f"{server.url}#strict"]) == 0
    assert "9 rows without answer count as wrong (the endpoint refuses this row: 400" in capsys.readouterr().out


def test_two_folders_over_the_same_rows_are_compared_and_others_refused(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, other = (write(tmp_path / f"{name}.jsonl", [conversation(n) for n in rows]) for name, rows in
                          (("here", range(40)), ("there", reversed(range(40))), ("other", range(1, 41))))  # fmt: skip
    for rows, model in ((here, "good"), (there, "poor"), (other, "poor")):
        assert evaluate.main(["--rows", str(rows), "--out", f"{rows}.out", "--here", "--systems", f"{server.url}#{model}"]) == 0
    good, poor = f"{server.url}#good", f"{server.url}#poor"
    capsys.readouterr()
    assert main(["compare", f"{here}.out", f"{there}.out", good, poor, "--metrics", "exact_match"]) == 0
    assert f"{good} is better than {poor} by 50.0 points" in capsys.readouterr().out
    assert main(["compare", f"{here}.out", f"{other}.out", good, poor]) == 3
    assert "not of the same rows" in capsys.readouterr().err
    assert main(["compare", f"{here}.out", good[:-1], good]) == 2
    assert f"did you mean `{good}`?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="another evaluation"):
        evaluate.main(["--rows", str(other), "--out", f"{here}.out", "--here", "--systems", good])


def test_a_merged_model_is_a_base_of_its_own_and_a_strangers_adapter_is_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = make_adapter(tiny_model_dir, tmp_path / "made", 1), AdapterStore(tmp_path / "store")
    ref = import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None)
    store.promote(ref)
    merged = tmp_path / "merged"
    merge_adapter(ref, store.fetch(ref, tmp_path / "fetched"), merged, log=lambda _: None)
    rows = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(6)])
    command = ["--rows", str(rows), "--store", str(store), "--task", "likelihood"]
    assert evaluate.main([*command, "--out", str(tmp_path / "out"), "--here", "--systems", "acme/support", str(merged)]) == 0
    lines = json.loads((tmp_path / "out" / "results.json").read_text())["lines"]
    values = [line["measured"]["perplexity"]["interval"]["value"] for line in lines]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    said = refused(capsys, *command, "--out", str(tmp_path / "other"), "--base", str(merged), "--systems", "acme/support")
    assert "belongs to another base" in said
    said = refused(capsys, *command, "--out", str(tmp_path / "other"), "--systems", str(folder))
    assert "ftcore adapters import" in said
