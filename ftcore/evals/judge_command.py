"""Judging: `ftcore compare DIR A B --judge SYSTEM`: a judge asked about two systems' answers, from the questions to the page.

In: two systems' answers, the options of a judge. Out: a Judgement, its files beside the answers. Runs in: a person's terminal.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, DataError, Interrupted
from ftcore.evals.judge import Asking, Terms
from ftcore.evals.judge_options import JudgeOptions
from ftcore.evals.judgement import About, Judgement, weigh
from ftcore.evals.kappa import people
from ftcore.evals.pairs import Pairing
from ftcore.evals.replies import Replies
from ftcore.evals.rubric import of_pairs
from ftcore.evals.spending import Limit, Prices, Purse
from ftcore.evals.systems import System, resolve
from ftcore.report.judgement import FOLDER, list_judgements, write_judgement
from ftcore.storage import Folder, digest_of

Log = Callable[[str], None]


def judge_of(options: JudgeOptions) -> System:
    """Raises ConfigError or ModelError for one that is not there, or comes with examples."""
    name = options.judge
    system = resolve([name], base=options.base, revision="main", store=options.store, key_variable=options.key_variable, option="--judge")[
        0
    ]
    if system.shots:
        raise ConfigError("a judge is shown no examples", where="--judge", got=name, wanted=name.rpartition("+")[0])
    return system


def judge_pair(options: JudgeOptions, pairing: Pairing, folder: Folder, log: Log) -> Judgement:
    """Asks what was not asked before, and writes the judgement's files into the evaluation's folder."""
    options.check()
    rubric, labels = of_pairs(options.rubric), people(options.human, pairing) if options.human else []
    if not any(row.text.strip() for row in (*pairing.ours.rows, *pairing.theirs.rows)):
        raise DataError("there are no words to judge", where=folder, remedy="ftcore evaluate --task answers, into another folder")
    system, prices = judge_of(options), Prices(*options.prices)
    facts = {"judge": system.facts(), "rubric": rubric.digest, "max_tokens": options.max_tokens, "answers": _answers(pairing)}
    place = folder / f"{FOLDER}/{_name(pairing)}-{digest_of(facts)[:8]}"
    replies, cases = Replies(place, facts), pairing.cases()
    kept = replies.read()
    purse = Purse(Limit.parse(options.limit, prices), prices, [replies.form()[1], *(reply.spent for reply in kept.values())])
    terms = Terms(options.max_tokens, options.at_once, options.most_unjudged * len(cases) / 2)
    asking = Asking(system, Torch(max_batch=options.at_once, max_context=options.context), rubric, replies, purse, terms, log)
    stopped = asyncio.run(asking.ask(cases, kept))
    money = prices.of(purse.spent) if any(options.prices) else None
    about = About(
        system.name, rubric.origin, rubric.digest, purse.spent, money, stopped, options.most_unjudged, options.confidence, str(place)
    )
    found = weigh(pairing, pairing.bouts(replies.read()), about, labels)
    write_judgement(place, found)
    list_judgements(folder)
    return found


def check_judgement(found: Judgement) -> None:
    """Raises DataError where the judge cannot be read often enough to be believed, Interrupted where its limit came first."""
    about = found.about
    if not found.is_trusted:
        raise DataError(
            found.sentence(), where=about.judge, got=f"{found.num_unread:,} of {found.num_asked:,} rows unjudged",
            wanted=f"at most {100 * about.most_unjudged:g} %",
            remedy="see what it says on the page; take another judge, more --judge-tokens, or allow more: --unjudged",
        )  # fmt: skip
    if about.stopped:
        done = f"{found.num_rows - found.num_missing:,} of {found.num_rows:,} rows"
        raise Interrupted(
            f"stopped before all rows were judged: {about.stopped}", where=about.judge,
            got=f"{done}, {about.spent.calls:,} calls, {about.spent.tokens:,} tokens",
            remedy="a higher --judge-limit: the same command goes on, and asks only what is missing",
        )  # fmt: skip


def _name(pairing: Pairing) -> str:
    both = "-".join(sorted((pairing.ours.system, pairing.theirs.system)))
    return re.sub(r"[^A-Za-z0-9]+", "-", both).strip("-")[:80]


def _answers(pairing: Pairing) -> str:
    """A digest of what is judged; A against B is B against A."""
    sides = [[each.system, [[row.id, row.text] for row in each.rows]] for each in (pairing.ours, pairing.theirs)]
    return digest_of(sorted(sides, key=lambda side: str(side[0])))
