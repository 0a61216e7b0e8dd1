"""History: what happened to a run beside its steps: when it was begun and continued, with which keys changed, and who failed.

In: events of the driver. Out: history.json in the run's folder. Runs in: the driver.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ftcore.rundir import RunDir

FILE = "history.json"
MAX_EVENTS = 1000


def remember(run: RunDir, what: str, **facts: Any) -> None:
    """Adds one event: `began`, `went on`, `failure`, `going`, `growing`, `group`; each with the time and what is known."""
    events = recall(run)[-MAX_EVENTS + 1 :]
    run.folder.write_json(FILE, [*events, {"time": time.time(), "what": what, **facts}])


def recall(run: RunDir) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return list(run.folder.read_json(FILE)) if run.folder.exists(FILE) else []


def shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`optim.lr: 0.1 became 0.2; ...`, at most six of them."""
    lines = [f"{path}: {before!r} became {now!r}" for path, (before, now) in list(changed.items())[:6]]
    return "; ".join(lines) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
