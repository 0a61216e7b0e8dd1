"""Guests of hosts that die: they begin again where a host answers, and one death counts once."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from ftcore.recipe import Recipe
from pipelines.hosting import Together

pytestmark = pytest.mark.ray
GUEST = {"name": "guest", "model": {"path": "base"}, "data": {"sources": "rows.jsonl"}, "method": "lora", "stage": "sft"}


class Host:
    """As a guest sees one; each look is a quarter of its steps."""

    def __init__(self, others: int) -> None:
        self.others, self.looks = others, 0

    async def num_guests(self) -> int:
        return self.others

    async def pid(self) -> int:
        return os.getpid()

    async def begin(self, name: str, recipe: str) -> None:
        self.looks = 0

    async def look(self, name: str) -> dict[str, Any]:
        self.looks += 1
        return {"share": 25.0 * self.looks, "pid": os.getpid()}


def killed(host: Any) -> int:
    pid: int = ray.get(host.pid.remote())
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_guest_waits_for_a_killed_host_and_a_death_counts_once(local_ray: None) -> None:
    host: Any = ray.remote(num_cpus=0, max_restarts=-1)(Host)
    hosts = [host.remote(0)]
    guest = Together(hosts, "guest", Recipe.model_validate(GUEST), max_failures=1)
    assert guest.next()["share"] == 25
    first = killed(hosts[0])
    found = guest.next()
    assert found["share"] == 50 and found["pid"] != first and guest.left == 0
    killed(hosts[0])
    with pytest.raises(RayActorError):
        guest.next()


def test_a_host_that_is_not_there_keeps_no_guest_from_another(local_ray: None) -> None:
    host: Any = ray.remote(num_cpus=0, max_restarts=0)(Host)
    gone, other = host.remote(0), host.remote(3)
    killed(gone)
    guest = Together([gone, other], "guest", Recipe.model_validate(GUEST), max_failures=0)
    assert guest.next()["pid"] == ray.get(other.pid.remote())
