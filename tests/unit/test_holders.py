"""Who holds the cluster: by job, with the command that began it; placement groups and actors of their own, nothing counted twice."""

from __future__ import annotations

from types import SimpleNamespace as Fact
from typing import Any

import pytest
from ray.util.state.exception import RayStateApiException

from cluster import holders as module
from cluster.holders import holders


def cluster(monkeypatch: pytest.MonkeyPatch, groups: list[Fact], actors: list[Fact]) -> None:
    jobs = [
        Fact(job_id="02", submission_id="raysubmit_x", entrypoint="python pipelines/sft.py a.yaml"),
        Fact(job_id="03", submission_id=None, entrypoint="python tune.py"),
    ]
    for name, found in (("list_placement_groups", groups), ("list_actors", actors), ("list_jobs", jobs)):
        monkeypatch.setattr(module, name, lambda found=found, **asked: found)


def group(job: str, cpus: float, gpus: float = 0, state: str = "CREATED") -> Fact:
    return Fact(state=state, creator_job_id=job, bundles=[{"unit_resources": {"CPU": cpus, "GPU": gpus}}])


def actor(job: str, cpus: float, within: str | None = None) -> Fact:
    return Fact(job_id=job, required_resources={"CPU": cpus}, placement_group_id=within)


def test_each_holder_is_named_with_its_job_and_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [group("02", 2, 1)], [actor("02", 2, within="pg"), actor("03", 1)])
    assert holders() == "job 02 (raysubmit_x): 2 CPUs, 1 GPUs; job 03 (python tune.py): 1 CPUs"


def test_a_group_that_waits_itself_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [group("02", 8, state="PENDING")], [])
    assert holders().startswith("nobody for long")


def test_without_a_dashboard_this_is_said_and_the_run_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**asked: Any) -> None:
        raise RayStateApiException("no dashboard")

    monkeypatch.setattr(module, "list_placement_groups", refuse)
    assert "is the dashboard off?" in holders()
