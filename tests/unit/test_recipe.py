"""Reading recipes: every problem with its line and the nearest right name; overrides; what is written reads back the same."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import ConfigError
from ftcore.recipe import Recipe, differences, dump_recipe, load_recipe, parse_recipe, recipe_digest
from ftcore.recipe_checks import notes
from ftcore.recipe_file import dump_yaml

GOOD = """\
name: first
model: {path: some/base}
data:
  sources: rows.jsonl
method: lora
stage: sft
"""


def refused(read: Callable[..., Recipe], *arguments: object, **options: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **options)
    return caught.value


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that `text` raises."""
    return [line.strip() for line in str(refused(parse_recipe, text, "r.yaml", overrides)).splitlines()]


def problem(text: str, *overrides: str) -> str:
    """The only problem of `text`."""
    lines = problems(text, *overrides)
    assert lines[0] == "1 problem in the recipe", lines
    return lines[1]


def with_lines(*lines: str) -> str:
    return GOOD + "\n".join(lines) + "\n"


def test_a_short_recipe_reads_with_every_default() -> None:
    recipe = parse_recipe(GOOD)
    assert (recipe.data.sources[0].path, recipe.method.kind, recipe.backend.kind, recipe.optim.lr) == ("rows.jsonl", "lora", "plain", 2e-4)


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_key() -> None:
    text = GOOD.replace("method: lora", "method:\n  kind: lora\n  rnk: 16")
    assert problem(text) == "r.yaml:7  method.rnk  unknown key; got 16; did you mean method.rank?"


def test_an_unknown_kind_is_refused_with_the_nearest_kind() -> None:
    assert (
        problem(GOOD.replace("lora", "loro"))
        == "r.yaml:5  method.kind  unknown method; wanted full | lora | qlora; did you mean `lora`?; got loro"
    )


def test_an_unknown_value_is_refused_with_the_nearest_value() -> None:
    assert (
        problem(with_lines("optim: {schedule: cosin}"))
        == "r.yaml:7  optim.schedule  unknown value; got cosin; wanted cosine | linear | constant; did you mean cosine?"
    )


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    lines = problems(with_lines("optim: {lr: -1}", "outptu: {}", "lora_r: 8").replace("name: first", "name: Not A Name"))
    assert lines[0] == "4 problems in the recipe"
    assert [line.split()[0] for line in lines[1:5]] == ["r.yaml:1", "r.yaml:7", "r.yaml:8", "r.yaml:9"]


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("lora_r", "method.rank"),
        ("lora_alpha", "method.alpha"),
        ("learning_rate", "optim.lr"),
        ("cutoff_len", "data.max_length"),
        ("sequence_len", "data.max_length"),
        ("num_train_epochs", "optim.epochs"),
        ("sample_packing", "data.pack"),
        ("base_model", "model.path"),
        ("per_device_train_batch_size", "backend.micro_batch"),
        ("val_set_size", "data.validation"),
        ("output_dir", "output.runs"),
        ("lr", "optim.lr"),
        ("seed", "optim.seed"),
        ("batchsize", "optim.batch_size"),
    ],
)
def test_other_programs_names_and_lost_keys_are_known(key: str, wanted: str) -> None:
    assert problem(with_lines(f"{key}: 1")).endswith(f"did you mean {wanted}?")


def test_every_foreign_name_points_at_a_key_that_exists() -> None:
    from ftcore.foreign_names import RECIPE_PATHS
    from ftcore.recipe_errors import all_leaf_paths
    from ftcore.recipe_file import parse_tree

    tree = parse_tree(GOOD)
    known = {*all_leaf_paths(tree, Recipe), "method.kind", "stage.kind"}
    assert {path for path in RECIPE_PATHS.values() if " " not in path} <= known


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("optim: {lr: 0}", "optim.lr  out of range; got 0; wanted greater than 0"),
        ("optim: {batch_size: 0}", "optim.batch_size  out of range; got 0; wanted 1 or more"),
        ("optim: {min_lr_ratio: 2}", "optim.min_lr_ratio  out of range; got 2; wanted from 0 to 1"),
        ("optim: {batch_size: 2.5}", "optim.batch_size  got 2.5; wanted a whole number"),
        ("optim: {batch_size: many}", "optim.batch_size  got many; wanted a whole number"),
        ("optim: {batch_size: true}", "optim.batch_size  wanted a number; got true"),
        ("optim: fast", "optim  got fast; wanted a section: keys indented under it"),
        ("resources: {workers: }", "resources.workers  got null; wanted a whole number"),
        ("output: {adapter: Acme}", "output.adapter  must read tenant/name"),
    ],
)
def test_a_wrong_value_is_told_in_words(line: str, words: str) -> None:
    assert words in problem(with_lines(line))


def test_both_bounds_of_a_share_are_told() -> None:
    assert problem(GOOD, "data.validation=1.5").endswith("out of range; got 1.5; wanted at least 0 and less than 1")


def test_a_key_written_twice_is_refused() -> None:
    assert (
        problem(with_lines("optim: {lr: 1}", "optim: {lr: 2}"))
        == "r.yaml:8  optim  this key is written twice (first in line 7); remove one"
    )


def test_numbers_without_a_dot_are_numbers() -> None:
    assert parse_recipe(with_lines("optim: {lr: 1e-4, eps: 1E-6}")).optim.lr == 1e-4


def test_off_and_no_are_words_where_words_are_wanted() -> None:
    assert parse_recipe(GOOD, overrides=("data.redact=off",)).data.redact == "off"


def test_off_and_no_are_still_truth_values_where_those_are_wanted() -> None:
    assert parse_recipe(GOOD, overrides=("data.pack=no",)).data.pack is False


def test_a_name_that_yaml_reads_as_a_number_asks_for_quotes() -> None:
    assert problem(GOOD.replace("first", "2024")) == "r.yaml:1  name  got 2024; wanted text (put it in quotes)"


def test_a_missing_section_says_what_it_is_for() -> None:
    assert "r.yaml:1  model  missing" in problem(GOOD.replace("model: {path: some/base}\n", ""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this recipe is empty"),
        ("# only a comment\n", "this recipe is empty"),
        ("- a\n- b\n", "a recipe is a mapping of keys"),
        ("name: [first\n", "not readable YAML"),
        ("name:\tfirst\n\tmodel: x\n", "not readable YAML"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("[" * 600, "not readable YAML"),
        ("a: 1\n---\nb: 2\n", "not readable YAML"),
    ],
)
def test_text_that_is_no_recipe_is_refused(text: str, words: str) -> None:
    assert words in str(refused(parse_recipe, text))


def test_broken_yaml_is_told_with_its_line_and_column() -> None:
    error = refused(parse_recipe, "name: first\nmodel: a: b\n", "r.yaml")
    assert (error.where, "in quotes" in error.remedy) == ("r.yaml:2:9", True)


def test_python_tags_build_nothing() -> None:
    assert "unknown" in str(refused(parse_recipe, with_lines("x: !!python/object/apply:os.system [exit 7]")))


def test_a_missing_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "sft-lora.yaml").write_text(GOOD)
    error = refused(load_recipe, tmp_path / "sft-lara.yaml")
    assert error.remedy.startswith(f"did you mean {tmp_path / 'sft-lora.yaml'}")


def test_a_folder_or_bytes_in_place_of_a_recipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "not a text file" in str(refused(load_recipe, tmp_path / "bytes.yaml"))
    assert "cannot be read" in str(refused(load_recipe, tmp_path))


def test_overrides_reach_lists_by_index_and_open_short_forms() -> None:
    recipe = parse_recipe(GOOD, overrides=("data.sources.0.format=alpaca", "method.rank=4", "backend.micro_batch=2", "optim.lr=1e-3"))
    assert (recipe.data.sources[0].path, recipe.data.sources[0].format) == ("rows.jsonl", "alpaca")
    assert (recipe.method.model_dump()["rank"], recipe.backend.micro_batch, recipe.optim.lr) == (4, 2, 1e-3)


def test_an_override_may_hold_yaml_or_an_address() -> None:
    recipe = parse_recipe(
        GOOD, overrides=("data.sources=[{path: s3://bucket/rows}, b.csv]", "output.store=s3://bucket/a", "eval.patience=")
    )
    assert [source.path for source in recipe.data.sources] == ["s3://bucket/rows", "b.csv"]
    assert (recipe.output.store, recipe.eval.patience) == ("s3://bucket/a", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optm.lr=1", "override `optm.lr=1`  optm  unknown key"),
        ("optim.rl=1", "override `optim.rl=1`  optim.rl  unknown key; got 1; did you mean optim.lr?"),
        ("optim.lr", "an override reads path=value"),
        ("=3", "an override reads path=value"),
        ("data.sources.7.path=x", "data.sources  this is a list; got index '7'; wanted an index from 0 to 0"),
        ("data.sources.first.path=x", "got index 'first'"),
        ("name.first=x", "name  holds 'first', so nothing can be set under it"),
        ("optim.lr=-1", "override `optim.lr=-1`  optim.lr  out of range"),
    ],
)
def test_a_wrong_override_is_shown_as_it_was_typed(text: str, words: str) -> None:
    assert words in problem(GOOD, text)


def test_changing_the_kind_says_how_to_drop_the_keys_of_the_old_one() -> None:
    text = GOOD.replace("method: lora", "method: {kind: lora, rank: 4}")
    assert problem(text, "method.kind=full").endswith(
        "method `full` has no such key; write method=full to replace the file's whole section"
    )
    assert parse_recipe(text, overrides=("method=full",)).method.kind == "full"


def test_what_is_dumped_reads_back_equal() -> None:
    recipe = parse_recipe(
        GOOD, overrides=("data.redact=off", "optim.eps=1e-9", "output.sign_key='1e5'", "output.adapter=a/b", "optim.betas=[0.8, 0.9]")
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_what_is_dumped_means_the_same_to_a_yaml_1_1_reader() -> None:
    import yaml

    recipe = parse_recipe(GOOD, overrides=("data.redact=off", "optim.eps=1e-9"))
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_the_digest_follows_what_is_asked_for_and_not_how_it_is_written() -> None:
    same = GOOD.replace("method: lora", "method: {kind: lora, rank: 8}").replace("sources: rows.jsonl", "sources: [{path: rows.jsonl}]")
    assert recipe_digest(parse_recipe(GOOD)) == recipe_digest(parse_recipe(same))
    assert recipe_digest(parse_recipe(GOOD)) != recipe_digest(parse_recipe(GOOD, overrides=("optim.seed=1",)))


def test_differences_are_the_keys_off_their_defaults() -> None:
    recipe = parse_recipe(GOOD, overrides=("method.rank=4", "optim.lr=1e-3", "resources.workers=1"))
    changed = {path: (value, default) for path, value, default in differences(recipe) if default != "(required)"}
    assert changed == {"method.rank": (4, 8), "optim.lr": (1e-3, 2e-4)}
    assert {path for path, _, _ in differences(recipe)} >= {"name", "model.path", "data.sources.0.path", "method.kind", "stage.kind"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.dtype=fp16",), "model.dtype  fp16 trains on GPUs only"),
        (("data.sources.0.format=alpacca",), "data.sources.0.format  unknown format; got alpacca; wanted auto | alpaca | "),
        (("data.sources.0.format=text",), "data.sources.0.format  stage `sft` learns from Conversation; got text; wanted alpaca | "),
        (("model.chat_template=lama3",), "did you mean llama3?"),
        (("model.attention=eager",), "model.attention  eager attention cannot keep packed segments apart"),
        (("method=full", "output.adapter=a/b"), "output.adapter  method `full` makes a whole model"),
        (("method=full", "model.adapter=a/b"), "model.adapter  method `full` cannot continue from an adapter"),
        (("output.sign_key=key.pem",), "output.sign_key  nothing is published"),
        (("optim.warmup=100", "optim.max_steps=10"), "optim.warmup  the warm-up (100 steps) is longer than the run"),
        (("eval.patience=3", "data.validation=0"), "eval.patience  early stopping needs validation rows"),
        (("data.sources.0.split=test",), "data.sources  no source has rows to train on"),
        (("resources.gpus_per_worker=1.5",), "resources.gpus_per_worker  Ray hands out whole GPUs above one"),
        (("resources.gpus_per_worker=0.5", "resources.workers=2"), "resources.gpus_per_worker  2 workers cannot share a GPU"),
        (("data.block_tokens=16",), "block_tokens (16) must hold at least one example"),
        (("data.validation=0.6", "data.test=0.5"), "validation + test must leave rows to train on"),
    ],
)
def test_an_impossible_combination_is_refused(overrides: tuple[str, ...], words: str) -> None:
    assert words in problem(GOOD, *overrides)


ODD: list[object] = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    2**70,
    "",
    "no",
    "\x00\x1b[31m",
    "é" * 300,
    [],
    [[]],
    [None],
    {},
    {"kind": []},
    {"a": {"b": 1}},
    "1e-4",
]


def every_place(values: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from every_place(below, (*path, key))


def test_whatever_stands_anywhere_in_a_recipe_only_a_config_error_comes_of_it() -> None:
    whole = parse_recipe(GOOD).model_dump(mode="json")
    for number, path in enumerate(every_place(whole)):
        for odd in (ODD[(number + step) % len(ODD)] for step in (0, 5, 11)):  # every value somewhere, three at each place
            changed = copy.deepcopy(whole)
            node: Any = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = odd
            with contextlib.suppress(ConfigError):
                parse_recipe(dump_yaml(changed))


def test_promote_without_an_adapter_name_is_fine() -> None:
    assert parse_recipe(GOOD, overrides=("output.promote=true",)).output.adapter is None


def test_notes_tell_of_idle_workers() -> None:
    recipe = parse_recipe(GOOD, overrides=("optim.batch_size=6", "resources.workers=4", "output.adapter=a/b"))
    assert len(notes(recipe)) == 1 and "not a multiple of workers x micro_batch (4)" in notes(recipe)[0]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"plugin_{os.getpid()}_recipe"
    (tmp_path / f"{name}.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_plugin_that_is_not_allowed_is_never_imported(plugin: str) -> None:
    error = refused(parse_recipe, with_lines(f"plugins: [{plugin}]"))
    assert "FTCORE_PLUGINS" in error.remedy and plugin not in sys.modules


def test_an_allowed_plugin_is_imported_before_validation(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCORE_PLUGINS", f"other, {plugin}")
    assert parse_recipe(with_lines(f"plugins: [{plugin}]")).plugins == (plugin,)
    assert sys.modules.pop(plugin).LOADED


def test_a_plugin_prefix_allows_what_is_under_it_and_not_what_begins_alike() -> None:
    error = refused(parse_recipe, with_lines("plugins: [acme.gone]"), plugins=("acme",))
    assert "could not be imported" in str(error)
    assert "does not allow" in str(refused(parse_recipe, with_lines("plugins: [acmeister]"), plugins=("acme",)))


def test_plugins_must_be_names() -> None:
    assert "module names" in str(refused(parse_recipe, with_lines("plugins: ['../evil']"), plugins=("..",)))
