"""Room: waits until the cluster has room for a run, says for what and who holds it, and gives up with that list instead of hanging.

In: what the recipe asks, the cluster now. Out: nothing, or a ClusterError. Runs in: the driver.

Two occasions: before the launch other runs may hold CPUs; in mid-run a node may be gone and not come back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # what is free on each node; Ray has no public name for it
from ray.exceptions import RayError
from ray.util.state import list_actors, list_jobs, list_placement_groups
from ray.util.state.exception import RayStateApiException

from cluster.resources import Node, alive_nodes, check_fits, num_that_fit
from ftcore.errors import ClusterError
from ftcore.recipe import Resources

Say = Callable[[str], None]
POLL_S, SPEAK_EVERY_S = 1.0, 30.0


def wait_s() -> float:
    """Seconds to wait for room: FTCORE_WAIT_S, else ten minutes."""
    text = os.environ.get("FTCORE_WAIT_S", "600")
    return float(text) if text.replace(".", "", 1).isdigit() else 600.0


def wait_for_room(asked: Resources, say: Say, *, at_least: int | None = None) -> None:
    """Returns when as many workers as the run needs at least can be placed. Raises ClusterError with who holds what after `wait_s()`."""
    began, spoke = time.monotonic(), float("-inf")
    while num_that_fit(asked, free := free_nodes()) < (at_least or asked.workers):
        waited = time.monotonic() - began
        if waited > wait_s():
            fit = num_that_fit(asked, free)
            raise ClusterError(
                f"others held the cluster for {waited:.0f} s", where="resources", got=holders(), wanted=_wanted(asked),
                remedy=f"wait for them or stop them (`ray job stop`), or take what is free: resources.workers={fit}" if fit
                else "wait for them or stop them (`ray job stop`); FTCORE_WAIT_S says how long to wait",
            )  # fmt: skip
        if time.monotonic() - spoke > SPEAK_EVERY_S:
            spoke = time.monotonic()
            say(f"waiting for {_wanted(asked)} ({waited:.0f} of {wait_s():.0f} s); held by {holders()}")
        time.sleep(POLL_S)


class Patience:
    """After workers failed: whether what is left of the cluster can hold them again, and how long to hope for lost nodes."""

    def __init__(self, asked: Resources, say: Say, *, at_least: int | None = None) -> None:
        self.asked, self.say, self.at_least = asked, say, at_least
        self._waiting = False
        self._short_since: float | None = None
        self._looked = 0.0

    def failed(self) -> None:
        self._waiting = True

    def running(self) -> None:
        self._waiting, self._short_since = False, None

    def check(self) -> None:
        """To be called often. Raises ClusterError when the cluster has been too small for `wait_s()`."""
        now = time.monotonic()
        if not self._waiting or now - self._looked < POLL_S:
            return
        self._looked = now
        try:
            check_fits(self.asked, alive_nodes(), at_least=self.at_least)
            self._short_since = None
        except ClusterError as error:
            if self._short_since is None:
                self._short_since = now
                self.say(f"waiting for nodes to come back: {error.wanted} wanted, {error.got} left (at most {wait_s():.0f} s)")
            if now - self._short_since > wait_s():
                raise ClusterError(
                    "nodes were lost and did not come back", where=error.where, got=error.got, wanted=error.wanted, remedy=error.remedy
                ) from error


def free_nodes() -> list[Node]:
    """The alive nodes with what is free on them now."""
    free = available_resources_per_node()
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return [Node(addresses[key], has.get("CPU", 0.0), has.get("GPU", 0.0)) for key, has in free.items() if key in addresses]


def holders() -> str:
    """Who holds CPUs and GPUs, by job."""
    try:
        held = _held_by_job()
        jobs = {job.job_id: job.submission_id or job.entrypoint for job in list_jobs()}
    except (RayStateApiException, RayError, OSError, ValueError) as error:
        return f"other work (who, is not known: {type(error).__name__}, is the dashboard off?)"
    each = [
        f"job {job}{f' ({jobs[job][:60]})' if jobs.get(job) else ''}: " + ", ".join(f"{n:g} {kind}s" for kind, n in have.items() if n)
        for job, have in sorted(held.items()) if any(have.values())
    ]  # fmt: skip
    return "; ".join(each) or "nobody for long: tasks that come and go"


def _held_by_job() -> dict[str, dict[str, float]]:
    held: dict[str, dict[str, float]] = {}

    def add(job: str, resources: dict[str, Any]) -> None:
        have = held.setdefault(job, {"CPU": 0.0, "GPU": 0.0})
        for kind in have:
            have[kind] += float(resources.get(kind, 0.0))

    for group in list_placement_groups(detail=True, limit=1000):
        if group.state == "CREATED":
            for bundle in group.bundles or []:
                add(group.creator_job_id, bundle["unit_resources"])
    for actor in list_actors(detail=True, limit=1000, filters=[("state", "=", "ALIVE")]):
        if not actor.placement_group_id:
            add(actor.job_id, actor.required_resources or {})
    return held


def _wanted(asked: Resources) -> str:
    gpus = f" and {asked.gpus_per_worker:g} GPUs" if asked.gpus_per_worker else ""
    return f"{asked.workers} x {asked.cpus_per_worker:g} CPUs{gpus} ({asked.placement})"
