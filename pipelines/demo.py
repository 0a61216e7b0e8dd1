"""Demo: the main job end to end on the embedded default: predict a user's next desktop operation.

    make demo                       python -m pipelines.demo
    make demo HISTORY=~/.bash_history         the same table for a shell history of your own; nothing leaves .demo/
    make demo MODEL=FOLDER-OR-HUB-NAME        the same table on another base

In: seeds (or a history file). Out: a table, adapters and run reports under .demo/. Runs in: the driver; training on 2 Ray Train workers.

    simulate two tenants -> prepare -> a LoRA each -> publish -> table -> habits drift -> train version 1 further -> compare -> promote
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.connect import connect
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.demo.history import HistoryDay, write_history
from ftcore.demo.judging import OWN, Bench, lineup, verdict
from ftcore.demo.tenants import CEILING, Ceiling, TenantDay, demo_teams, new_habits, write_day
from ftcore.errors import FtcoreError
from ftcore.evals.predictors import Predictor
from ftcore.evals.tasks.next_operation import Table, judge
from ftcore.recipe import Recipe, load_recipe
from pipelines.fit import Outcome, fit

RECIPES = Path(__file__).parent / "recipes"
DAY_ONE, DAY_TWO = "monday", "tuesday"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.monotonic()
    connection = connect(local_cpus=2)
    try:
        met = own_history(options) if options.history else two_tenants(options)
    except FtcoreError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        connection.close()
    print(f"\n{time.monotonic() - started:.0f} s in all (seed {options.seed})")
    return 0 if met else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--history", type=Path, help="a shell history file (bash, zsh or fish)")
    parser.add_argument("--model", help="another base: a folder or a hub name")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where everything lands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=300, help="training sessions a tenant")
    parser.add_argument("--held-out", type=int, default=100, help="sessions a tenant is judged by")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override the recipes (for experiments)")
    return parser.parse_args(arguments)


def recipe_for(options: argparse.Namespace, file: str, rows: Path, adapter: str, *extra: str) -> Recipe:
    """The committed recipe, pointed at these rows, this tenant and this output folder."""
    name = f"{rows.name.split('.')[0]}-{options.seed}" + (f"-{Path(options.model).name.lower()}" if options.model else "")
    base = [f"model.path={options.model}"] if options.model else []
    places = [f"output.runs={options.out}/runs", f"output.store={options.out}/adapters", f"data.cache={options.out}/prepared"]
    sources = json.dumps([{"path": str(rows), "format": "messages"}])
    return load_recipe(
        RECIPES / file, (f"name={name}", f"data.sources={sources}", f"output.adapter={adapter}", *places, *base, *extra, *options.set)
    )


def two_tenants(options: argparse.Namespace) -> bool:
    """The demo proper. Returns whether every goal was met."""
    say(f"1. two tenants, {options.sessions} sessions each: the same events, contradictory habits")
    teams, folder = demo_teams(options.seed), options.out / "data"
    sizes = {"num_train": options.sessions, "num_test": options.held_out, "seed": options.seed}
    days = [write_day(team, folder, day=DAY_ONE, **sizes) for team in teams]
    outcomes: list[Outcome] = []
    for number, day in enumerate(days, 2):
        say(f"{number}. a LoRA for {day.team.name}: {day.rows}")
        outcomes.append(fit(recipe_for(options, "demo-lora.yaml", day.rows, f"{day.team.name}/desktop")))
    say("4. the table: held-out sessions, every operation foretold with its true past")
    recipe = recipe_for(options, "demo-lora.yaml", days[0].rows, "acme/desktop")
    store = AdapterStore(recipe.output.store)
    refs = [ref_of(outcome) for outcome in outcomes]
    bench = Bench(recipe.model, {ref.tenant: store.fetch(ref, options.out / "fetched") for ref in refs})
    tables, met = [], True
    for day, other in zip(days, reversed(days), strict=True):
        rivals = [*lineup(bench, day.train(), day.team.name, other.team.name), Ceiling(day.held_out)]
        tables.append(judge(f"{day.team.name}, {DAY_ONE}", rivals, day.test()))
        good, sentences = verdict(tables[-1], CEILING)
        met = met and good
        print(tables[-1].text(), *sentences, "", sep="\n")
    drifted, table, better = drift(options, days[0], refs[0], store, sizes)
    end(options, [*tables, table], [*outcomes, drifted])
    return met and better


def drift(
    options: argparse.Namespace, before: TenantDay, first: AdapterRef, store: AdapterStore, sizes: dict[str, int]
) -> tuple[Outcome, Table, bool]:
    """Another day: habits changed. Version 1 is trained further on the new sessions, compared, and version 2 promoted if it is better."""
    say(f"5. {DAY_TWO}: {before.team.name}'s habits changed; version 1 ({first}) is trained further")
    day = write_day(new_habits(before.team, options.seed), options.out / "data", day=DAY_TWO, **sizes)
    recipe = recipe_for(options, "demo-drift.yaml", day.rows, f"{first.tenant}/{first.name}", f"model.adapter={first.full}")
    outcome = fit(recipe)
    second = ref_of(outcome)
    bench = Bench(recipe.model, {name: store.fetch(ref, options.out / "fetched") for name, ref in (("v1", first), ("v2", second))})
    rivals: list[Predictor] = [bench.predictor("version 1", "v1"), bench.predictor("version 2", "v2"), Ceiling(day.held_out)]
    table = judge(f"{day.team.name}, {DAY_TWO} (habits drifted)", rivals, day.test())
    lead = table.lead("version 2", "version 1")
    print(table.text())
    better, points = lead.low > 0, f"{100 * lead.value:+.1f} points (95 % {100 * lead.low:+.1f} .. {100 * lead.high:+.1f})"
    if better:
        store.promote(second)
    print(f"  version 2: {points}; " + (f"promoted, acme/desktop now means {second}" if better else "not clearly better, version 1 stays"))
    return outcome, table, better


def own_history(options: argparse.Namespace) -> bool:
    """The same table for a shell history of the user's own."""
    say(f"1. {options.history}: read, redacted, kept under {options.out}")
    day: HistoryDay = write_history(options.history, options.out / "data")
    print(f"  {day.num_commands} commands, {day.num_redacted} with secrets or personal data masked; the newest fifth is held out")
    say("2. a LoRA for me")
    outcome = fit(recipe_for(options, "demo-lora.yaml", day.rows, "me/shell"))
    recipe = recipe_for(options, "demo-lora.yaml", day.rows, "me/shell")
    bench = Bench(recipe.model, {"me": AdapterStore(recipe.output.store).fetch(ref_of(outcome), options.out / "fetched")})
    table = judge("my shell history", lineup(bench, day.train, "me", None), day.test)
    print(table.text(), *verdict(table, None)[1], sep="\n")
    end(options, [table], [outcome])
    return True


def ref_of(outcome: Outcome) -> AdapterRef:
    assert outcome.ref is not None, "the demo's recipes publish"
    return outcome.ref


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def end(options: argparse.Namespace, tables: Sequence[Table], outcomes: Sequence[Outcome]) -> None:
    """Where things are, and what to try next."""
    report = options.out / "table.md"
    report.write_text("\n\n".join(table.markdown() for table in tables) + "\n", encoding="utf-8")
    (options.out / "table.json").write_text(json.dumps([table.to_json() for table in tables], indent=1), encoding="utf-8")
    print(f"\nthe tables        {report} (and table.json)")
    for outcome in outcomes:
        print(f"run report        {outcome.report}")
    names = sorted({f"{ref_of(outcome).tenant}/{ref_of(outcome).name}" for outcome in outcomes})
    print(f"adapters          {options.out}/adapters: {', '.join(names)}")
    print("\ntry next")
    print(f"  ftcore adapters list --store {options.out}/adapters")
    print(f"  ftcore preview {RECIPES / 'demo-lora.yaml'}            rows token by token: what is trained and what is not")
    print("  make demo HISTORY=~/.bash_history           the same table for your own shell")
    print(f"  the own adapter is the line `{OWN}`; its recipe: pipelines/recipes/demo-lora.yaml")


if __name__ == "__main__":
    sys.exit(main())
