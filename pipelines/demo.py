"""Demo: the main job end to end on the embedded default: predict a user's next desktop operation.

    make demo                                 python -m pipelines.demo
    make demo HISTORY=~/.bash_history         the same table for a shell history of your own; nothing of it leaves .demo/
    make demo MODEL=FOLDER-OR-HUB-NAME        the same table on another base

In: seeds (or a history file). Out: tables, adapters and run reports under .demo/. Runs in: the driver; training on 2 Ray Train workers.

    simulate two tenants -> prepare -> a LoRA each -> publish -> table -> habits drift -> train version 1 further -> compare -> promote
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.connect import connect
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.cli import guarded
from ftcore.demo.ceiling import CEILING, Ceiling
from ftcore.demo.history import write_history
from ftcore.demo.judging import goals, lineup
from ftcore.demo.tenants import TenantDay, demo_teams, new_habits, write_day
from ftcore.evals.bench import Bench
from ftcore.evals.predictors import Predictor
from ftcore.evals.tasks.next_operation import Table, judge
from ftcore.recipe import Recipe, load_recipe
from ftcore.report import write_report
from pipelines.fit import Outcome, fit

RECIPES = Path(__file__).parent / "recipes"
ANOTHER_BASE = ("data.max_length=1024", "data.overlong=split", "optim.lr=5e-4")
"""What suits a base that was not made for this text: it needs more tokens for it, and smaller steps."""
FEW_ROWS = ("optim.epochs=30", "optim.lr=3e-3", "eval.patience=3", "data.validation=0.1")
"""A shell history is short: more passes over it, until the validation loss rises."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    connection = connect(local_cpus=2)
    try:
        own_history(options, options.history.expanduser()) if options.history else two_tenants(options)
    finally:
        connection.close()
    print(f"\n{time.monotonic() - started:.0f} s in all, seed {options.seed}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--history", type=Path, help="a shell history file (bash, zsh or fish)")
    parser.add_argument("--model", help="another base: a folder or a hub name")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where everything lands")
    parser.add_argument("--seed", type=int, default=0, help="of the tenants, their habits and their sessions")
    parser.add_argument("--sessions", type=int, default=300, help="training sessions a tenant")
    parser.add_argument("--held-out", type=int, default=100, help="sessions a tenant is judged by")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override the recipes, for experiments")
    return parser.parse_args(argv)


def recipe_for(options: argparse.Namespace, file: str, rows: Path, adapter: str, *extra: str) -> Recipe:
    """A committed recipe, pointed at these rows, this tenant and this output folder."""
    base = [f"model.path={options.model}", *ANOTHER_BASE] if options.model else []
    name = "-".join([rows.name.split(".")[0], str(options.seed), *([Path(options.model).name.lower()] if options.model else [])])
    places = [f"output.runs={options.out}/runs", f"output.store={options.out}/adapters", f"data.cache={options.out}/prepared"]
    sources = json.dumps([{"path": str(rows), "format": "messages"}])
    changes = [f"name={name}", f"data.sources={sources}", f"output.adapter={adapter}", *places, *base, *extra, *options.set]
    return load_recipe(RECIPES / file, changes)


def two_tenants(options: argparse.Namespace) -> bool:
    """The demo proper. Returns whether every goal was met."""
    say(f"1. two tenants, {options.sessions} sessions each: the same events, contradictory habits")
    sizes = {"num_train": options.sessions, "num_test": options.held_out, "seed": options.seed}
    days = [write_day(team, options.out / "data", day="monday", **sizes) for team in demo_teams(options.seed)]
    recipes = [recipe_for(options, "demo-lora.yaml", day.rows, f"{day.team.name}/desktop") for day in days]
    outcomes = []
    for number, (day, recipe) in enumerate(zip(days, recipes, strict=True), 2):
        say(f"{number}. a LoRA for {day.team.name}: {day.rows}")
        outcomes.append(fit(recipe))
    say("4. the table: every operation of held-out sessions, foretold from what was seen before it")
    store, refs = AdapterStore(recipes[0].output.store), [ref_of(outcome) for outcome in outcomes]
    bench = Bench(recipes[0].model, {ref.tenant: store.fetch(ref, options.out / "fetched") for ref in refs})
    tables, met = [], True
    for day, other, outcome in zip(days, reversed(days), outcomes, strict=True):
        rivals = [*lineup(bench, day.train(), day.team.name, other.team.name), Ceiling(day.held_out)]
        tables.append(judge(f"{day.team.name}, monday", rivals, day.test()))
        reached = goals(tables[-1], CEILING)
        met = met and all(goal.met for goal in reached)
        print("\n".join([tables[-1].text(), *map(str, reached), ""]))
        write_report(outcome.run, comparison=tables[-1].text())
    drifted, table, better = drift(options, days[0], refs[0], store, sizes)
    end(options, [*tables, table], [*outcomes, drifted])
    return met and better


def drift(
    options: argparse.Namespace, before: TenantDay, first: AdapterRef, store: AdapterStore, sizes: dict[str, int]
) -> tuple[Outcome, Table, bool]:
    """Another day: habits changed. Version 1 is trained further on the new sessions, compared, and version 2 promoted if it is better."""
    say(f"5. tuesday: {before.team.name}'s habits changed; version 1 ({first}) is trained further")
    day = write_day(new_habits(before.team, options.seed), options.out / "data", day="tuesday", **sizes)
    recipe = recipe_for(options, "demo-drift.yaml", day.rows, f"{first.tenant}/{first.name}", f"model.adapter={first.full}")
    outcome = fit(recipe)
    second = ref_of(outcome)
    bench = Bench(recipe.model, {name: store.fetch(ref, options.out / "fetched") for name, ref in (("v1", first), ("v2", second))})
    versions: list[Predictor] = [bench.predictor("version 1", "v1"), bench.predictor("version 2", "v2")]
    table = judge(f"{day.team.name}, tuesday (habits drifted)", [*versions, Ceiling(day.held_out)], day.test())
    lead = table.lead("version 2", "version 1")
    better, points = lead.low > 0, f"{100 * lead.value:+.1f} points, 95 % interval {100 * lead.low:+.1f} .. {100 * lead.high:+.1f}"
    if better:
        store.promote(second)
    decision = f"promoted: acme/desktop now means {second}" if better else "not clearly better: version 1 stays"
    print(f"{table.text()}\n  version 2 over version 1: {points}; {decision}")
    write_report(outcome.run, comparison=table.text())
    return outcome, table, better


def own_history(options: argparse.Namespace, history: Path) -> Table:
    """The same table for a shell history of the user's own."""
    say(f"1. {history}: read, redacted, kept under {options.out}")
    mine = write_history(history, options.out / "data")
    print(f"{mine.num_commands} commands, secrets or personal data masked in {mine.num_redacted}; the newest fifth is held out")
    say("2. a LoRA for me")
    recipe = recipe_for(options, "demo-lora.yaml", mine.rows, "me/shell", *FEW_ROWS)
    outcome = fit(recipe)
    bench = Bench(recipe.model, {"me": AdapterStore(recipe.output.store).fetch(ref_of(outcome), options.out / "fetched")})
    table = judge("my shell history", lineup(bench, mine.train, "me", None), mine.test)
    print("\n".join([table.text(), *(f"  own adapter: {goal.fact}" for goal in goals(table, None))]))
    write_report(outcome.run, comparison=table.text())
    end(options, [table], [outcome])
    return table


def ref_of(outcome: Outcome) -> AdapterRef:
    assert outcome.ref is not None, "the demo's recipes publish"
    return outcome.ref


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def end(options: argparse.Namespace, tables: Sequence[Table], outcomes: Sequence[Outcome]) -> None:
    """Where things are, and what to try next."""
    (options.out / "table.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n", encoding="utf-8")
    (options.out / "table.json").write_text(json.dumps([table.to_json() for table in tables], indent=1), encoding="utf-8")
    program = Path(os.path.relpath(Path(sys.executable).with_name("ftcore")))
    print("\n(an n-gram of whole operations gives one it never saw no probability at all, so it has no perplexity)")
    print("\nwhere things are")
    print(f"  tables     {options.out}/table.md, table.json")
    print(*(f"  report     {outcome.report}" for outcome in outcomes), sep="\n")
    print(f"  adapters   {options.out}/adapters: {', '.join(str(ref_of(outcome)) for outcome in outcomes)}")
    print("\ntry next")
    print(f"  {program} adapters list --store {options.out}/adapters")
    print(f"  {program} preview {os.path.relpath(RECIPES / 'demo-lora.yaml')}        rows token by token: what is trained")
    print("  make demo HISTORY=~/.bash_history                         the same table for your own shell")


if __name__ == "__main__":
    sys.exit(guarded(lambda argv: main(argv), sys.argv[1:]))
