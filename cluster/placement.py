"""Placement: how many workers fit now, and on which nodes not: the dead that Ray still counts, and those about to be taken away.

In: a recipe's resources, the cluster as it is. Out: a Place, or a ClusterError when there is no room for too long. Runs in: the driver.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node  # no public name; ray.available_resources() adds all nodes up
from ray._private.state import state as cluster_state

from cluster.holders import holders
from cluster.resources import Node, alive_nodes, check_fits, fits, have, wants
from ftcore.errors import ClusterError
from ftcore.recipe import Resources

SETTLE_S = 3.0
"""What ended a moment ago gives its CPUs back within this; a smaller group is only started after it."""
LOOK_EVERY_S = 0.2
SAY_EVERY_S = 30.0
KNOCK_S = 1.0
NODE_ID_LABEL = "ray.io/node-id"


def patience_s() -> float:
    """How long a run waits for room: FTCORE_PLACEMENT_WAIT_S, else ten minutes. Nothing waits for ever."""
    return float(os.environ.get("FTCORE_PLACEMENT_WAIT_S", "600"))


@dataclass(frozen=True)
class Place:
    """Room for a group of workers. `avoid`: ids of nodes that Ray counts and that must not be used."""

    num_workers: int
    avoid: tuple[str, ...] = ()

    def selector(self) -> dict[str, str]:
        """Ray's label selector that keeps workers off those nodes."""
        return {NODE_ID_LABEL: f"!in({','.join(self.avoid)})"} if self.avoid else {}


@dataclass(frozen=True)
class Seen:
    """The cluster at one moment: usable nodes with what is free on them, and the ids of those that are not usable."""

    free: tuple[Node, ...]
    unusable: tuple[str, ...]


def look(avoid: Collection[str] = ()) -> Seen:
    """What is free now on each node that is alive, answers, is not being drained and is not in `avoid`."""
    draining = cluster_state.get_draining_nodes()
    available = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=min(32, len(nodes) or 1)) as pool:
        answers = list(pool.map(lambda node: reachable(node["NodeManagerAddress"], node["NodeManagerPort"]), nodes))
    free, unusable = [], []
    for node, answered in zip(nodes, answers, strict=True):
        left = available.get(node["NodeID"], {})
        if not answered or node["NodeID"] in draining or node["NodeID"] in avoid:
            unusable.append(node["NodeID"])
        else:
            free.append(Node(node["NodeManagerAddress"], left.get("CPU", 0.0), left.get("GPU", 0.0), node["NodeID"]))
    return Seen(tuple(free), tuple(sorted(unusable)))


def reachable(address: str, port: int) -> bool:
    """Whether a node's raylet takes a connection. Ray itself calls a node dead only after many missed heartbeats."""
    try:
        socket.create_connection((address, port), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True


def draining_nodes() -> set[str]:
    """Ids of nodes that were told to go (`ray drain-node`, an autoscaler, a preemption)."""
    return set(cluster_state.get_draining_nodes())


def gone(node_ids: Collection[str]) -> set[str]:
    """Which of these nodes are dead or do not answer."""
    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    return {
        node for node in node_ids if node not in known or not reachable(known[node]["NodeManagerAddress"], known[node]["NodeManagerPort"])
    }


def place(
    asked: Resources, say: Callable[[str], None], *, avoid: Collection[str] = (), again: bool = False, stopped: Callable[[], bool] = bool
) -> Place:
    """Waits until at least the fewest workers asked for fit; takes as many as fit, up to the most.

    The first time a cluster whose totals are too small is refused at once; `again` (after a failure) its nodes may come back. `avoid`:
    nodes not to use. Raises ClusterError after `patience_s()`.
    """
    began = time.monotonic()
    said, seen = began - SAY_EVERY_S + SETTLE_S, Seen((), ())
    while True:
        seen = look(avoid)
        room = min(asked.max_workers, fits(asked, seen.free))
        waited = time.monotonic() - began
        if room == asked.max_workers or (room >= asked.min_workers and waited >= SETTLE_S):
            return Place(room, seen.unusable)
        if not again:
            check_fits(replaced_by_min(asked), alive_nodes())
        if waited > patience_s() or stopped():
            raise _no_room(asked, seen, waited)
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            left = f"at most {patience_s() - waited:.0f} s more"
            say(f"waiting for room for {wants(asked)}; free now: {have(list(seen.free))}; held by {holders()} ({left})")
        time.sleep(LOOK_EVERY_S)


def _no_room(asked: Resources, seen: Seen, waited_s: float) -> ClusterError:
    return ClusterError(
        f"there was no room for this run for {waited_s:.0f} s",
        where="resources",
        got=f"free: {have(list(seen.free))}; held by {holders()}",
        wanted=wants(asked),
        remedy="the same command goes on from the newest checkpoint: add nodes, end what holds them, ask for fewer workers "
        "(resources.workers={min: 1, max: N}), or wait longer (FTCORE_PLACEMENT_WAIT_S)",
    )


def replaced_by_min(asked: Resources) -> Resources:
    """The least this run can start with."""
    return asked.model_copy(update={"workers": asked.min_workers})
