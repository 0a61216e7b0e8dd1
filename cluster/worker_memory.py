"""Worker memory: what one worker may take of the machine or the GPU it will sit on.

In: a recipe's resources; this machine, or the nodes of a cluster. Out: a Share. Runs in: the driver; imports no ray.

On this machine it is what is free now. Of a cluster's nodes it is all they have: what runs there now ends, missing memory does not appear
(as cluster.resources counts CPUs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.node_facts import node_facts
from ftcore.memory import Host
from ftcore.recipe import Resources


@dataclass(frozen=True)
class Share:
    """`gib` is None where nobody knows; `source` says where the figure comes from, or why there is none."""

    gib: float | None
    source: str
    hosts: tuple[Host, ...] = ()
    """Of GPU workers: what nodes have beside their GPUs, as far as it is known."""


@dataclass(frozen=True)
class NodeMemory:
    """A node that can hold `workers` of the workers asked for."""

    name: str
    gib: float
    workers: int
    gpus: tuple[str, ...] = ()
    """As NodeFacts names them."""


def share_here(asked: Resources) -> Share:
    """When Ray is started on this machine, or not needed at all."""
    here = node_facts()
    if asked.gpus_per_worker:
        seats = int(len(here.gpus) / asked.gpus_per_worker + 1e-9)
        hosts = (Host("free on this machine", here.memory_free_gib, seats),) if here.memory_free_gib and seats else ()
        return _smallest_gpu({"this machine": here.gpus}, asked, hosts)
    if not here.memory_free_gib:
        return Share(None, "this machine does not say how much memory is free")
    count = asked.max_workers
    return Share(here.memory_free_gib / count, f"free on this machine, by {count} worker{'s' * (count != 1)}")


def share_of_nodes(asked: Resources, nodes: Sequence[NodeMemory]) -> Share:
    """The least that a worker gets on any of the nodes that can hold one: nobody knows which of them Ray will choose."""
    able = [node for node in nodes if node.workers]
    if asked.gpus_per_worker:
        hosts = tuple(_host(asked, node, len(able)) for node in able if node.gib)
        return _smallest_gpu({node.name: node.gpus for node in able}, asked, hosts)
    shares = [(node.gib / _crowd(asked, node, len(able)), node) for node in able if node.gib]
    if not shares:
        return Share(None, "no node says how much memory it has")
    least, node = min(shares, key=lambda share: share[0])
    count = _crowd(asked, node, len(able))
    return Share(least, f"node {node.name}, by {count} worker{'s' * (count != 1)}")


def _crowd(asked: Resources, node: NodeMemory, num_nodes: int) -> int:
    """Workers that will share this node's memory."""
    most = {"STRICT_SPREAD": 1, "SPREAD": -(-asked.max_workers // num_nodes)}.get(asked.placement, asked.max_workers)
    return min(node.workers, most)


def _host(asked: Resources, node: NodeMemory, num_nodes: int) -> Host:
    seats = 1 if asked.placement == "STRICT_SPREAD" else node.workers
    return Host(f"node {node.name}", node.gib, seats, num_nodes if asked.placement == "SPREAD" else 1)


def _smallest_gpu(gpus: dict[str, tuple[str, ...]], asked: Resources, hosts: tuple[Host, ...]) -> Share:
    sizes = [(_gib(gpu), place) for place, names in gpus.items() for gpu in names]
    if not sizes:
        return Share(None, "no GPU here to ask")
    least, place = min(sizes)
    return Share(least * min(1.0, asked.gpus_per_worker), f"the smallest GPU of {place}", hosts)


def _gib(gpu: str) -> float:
    """From `NVIDIA L4, 23034 MiB`."""
    return float(gpu.rsplit(",", 1)[1].split()[0]) / 1024
