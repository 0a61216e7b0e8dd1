"""Tune: trials of a recipe over ranges of its keys; the winner trained, published, and reported with all that was tried.

    ray job submit --working-dir . -- python pipelines/tune.py RECIPE optim.lr='{log: [1e-4, 1e-2]}' method.rank='{choice: [4, 8, 16]}'

In: RECIPE, PATH=RANGE words (or --search FILE), PATH=VALUE overrides. Out: search.json, a report, the winner's run and adapter.
Runs in: the driver. `ftcore tune` is the same.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.connect import connect_early
from ftcore.cli import guarded
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError
from ftcore.recipe import load_recipe
from ftcore.search import check, is_range, load_search
from ftcore.trials import table
from pipelines.plan import NOT_RUNNABLE
from pipelines.runs import at_home
from pipelines.search_room import require_search_room
from pipelines.sft import GATE_SHUT

say = partial(print, flush=True)

OPTIONS = {
    "searcher": "tpe (default), random or grid",
    "scheduler.kind": "asha (default), median, pbt or none",
    "trials": "how many (default: 16)",    "minutes": "no trial goes on after this long; more may be given later, as of trials",
    "concurrent": "trials at once",
    "shared": "auto (default: LoRA trials train together over one base), on or off",
    "metric": "what decides (default: validation_loss)",
    "seed": "of what is drawn (default: 0)",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tune", description="Searches a recipe's keys for the best values, trains and publishes the winner."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument(
        "words", metavar="PATH=RANGE|PATH=VALUE", nargs="*",
        help="a key to search: optim.lr='{log: [1e-4, 1e-2]}', method.rank='{choice: [4, 8]}', method.alpha='{equals: 2 * method.rank}'; "
        "or a key set over the recipe's, for all trials: optim.epochs=2",
    )  # fmt: skip
    parser.add_argument("--search", metavar="FILE", help="a YAML file with `space` and how to search it (pipelines/searches/lora.yaml)")
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name.split('.')[0]}", dest=name, help=text)
    parser.add_argument(
        "--plan", action=argparse.BooleanOptionalAction, default=True,
        help="refuse, with exit code 3, trials that are forecast to need more memory than there is (default); --no-plan tries all the same",
    )  # fmt: skip
    options = parser.parse_intermixed_args(argv)
    ranges = [word for word in options.words if is_range(word)]
    search = load_search(options.search, ranges, {name: getattr(options, name) for name in OPTIONS})
    recipe = load_recipe(options.recipe, [word for word in options.words if word not in ranges])
    shares = check(search, recipe)
    recipe = at_home(recipe, say)
    if options.plan:
        try:
            require_search_room(search, recipe, shares, say)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_RUNNABLE
    connect_early()

    from pipelines.evaluating import Means  # late: what is wrong with the words is said at once
    from pipelines.judging import Wanted, evaluate
    from pipelines.prepare import prepare
    from pipelines.searching import contest, crown, find, search_folder

    found = find(search, recipe, log=say)
    outcome = crown(search, recipe, found, log=say)
    say("\n" + table(found, search.metric))
    winner, systems = contest(outcome, recipe)
    if systems and len(prepare(winner, log=lambda line: None).rows("test")):
        judged = Wanted(winner, systems, f"{search_folder(recipe)}/test", Torch.reading(winner.data.max_length))
        say("\n" + evaluate(judged, Means(here=True), say).text() + "\n")
    say(f"{'report':<32}{search_folder(recipe)}/report.html\n{'winner':<32}{outcome.run.url}")
    if outcome.ref:
        say(f"{'adapter':<32}{outcome.ref}\n\nnext:  ftcore adapters show {outcome.ref} --store {outcome.store}")
    if outcome.shut:
        say(f"\n{outcome.shut}")
        return GATE_SHUT
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda argv: main(argv), sys.argv[1:]))
