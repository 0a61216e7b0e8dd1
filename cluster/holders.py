"""Holders: who holds the cluster's CPUs and GPUs now, by job; what a run that waits for room says.

In: the cluster's state. Out: one sentence. Runs in: the driver.
"""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayError
from ray.util.state import list_actors, list_jobs, list_placement_groups
from ray.util.state.exception import RayStateApiException


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
