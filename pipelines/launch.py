"""Launch: runs one function on every worker of a run, on Ray Train or in this process, and brings back its value or the true cause.

In: `work(post)`, the recipe's resources. Out: rank 0's return value; what workers said, handed to `hear`. Runs in: the driver.

`work` finds its own way back from what is sealed, so workers may be replaced at any time (pipelines.lead says when). Errors that would
only happen again (a wrong recipe, damaged files, a full disk, a loss that is not finite) are not retried. Ctrl-C and SIGTERM ask `work`
to stop; asked twice, it is left at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from cluster.connect import Connection
from cluster.relay import Relay
from cluster.resources import alive_nodes, check_fits
from cluster.runtime_env import worker_variables
from ftcore.backends.base import World
from ftcore.errors import Interrupted
from ftcore.nursery import Birth, End, Post, Worker, WorkerDied
from ftcore.recipe import Resources
from pipelines.lead import Hear, Lead
from pipelines.seat import HEAR_S, nursery_here

T = TypeVar("T")


def launch(
    work: Callable[[Post], T],
    resources: Resources,
    connection: Connection,
    *,
    name: str,
    hear: Hear,
    preload: Sequence[str] = (),
    asked: threading.Event | None = None,
) -> T:
    """Runs `work` on Ray Train workers, as many as the recipe asks for; returns what rank 0 returned.

    `work` must be importable where workers run (a function of a module, or a partial of one); `preload` names what its processes may
    import before they are needed. `hear` is called in this process with every message a worker said, and with what happens to them.
    `asked`: set by somebody who wants it to stop, as a signal would.
    Raises the worker's own FtcoreError, ClusterError when there is no room, Interrupted on Ctrl-C, SIGTERM or a machine that goes.
    """
    check_fits(resources, alive_nodes())
    relay = Relay.open()
    lead = Lead(work, resources, relay, name=name, hear=hear, logs=connection.logs)
    lead.preload = tuple(preload)
    lead.asked = asked or lead.asked
    try:
        with _prepared(resources, connection, lead.preload), on_stop_signal(lead.stop):
            value: T = lead.through()
            return value
    finally:
        relay.close()


@contextmanager
def _prepared(resources: Resources, connection: Connection, preload: Sequence[str]) -> Iterator[None]:
    """On a Ray of this machine alone, the workers' imports begin now, beside the start of Ray Train, and not after it."""
    if connection.kind not in ("local", "joined") or connection.nodes > 1:
        yield
        return
    nursery = nursery_here(preload, worker_variables(resources))
    try:
        yield
    finally:
        nursery.close()


def launch_here(work: Callable[[Post], T], *, hear: Hear) -> T:
    """Runs `work` in this process as the only worker, without Ray."""
    asked = threading.Event()
    with on_stop_signal(asked.set):
        return work(Post(World(node="here"), hear, asked.is_set))


def launch_beside(work: Callable[[Post], T], resources: Resources, *, hear: Hear, preload: Sequence[str], asked: threading.Event) -> T:
    """Runs `work` as the only worker, in a process forked from this node's nursery; one that dies is followed by another, up to
    `resources.max_failures` times. Raises Interrupted soon after `asked` is set: the worker is ended at once, what it sealed stays."""
    variables = worker_variables(resources)
    birth = Birth(work, World(device="cuda" if resources.gpus_per_worker else "cpu"), "", {**os.environ, **variables})
    nursery = nursery_here(preload, variables)
    num_failures = 0
    try:
        while True:
            end = _accompanied(nursery.bear(birth), hear, asked)
            if end.error is None:
                value: T = end.value
                return value
            num_failures += 1
            if not isinstance(end.error, WorkerDied) or 0 <= resources.max_failures < num_failures:
                raise end.error
            hear({"event": "failure", "rank": 0, "cause": str(end.error), "final": False})
    finally:
        nursery.close()


def _accompanied(worker: Worker, hear: Hear, asked: threading.Event) -> End:
    try:
        while worker.end is None:
            for message in worker.hear(HEAR_S):
                hear(message)
            if asked.is_set():
                raise Interrupted("stopped")
        return worker.end
    finally:
        worker.kill()


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM calls `stop` once; the second time it is a KeyboardInterrupt. Outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        stop()

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
