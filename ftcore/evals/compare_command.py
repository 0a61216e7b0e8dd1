"""Compare: `ftcore compare`: is one system of a finished evaluation better than another, also across two evaluations of the same rows.

In: folders of results, two systems' names. Out: a sentence a metric. Runs in: a person's terminal; no torch, no ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import Answers
from ftcore.evals.given import answers_of
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.records import Records
from ftcore.evals.results import in_common
from ftcore.evals.verdict import compare
from ftcore.evals.words import read_as


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ftcore compare", description="is A better than B?")
    parser.add_argument("words", metavar="DIR [DIR] A B", nargs="+", help="one folder of results, or A's and B's; then the two systems")
    parser.add_argument("--metrics", nargs="+", default=[], help="default: those of the evaluation")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    options = parser.parse_args(list(arguments))
    if len(options.words) not in (3, 4):
        raise ConfigError("which systems?", got=" ".join(options.words), wanted="ftcore compare DIR A B, or ftcore compare DIR DIR A B")
    if not 0.5 <= options.confidence < 1:
        raise ConfigError("there is no such confidence", where="--confidence", got=str(options.confidence), wanted="0.5 to below 1")
    *folders, ours, theirs = options.words
    for sentence in sentences(folders, ours, theirs, options.metrics, options.confidence):
        print(sentence)
    return 0


def sentences(folders: Sequence[str], ours: str, theirs: str, metrics: Sequence[str], confidence: float) -> list[str]:
    """A verdict a metric. Raises ConfigError for a system or metric that is not there, DataError for two evaluations of other rows."""
    opened = [Records(folder) for folder in folders]
    facts = [records.results() for records in opened]
    across = len(opened) > 1
    first, second = _answers(opened[0], facts[0], ours, across), _answers(opened[-1], facts[-1], theirs, across)
    if across:
        second = _in_order_of(first, replace(second, system=f"{theirs} ({folders[-1]})" if ours == theirs else theirs))
    reading = read_as(first.rows)
    found = []
    for name in metrics or facts[0]["about"]["metrics"]:
        METRICS[name].check()
        mine, others = in_common(name, [first, second])
        found.append(compare(name, mine, others, reading.language, confidence=confidence).sentence())
    return found


def _answers(records: Records, facts: dict[str, Any], system: str, across: bool) -> Answers:
    """With rows named by their content where two folders are compared: there the same row may lie under another path."""
    lines = {line["name"]: line["key"] for line in facts["lines"]}
    if system not in lines:
        near = get_close_matches(system, lines, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else "ftcore evaluate with it, into the same folder"
        raise ConfigError("this evaluation has no such system", where=records.folder, got=system, wanted=" | ".join(lines), remedy=remedy)
    questions = records.questions()
    answers = answers_of(system, questions, records.answers(lines[system]), labelled=facts["about"]["task"] == "labels")
    if not across:
        return answers
    content = {row.id: row.content for row in questions}
    return replace(answers, rows=tuple(replace(row, id=content[row.id]) for row in answers.rows))


def _in_order_of(first: Answers, second: Answers) -> Answers:
    by_id = {row.id: row for row in second.rows}
    missing = [row.id for row in first.rows if row.id not in by_id]
    if missing or len(by_id) != len({row.id for row in first.rows}):
        raise DataError(
            "the two evaluations are not of the same rows", got=f"{len(first.rows)} and {len(second.rows)} rows, {len(missing)} of the "
            "first not in the second", wanted="the same rows", remedy="evaluate both on one test set",
        )  # fmt: skip
    return replace(second, rows=tuple(by_id[row.id] for row in first.rows))
