"""Desk: one rater's sitting: which pair is shown next, in which order, and what a key means. The terminal and the page share it.

In: pairs, a rater's file, keys. Out: what to show; judgements in the file. Runs in: a person's terminal, the page's server.

Everybody sees the rows in one order, so that raters who stop early still share rows. Which answer stands first is drawn by row and rater:
a rater who favours the first one favours no system, and two raters see the pair in different orders half of the time.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ftcore.card import utc_now
from ftcore.feedback.judgements import HIGHEST, LOWEST, Choice, Judgement, RaterFile
from ftcore.feedback.pairs import Pair

SCORES = re.compile(rf"^[{LOWEST}-{HIGHEST}]{{2}}$")
KEYS = {"a": "first", "b": "second", "t": "tie", "s": "skip"}


@dataclass(frozen=True)
class Shown:
    """What a rater sees. `number` from 1; `id` says which pair a key is meant for."""

    id: str
    number: int
    total: int
    prompt: Sequence[dict[str, str]]
    first: str
    second: str


class Desk:
    """`scored`: a judgement is two digits, the first answer's score and the second's; else one of a, b, t, s."""

    def __init__(self, pairs: Sequence[Pair], file: RaterFile, *, scored: bool) -> None:
        self._pairs, self._file, self.scored = {pair.id: pair for pair in pairs}, file, scored
        self._since = time.monotonic()
        self.made = 0
        """Judgements of this sitting that stand."""

    @property
    def current(self) -> Shown | None:
        """None where everything is judged."""
        judged = {judgement.pair for judgement in self._file.kept}
        pair = next((pair for key, pair in self._pairs.items() if key not in judged), None)
        if pair is None:
            return None
        first, second = (pair.a, pair.b) if order(pair.id, self._file.rater) == "ab" else (pair.b, pair.a)
        done = len(judged & self._pairs.keys())
        return Shown(pair.id, done + 1, len(self._pairs), pair.prompt, first, second)

    def press(self, key: str) -> bool:
        """Judges the current pair, or takes the last judgement back (u). False for a key that means nothing here."""
        shown = self.current
        if key == "u":
            undone = self._file.undo()
            self.made -= undone is not None
            self._since = time.monotonic()
            return undone is not None
        if shown is None or not (SCORES.match(key) or key == "s" if self.scored else key in KEYS):
            return False
        seen = order(shown.id, self._file.rater)
        scores = (int(key[0]), int(key[1])) if self.scored and key != "s" else None
        if scores is not None:
            scores = scores if seen == "ab" else scores[::-1]
            choice: Choice = "tie" if scores[0] == scores[1] else "a" if scores[0] > scores[1] else "b"
        else:
            choice = "skip" if key == "s" else "tie" if key == "t" else "a" if (key == "a") == (seen == "ab") else "b"
        seconds = round(time.monotonic() - self._since, 1)
        self._file.add(Judgement(shown.id, self._file.rater, choice, seen, scores, seconds, utc_now()))
        self._since, self.made = time.monotonic(), self.made + 1
        return True


def order(pair: str, rater: str) -> Literal["ab", "ba"]:
    """Which answer this rater sees first: drawn once, the same after a restart."""
    return "ab" if hashlib.sha256(f"{pair} {rater}".encode()).digest()[0] % 2 else "ba"
