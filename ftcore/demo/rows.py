"""Rows: an event log becomes training rows, one conversation a session: what was seen is the user's turn, the operation is the answer.

In: event log lines of a session (the simulator's, or a collector's that writes the same). Out: `messages` rows. Runs in: everywhere.

    system     user mira
    user       login                                    assistant  start mutt
    user       + mutt 431, download plan4.doc            assistant  move plan4.doc attic
    user       ok                                       assistant  open plan4.doc reader
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

IGNORED = frozenset({"window_focus"})
"""Kinds of event that say nothing about the next operation."""
NOTHING_NEW = "ok"


def observation(event: dict[str, Any]) -> str:
    """One system event in words; of a process, its name and PID."""
    if event["kind"] == "process_start":
        return f"+ {event['process']} {event['pid']}"
    if event["kind"] == "process_stop":
        return f"- {event['process']}"
    return " ".join([event["kind"], *event.get("args", ())])


def conversation(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The events of one session as a `messages` row."""
    events = list(events)
    messages = [{"role": "system", "content": f"user {events[0]['user']}"}]
    seen: list[str] = []
    for event in events:
        if event["actor"] == "user":
            messages.append({"role": "user", "content": ", ".join(seen) or NOTHING_NEW})
            messages.append({"role": "assistant", "content": " ".join([event["kind"], *event.get("args", ())])})
            seen = []
        elif event["kind"] not in IGNORED:
            seen.append(observation(event))
    return {"messages": messages}


def write_log(logs: Iterable[Iterable[dict[str, Any]]], path: Path) -> Path:
    """Event logs of many sessions, one after the other, as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for log in logs:
            file.writelines(json.dumps(event, separators=(",", ":")) + "\n" for event in log)
    return path


def read_log(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Sessions of a log file (lines of one session stand together)."""
    with path.open(encoding="utf-8") as file:
        for _, log in groupby((json.loads(line) for line in file if line.strip()), key=lambda event: event["session"]):
            yield list(log)


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    return path
