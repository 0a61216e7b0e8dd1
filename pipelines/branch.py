"""Branch: a run that begins where another one stood, with other values from there on.

In: a run with a sealed step, the recipe to go on with. Out: a run folder of its own, at that step. Runs in: trials of a search.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ftcore.checkpoint import STATE, read_position
from ftcore.history import remember
from ftcore.journal import FILE as JOURNAL
from ftcore.recipe import Recipe, dump_recipe, recipe_digest
from ftcore.rundir import RunDir, checkpoint_key
from ftcore.storage import MANIFEST
from pipelines.runs import PREPARED
from pipelines.same_base import BASE

FACTS = (PREPARED, BASE, "audit.json", JOURNAL)


def branch(donor: RunDir, step: int, into: RunDir, recipe: Recipe) -> None:
    """Puts `donor`'s weights and optimizer state at `step` into a new run. What was best before stays the donor's."""
    for name in FACTS:
        if donor.folder.exists(name):
            into.folder.write(name, donor.folder.read(name))
    if (donor.folder / "parent").exists(MANIFEST):
        with donor.opened("parent") as parent, into.sealing("parent", {"named": recipe.model.adapter}) as copy:
            _copied(parent, copy)
    into.folder.write("recipe.yaml", dump_recipe(recipe).encode())
    key = checkpoint_key(step)
    with donor.opened(key) as folder, into.sealing(key, {"step": step}) as copy:
        _copied(folder, copy)
        at = replace(read_position(folder), recipe=recipe_digest(recipe), best_step=0, best_loss=None, stale=0)
        (copy / STATE).write_text(json.dumps(asdict(at)))
    remember(into, "branched", step=step, donor=donor.name)


def _copied(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
