"""Compare: `ftcore compare`: is one system of a finished evaluation better than another, also across two evaluations of the same rows.

In: folders of results, two systems' names; a judge. Out: a sentence a metric; a judgement. Runs in: a person's terminal; no ray, and torch
only with a judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from ftcore.errors import ConfigError, DataError
from ftcore.evals.answered import Answers
from ftcore.evals.asked import Asked
from ftcore.evals.given import answers_of
from ftcore.evals.judge_options import JudgeOptions, add_judge_options
from ftcore.evals.metrics.base import METRICS
from ftcore.evals.records import Records
from ftcore.evals.results import in_common
from ftcore.evals.verdict import compare
from ftcore.evals.words import read_as
from ftcore.storage import Folder


@dataclass(frozen=True)
class Both:
    """Two systems' answers to the same rows."""

    folder: Folder
    metrics: tuple[str, ...]
    """Those of the evaluation."""
    ours: Answers
    theirs: Answers
    asked: dict[str, Asked]
    """The questions, by the answers' ids."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ftcore compare", description="is A better than B?")
    made.add_argument("words", metavar="DIR [DIR] A B", nargs="+", help="one folder of results, or A's and B's; then the two systems")
    made.add_argument("--metrics", nargs="+", default=[], help="default: those of the evaluation")
    made.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add_judge_options(made, "says which answer is better, asked in both orders")
    made.add_argument("--human", metavar="PLACE", default="", help="how far people agree: their preference rows, or ftcore label's folder")
    made.add_argument("--key-variable", default="OPENAI_API_KEY", help="the environment variable that holds the endpoint's key")
    made.add_argument("--at-once", type=int, default=8, help="questions at once (default: 8)")
    made.add_argument("--base", default="", help="the folder or hub name of a local judge's base")
    made.add_argument("--store", default="adapters", help="the adapter store of a local judge (default: adapters)")
    made.add_argument("--context", type=int, default=4096, help="tokens of a local judge's question and reply at most (default: 4096)")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    if len(options.words) not in (3, 4):
        raise ConfigError("which systems?", got=" ".join(options.words), wanted="ftcore compare DIR A B, or ftcore compare DIR DIR A B")
    if not 0.5 <= options.confidence < 1:
        raise ConfigError("there is no such confidence", where="--confidence", got=str(options.confidence), wanted="0.5 to below 1")
    *folders, ours, theirs = options.words
    both = read_both(folders, ours, theirs)
    for sentence in sentences(both, options.metrics, options.confidence):
        print(sentence)
    if options.judge:
        _judged(options, both)
    return 0


def _judged(options: argparse.Namespace, both: Both) -> None:
    from ftcore.evals.judge_command import check_judgement, judge_pair
    from ftcore.evals.pairs import Pairing

    asked = replace(JudgeOptions.of(options), human=options.human, confidence=options.confidence)
    found = judge_pair(asked, Pairing(both.ours, both.theirs, both.asked), both.folder, partial(print, flush=True))
    print(f"\n{found.text()}\n\n{'page':<10}{found.about.place}/result.html", flush=True)
    check_judgement(found)


def read_both(folders: Sequence[str], ours: str, theirs: str) -> Both:
    """Raises ConfigError for a system that is not there, DataError for two evaluations of other rows."""
    opened = [Records(folder) for folder in folders]
    facts = [records.results() for records in opened]
    across = len(opened) > 1
    first, second = _answers(opened[0], facts[0], ours, across), _answers(opened[-1], facts[-1], theirs, across)
    if across:
        second = _in_order_of(first, replace(second, system=f"{theirs} ({folders[-1]})" if ours == theirs else theirs))
    asked = {row.content if across else row.id: row for row in opened[0].questions()}
    return Both(opened[0].folder, tuple(facts[0]["about"]["metrics"]), first, second, asked)


def sentences(both: Both, metrics: Sequence[str], confidence: float) -> list[str]:
    """A verdict a metric. Raises ConfigError for a metric that is not there."""
    reading = read_as(both.ours.rows)
    found = []
    for name in metrics or both.metrics:
        METRICS[name].check()
        mine, others = in_common(name, [both.ours, both.theirs])
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
    key, by = lines[system], facts["about"].get("support", "")
    support = records.support(by, key) if by else {}
    answers = answers_of(system, questions, records.answers(key), labelled=facts["about"]["task"] == "labels", support=support)
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
