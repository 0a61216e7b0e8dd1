"""Pace: how many rows of who asks much fit into a step beside who asks little, found as the engine works.

In: rows and seconds of steps. Out: how many rows more may take part. Runs in: the engine's thread. No torch here.

On a processor a step with sixteen rows takes three times as long as with one; on a GPU hardly longer; adapters, lengths and what else runs
on the machine change it. So it is tried: a step that keeps to the limit lets in a little more, one that does not takes a part away (AIMD:
Chiu and Jain 1989, "Analysis of the increase and decrease algorithms for congestion avoidance"). Now and then a step is made without the
others, to know how long it would take.
"""

from __future__ import annotations

FASTER, SLOWER = 0.5, 0.02
"""How far a known time is moved towards the newest one's: what is kept is about the fastest, for the rest waited for others' work."""
MORE, LESS = 0.25, 0.8
"""Rows added after a step within the limit; part that is left after one beyond it."""
LEAST = 0.25
"""Rows a step at least: one in each fourth."""
KNOWN_FOR = 16
"""Steps beside others for which the time without them is taken to be the same."""


class Pace:
    """One for each engine."""

    def __init__(self, stretch: float | None, most: int) -> None:
        """`stretch`: how many times its own length a step may take for others' rows; None: as it comes. `most`: rows there are."""
        self.stretch, self.most = stretch, most
        self._others = float(most)
        self._due = 0.0
        self._alone: dict[int, float] = {}
        self._known_for: dict[int, int] = {}

    def beside(self, num_own: int) -> int:
        """Others' rows that may take part in the next step, with `num_own` rows of those who ask little."""
        if self.stretch is None:
            return self.most
        if num_own and not self._known_for.get(num_own):
            return 0
        self._due = min(self._due, 1.0) + self._others
        return int(self._due)

    def took(self, num_own: int, num_others: int, seconds: float) -> None:
        """A step of decoding rows and nothing else. Where nobody is held back, all are their own."""
        self._due = max(0.0, self._due - num_others)
        if not num_others:
            before = self._alone.get(num_own, seconds)
            self._alone[num_own] = before + (FASTER if seconds < before else SLOWER) * (seconds - before)
            self._known_for[num_own] = KNOWN_FOR
        elif self.stretch is not None and num_own in self._alone:
            self._known_for[num_own] = max(0, self._known_for[num_own] - 1)
            if seconds > self.stretch * self._alone[num_own]:
                self._others = max(LEAST, LESS * min(self._others, num_others))
            elif num_others >= int(self._others):
                self._others = min(float(self.most), self._others + MORE)
