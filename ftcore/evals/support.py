"""Support: how far what was said before an answer supports it: found once for every answer of an evaluation, and kept beside them.

In: an evaluation's records, an entailment model or a judge. Out: a number from 0 to 1 a row, or None where nobody could tell. Runs in: the
driver, after the answers.

By a model: see `entailment`. By a judge: 1 where it says that the source supports every statement of the answer, else 0.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence

from ftcore.engines.torch import Torch
from ftcore.errors import DataError, Interrupted
from ftcore.evals.asked import Asked
from ftcore.evals.entailment import Entailment, support
from ftcore.evals.given import Given
from ftcore.evals.judge import Asking, Case, Terms
from ftcore.evals.judge_options import JudgeOptions
from ftcore.evals.records import WINDOW, Records
from ftcore.evals.replies import Replies
from ftcore.evals.rubric import YES, of_support
from ftcore.evals.spending import Limit, Prices, Purse
from ftcore.evals.systems import System
from ftcore.storage import digest_of

Log = Callable[[str], None]
FOLDER = "support"
METRIC = "consistency"


def by_model(classifier: Entailment, records: Records, systems: Sequence[System], log: Log) -> str:
    """Returns the key of what was found; a part that is there is not made again."""
    key = f"{FOLDER}/{_slug(classifier.name)}-{classifier.digest[:8]}"
    for system in systems:
        given = {row.id: row for row in records.answers(system.key)}
        for number, rows in _windows(records.questions()):
            if records.has_support(key, system.key, number):
                continue
            log(f"consistency of {system.name}: rows {WINDOW * number + 1:,} to {WINDOW * number + len(rows):,} of {len(given):,}")
            found = support([source_of(row) for row in rows], [given[row.id].text for row in rows], classifier)
            records.write_support(key, system.key, number, dict(zip([row.id for row in rows], found, strict=True)))
        log(f"consistency of {system.name}: looked at by {classifier.name}")
    return key


def judge_tried(options: JudgeOptions, judge: System, records: Records, log: Log) -> Asking:
    """A judge that can be asked. Raises FtcoreError for one that does not answer, or gives no verdict."""
    rubric, prices, asked = of_support(options.rubric), Prices(*options.prices), records.questions()
    facts = {"judge": judge.facts(), "rubric": rubric.digest, "max_tokens": options.max_tokens}
    replies = Replies(records.folder / f"{FOLDER}/{_slug(judge.name)}-{digest_of(facts)[:8]}", facts)
    before = [replies.form()[1], *(reply.spent for reply in replies.read().values())]
    purse = Purse(Limit.parse(options.limit, prices), prices, before)
    terms = Terms(options.max_tokens, options.at_once, options.most_unjudged * len(asked))
    asking = Asking(judge, Torch(max_batch=options.at_once, max_context=options.context), rubric, replies, purse, terms, log)
    asyncio.run(asking.try_out())
    return asking


def by_judge(asking: Asking, records: Records, systems: Sequence[System], log: Log) -> str:
    """As `by_model`. Raises DataError where the judge cannot be read, Interrupted where its limit comes first."""
    replies, judge, asked = asking.replies, asking.system, records.questions()
    key = replies.folder.url.removeprefix(records.folder.url).strip("/")
    cases = _cases(asked, {system.key: {row.id: row for row in records.answers(system.key)} for system in systems})
    stopped = asyncio.run(asking.ask(cases, replies.read()))
    told = replies.read()
    unread = {case.id for case in cases if case.key in told and not told[case.key].verdict}
    if len(unread) > asking.terms.most_unread:
        raise DataError(
            "the judge's verdicts on consistency cannot be read", where=judge.name, got=f"{len(unread):,} rows without one",
            wanted=f"at most {asking.terms.most_unread:g} of {len(asked):,}", remedy="take another judge, or allow more: --unjudged",
        )  # fmt: skip
    if stopped:
        done = sum(case.key in told for case in cases)
        raise Interrupted(
            f"stopped before all answers were judged: {stopped}", where=judge.name, got=f"{done:,} of {len(cases):,} answers",
            remedy="a higher --judge-limit: the same command goes on, and asks only what is missing",
        )  # fmt: skip
    log(f"consistency: looked at by {judge.name}; {asking.purse.spent.calls:,} calls, {asking.purse.spent.tokens:,} tokens")
    for system in systems:
        for number, rows in _windows(asked):
            if not records.has_support(key, system.key, number):
                verdicts = {row.id: told[row.id, system.key].verdict if (row.id, system.key) in told else "no" for row in rows}
                found = {id: float(verdict == YES) if verdict else None for id, verdict in verdicts.items()}
                records.write_support(key, system.key, number, found)
    return key


def source_of(row: Asked) -> str:
    """Everything that was said before, but by the assistant."""
    return "\n\n".join(turn.content for turn in row.turns if turn.role != "assistant")


def _cases(asked: Sequence[Asked], given: Mapping[str, Mapping[str, Given]]) -> list[Case]:
    """A row of every system beside each other, rows by their content. An answer of nothing is supported by nothing: nobody is asked."""
    return [
        Case(row.id, key, (("source", source_of(row)), ("answer", rows[row.id].text.strip())))
        for row in sorted(asked, key=lambda row: row.content)
        for key, rows in given.items()
        if rows[row.id].text.strip()
    ]


def _windows(rows: Sequence[Asked]) -> list[tuple[int, Sequence[Asked]]]:
    return [(at // WINDOW, rows[at : at + WINDOW]) for at in range(0, len(rows), WINDOW)]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-60:]
