"""Fine-tune: a recipe, from rows to a sealed, verified adapter, on however many workers it asks for.

    ray job submit --working-dir . -- python pipelines/sft.py pipelines/recipes/sft-lora.yaml resources.workers=2

In: RECIPE and PATH=VALUE overrides. Out: the run folder, the adapter, an exit code (9: the gate is shut). Runs in: the driver.
`ftcore sft` is the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.runtime_env import compute_threads
from ftcore.cli import guarded
from ftcore.errors import ConfigError
from ftcore.recipe import load_recipe
from ftcore.rundir import RunDir
from pipelines.plan import NOT_RUNNABLE
from pipelines.room import require_room
from pipelines.runs import at_home

GATE_SHUT = 9
"""Exit code of a run that is trained and published, and whose version its gate did not let through."""
say = partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sft", description="Trains what a recipe says and publishes the verified adapter.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like optim.lr=1e-4")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on from the newest sealed and verified checkpoint of the same name (default); --no-resume begins again from nothing and "
        "keeps the old run's folder under another name: not for a command that is restarted by itself",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action=argparse.BooleanOptionalAction, default=True,
        help="refuse, with exit code 3, what is forecast to need more memory than there is (default); --no-plan tries it all the same",
    )  # fmt: skip
    options = parser.parse_intermixed_args(argv)
    recipe = at_home(load_recipe(options.recipe, options.overrides), say)
    if options.plan and not RunDir(recipe.output.runs, recipe.name).is_finished():  # a finished run needs no room any more
        try:
            require_room(recipe, say)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_RUNNABLE

    # late: a wrong recipe, or one that cannot fit, is refused at once, and Ray starts while torch is loaded
    from cluster.connect import connect_early
    from cluster.resources import needs_ray

    if needs_ray(recipe.resources):
        connect_early()
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads(recipe.resources)))

    from ftcore.report.journal_view import figures, read_journal
    from pipelines.fit import fit

    outcome = fit(recipe, log=say, resume=options.resume)
    print()
    for label, value in figures(read_journal(outcome.run.folder)).items():
        print(f"{label:<32}{value}")
    print(f"{'run':<32}{outcome.run.url}\n{'report':<32}{outcome.report}")
    if outcome.ref:
        print(f"{'adapter':<32}{outcome.ref}\n\nnext:  ftcore adapters show {outcome.ref} --store {outcome.store}")
        print(f"       ftcore merge {outcome.ref} --store {outcome.store} --out merged")
    elif not recipe.method.is_adapter:
        print(f"\nnext:  ftcore serve base={outcome.run.url}/final store={outcome.store}")
    if outcome.shut:
        print(f"\n{outcome.shut}")
        return GATE_SHUT
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda argv: main(argv), sys.argv[1:]))
