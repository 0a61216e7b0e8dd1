"""Simulator: desktop sessions of a persona, event by event, with the exact probability of everything the user does.

In: a persona, a seeded generator. Out: Sessions: an event log as a collector would write it, and the odds of each operation.
Runs in: everywhere.

Nothing the user does depends on anything hidden: given the persona and what is visible in the session, the distribution of the next
operation is known exactly (`Odds`). A predictor that knows the persona and picks the likeliest operation each time is the best there is;
its expected hit rate is the ceiling.

An event log line (JSONL): time (seconds into the session), session, user, actor (`system`: it happened; `user`: an operation), kind, args,
and for processes: process, pid, parent, ppid, memory_mib. `window_focus` lines carry the keyboard and mouse counts since the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ftcore.demo.personas import APPLICATIONS, BY_NAME, EXTENSIONS, PEOPLE, SITUATIONS, Persona, Situation, Team


@dataclass(frozen=True, slots=True)
class Event:
    time: float
    session: str
    user: str
    actor: str
    kind: str
    args: tuple[str, ...] = ()
    process: str = ""
    pid: int = 0
    parent: str = ""
    ppid: int = 0
    memory_mib: int = 0
    keys: int = 0
    clicks: int = 0

    def to_json(self) -> dict[str, Any]:
        """Without what does not apply to this kind of event."""
        facts = {key: getattr(self, key) for key in self.__slots__}
        return {key: value for key, value in facts.items() if value or key == "time"}


@dataclass(frozen=True, slots=True)
class Odds:
    """What was known about one operation before it was done."""

    operation: str
    probability: float
    best: str
    best_probability: float


@dataclass(frozen=True)
class Session:
    events: tuple[Event, ...]
    odds: tuple[Odds, ...]
    """One for each operation (event of actor `user`), in order."""


@dataclass
class Desktop:
    """What is visible in a session so far, and the clock."""

    persona: Persona
    rng: np.random.Generator
    name: str
    clock: float = 0.0
    running: dict[str, int] = field(default_factory=dict)
    """Application -> pid."""
    files: list[str] = field(default_factory=list)
    """Files in the order they were last touched."""
    first: str = ""
    sent: dict[str, str] = field(default_factory=dict)
    """Colleague -> the last file they mailed."""
    cast: tuple[str, ...] = ()
    events: list[Event] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)

    def log(self, actor: str, kind: str, args: Iterable[str] = (), **facts: Any) -> None:
        self.clock += float(self.rng.exponential(8.0 if actor == "user" else 2.0))
        self.events.append(Event(round(self.clock, 1), self.name, self.persona.user, actor, kind, tuple(args), **facts))

    def touch(self, file: str) -> None:
        self.files = [*(known for known in self.files if known != file), file]
        self.first = self.first or file

    def operate(self, operation: str) -> None:
        """Does it: the log line, and what follows on the desktop (processes started and stopped, files touched)."""
        kind, *args = operation.split(" ")
        self.log("user", kind, args)
        if kind in ("kill", "$") and args[-1].isdigit():
            for app in [app for app, pid in self.running.items() if pid == int(args[-1])]:
                self.stop(app)
        for word in args:
            if "." in word and word != "clean.py":
                self.touch(word)
            if word in APPLICATIONS and kind in ("start", "open"):
                self.start(word)
            elif word in self.running and kind == "close":
                self.stop(word)
        if kind == "rename":
            self.files = [known for known in self.files if known != args[0]]

    def start(self, app: str) -> None:
        if app in self.running:
            touches: dict[str, Any] = {"keys": int(self.rng.poisson(60)), "clicks": int(self.rng.poisson(9))}
            self.log("system", "window_focus", process=app, pid=self.running[app], **touches)
            return
        self.running[app] = int(self.rng.integers(100, 1000))
        facts: dict[str, Any] = {"parent": "shell", "ppid": 812, "memory_mib": int(self.rng.integers(20, 99))}
        self.log("system", "process_start", process=app, pid=self.running[app], **facts)

    def stop(self, app: str) -> None:
        self.log("system", "process_stop", process=app, pid=self.running.pop(app))


def simulate(persona: Persona, rng: np.random.Generator, name: str, *, num_events: tuple[int, int] = (8, 12)) -> Session:
    """One session: login, then between `num_events` situations in random order, each answered by one routine."""
    cast = rng.choice([person for person in PEOPLE if person != persona.user], 3, replace=False)
    desktop = Desktop(persona, rng, name, cast=tuple(map(str, cast)))
    happen(desktop, BY_NAME["login"])
    names = [s.name for s in SITUATIONS if s.name != "login"]
    rates = np.array([persona.rates[n] for n in names])
    for _ in range(int(rng.integers(num_events[0], num_events[1] + 1))):
        possible = np.array([can_happen(desktop, BY_NAME[n]) for n in names])
        odds = rates * possible
        happen(desktop, BY_NAME[str(rng.choice(names, p=odds / odds.sum()))])
    return Session(tuple(desktop.events), tuple(desktop.odds))


def can_happen(desktop: Desktop, situation: Situation) -> bool:
    """A situation needs the things its event and every one of its routines speak of."""
    there = {"{a}": bool(desktop.running), "{sent}": bool(desktop.sent), "{last}": bool(desktop.files), "{first}": bool(desktop.files)}
    return all(there[slot] for slot in needs(situation))


@cache
def needs(situation: Situation) -> tuple[str, ...]:
    text = " ".join([situation.event, *(step for routine in situation.routines for step in routine)])
    return tuple(slot for slot in ("{a}", "{sent}", "{last}", "{first}") if slot in text)


def happen(desktop: Desktop, situation: Situation) -> None:
    """The event, then one routine drawn from the persona's habit, with the odds of each step as they stood just before it."""
    rng = desktop.rng
    slots = event_slots(desktop, situation)
    event = situation.event.format(**slots)
    kind, *args = event.split(" ")
    desktop.log("system", kind, args)
    if situation.name == "attachment":
        desktop.sent[slots["n"]] = slots["f"]
    if "f" in slots:
        desktop.touch(slots["f"])
    routines = [tuple(step.format(**slots) for step in routine) for routine in situation.routines]
    weights = desktop.persona.habits[situation.name]
    chosen = routines[int(rng.choice(len(routines), p=np.array(weights) / math.fsum(weights)))]
    for step, operation in enumerate(chosen):
        desktop.odds.append(odds_of(operation, next_operations(routines, weights, chosen[:step])))
        desktop.operate(operation)


def event_slots(desktop: Desktop, situation: Situation) -> dict[str, str]:
    """Everything a brace may stand for in this situation, at this moment."""
    rng, slots = desktop.rng, dict(desktop.persona.slots)
    slots["n"] = str(rng.choice(list(desktop.sent) if "{sent}" in needs(situation) else list(desktop.cast)))
    slots["sent"] = desktop.sent.get(slots["n"], "")
    slots["last"], slots["first"] = (desktop.files[-1] if desktop.files else ""), desktop.first
    if desktop.running:
        slots["a"] = str(rng.choice(list(desktop.running)))
        slots["pid"] = str(desktop.running[slots["a"]])
    if situation.file:
        stems, extensions = EXTENSIONS[situation.file]
        stem, extension = f"{rng.choice(stems)}{rng.integers(1, 10)}", str(rng.choice(extensions))
        slots["f"], slots["g"] = stem + extension, stem + slots["suffix"] + extension
    return slots


def next_operations(routines: list[tuple[str, ...]], weights: Iterable[float], done: tuple[str, ...]) -> dict[str, float]:
    """P(next operation | what was done since the event, and that the routine goes on): routines that began otherwise are out."""
    odds: dict[str, float] = {}
    for routine, weight in zip(routines, weights, strict=True):
        if len(routine) > len(done) and routine[: len(done)] == done:
            odds[routine[len(done)]] = odds.get(routine[len(done)], 0.0) + weight
    total = math.fsum(odds.values())
    return {operation: weight / total for operation, weight in odds.items()}


def odds_of(operation: str, odds: dict[str, float]) -> Odds:
    best = max(odds, key=lambda text: odds[text])
    return Odds(operation, odds[operation], best, odds[best])


def sessions(team: Team, count: int, seed: int, *, day: str = "mon") -> Iterator[Session]:
    """`count` sessions of the team's users in turn; each has its own generator, so any one can be made again alone."""
    for index in range(count):
        persona = team.personas[index % len(team.personas)]
        yield simulate(persona, np.random.default_rng([seed, index]), f"{team.name}-{day}-{index:04d}")


@dataclass(frozen=True)
class Ceiling:
    """The best any predictor can do on these sessions."""

    exact_match: float
    """Mean over operations of the likeliest one's probability: what the best predictor is expected to hit."""
    nll: float
    """Mean negative log-probability of an operation, in nats."""
    num_operations: int


def ceiling(made: Iterable[Session]) -> Ceiling:
    odds = [one for session in made for one in session.odds]
    hit, nll = math.fsum(one.best_probability for one in odds), -math.fsum(math.log(one.probability) for one in odds)
    return Ceiling(hit / len(odds), nll / len(odds), len(odds))
