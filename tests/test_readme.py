"""The README cannot drift: its commands parse against the real programs, its recipes and files exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ftcore import errors
from ftcore.cli import COMMANDS, main
from ftcore.recipe import load_recipe
from ftcore.search import check, is_range, load_search
from serving.settings import load_settings

REPO = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "k8s/README.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OVERRIDE = re.compile(r"^[a-z_]+(\.\w+)*=")


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line in a shell block."""
    for page in PAGES:
        for language, block in FENCE.findall((REPO / page).read_text(encoding="utf-8")):
            if language in ("bash", "sh", "console", ""):
                yield from ((page, line) for line in block.splitlines() if line.strip() and not line.startswith("#"))


COMMAND_LINES = sorted({command for _, command in commands()})


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@cache
def help_of(*command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    return printed.getvalue()


def test_there_is_something_to_check() -> None:
    assert len(COMMAND_LINES) > 15


@pytest.mark.parametrize("command", [line for line in COMMAND_LINES if words(line)[0] == "make"])
def test_a_make_command_names_real_targets_and_variables(command: str) -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for word in words(command)[1:]:
        if "=" in word:
            assert f"$({word.partition('=')[0]})" in makefile
        else:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("command", [line for line in COMMAND_LINES if words(line)[0] == "ftcore"])
def test_an_ftcore_command_parses(command: str) -> None:
    name, *rest = words(command)[1:]
    if name.startswith("-"):
        return
    assert name in COMMANDS
    command_words = [name, rest.pop(0)] if name in ("adapters", "tenants", "k8s") else [name]
    text = help_of(*command_words)
    for flag in (word for word in rest if word.startswith("--")):
        assert flag in text, f"`ftcore {' '.join(command_words)}` has no {flag}"


def check_overrides(recipe: str, arguments: list[str]) -> None:
    words_set = [word for word in arguments if OVERRIDE.match(word)]
    ranges = [word for word in words_set if is_range(word)]
    found = load_recipe(REPO / recipe, [word for word in words_set if word not in ranges])
    if ranges:
        check(load_search(None, ranges), found)


@pytest.mark.parametrize("command", [line for line in COMMAND_LINES if "pipelines/recipes/" in line])
def test_a_recipe_and_its_overrides_validate(command: str) -> None:
    arguments = words(command)
    recipe = next(word for word in arguments if word.startswith("pipelines/recipes/"))
    check_overrides(recipe, arguments[arguments.index(recipe) + 1 :])


@pytest.mark.parametrize("command", [line for line in COMMAND_LINES if "RECIPE" in words(line)])
def test_overrides_shown_with_a_placeholder_are_real_keys(command: str) -> None:
    check_overrides("pipelines/recipes/sft-lora.yaml", words(command))


@pytest.mark.parametrize("command", [line for line in COMMAND_LINES if " python " in f" {line} "])
def test_a_script_that_is_run_exists(command: str) -> None:
    arguments = words(command)
    script, *rest = arguments[arguments.index("python") + 1 :]
    assert (REPO / (rest[0].replace(".", "/") + ".py" if script == "-m" else script)).is_file()


def test_the_settings_shown_are_settings(tmp_path: Path) -> None:
    blocks = [block for language, block in FENCE.findall((REPO / "README.md").read_text(encoding="utf-8")) if language == "yaml"]
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block)
    (settings,) = (load_settings(tmp_path / f"{number}.yaml") for number, block in enumerate(blocks) if "ftcore serve" in block)
    assert list(settings.all_bases) == ["small", "mine"]


def test_pip_extras_exist() -> None:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (REPO / "README.md").read_text(encoding="utf-8")
    asked = {name for group in re.findall(r'-e "?\.\[([\w,]+)\]', text) for name in group.split(",")}
    tabled = set(re.findall(r"^\| `(\w+)` \| ", text.split("| extra | for |")[1].split("\n\n")[0], re.MULTILINE))
    assert asked <= set(extras) and tabled == set(extras)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_on_a_page_exists(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:ftcore|cluster|pipelines|serving|tests|benchmarks|k8s)/[\w./-]*)`", text))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert sorted(name for name in named if not (REPO / name).exists()) == []


def test_the_map_names_every_room() -> None:
    rows = (REPO / "README.md").read_text(encoding="utf-8").split("## The map")[1].split("\n## ")[0]
    assert all(f"`{room}/" in rows for room in ("ftcore", "pipelines", "cluster", "tests", "benchmarks"))


def test_every_command_of_the_program_is_shown() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    hidden = [name for name in COMMANDS if f"ftcore {name}" not in text and f"make {name}" not in text and name != "pretrain"]
    assert hidden == []


def test_the_exit_codes_are_the_real_ones() -> None:
    text = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    told = dict(
        re.findall(
            r"(\d+) (recipe|data|model|storage|integrity|cluster|training|interrupted)\b", text.split("a code of its own:")[1].split(".")[0]
        )
    )
    names = {"recipe": "ConfigError", "interrupted": "Interrupted"}
    assert len(told) == 8
    for code, name in told.items():
        assert getattr(errors, names.get(name, f"{name.capitalize()}Error")).exit_code == int(code)
