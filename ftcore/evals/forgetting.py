"""Forgetting: what a system knew before it was tuned, judged on a general set: the base before, the adapter after, on the same rows.

In: verdicts of tuned systems against their base. Out: sentences. Runs in: the driver.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftcore.evals.systems import System
from ftcore.evals.verdict import Verdict

BEFORE = "base"


def told(verdicts: Sequence[Verdict]) -> list[str]:
    """One sentence a verdict: forgets, does not forget, or nobody can tell."""
    return [_told(verdict) for verdict in verdicts]


def _told(verdict: Verdict) -> str:
    sentence = verdict.sentence()
    if not verdict.better:
        return f"cannot tell whether {verdict.ours} forgets: {sentence}"
    return f"{verdict.ours} forgets: {sentence}" if verdict.better == verdict.theirs else f"{verdict.ours} does not forget: {sentence}"


def judged_before_and_after(systems: Sequence[System]) -> tuple[str, ...]:
    """Their names, the base first: those whose weights are here, without examples in front, which belong to the other task."""
    return BEFORE, *(each.name for each in systems if each.endpoint is None and not each.shots and each.name != BEFORE)
