"""Pairs: two answers to one question, by systems whose names no rater sees.

In: a folder of `ftcore evaluate` and two of its systems, or a file of rows {prompt, a, b}. Out: Pairs, and how many were left out and why;
the same as a file of their own, so that a second rater needs nothing else. Runs in: a person's terminal; no torch, no ray.

Left out is what teaches nothing: two answers that are the same, an answer that is empty, a row that one of the systems did not answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from ftcore.data.read import plan, read
from ftcore.data.types import Rejected
from ftcore.errors import ConfigError, DataError
from ftcore.evals.records import Records
from ftcore.recipe import Source
from ftcore.storage import Folder, digest_of

PAIRS = "pairs.jsonl"
WANTED = "{prompt: text or turns, a: text, b: text}"
Turns = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """`a_from`, `b_from`: which system gave the answer; for the output only."""

    prompt: Turns
    """Turns {role, content}; the last one asks."""
    a: str
    b: str
    a_from: str = "a"
    b_from: str = "b"

    @property
    def id(self) -> str:
        """16 hex digits of what is judged: the same wherever its row lies."""
        return digest_of([self.prompt, self.a, self.b])[:16]


@dataclass(frozen=True)
class Pairs:
    """`left_out`: how many were, by reason."""

    pairs: tuple[Pair, ...]
    left_out: dict[str, int]

    @property
    def digest(self) -> str:
        return digest_of(sorted(pair.id for pair in self.pairs))

    def write(self, folder: Folder) -> None:
        lines = (json.dumps(asdict(pair), ensure_ascii=False) for pair in self.pairs)
        folder.write(PAIRS, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def written_pairs(folder: Folder) -> Pairs:
    """Those that a folder of labels was begun with. Raises ConfigError where it was not."""
    if not folder.exists(PAIRS):
        raise ConfigError(
            "which answers are to be judged?", where=folder, got="no pairs there yet",
            wanted="ftcore label RESULTS SYSTEM SYSTEM --out DIR, or ftcore label PAIRS.jsonl --out DIR",
        )  # fmt: skip
    records = [json.loads(line) for line in folder.read(PAIRS).splitlines()]
    return Pairs(tuple(Pair(**{**record, "prompt": tuple(record["prompt"])}) for record in records), {})


def evaluated_pairs(folder: str, ours: str, theirs: str) -> Pairs:
    """What two systems of a finished evaluation answered to the same rows. Raises ConfigError for a system that is not there."""
    records = Records(folder)
    keys = {line["name"]: line["key"] for line in records.results()["lines"]}
    for name in (ours, theirs):
        if name not in keys:
            near = get_close_matches(name, keys, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else ""
            raise ConfigError("this evaluation has no such system", where=folder, got=name, wanted=" | ".join(keys), remedy=remedy)
    first, second = ({row.id: row for row in records.answers(keys[name])} for name in (ours, theirs))
    found: list[Pair | str] = []
    for row in records.questions():
        one, other = first.get(row.id), second.get(row.id)
        if one is None or other is None or one.error or other.error:
            found.append("a system did not answer")
            continue
        prompt = tuple({"role": turn.role, "content": turn.content} for turn in row.turns)
        found.append(Pair(prompt, one.text, other.text, ours, theirs))
    return _useful(found, folder)


def file_pairs(path: str) -> Pairs:
    """Rows of a file. Raises DataError with the place of the first that is no pair."""
    return _useful(list(_rows(path)), path)


def _rows(path: str) -> Iterator[Pair]:
    for piece in plan([Source(path=path)]):
        for row in read(piece):
            if isinstance(row, Rejected):
                raise DataError("a row cannot be read", where=row.origin, got=f"{row.reason}: {row.detail}", wanted=WANTED)
            prompt = _turns(row.value.get("prompt"))
            answers = [row.value.get(key) for key in ("a", "b")]
            if prompt is None or not all(isinstance(answer, str) for answer in answers):
                raise DataError("a row is no pair of answers", where=row.origin, got=", ".join(map(str, row.value)), wanted=WANTED)
            names = [str(row.value.get(f"{key}_from", key)) for key in ("a", "b")]
            yield Pair(prompt, str(answers[0]), str(answers[1]), *names)


def _turns(prompt: Any) -> Turns | None:
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, list) or not prompt:
        return None
    turns = [(turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None) for turn in prompt]
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in turns):
        return None
    return tuple({"role": str(role), "content": str(content)} for role, content in turns)


def _useful(found: Sequence[Pair | str], where: str) -> Pairs:
    kept: dict[str, Pair] = {}
    reasons: Counter[str] = Counter()
    for pair in found:
        if isinstance(pair, str):
            reasons[pair] += 1
        elif not pair.a.strip() or not pair.b.strip():
            reasons["an answer is empty"] += 1
        elif pair.a == pair.b:
            reasons["both answers are the same"] += 1
        elif pair.id in kept:
            reasons["the pair is there twice"] += 1
        else:
            kept[pair.id] = pair
    if not kept:
        why = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.items()) or "no rows"
        raise DataError("there is no pair to judge", where=where, got=why, wanted="two different answers to one question")
    return Pairs(tuple(kept.values()), dict(reasons))
