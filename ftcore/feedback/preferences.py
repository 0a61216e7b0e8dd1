"""Preferences: what several raters' judgements come to, as rows that training reads (format `preference`).

In: pairs, judgements by rater. Out: rows {prompt, chosen, rejected} with where they come from beside them. Runs in: a person's terminal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ftcore.feedback.judgements import Judgement
from ftcore.feedback.pairs import Pair
from ftcore.storage import Folder

PREFERENCES = "preferences.jsonl"


@dataclass(frozen=True)
class Preferred:
    """`left_out`: judged pairs that make no row, by reason."""

    rows: tuple[dict[str, Any], ...]
    left_out: dict[str, int]


def preferred(pairs: Sequence[Pair], judgements: Mapping[str, Sequence[Judgement]]) -> Preferred:
    """A pair makes a row where more than half of those who judged it prefer the same answer; who skipped it did not judge it."""
    of_pair: dict[str, list[Judgement]] = {}
    for each in judgements.values():
        for judgement in each:
            if judgement.choice != "skip":
                of_pair.setdefault(judgement.pair, []).append(judgement)
    rows, reasons = [], Counter[str]()
    for pair in pairs:
        said = of_pair.get(pair.id, [])
        votes = Counter(judgement.choice for judgement in said)
        winner = next((choice for choice in ("a", "b") if 2 * votes[choice] > len(said)), "")
        if winner:
            rows.append(_row(pair, winner, votes, said))
        elif said:
            reasons["a tie" if 2 * votes["tie"] > len(said) else "the raters differ"] += 1
    return Preferred(tuple(rows), dict(reasons))


def write_preferences(folder: Folder, found: Preferred) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in found.rows)
    folder.write(PREFERENCES, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def _row(pair: Pair, winner: str, votes: Counter[Any], said: Sequence[Judgement]) -> dict[str, Any]:
    """Plain text where one question was asked, turns otherwise; the rest beside it is for people and other programs."""
    first = winner == "a"
    chosen, rejected = (pair.a, pair.b) if first else (pair.b, pair.a)
    names = (pair.a_from, pair.b_from) if first else (pair.b_from, pair.a_from)
    if [turn["role"] for turn in pair.prompt] == ["user"]:
        texts: dict[str, Any] = {"prompt": pair.prompt[0]["content"], "chosen": chosen, "rejected": rejected}
    else:
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        texts = {"prompt": list(pair.prompt), "chosen": answers[0], "rejected": answers[1]}
    row = {**texts, "chosen_from": names[0], "rejected_from": names[1], "pair": pair.id, "raters": sorted({one.rater for one in said})}
    row["votes"] = {"chosen": votes[winner], "rejected": votes["b" if first else "a"], "tie": votes["tie"]}
    scores = [judgement.scores for judgement in said if judgement.scores]
    if scores:
        means = [fmean(score[at] for score in scores) for at in ((0, 1) if first else (1, 0))]
        row["scores"] = {"chosen": means[0], "rejected": means[1]}
    return row
