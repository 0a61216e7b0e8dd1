"""Invariants: does this recipe train the same model however the work is cut? Tried on the user's own model, data, method and backend.

    ftcore doctor --invariants pipelines/recipes/sft-lora.yaml data.sources.0.path=rows.jsonl
    python -m pipelines.invariants pipelines/recipes/sft-lora.yaml data.sources.0.path=rows.jsonl

In: a recipe and PATH=VALUE overrides. Out: one line a check, with the number; exit code 3 when one failed. Runs in: one machine, no Ray.
Blocks are taken from (or prepared into) the recipe's data.cache; runs and adapters go to a scratch folder that is removed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ftcore.cli import guarded
from ftcore.recipe import Recipe, load_recipe
from pipelines.prepare import prepare

if TYPE_CHECKING:
    from ftcore.invariants import Finding

Log = Callable[[str], None]
FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="invariants", description="Tries on your own recipe what must not change a result.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like model.dtype=fp32")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each run (at least 2)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens kept of each block")
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks whose name holds this, like accumulation")
    options = parser.parse_intermixed_args(argv)
    log = partial(print, flush=True)
    recipe = load_recipe(options.recipe, options.overrides)
    findings = run_invariants(recipe, log, steps=max(2, options.steps), num_tokens=max(16, options.tokens), only=options.only)
    print()
    print(*findings, sep="\n")
    return FAILED if any(finding.outcome == "FAIL" for finding in findings) else 0


def run_invariants(recipe: Recipe, log: Log, *, steps: int = 4, num_tokens: int = 512, only: str = "") -> list[Finding]:
    """Every check in turn, each told as it ends. Raises an FtcoreError when the recipe does not even train."""
    from ftcore.invariants import invariants  # loads torch: `doctor` answers without

    prepared = prepare(recipe, log=log)
    with tempfile.TemporaryDirectory(prefix="ftcore-invariants-", ignore_cleanup_errors=True) as scratch:
        return invariants(recipe, prepared, Path(scratch), steps=steps, num_tokens=num_tokens, only=only, log=log)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
