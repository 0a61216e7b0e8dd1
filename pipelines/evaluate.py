"""Evaluate: is it better, and was fine-tuning worth it? Base, k-shot, adapters, merged models and endpoints on the same held-out rows.

    ray job submit --working-dir . -- python pipelines/evaluate.py RECIPE --systems base base+3 acme/support --out s3://bucket/results

In: a recipe (its test split) or files of rows; systems. Out: a folder with every answer, results.json, results.md and results.html.
Runs in: the driver. `ftcore evaluate` is the same.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ftcore.cli import guarded
from ftcore.engines.torch import Torch, add_base_options
from ftcore.evals.judge_options import JudgeOptions, add_judge_options
from ftcore.recipe import load_recipe


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ftcore evaluate", description="judge systems on the same held-out rows")
    made.add_argument("recipe", metavar="RECIPE", nargs="?", default="", help="its test split is judged on; its base is `base`")
    made.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's; as the training had it")
    made.add_argument("--systems", nargs="+", required=True, metavar="SYSTEM", help="base, base+3, tenant/name[@digest], FOLDER, URL#MODEL")
    made.add_argument("--rows", nargs="+", default=[], metavar="FILE", help="judge on all rows of these instead")
    made.add_argument("--base", default="", help="the base's folder or hub name; else the recipe's")
    made.add_argument("--store", default="", help="the adapter store; else the recipe's, or `adapters`")
    made.add_argument("--out", required=True, help="a folder or fsspec path; the same command goes on where it was stopped")
    made.add_argument(
        "--task",
        default="auto",
        help="answers, labels, likelihood, documents, refusals, stereotypes, toxicity; auto (the default) looks at the rows",
    )
    made.add_argument(
        "--classifier", default="", metavar="FOLDER#LABEL", help="a local classifier that says which answers are toxic, or refuse"
    )
    made.add_argument("--labels", nargs="+", default=[], help="what may be chosen (default: the references that occur)")
    made.add_argument("--metrics", nargs="+", default=[], help="default: what suits the task")
    made.add_argument(
        "--general", nargs="+", default=[], metavar="FILE", help="rows of other things: is anything forgotten since the base?"
    )
    made.add_argument("--general-metrics", nargs="+", default=[], help="by which (default: perplexity per token and per byte)")
    made.add_argument("--by", default="", metavar="COLUMN", help="a column that says what kind a row is: results by kind too")
    made.add_argument("--group", default="", metavar="COLUMN", help="rows alike in it (a session's, a document's) are resampled together")
    made.add_argument("--limit", type=int, default=0, help="judge on a stable sample of so many rows")
    made.add_argument("--leaks", choices=("drop", "keep"), default="drop", help="rows that were trained on too (default: drop)")
    made.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    made.add_argument("--seed", type=int, default=0, help="of which examples are shown (default: 0)")
    made.add_argument("--batch", type=int, default=16, help="answers made at once by a worker (default: 16)")
    made.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer at most (default: 2048)")
    made.add_argument("--key-variable", default="OPENAI_API_KEY", help="the environment variable that holds an endpoint's key")
    made.add_argument("--at-once", type=int, default=8, help="questions an endpoint is asked at once (default: 8)")
    made.add_argument("--entailment", default="", metavar="MODEL", help="a classifier that says how far sources support answers")
    add_judge_options(made, "says whether sources support answers; which of two is better: ftcore compare --judge")
    made.add_argument("--here", action="store_true", help="in this process, without Ray")
    made.add_argument("--workers", type=int, default=1, help="engines at once, each with a copy of the base (default: 1)")
    made.add_argument("--gpus", type=float, default=0, help="GPUs of each worker (default: 0)")
    add_base_options(made)
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(argv)
    from ftcore.evals.columns import Columns
    from pipelines.evaluating import Means
    from pipelines.judging import Wanted, evaluate

    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    wanted = Wanted(
        recipe=recipe, rows=tuple(options.rows), systems=tuple(options.systems),
        base=options.base, store=options.store, out=options.out, task=options.task, labels=tuple(options.labels),
        metrics=tuple(options.metrics), limit=options.limit, keep_leaks=options.leaks == "keep", max_tokens=options.max_tokens,
        seed=options.seed, key_variable=options.key_variable, at_once=options.at_once, entailment=options.entailment,
        judge=JudgeOptions.of(options) if options.judge else None, classifier=options.classifier,
        columns=Columns(options.by, options.group), general=tuple(options.general), general_metrics=tuple(options.general_metrics),
        engine=Torch(max_batch=options.batch, max_context=options.context, dtype=options.dtype, quantise=options.quantise),
    )  # fmt: skip
    results = evaluate(wanted, Means(options.here, options.workers, options.gpus), partial(print, flush=True))
    print(f"\n{results.text()}\n")
    print(f"{'page':<10}{options.out}/results.html\n{'answers':<10}{options.out}/answers")
    if len(options.systems) > 1:
        print(f"\nnext:  ftcore compare {options.out} {options.systems[-1]} {options.systems[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
