"""Every recipe in pipelines/recipes is valid, complete and short, and the recipe's key names are the frozen ones."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from ftcore.backends.base import BACKENDS
from ftcore.methods.base import METHODS
from ftcore.recipe import Gate, Recipe, Source, dump_recipe, load_recipe, parse_recipe
from ftcore.recipe_commands import recipe_schema
from ftcore.recipe_file import read_tree
from ftcore.section import leaf_paths
from ftcore.stages.base import STAGES

REPO = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPO / "pipelines" / "recipes").glob("*.yaml"))
GOLDEN = REPO / "tests" / "golden" / "recipe_keys.txt"
MAX_LINES, MAX_TOP_KEYS, MAX_LEAVES = 40, 11, 65


@pytest.fixture(params=RECIPES, ids=[path.stem for path in RECIPES])
def recipe(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_are_recipes_to_start_from() -> None:
    assert {"sft-lora", "sft-full", "pretrain"} <= {path.stem for path in RECIPES}


def test_a_recipe_validates(recipe: Path) -> None:
    assert load_recipe(recipe).name


def test_a_recipe_agrees_with_the_json_schema(recipe: Path) -> None:
    jsonschema.validate(read_tree(recipe).values, recipe_schema())


def test_a_recipe_with_a_typo_fails_the_json_schema(recipe: Path) -> None:
    values = read_tree(recipe).values
    values["optim"] = {**values.get("optim", {}), "rl": 1e-4}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, recipe_schema())


def test_a_recipe_is_at_most_40_lines(recipe: Path) -> None:
    assert len(recipe.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_a_recipe_opens_with_hardware_and_command(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])
    assert any(word in comment for word in ("core", "GPU", "CPU")), "the first comment names the hardware"
    assert any(command in comment for command in ("ftcore ", "make ", "python pipelines/", "python -m pipelines")), (
        "the first comment gives the command"
    )


def test_a_recipe_is_complete(recipe: Path) -> None:
    """It says itself what a reader wants to know, whatever the defaults are."""
    wanted = {"name", "model.path", "data.sources", "method.kind", "stage.kind", "optim.lr", "optim.batch_size", "resources.workers"}
    values = read_tree(recipe).values
    written = {f"{section}.{key}" for section, keys in values.items() if isinstance(keys, dict) for key in keys} | set(values)
    written |= {f"{section}.kind" for section in ("method", "stage") if isinstance(values[section], str)}
    assert wanted <= written


def test_a_recipe_survives_being_written_out(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert parse_recipe(dump_recipe(loaded)) == loaded


def keys() -> list[str]:
    branches = [
        f"{axis}[{kind}].{key}"
        for axis, registry in (("method", METHODS), ("stage", STAGES), ("backend", BACKENDS))
        for kind, cls in registry.items()
        for key in cls.model_fields
        if key != "kind" and cls.__module__.startswith("ftcore.")
    ]
    branches += [f"output.gate[set].{key}" for key in Gate.model_fields]
    return sorted([*leaf_paths(Recipe), *(f"data.sources.N.{key}" for key in Source.model_fields)]) + sorted(branches)


def test_the_key_names_are_the_frozen_ones() -> None:
    """People's recipes depend on them. Adding one is fine: add it to the golden file. Renaming or removing one breaks recipes."""
    assert "\n".join(keys()) + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_a_recipe_stays_small_enough_to_learn() -> None:
    leaves = [key for key in keys() if "[" not in key]
    assert len(Recipe.model_fields) <= MAX_TOP_KEYS and len(leaves) <= MAX_LEAVES, len(leaves)


def test_every_key_is_documented() -> None:
    def undocumented(schema: dict[str, object]) -> list[str]:
        found = []
        for name, section in dict(schema["$defs"]).items():
            found += [f"{name}.{key}" for key, drawn in section.get("properties", {}).items() if not drawn.get("description")]
        return found

    assert undocumented(recipe_schema()) == []
