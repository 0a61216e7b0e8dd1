"""Prepare: from the rows a recipe names to packed blocks at rest, once; the same rows again are taken from the cache.

    ray job submit --working-dir . -- python pipelines/prepare.py pipelines/recipes/sft-lora.yaml data.cache=s3://bucket/prepared

In: a recipe and `path=value` overrides. Out: a sealed folder of blocks, the audit on the terminal. Runs in: the driver.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ftcore.cli import guarded
from ftcore.data.audit import Audit
from ftcore.data.identity import identity
from ftcore.data.prepared import Prepared
from ftcore.errors import IntegrityError
from ftcore.recipe import Recipe, load_recipe
from ftcore.storage import Folder, digest_of, is_sealed

Log = Callable[[str], None]


def prepare(recipe: Recipe, *, log: Log = print) -> Prepared:
    """The recipe's blocks: from the cache, or made now. Raises DataError when the audit refuses the rows."""
    started = time.monotonic()
    cache = Folder(recipe.data.cache)
    facts = identity(recipe, cache)
    found = _cached(cache / digest_of(facts), log)
    if found is None:
        from pipelines.build import build  # imports transformers, which a cached start must not wait for

        return build(recipe, cache, facts, log)
    audit = Audit.from_json(found.manifest["audit"])
    audit.check(recipe.data)
    blocks = ", ".join(f"{found.num_blocks(split):,} {split}" for split in found.splits)
    log(f"prepared before: {audit.kept:,} rows, {blocks} blocks in {found.url} ({time.monotonic() - started:.1f} s)")
    for line in audit.warnings(recipe.data):
        log(f"warning: {line}")
    return found


def _cached(folder: Folder, log: Log) -> Prepared | None:
    if not is_sealed(folder):
        return None
    try:
        return Prepared.open(folder)
    except IntegrityError as error:
        log(f"the cached blocks cannot be used and are made again: {error}")
        folder.delete()
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prepare", description="Prepares the rows of a recipe: audit, tokens, packed blocks.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like data.max_length=1024")
    options = parser.parse_args(argv)
    prepared = prepare(load_recipe(options.recipe, options.overrides))
    print(prepared.url)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
