"""Personas: who sits at the simulated desktops, and what each of them does when something happens.

In: a seeded generator. Out: teams of personas with habits: for every situation, how likely each routine is. Runs in: everywhere.

A *situation* is something the desktop does to its user (a download ends, a build fails, an application hangs). A *routine* is what a user
does about it: one to three operations. A persona has one routine of choice for each situation (probability 0.75 to 0.97), its own
folders, applications and colleagues. A team shares most habits; each user has a few of their own. Text in braces is a slot:

    from the event     {f} a new file · {g} that file renamed · {n} a colleague · {a} a running application · {pid} its process
    from the session   {last} the file in hand before this event · {first} the session's first file · {sent} what {n} mailed earlier
    from the persona   {inbox} {archive} {share} folders · {editor} {viewer} {browser} {mailer} applications · {boss} {buddy} · {suffix}
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

DOCUMENTS: tuple[str, ...] = (
    "plan", "report", "memo", "notes", "budget", "offer", "letter", "agenda", "draft", "thesis", "survey", "poster", "manual",
    "guide", "menu", "contract", "lease", "resume", "essay", "brief", "summary", "review", "recipe", "roster", "pitch", "quote",
    "permit", "ticket", "visa", "syllabus",
)  # fmt: skip
SOURCES: tuple[str, ...] = (
    "parser", "lexer", "server", "client", "cache", "router", "model", "trainer", "loader", "logger", "queue", "worker", "timer",
    "socket", "buffer", "mapper", "solver", "packer",
)  # fmt: skip
PICTURES: tuple[str, ...] = (
    "photo", "screen", "chart", "logo", "icon", "map", "scan", "sketch", "banner", "diagram",
)  # fmt: skip
TABLES: tuple[str, ...] = (
    "sales", "stock", "orders", "wages", "grades", "tests", "users", "costs", "trips", "hours",
)  # fmt: skip
LOGS: tuple[str, ...] = (
    "nginx", "cron", "kernel", "mailer", "backup", "auth", "sync", "db",
)  # fmt: skip
EXTENSIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "document": (DOCUMENTS, (".doc", ".pdf", ".odt", ".md", ".txt")),
    "source": (SOURCES, (".py", ".c", ".go", ".rs", ".js")),
    "picture": (PICTURES, (".png", ".jpg", ".svg")),
    "table": (TABLES, (".csv", ".xls")),
    "log": (LOGS, (".log",)),
    "bundle": (DOCUMENTS, (".zip", ".tar")),
}
PEOPLE: tuple[str, ...] = (
    "ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana", "ivan", "jo", "kira", "leo", "mira", "nils", "olga", "paul",
    "quin", "rosa", "sam", "tara", "uma", "vic", "wendy", "xena", "yan", "zoe",
)  # fmt: skip
FOLDERS: tuple[str, ...] = (
    "attic", "desk", "drawer", "shelf", "vault", "stack", "cellar", "dock", "harbor", "tray", "box", "locker", "garden", "island",
    "bridge", "tower", "lab", "studio", "depot", "barn", "cabin", "loft", "nest", "cove",
)  # fmt: skip
SLOTS: dict[str, tuple[str, ...]] = {
    "inbox": FOLDERS, "archive": FOLDERS, "share": FOLDERS, "boss": PEOPLE, "buddy": PEOPLE,
    "editor": ("writer", "vim", "emacs", "nano", "kate", "code"),
    "viewer": ("reader", "evince", "okular", "preview", "acrobat"),
    "browser": ("firefox", "chrome", "opera", "edge", "safari"),
    "mailer": ("outlook", "thunderbird", "mutt", "gmail", "kmail"),
    "suffix": ("_final", "_old", "_done", "_checked", "_copy", "_mine"),
}  # fmt: skip
APPLICATIONS = frozenset(SLOTS["editor"] + SLOTS["viewer"] + SLOTS["browser"] + SLOTS["mailer"])


@dataclass(frozen=True)
class Situation:
    """Something that happens, as the collector words it, and the routines a user may answer with (operations parted by `;`)."""

    name: str
    event: str
    routines: tuple[tuple[str, ...], ...]
    file: str = ""
    """Kind of the new file `{f}`, a key of EXTENSIONS."""


def _situation(name: str, event: str, file: str, routines: str) -> Situation:
    """`routines` are parted by `|`, the operations of one by `;`."""
    return Situation(name, event, tuple(tuple(step.strip() for step in routine.split(";")) for routine in routines.split("|")), file)


SITUATIONS: tuple[Situation, ...] = (
    _situation("login", "login", "", "start {mailer} | start {browser} | start {editor} | $ git pull | open {inbox} | $ htop"),
    _situation(
        "download", "download {f}", "document",
        "open {f} {viewer} | move {f} {inbox}; open {f} {viewer} | rename {f} {g}; move {g} {archive} | delete {f} | copy "
        "{f} {share} | mail {f} {buddy} | move {f} {archive}",
    ),
    _situation(
        "attachment", "mail {n} {f}", "document",
        "reply {n} | move {f} {inbox} | open {f} {editor}; reply {n} | mail {f} {boss} | print {f} | open {f} {viewer}; move "
        "{f} {archive} | copy {f} {share}",
    ),
    _situation(
        "saved", "saved {f}", "document",
        "copy {f} {share} | rename {f} {g} | mail {f} {boss}; close {editor} | print {f}; close {editor} | $ git add {f} | "
        "rename {f} {g}; mail {g} {buddy} | copy {f} {archive}",
    ),
    _situation(
        "failed", "failed {f}", "source",
        "open {f} {editor} | $ git diff {f} | $ make test | $ git stash | chat {buddy}; open {f} {editor} | $ git checkout "
        "{f} | $ grep todo {f}",
    ),
    _situation(
        "passed", "passed {f}", "source",
        "$ git add {f}; $ git commit; $ git push | $ git push | copy {f} {share} | chat {boss} | $ make deploy | $ git "
        "commit; $ make deploy | $ git add {f}; $ git stash",
    ),
    _situation(
        "pulled", "pulled {f}", "source",
        "open {f} {editor} | $ make test | $ git log {f} | $ git diff {f}; chat {boss} | copy {f} {archive} | $ wc {f}",
    ),
    _situation(
        "hung", "hung {a}", "",
        "kill {pid} | close {a} | close {a}; start {a} | $ kill -9 {pid} | wait | $ htop; kill {pid}",
    ),
    _situation(
        "full", "disk full", "",
        "delete {last} | zip {last} | $ du {archive} | move {last} {archive} | delete {first} | open {archive}",
    ),
    _situation(
        "called", "call {n}", "",
        "open {sent} {viewer} | mute {n} | share {sent} | decline {n}; chat {n} | share {last} | print {sent}",
    ),
    _situation(
        "unlocked", "unlock", "",
        "open {last} {editor} | start {mailer} | open {first} {viewer} | start {browser} | $ git status | chat {buddy}",
    ),
    _situation(
        "stick", "usb", "",
        "copy {last} usb; eject usb | open usb | eject usb | copy {first} usb | move {last} usb | $ ls usb",
    ),
    _situation(
        "screenshot", "screenshot {f}", "picture",
        "rename {f} {g} | mail {f} {buddy} | delete {f} | move {f} {share} | open {f} {viewer} | print {f}; delete {f} | "
        "rename {f} {g}; move {g} {inbox}",
    ),
    _situation(
        "exported", "export {f}", "table",
        "open {f} {editor} | $ python clean.py {f} | zip {f}; mail {f} {boss} | move {f} {inbox} | copy {f} usb | $ head "
        "{f}; move {f} {archive} | $ sort {f}",
    ),
    _situation(
        "bundle", "download {f}", "bundle",
        "unzip {f}; delete {f} | unzip {f} | move {f} {archive} | scan {f}; unzip {f} | delete {f} | copy {f} {share}",
    ),
    _situation(
        "alert", "alert {f}", "log",
        "$ tail {f} | $ grep error {f} | open {f} {editor} | mail {f} {boss} | $ tail {f}; chat {buddy} | mute alert",
    ),
    _situation(
        "update", "update {a}", "",
        "install {a} | later | close {a}; install {a} | mute {a} | $ sudo upgrade | start {browser}",
    ),
    _situation(
        "asked", "chat {n}", "",
        "chat {n} | mute {n} | share {last}; chat {n} | call {n} | open {sent} {editor} | mail {sent} {n}",
    ),
    _situation(
        "meeting", "meeting {n}", "",
        "open {sent} {viewer}; call {n} | call {n} | decline {n} | print {last} | start {browser} | chat {n}",
    ),
    _situation(
        "conflict", "conflict {f}", "document",
        "rename {f} {g} | delete {f} | open {f} {editor}; copy {f} {share} | chat {buddy} | move {f} {archive} | $ diff {f} "
        "{last}",
    ),
)  # fmt: skip
BY_NAME = {situation.name: situation for situation in SITUATIONS}


@dataclass(frozen=True)
class Persona:
    """One user: `slots` fill the persona's braces, `habits[situation]` are the probabilities of its routines, in order."""

    user: str
    slots: dict[str, str]
    habits: dict[str, tuple[float, ...]]
    rates: dict[str, float]
    """How often each situation comes, relative to the others."""

    def favourite(self, situation: str) -> int:
        return int(np.argmax(self.habits[situation]))


@dataclass(frozen=True)
class Team:
    """A tenant: several users who share most habits."""

    name: str
    personas: tuple[Persona, ...]


def draw_team(rng: np.random.Generator, name: str, *, users: int = 2, own_share: float = 0.25, avoid: Team | None = None) -> Team:
    """A random team. `own_share` of the situations each user handles their own way. With `avoid`, every favourite routine and every slot
    contradicts that team's: the same event, another answer."""
    other = avoid.personas[0] if avoid else None
    shared = draw_persona(rng, "", other)
    names = rng.permutation([person for person in PEOPLE if person not in (shared.slots["boss"], shared.slots["buddy"])])
    personas = []
    for user in names[:users]:
        own = draw_persona(rng, str(user), other)
        mine = set(rng.permutation([s.name for s in SITUATIONS])[: round(own_share * len(SITUATIONS))]) if users > 1 else set()
        habits = {name: (own if name in mine else shared).habits[name] for name in shared.habits}
        personas.append(Persona(str(user), {**shared.slots, "editor": own.slots["editor"]}, habits, own.rates))
    return Team(name, tuple(personas))


def draw_persona(rng: np.random.Generator, user: str, avoid: Persona | None = None) -> Persona:
    slots: dict[str, str] = {}
    for slot, values in SLOTS.items():
        taken = set(slots.values()) | ({avoid.slots[slot]} if avoid else set())
        slots[slot] = str(rng.choice([value for value in values if value not in taken]))
    habits = {s.name: draw_habit(rng, len(s.routines), avoid.favourite(s.name) if avoid else None) for s in SITUATIONS}
    rates = rng.gamma(4.0, 0.25, len(SITUATIONS))
    return Persona(user, slots, habits, {s.name: float(rate) for s, rate in zip(SITUATIONS, rates, strict=True)})


def draw_habit(rng: np.random.Generator, count: int, avoid: int | None = None) -> tuple[float, ...]:
    """Probabilities of `count` routines: one favourite with 0.75 to 0.97, the rest shared by the others; `avoid` is not the favourite."""
    favourite = int(rng.choice([index for index in range(count) if index != avoid]))
    strength = rng.uniform(0.75, 0.97)
    rest = rng.dirichlet(np.full(count - 1, 0.5)) * (1 - strength)
    return tuple(float(p) for p in np.insert(rest, favourite, strength))


def drifted(team: Team, rng: np.random.Generator, *, share: float = 0.4) -> Team:
    """The same team another day: for `share` of the situations everybody has a new favourite, and files go to a new archive."""
    names = [s.name for s in SITUATIONS]
    changed: Iterable[str] = rng.permutation(names)[: round(share * len(names))]
    fresh = {name: draw_habit(rng, len(BY_NAME[name].routines), team.personas[0].favourite(name)) for name in map(str, changed)}
    used = set(team.personas[0].slots.values())
    archive = str(rng.choice([folder for folder in FOLDERS if folder not in used]))
    return Team(
        team.name,
        tuple(replace(p, habits={**p.habits, **fresh}, slots={**p.slots, "archive": archive}) for p in team.personas),
    )
