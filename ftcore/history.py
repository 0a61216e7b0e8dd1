"""History: what happened to a run beside its steps: when it was begun and continued, with which keys changed, and who failed.

In: events of the driver. Out: history.json in the run's folder, and the same for people. Runs in: the driver.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ftcore.rundir import RunDir

FILE = "history.json"
MAX_EVENTS = 1000


def remember(run: RunDir, what: str, **facts: Any) -> None:
    """Adds one event: `began`, `went on`, `failure`, `going`, `growing`, `group`, `branched`, `gate`; each with its time and facts."""
    events = recall(run)[-MAX_EVENTS + 1 :]
    run.folder.write_json(FILE, [*events, {"time": time.time(), "what": what, **facts}])


def recall(run: RunDir) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return list(run.folder.read_json(FILE)) if run.folder.exists(FILE) else []


def shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`optim.lr: 0.1 became 0.2; ...`, at most six of them."""
    lines = [f"{path}: {before!r} became {now!r}" for path, (before, now) in list(changed.items())[:6]]
    return "; ".join(lines) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")


def told(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(time, what happened, in words) of each event."""
    return [(f"{datetime.fromtimestamp(e['time'], UTC):%Y-%m-%d %H:%M:%S} UTC", e["what"], _in_words(e)) for e in events]


def _in_words(event: Mapping[str, Any]) -> str:
    match event["what"]:
        case "began" | "went on":
            changed = {path: (before, now) for path, (before, now) in event.get("changed", {}).items()}
            return f"after step {event['step']}" * bool(event["step"]) + f" with another {shown(changed)}" * bool(changed)
        case "failure":
            return f"worker {event['rank']}: {event['cause']}" + " (it ended the run)" * bool(event["final"])
        case "going":
            return f"worker {', '.join(map(str, event['ranks'])) or 'unknown'}: {event['why']}"
        case "growing":
            return f"room for {event['to']} workers"
        case "branched":
            return f"with the weights of {event['donor']} at step {event['step']}"
        case "group":
            return f"{event['size']} worker{'s' * (event['size'] != 1)} from the newest sealed checkpoint"
        case "gate":
            return ("passed: " if event["passed"] else "shut: ") + str(event["why"])
        case _:
            return ""
