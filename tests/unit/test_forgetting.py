"""What is forgotten on a general set, how far a system is from the recipe's targets, and what the table says of sizes and times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftcore.adapters import AdapterStore
from ftcore.cli import main
from ftcore.errors import ConfigError
from ftcore.evals.answered import Answered, Answers
from ftcore.evals.forgetting import told
from ftcore.evals.gaps import gap
from ftcore.evals.intervals import Interval
from ftcore.evals.metrics.base import METRICS, Measured
from ftcore.evals.systems import resolve
from ftcore.evals.tasks.base import asking
from ftcore.evals.verdict import compare
from ftcore.publish import import_adapter
from ftcore.recipe import Model, parse_recipe
from pipelines import evaluate
from tests.oracles import make_adapter


def measured(metric: str, value: float, low: float, high: float) -> Measured:
    return Measured(metric, Interval(value, low, high), "", 200, 200)


@pytest.mark.parametrize(
    ("found", "target", "sentence"),
    [
        (measured("exact_match", 0.85, 0.81, 0.89), 0.8,
         "v2 reaches the target of 80.0 points (exact match): 85.0, 95 % interval 81.0..89.0, on 200 rows"),
        (measured("exact_match", 0.70, 0.64, 0.76), 0.8,
         "v2 misses the target of 80.0 points (exact match) by 10.0 points: 70.0, 95 % interval 64.0..76.0, on 200 rows"),
        (measured("exact_match", 0.78, 0.74, 0.82), 0.8,
         "cannot tell whether v2 reaches the target of 80.0 points (exact match): "
         "78.0, 95 % interval 74.0..82.0, on 200 rows; 2.0 points short"),
        (measured("perplexity", 5.0, 4.5, 5.5), 6.0,
         "v2 reaches the target of 6.000 (perplexity per token): 5.000, 95 % interval 4.500..5.500, on 200 rows"),
        (measured("perplexity", 7.0, 6.5, 7.5), 6.0,
         "v2 misses the target of 6.000 (perplexity per token) by 1.000: 7.000, 95 % interval 6.500..7.500, on 200 rows"),
        (measured("exact_match", 0.9, float("nan"), float("nan")), 0.8,
         "cannot tell whether v2 reaches the target of 80.0 points (exact match): 90.0, no interval, on 200 rows; 10.0 points beyond"),
    ],
)  # fmt: skip
def test_a_target_is_reached_missed_or_nobody_can_tell(found: Measured, target: float, sentence: str) -> None:
    assert gap("v2", found, target) == sentence


def right(num_rows: int, metric: str = "exact_match", num_groups: int = 0) -> str:
    """What is said of a target of 95 where all rows are right."""
    group = [f"g{n % num_groups}" if num_groups else "" for n in range(num_rows)]
    rows = [Answered(f"r{n}", "4", ("4",), group[n], gold="4", chosen="4", harmful=n % 2 == 0, refused=True) for n in range(num_rows)]
    return gap("v2", METRICS[metric].measure(rows, "en"), 0.95)


def test_two_right_rows_of_two_do_not_reach_a_target_and_two_hundred_do() -> None:
    assert right(2).startswith("cannot tell whether v2 reaches the target of 95.0 points (exact match): 100.0, 95 % interval 15.8..100.0")
    assert right(200).startswith("v2 reaches the target") and "98.2..100.0" in right(200)
    assert right(200, num_groups=2).startswith("cannot tell") and "15.8..100.0" in right(200, num_groups=2)
    assert "15.8..100.0" in right(4, "refusal")  # of the two harmful ones
    assert "no interval" in right(200, "f1_macro")  # no mean over rows
    wrong = METRICS["exact_match"].measure([Answered(f"r{n}", "5", ("4",)) for n in range(2)], "en")
    assert METRICS["exact_match"].shown_ends(wrong.interval) == "0.0..84.2"


def test_rows_that_all_came_out_alike_reach_no_perplexity() -> None:
    same = [Answered(f"r{n}", nll=4.1, num_tokens=3, num_bytes=20) for n in range(3)]
    assert gap("v2", METRICS["perplexity"].measure(same, "en"), 6.0).startswith("cannot tell")


def system(name: str, nll: float) -> Answers:
    return Answers(name, tuple(Answered(f"r{n}", nll=nll + n % 7, num_tokens=4, num_bytes=20) for n in range(60)))


def test_worse_on_the_general_set_is_forgetting_and_no_difference_is_none() -> None:
    base, worse, same = system("base", 5.0), system("acme/v2", 6.0), system("acme/v1", 5.0)
    other = replace(same, rows=tuple(replace(row, nll=(row.nll or 0) + (-1) ** n) for n, row in enumerate(same.rows)))
    found = told([compare("perplexity", each, base, "en") for each in (worse, other, replace(base, system="x"))])
    assert found[0].startswith("acme/v2 forgets: acme/v2 is worse than base by ") and found[0].endswith("on 60 rows")
    assert found[1].startswith("cannot tell whether acme/v1 forgets: cannot tell acme/v1 from base")
    assert found[2].startswith("cannot tell whether x forgets") and "no difference on 60 rows" in found[2]
    assert told([compare("perplexity", base, worse, "en")])[0].startswith("base does not forget: base is better than acme/v2")


def test_a_metric_finds_the_task_that_measures_it() -> None:
    assert (asking(["exact_match"]), asking(["perplexity", "perplexity_byte"]), asking(["accuracy"])) == ("auto", "likelihood", "labels")
    with pytest.raises(ConfigError, match="judge them apart"):
        asking(["accuracy", "perplexity"])


def rows(path: Path, numbers: range, word: str) -> str:
    lines = [{"instruction": f"What is {n} {word} {n}?", "output": f"It is {2 * n}."} for n in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def recipe_of(tmp_path: Path, base: Path, **more: Any) -> dict[str, Any]:
    data = {
        "sources": rows(tmp_path / "rows.jsonl", range(40), "plus"), "cache": str(tmp_path / "cache"), "max_length": 128, "validation": 0,
        "test": 0.3, "engine": "process",
    }  # fmt: skip
    return {"name": "t", "model": {"path": str(base)}, "data": data, "method": "lora", "stage": "sft", **more}


def test_a_general_set_is_judged_before_and_after_and_targets_stand_in_the_result(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = make_adapter(tiny_model_dir, tmp_path / "made", 0, 30.0), AdapterStore(tmp_path / "store")
    store.promote(import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None))
    recipe, out = tmp_path / "t.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(recipe_of(tmp_path, tiny_model_dir, eval={"targets": {"perplexity": 2.0, "bleu": 30}})))
    general = rows(tmp_path / "general.jsonl", range(30), "and")
    command = [str(recipe), f"output.store={store}", "--systems", "acme/support", "--here", "--task", "likelihood", "--out", str(out)]
    assert evaluate.main([*command, "--general", general]) == 0
    said = capsys.readouterr().out
    assert "acme/support forgets: acme/support is worse than base by " in said and "on 30 rows" in said
    assert "acme/support misses the target of 2.000 (perplexity per token) by " in said
    assert "targets that task likelihood does not measure: BLEU" in said
    results = json.loads((out / "results.json").read_text())
    assert len(results["forgetting"]) == 2 and len(results["gaps"]) == 1
    assert results["forgetting"][0] in (out / "results.html").read_text()
    assert [line["name"] for line in json.loads((out / "general" / "results.json").read_text())["lines"]] == ["base", "acme/support"]
    assert main(["compare", str(out / "general"), "acme/support", "base", "--metrics", "perplexity"]) == 0
    assert capsys.readouterr().out.startswith("acme/support is worse than base by ")
    assert main(["evaluate", *command, "--general-metrics", "exact_match"]) == 2
    assert "metrics of which general set?" in capsys.readouterr().err


def test_the_table_says_how_large_a_model_is_and_how_long_its_adapter_was_trained(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = make_adapter(tiny_model_dir, tmp_path / "made", 1), AdapterStore(tmp_path / "store")
    ref = import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None)
    store.promote(ref)
    card = store.card(ref)
    names = ["base", "acme/support"]
    base, imported = resolve(names, base=str(tiny_model_dir), revision="main", store=str(store), key_variable="")
    size = (tiny_model_dir / "model.safetensors").stat().st_size
    assert (base.model_bytes, base.train_s, imported.model_bytes, imported.train_s) == (size, None, size, None)
    monkeypatch.setattr(AdapterStore, "card", lambda self, ref: card.model_copy(update={"metrics": {"train_seconds": 83.4}}))
    assert resolve(names, base=str(tiny_model_dir), revision="main", store=str(store), key_variable="")[1].train_s == 83.4


def test_a_target_of_no_metric_and_a_gate_on_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    for more, said in (
        ({"eval": {"targets": {"exact_mach": 1}}}, "did you mean exact_match"),
        ({"output": {"adapter": "a/b", "gate": {"metric": "refusal", "min": 1}}}, "judged on rows of its own"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_recipe(json.dumps(recipe_of(tmp_path, tmp_path, **more)))
    assert parse_recipe(json.dumps(recipe_of(tmp_path, tmp_path)), overrides=["eval.targets.bleu=30"]).eval.targets == {"bleu": 30.0}
