"""Cron: the schedule and the time zone of a RayCronJob, read as the operator's cron library reads them.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from zoneinfo import available_timezones

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import go_duration_s

WORDS = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}
MONTHS = {
    name: number for number, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1)
}
DAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, DAYS),
)


@rule("cron-gate", "without the feature gate RayCronJob the operator does not look at these objects at all")
def cron_gate(scene: Scene) -> Iterator[Flaw]:
    for place in scene.ray("RayCronJob"):
        if not scene.enabled("RayCronJob"):
            yield place["kind"].flaw("the feature gate RayCronJob", "turn the gate on in the operator: it is off by default in 1.7.0")


@rule("cron-schedule", "a schedule that cannot be read never starts anything")
def cron_schedule(scene: Scene) -> Iterator[Flaw]:
    for place in scene.ray("RayCronJob"):
        where = place.down("spec", "schedule")
        if "TZ" in where.text:
            yield where.flaw("no time zone in the schedule", "move it to spec.timeZone")
            continue
        fault = _fault(where.text)
        if fault:
            yield where.flaw(fault, "write five fields like `0 3 * * mon-fri`, or @daily")


def _fault(schedule: str) -> str:
    """What a schedule should be and is not; nothing for a good one."""
    if schedule.startswith("@"):
        every = schedule.removeprefix("@every ")
        good = schedule in WORDS or (every != schedule and go_duration_s(every) is not None)
        return "" if good else f"one of {', '.join(sorted(WORDS))}, or @every DURATION"
    parts = schedule.split()
    if len(parts) != len(FIELDS):
        return "five fields: minute, hour, day of the month, month, day of the week"
    for part, (title, low, high, names) in zip(parts, FIELDS, strict=True):
        if not all(_is_range(item, low, high, names) for item in part.split(",")):
            return f"a {title} of {low} to {high}, not {part}"
    return ""


def _is_range(item: str, low: int, high: int, names: dict[str, int]) -> bool:
    found = re.fullmatch(r"(\*|\?|[0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?(?:/([0-9]+))?", item)
    if not found or (found[3] is not None and int(found[3]) == 0):
        return False
    if found[1] in "*?":
        return found[2] is None
    first = _number(found[1], names)
    last = _number(found[2], names) if found[2] else first
    return first is not None and last is not None and low <= first <= last <= high


def _number(text: str, names: dict[str, int]) -> int | None:
    return int(text) if text.isdigit() else names.get(text.lower())


@rule("cron-time-zone", "a time zone that the operator does not know is refused; an empty one too")
def cron_time_zone(scene: Scene) -> Iterator[Flaw]:
    for place in scene.ray("RayCronJob"):
        where = place.down("spec", "timeZone")
        if not isinstance(where.value, str):
            continue
        known = _zones()
        if not where.text or (known and where.text not in known | {"UTC", "Local"}):
            yield where.flaw("a name of the IANA list, like Europe/Vienna or UTC", "write such a name, or delete timeZone")


@cache
def _zones() -> set[str]:
    """Reads the machine's files once. Empty where there are none: then nothing can be said."""
    return available_timezones()
