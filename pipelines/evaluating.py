"""Evaluating: the work of `ftcore evaluate`: questions out, answers back window by window, over Ray Data's actors or in this process.

In: an Evaluation. Out: Parquet parts of every system's answers in its folder. Runs in: the driver (orders), Ray Data actors (a panel each).

Systems that share a base are asked together, by one engine; each part of each system's answers is written once, so the same command goes on
where it was stopped, and a system that is added later has only its own answers made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftcore.data.types import Conversation
from ftcore.engines.torch import Torch
from ftcore.evals.asked import Asked
from ftcore.evals.given import Given
from ftcore.evals.panel import Panel, open_panel
from ftcore.evals.records import Records
from ftcore.evals.systems import System
from ftcore.evals.tasks.base import Task
from ftcore.progress import clock

Log = Callable[[str], None]
Order = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Everything a worker must know, in plain values."""

    out: str
    systems: tuple[System, ...]
    task: Task
    engine: Torch
    max_tokens: int
    shots: tuple[Conversation, ...] = ()
    """Solved examples; a system with k shots takes the first k."""
    at_once: int = 8
    """Questions an endpoint is asked at once."""

    def panels(self) -> dict[str, tuple[System, ...]]:
        return {
            panel: tuple(system for system in self.systems if system.panel == panel)
            for panel in dict.fromkeys(s.panel for s in self.systems)
        }


@dataclass(frozen=True)
class Means:
    """With what: `here`, in this process and without Ray; else so many workers, each with so many GPUs."""

    here: bool = False
    workers: int = 1
    gpus: float = 0


@dataclass
class Tally:
    """What was done so far; for the progress line."""

    total: int = 0
    """Answers that are to be made."""
    made: int = 0
    found: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        more = f" of {self.total:,}" if self.made < self.total else ""
        left = f", {clock(seconds / self.made * (self.total - self.made))} left" if more and self.made else ""
        return f"{self.made:,}{more} answers, {self.tokens:,} tokens, {seconds:.0f} s{left}"


def answer_all(evaluation: Evaluation, windows: Sequence[int], means: Means, log: Log) -> Tally:
    """Asks every system every question that it was not asked before. `windows`: how many rows each has.

    Raises FtcoreError where a system fails altogether.
    """
    records, tally = Records(evaluation.out), Tally()
    wanted: dict[str, list[Order]] = {}
    for panel, systems in evaluation.panels().items():
        orders = wanted.setdefault(panel, [])
        for number, num_rows in enumerate(windows):
            missing = [system.name for system in systems if not records.has(system.key, number)]
            tally.found += len(systems) - len(missing)
            tally.total += len(missing) * num_rows
            if missing:
                orders.append({"number": len(orders), "window": number, "systems": missing})
    for panel, systems in evaluation.panels().items():
        orders = wanted[panel]
        if not orders:
            log(f"{panel}: all answers are there")
            continue
        log(f"{panel}: {', '.join(system.name for system in systems)}; {len(orders)} of {len(windows)} windows to ask")
        for done in _carried_out(evaluation, panel, orders, means, log):
            tally.made += done["made"]
            tally.tokens += done["tokens"]
            log(f"  {tally}")
    return tally


def _carried_out(evaluation: Evaluation, panel: str, orders: Sequence[Order], means: Means, log: Log) -> Iterator[dict[str, Any]]:
    if means.here:
        asker = Asker(evaluation, panel)
        try:
            yield from map(asker, orders)
        finally:
            asker.close()
        return
    from cluster.connect import connect  # small sets are judged without Ray
    from pipelines.errands import by_actors, environment

    connection = connect(log=log)
    wants: dict[str, Any] = {"num_cpus": 0 if means.gpus else 1, "num_gpus": means.gpus, **environment(connection)}
    yield from by_actors(Asker, (evaluation, panel), orders, concurrency=max(1, min(means.workers, len(orders))), **wants)


class Asker:
    """Asks one panel: opened once per worker, for its engine."""

    def __init__(self, evaluation: Evaluation, panel: str) -> None:
        self.evaluation, self.records = evaluation, Records(evaluation.out)
        self.systems = {system.name: system for system in evaluation.panels()[panel]}
        self.runner = asyncio.Runner()
        self.panel: Panel = self.runner.run(self._opened())

    async def _opened(self) -> Panel:
        return open_panel(list(self.systems.values()), self.evaluation.engine, self.evaluation.at_once)

    def __call__(self, order: Order) -> dict[str, Any]:
        rows = self.records.questions(order["window"])
        systems = [self.systems[name] for name in order["systems"]]
        answers = self.runner.run(self._ask(systems, rows))
        for system, given in zip(systems, answers, strict=True):
            self.records.write(system.key, order["window"], given)
        made = [row for given in answers for row in given]
        return {"made": len(made), "tokens": sum(row.completion_tokens for row in made)}

    async def _ask(self, systems: Sequence[System], rows: Sequence[Asked]) -> list[list[Given]]:
        task, most, shots = self.evaluation.task, self.evaluation.max_tokens, self.evaluation.shots
        return await asyncio.gather(*(task.answer(self.panel, system, rows, shots[: system.shots], most) for system in systems))

    def close(self) -> None:
        self.runner.run(self.panel.close())
        self.runner.close()
