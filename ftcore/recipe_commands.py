"""The commands about recipes: validate, schema, import-config, completion. Nothing here needs torch or ray.

In: a command line. Out: text on stdout. Runs in: a person's terminal, editors, CI.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ftcore.cli import COMMANDS
from ftcore.data.formats.base import FORMATS
from ftcore.errors import ConfigError
from ftcore.importers import import_file
from ftcore.plugins import allowed_plugins, import_plugins
from ftcore.recipe import REQUIRED, Recipe, differences, load_recipe, parse_recipe, recipe_digest
from ftcore.recipe_checks import notes
from ftcore.recipe_errors import shown
from ftcore.section import leaf_paths


def validate(argv: list[str]) -> int:
    """`ftcore validate RECIPE [PATH=VALUE ...]`"""
    parser = argparse.ArgumentParser(prog="ftcore validate", description="Checks a recipe and prints what differs from the defaults.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like optim.lr=1e-4")
    parser.add_argument("--json", action="store_true", help="print the resolved recipe as JSON instead")
    options = parser.parse_args(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    if options.json:
        print(json.dumps(recipe.model_dump(mode="json"), indent=1))
        return 0
    rows = [
        (path, shown(_plain(value)), "" if default == REQUIRED else shown(_plain(default))) for path, value, default in differences(recipe)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print(f"{options.recipe}: valid, digest {recipe_digest(recipe)[:12]}; differs from the defaults in:")
    for path, value, default in rows:
        print(f"  {path:<{widths[0]}}  {value:<{widths[1]}}  {f'default {default}' if default else ''}".rstrip())
    for note in notes(recipe):
        print(f"note: {note}")
    return 0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def schema(argv: list[str]) -> int:
    """`ftcore schema`"""
    parser = argparse.ArgumentParser(
        prog="ftcore schema",
        description="JSON Schema of recipes. For completion and checks in an editor, write it to a file and put "
        "`# yaml-language-server: $schema=recipe.schema.json` at the top of a recipe.",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write there instead of to the terminal")
    options = parser.parse_args(argv)
    import_plugins(allowed_plugins(), where="FTCORE_PLUGINS")
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file; each choice is one branch per kind."""
    drawn = Recipe.model_json_schema()
    drawn["$defs"]["Source"]["properties"]["format"]["enum"] = ["auto", *FORMATS]
    sources = drawn["$defs"]["Data"]["properties"]["sources"]  # a single source, and a path alone, are read too
    one = [{"type": "string"}, sources["items"]]
    drawn["$defs"]["Data"]["properties"]["sources"] = {
        "description": sources["description"],
        "anyOf": [*one, {"type": "array", "minItems": 1, "items": {"anyOf": one}}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **drawn, "title": "ftcore recipe"}


def import_config(argv: list[str]) -> int:
    """`ftcore import-config FILE`: the recipe on stdout (or --out), the key by key table on stderr."""
    parser = argparse.ArgumentParser(
        prog="ftcore import-config", description="Turns an axolotl, LLaMA-Factory or torchtune config into a recipe."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the other program's YAML")
    parser.add_argument(
        "--from", dest="program", choices=("auto", "axolotl", "llama-factory", "torchtune"), default="auto", help="whose file it is"
    )
    parser.add_argument("--out", metavar="RECIPE", type=Path, help="write the recipe there")
    options = parser.parse_args(argv)
    if options.out and options.out.exists():
        raise ConfigError("this file exists already", where=options.out, remedy="choose another name or remove it")
    imported = import_file(options.file, options.program)
    print(imported.table(), file=sys.stdout if options.out else sys.stderr)
    if options.out:
        options.out.write_text(imported.text(), encoding="utf-8")
        print(f"\nwrote {options.out}; next: ftcore validate {options.out}")
    else:
        print(imported.text(), end="")
    parse_recipe(imported.text(), str(options.out or "the recipe"))  # what is not valid yet is said, after the recipe was written
    return 0


COMPLETION = """# ftcore completion for {shell}: put `source <(ftcore completion {shell})` in your shell's start-up file
_ftcore() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  local keys="$(compgen -S = -W "{paths}" -- "$word")"
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [ -n "$word" ] && [ -n "$keys" ]; then COMPREPLY=($keys); compopt -o nospace
  else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -F _ftcore ftcore"""


def completion(argv: list[str]) -> int:
    """`ftcore completion bash|zsh`"""
    parser = argparse.ArgumentParser(prog="ftcore completion", description="Prints a completion script for commands and override paths.")
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(argv).shell
    script = COMPLETION.format(
        shell=shell, commands=" ".join(name for name in COMMANDS if " " not in name), paths=" ".join(leaf_paths(Recipe))
    )
    print(("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script)
    return 0
