"""Shell sessions: what people type into a terminal, in cycles they repeat, and a reader for a shell history of the user's own.

In: a seeded generator, or a history file of bash, zsh or fish. Out: `messages` rows, a command an answer. Runs in: everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftcore.demo.personas import DOCUMENTS, EXTENSIONS, FOLDERS, PEOPLE

CYCLES: tuple[tuple[str, ...], ...] = tuple(
    tuple(cycle.split("; "))
    for cycle in (
        "cd {d}; ls; git status; git pull",
        "{e} {s}; make test; git add {s}; git commit -m {w}",
        "git add {s}; git commit -m {w}; git push",
        "ls -la; cat {t}; rm {t}",
        "mkdir {d}; cd {d}; cp ../{t} .; ls",
        "python {s}; {e} {s}; python {s}",
        "ssh {n}@{d}; tail {l}; exit",
        "grep -n {w} {s}; {e} {s}",
        "git checkout -b {w}; {e} {s}; git push origin {w}",
        "docker build -t {d} .; docker run {d}; docker ps",
        "pip install {w}; python {s}; pip freeze",
        "tar xf {z}; cd {d}; make; make install",
        "ps aux; kill {p}; ps aux",
        "curl localhost:{p}; tail {l}; curl localhost:{p}",
        "mv {t} {d}/; ls {d}; cd {d}",
        "git diff {s}; git stash; git pull; git stash pop",
        "pytest tests/{s}; {e} {s}; pytest tests/{s}",
        "cd ..; ls; cd {d}",
        "scp {t} {n}@{d}:; ssh {n}@{d}; exit",
        "wc -l {t}; sort {t}; head {t}",
        "go build; go test; {e} {s}; go build",
        "kubectl get pods; kubectl logs {d}; kubectl get pods",
        "sudo apt update; sudo apt install {w}",
        "df -h; du -sh {d}; rm -r {d}",
    )
)
EDITORS = ("vim", "nano", "emacs", "code", "hx")
PROMPT = "$"
"""What stands in the user's turn: a shell history does not say what the user saw."""
ZSH = re.compile(r"^: \d+:\d+;")
SESSION_COMMANDS = 16


def shell_session(rng: np.random.Generator) -> dict[str, Any]:
    """One user's terminal session: three to five cycles of their own, repeated with the same few files."""
    own = [CYCLES[i] for i in rng.choice(len(CYCLES), int(rng.integers(3, 6)), replace=False)]
    things = [_things(rng) for _ in range(int(rng.integers(1, 4)))]
    editor = str(rng.choice(EDITORS))
    commands: list[str] = []
    for _ in range(int(rng.integers(5, 14))):
        thing = things[int(rng.integers(len(things)))]
        commands += [step.format(e=editor, **thing) for step in own[int(rng.integers(len(own)))]]
    return shell_row(str(rng.choice(PEOPLE)), commands)


def _things(rng: np.random.Generator) -> dict[str, str]:
    def file(kind: str) -> str:
        stems, extensions = EXTENSIONS[kind]
        return f"{rng.choice(stems)}{rng.integers(1, 10)}{rng.choice(extensions)}"

    words = {"s": file("source"), "t": file("document"), "l": file("log"), "z": file("bundle"), "p": str(rng.integers(100, 1000))}
    return {**words, "d": str(rng.choice(FOLDERS)), "n": str(rng.choice(PEOPLE)), "w": str(rng.choice(DOCUMENTS))}


def shell_row(user: str, commands: Sequence[str]) -> dict[str, Any]:
    """Commands typed one after the other, as one conversation."""
    messages = [{"role": "system", "content": f"user {user}"}]
    for command in commands:
        messages += [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": f"{PROMPT} {command}"}]
    return {"messages": messages}


def history_commands(text: str) -> list[str]:
    """The commands of a history file: bash (one a line, `#time` lines skipped), zsh (`: time:0;command`), fish (`- cmd: command`)."""
    commands = []
    for line in text.splitlines():
        line = line.removeprefix("- cmd:") if line.startswith("- cmd:") else ZSH.sub("", line)
        line = " ".join(line.split())
        if line and not re.fullmatch(r"#\d+|when: \d+|paths:|- /.*", line):
            commands.append(line[:200])
    return commands


def history_rows(commands: Sequence[str], user: str = "me") -> list[dict[str, Any]]:
    """Windows of SESSION_COMMANDS commands; each is a session."""
    return [shell_row(user, commands[i : i + SESSION_COMMANDS]) for i in range(0, len(commands), SESSION_COMMANDS)]
