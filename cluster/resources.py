"""Resources: what a recipe asks of the cluster, checked against what the cluster has before anything is launched.

In: a recipe's resources, the alive nodes. Out: the numbers of a Ray ScalingConfig, or a ClusterError. Runs in: the driver.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.node_facts import GIB
from cluster.runtime_env import joins_cluster
from ftcore.errors import ClusterError
from ftcore.recipe import Resources


def needs_ray(asked: Resources) -> bool:
    """One CPU worker with no cluster in sight trains in the driver's process: Ray would only add its start-up."""
    return asked.max_workers > 1 or asked.gpus_per_worker > 0 or joins_cluster()


@dataclass(frozen=True)
class Node:
    """One alive node's totals, as Ray counts them (logical)."""

    name: str
    cpus: float
    gpus: float
    id: str = ""
    memory_gib: float = 0.0
    """What Ray counts for tasks and for objects together; 0 where nobody looked."""

    def holds(self, asked: Resources) -> int:
        """How many of these workers fit on it."""
        by_cpu = int(self.cpus / asked.cpus_per_worker + 1e-9)
        if not asked.gpus_per_worker:
            return by_cpu
        return min(by_cpu, int(self.gpus / asked.gpus_per_worker + 1e-9))


def in_pods() -> bool:
    """Whether KubeRay keeps the nodes: another pod comes for one that goes, and Ray is told the container's whole memory."""
    return "RAY_USAGE_STATS_KUBERAY_IN_USE" in os.environ


def alive_nodes() -> list[Node]:
    """The nodes of the cluster this process is joined to."""
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            memory = (resources.get("memory", 0.0) + (0.0 if in_pods() else resources.get("object_store_memory", 0.0))) / GIB
            nodes.append(Node(node["NodeManagerAddress"], resources.get("CPU", 0.0), resources.get("GPU", 0.0), node["NodeID"], memory))
    return nodes


def check_fits(asked: Resources, nodes: list[Node]) -> None:
    """Raises ClusterError unless all workers can stand at once: a run that cannot start must say so instead of waiting for ever.

    Totals are counted, not what is free now: another run's workers end, missing CPUs do not appear.
    """
    room = fits(asked, nodes)
    if room >= asked.min_workers:
        return
    strict = " (STRICT_SPREAD: one worker a node)" if asked.placement == "STRICT_SPREAD" else ""
    raise ClusterError(
        "the cluster is too small for this run",
        where="resources",
        got=have(nodes),
        wanted=wants(asked) + strict,
        remedy=_remedy(asked, room),
    )


def fits(asked: Resources, nodes: Sequence[Node]) -> int:
    """How many of these workers fit on these nodes together."""
    room = [node.holds(asked) for node in nodes]
    return sum(min(1, held) for held in room) if asked.placement == "STRICT_SPREAD" else sum(room)


def scaling_numbers(asked: Resources, num_workers: int) -> dict[str, Any]:
    """Keyword arguments of ray.train.ScalingConfig. The controller takes no CPU, so the workers may have all of them."""
    per_worker: dict[str, float] = {"CPU": asked.cpus_per_worker}
    if asked.gpus_per_worker:
        per_worker["GPU"] = asked.gpus_per_worker
    return {
        "num_workers": num_workers,
        "use_gpu": asked.gpus_per_worker > 0,
        "resources_per_worker": per_worker,
        "placement_strategy": asked.placement,
    }


def have(nodes: list[Node]) -> str:
    """What these nodes have, in words."""
    each = "; ".join(f"{node.name}: {node.cpus:g} CPUs" + (f", {node.gpus:g} GPUs" if node.gpus else "") for node in nodes[:8])
    more = f"; and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)} ({each}{more})"


def wants(asked: Resources) -> str:
    """What the recipe asks for, in words."""
    gpus = f" and {asked.gpus_per_worker:g} GPU" if asked.gpus_per_worker else ""
    least, most = asked.min_workers, asked.max_workers
    count = f"{most}" if least == most else f"{least} to {most}"
    return f"{count} worker{'s' * (most != 1)} x {asked.cpus_per_worker:g} CPU{gpus}"


def _remedy(asked: Resources, room: int) -> str:
    if room:
        return f"resources.workers={room}, or add nodes; to try more workers than cores on a Ray of our own, set FTCORE_LOCAL_CPUS"
    if asked.gpus_per_worker:
        return "no node can hold one such worker: resources.gpus_per_worker=0 trains on CPUs, or add a node with GPUs"
    return "no node can hold one such worker: lower resources.cpus_per_worker, or add a larger node"
