"""What is searched: ranges, relations, what may differ between trials, and the recipe of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcore.adapters import AdapterRef
from ftcore.errors import ConfigError
from ftcore.formula import Formula
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir
from ftcore.search import Choices, Search, check, grid, is_range, load_search, recipe_of, settled
from ftcore.sharing import base_key
from ftcore.trials import Found, Look, Tried
from pipelines import searching
from pipelines.fit import Outcome
from pipelines.trial import trial_recipe

LR = "optim.lr={log: [1e-4, 1e-2]}"


def recipe(**changes: Any) -> Recipe:
    values = {
        "name": "base", "model": {"path": str(Path(__file__).parent)}, "data": {"sources": "rows.jsonl"},
        "method": {"kind": "lora", "rank": 8, "alpha": 16}, "stage": "sft", "optim": {"max_steps": 10}, **changes,
    }  # fmt: skip
    return Recipe.model_validate(values)


def search(*words: str, **options: Any) -> Search:
    return load_search(None, words, options)


def test_ranges_are_told_from_values() -> None:
    assert is_range(LR) and is_range('method.rank={"choice": [4, 8]}') and is_range("method.alpha={equals: 2 * method.rank}")
    assert not is_range("optim.lr=1e-4") and not is_range("data.sources=[{path: rows.jsonl}]") and not is_range("method={kind: lora}")


def test_a_trials_recipe_has_its_values_and_what_follows_from_them() -> None:
    wanted = search(LR, "method.rank={choice: [4, 32]}", "method.alpha={equals: 2 * method.rank}")
    made = recipe_of(wanted, recipe(), {"optim.lr": 3e-3, "method.rank": 32})
    assert (made.optim.lr, made.method.rank, made.method.alpha) == (3e-3, 32, 64)
    assert made.model_copy(update={"optim": recipe().optim, "method": recipe().method}) == recipe()


def test_a_method_without_a_key_that_was_drawn_goes_without_it() -> None:
    wanted = search("method.kind={choice: [lora, full]}", "method.rank={choice: [4, 8]}", "method.alpha={equals: 2 * method.rank}")
    assert recipe_of(wanted, recipe(), {"method.kind": "full", "method.rank": 4}).method.kind == "full"
    made = recipe_of(wanted, recipe(), {"method.kind": "lora", "method.rank": 4})
    assert (made.method.kind, made.method.alpha) == ("lora", 8)
    assert recipe_of(search("method.kind={choice: [qlora, lora]}"), recipe(), {"method.kind": "qlora"}).method.rank == 8


def test_whole_sections_are_choices_too() -> None:
    wanted = search("method={choice: [{kind: lora, rank: 4}, {kind: full}]}")
    assert [recipe_of(wanted, recipe(), values).method.kind for values in grid(wanted)] == ["lora", "full"]


def test_every_choice_of_data_is_prepared_before_trials_hold_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("data.max_length={choice: [64, 128]}", "stage.kind={choice: [sft, pretrain]}", LR)
    made: list[tuple[int, str]] = []
    monkeypatch.setattr(searching, "prepare", lambda each, log: made.append((each.data.max_length, each.stage.kind)))
    monkeypatch.setattr(searching, "identity", lambda each, cache: {"as": (each.data.max_length, each.stage.kind)})
    searching._prepare_all(search(*words), recipe(data={"sources": "rows.jsonl", "max_length": 64}), print)
    assert made == [(64, "sft"), (64, "pretrain"), (128, "sft"), (128, "pretrain")]
    made.clear()
    searching._prepare_all(search(LR), recipe(), print)
    assert len(made) == 1


def test_a_trial_never_prepares_on_the_cpus_that_trials_hold() -> None:
    whole = recipe(data={"sources": "rows.jsonl", "engine": "ray"})
    made = trial_recipe(search(LR), whole, {"optim.lr": 1e-3}, "trial", "runs")
    assert made.data.engine == "process" and base_key(made) == base_key(whole)


def test_methods_that_make_no_adapter_are_searched_beside_those_that_do() -> None:
    published = {"adapter": "acme/best", "gate": {"metric": "exact_match", "min": 0.1}}
    whole = recipe(output=published, data={"sources": "rows.jsonl", "validation": 0.1, "test": 0.1})
    assert not check(search("method.kind={choice: [lora, full]}"), whole)
    made = trial_recipe(search(LR), whole, {"optim.lr": 1e-3}, "trial", "runs")
    assert parse_recipe(dump_recipe(made)) == made, "a host reads it again"


def test_a_winner_is_judged_with_its_own_recipe(tmp_path: Path) -> None:
    given, run = recipe(), RunDir(str(tmp_path), "best")
    for base, kind, ref, wanted in (
        ("another/base", "lora", AdapterRef("acme", "best", "f" * 64), "acme/best@" + "f" * 64), ("some/base", "lora", None, ""),
        ("some/base", "full", None, str(tmp_path / "best" / "final")),
    ):  # fmt: skip
        own = recipe(model={"path": base}, method={"kind": kind})
        run.folder.write("recipe.yaml", dump_recipe(own).encode())
        winner, systems = searching.contest(Outcome(run, ref, "store", {}, ""), given)
        assert winner == own and systems == (("base", wanted) if wanted else ())


def test_a_range_is_of_whole_numbers_where_its_key_is(tmp_path: Path) -> None:
    words = ("optim.weight_decay={range: [0, 1]}", "optim.lr={log: [1, 2]}", "method.rank={range: [4, 8]}", "optim.seed={log: [1, 9]}")
    wanted = Search.model_validate_json(settled(search(*words), recipe()).model_dump_json())
    assert {path: span.is_whole for path, span in wanted.free.items() if not isinstance(span, Choices)} == {
        "optim.weight_decay": False, "optim.lr": False, "method.rank": True, "optim.seed": True,
    }  # fmt: skip
    methods = search("method.kind={choice: [full, lora]}", "method.rank={range: [4, 8]}", "method.dropout={range: [0, 1]}")
    whole = [span.is_whole for span in settled(methods, recipe()).free.values() if not isinstance(span, Choices)]
    assert whole == [True, False]
    drawn = searching.space_of(wanted)["optim.weight_decay"]
    assert len({drawn.sample() for _ in range(20)}) > 2


def test_a_search_may_be_given_more_trials_and_minutes_and_knows_what_it_found() -> None:
    words = (LR, "method.rank={choice: [4, 8]}")
    assert searching._digest(search(*words, trials="4"), recipe()) == searching._digest(search(*words, trials="8", minutes="9"), recipe())
    assert searching._digest(search(*words), recipe()) != searching._digest(search(LR), recipe())
    tried = {name: Tried(name, {"optim.lr": 1e-3, "method.rank": 8}, (Look(100, 10, loss),)) for name, loss in (("a", 1.0), ("b", 2.0))}
    tpe = searching.searcher_of(search(*words), 1, Found("", "min", tried, parts=1))
    assert [trial.value for trial in tpe._ot_study.trials] == [1.0, 2.0]


def test_a_grid_is_every_combination() -> None:
    wanted = search("method.rank={choice: [4, 8]}", "optim.lr={choice: [1e-3, 1e-4, 1e-5]}", searcher="grid")
    assert wanted.num_trials == 6 == len({tuple(values.items()) for values in grid(wanted)})


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["optim.lrr={log: [1e-4, 1e-2]}"], {}, r"optim\.lrr.*(?s:.*)did you mean"),
        (["method.rank={range: [0, 8]}"], {}, "(?s)the trial with method.rank=0|greater than"),
        ([], {}, "space"),
        (["optim.lr={log: [0, 1]}"], {}, "above 0"),
        (["optim.lr={log: [1e-2, 1e-4]}"], {}, "lower end comes first"),
        (["optim.lr={choice: []}"], {}, "choice"),
        (["method.alpha={equals: 2 * method.rank}"], {}, "every key follows from another"),
        ([LR, "method.alpha={equals: __import__('os')}"], {}, "wanted numbers, recipe paths"),
        ([LR, "method.alpha={equals: 2 * method.kind}"], {}, "no number of this recipe"),
        ([LR, "method.alpha={equals: 2 *}"], {}, "cannot read"),
        ([LR], {"searcher": "grid"}, "grid takes choices only"),
        ([LR], {"searcher": "gird"}, "tpe.*random.*grid"),
        (["name={choice: [a, b]}"], {}, "the same in all trials"),
        (["data.validation={range: [0.1, 0.2]}"], {}, "the same in all trials"),
        (["method.rank={choice: [4, 8]}"], {"scheduler.kind": "pbt", "searcher": "random"}, "pbt changes a trial while it trains"),
        ([LR], {"trials": "0"}, "trials"),
        ([LR], {"metric": "validation_los"}, "(?s)no run reports this metric.*did you mean validation_loss"),
        (["method.dropout={range: [0.0, 0.1]}"], {"shared": "on"}, "cannot share a base(?s:.*)dropout"),
        (["model.path={choice: [a/b, c/d]}"], {"shared": "on"}, "other bases"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_trial(words: list[str], options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(search(*words, **options), recipe())


def test_trials_share_a_base_where_all_of_the_space_allows_it() -> None:
    assert check(search(LR, "method.rank={choice: [4, 8]}"), recipe())
    assert not check(search(LR, "method.dropout={range: [0.0, 0.1]}"), recipe())
    assert not check(search("method.kind={choice: [lora, full]}"), recipe())
    assert not check(search(LR, shared="off"), recipe())


@pytest.mark.parametrize(
    "config", [{"model_type": "granite", "logits_scaling": 8.0}, {"text_config": {"logit_scale": 0.06}}, {"model_type": "gemma2"}]
)
def test_a_base_whose_head_is_more_than_a_linear_layer_is_not_shared(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not check(search(LR), recipe(model={"path": str(tmp_path)}))
    with pytest.raises(ConfigError, match="head is more than a linear layer"):
        check(search(LR, shared="on"), recipe(model={"path": str(tmp_path)}))


def test_a_search_file_is_checked_like_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("space:\n  optim.lr: {log: [1e-4, 1e-2]}\ntrails: 3\n")
    with pytest.raises(ConfigError, match=r"(?s)trails.*did you mean.*trials"):
        load_search(file)
    file.write_text("space:\n  optim.lr: {log: [1e-4, 1e-2]}\ntrials: 3\n")
    found = load_search(file, ["method.rank={choice: [4, 8]}"], {"trials": "5", "seed": None})
    assert (found.trials, set(found.space)) == (5, {"optim.lr", "method.rank"})


def test_losses_are_to_be_small_and_everything_else_large() -> None:
    assert [search(LR, metric=name).mode for name in ("validation_loss", "perplexity", "accuracy")] == ["min", "min", "max"]
    assert search(LR, metric="accuracy", goal="min").mode == "min"


@given(st.integers(1, 64), st.floats(0.1, 10))
def test_a_relation_is_plain_arithmetic(rank: int, factor: float) -> None:
    assert Formula(f"{factor} * method.rank + 1").value({"method": {"rank": rank}}) == pytest.approx(factor * rank + 1)
    assert Formula("max(2, method.rank // 2) ** 2 - -1").value({"method": {"rank": rank}}) == max(2, rank // 2) ** 2 + 1


@pytest.mark.parametrize("file", sorted(Path(searching.__file__).parent.glob("searches/*.yaml")), ids=lambda file: file.stem)
def test_a_committed_search_is_one(file: Path) -> None:
    assert check(load_search(file), recipe())
