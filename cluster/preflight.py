"""Preflight: goes to every node at once and asks: facts, connections between them, and whatever function it is given.

In: the cluster this process is joined to, or only this machine. Out: answers by node; Findings where a node did not answer.
Runs in: the driver; one probe (an actor that takes no CPU) on every node.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.findings import EVERYWHERE, Counted, Finding
from cluster.node_facts import GIB, NodeFacts, gpus, node_facts
from cluster.resources import Node, alive_nodes
from cluster.worker_memory import NodeMemory, Share, share_of_nodes
from ftcore.errors import FtcoreError
from ftcore.recipe import Resources

T = TypeVar("T")
HERE = "this machine"
ANSWER_TIMEOUT_S = 180.0
KNOCK_S = 5.0


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a node answered, or what went wrong there in one line."""

    value: T | None
    error: str = ""


class Probe:
    """Sits on one node and does what it is told."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None

    def call(self, function: Callable[..., T], *arguments: Any) -> Answer[T]:
        try:
            return Answer(function(*arguments))
        except Exception as error:  # every finding is told at once: one that fails must not hide the others
            return Answer(None, _one_line(error))

    def listen(self) -> tuple[str, int]:
        """Opens a port of the node's address and waits for knocks in the backlog."""
        address = ray.util.get_node_ip_address()
        self._server = socket.create_server((address, 0), backlog=64)
        return address, self._server.getsockname()[1]

    def deaf(self) -> None:
        if self._server is not None:
            self._server.close()


class Nodes:
    """Every alive node of the cluster; without one, this machine alone."""

    def __init__(self, *, joined: bool) -> None:
        self.counted: dict[str, Counted] = {}
        self._probes: dict[str, Any] = {}
        for node in _alive() if joined else []:
            name, resources = _name(node, self.counted), node["Resources"]
            self.counted[name] = Counted(resources.get("CPU", 0), resources.get("GPU", 0), resources.get("memory", 0) / GIB)
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            self._probes[name] = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=there).remote()

    @property
    def names(self) -> list[str]:
        return list(self._probes) or [HERE]

    def ask(self, function: Callable[..., T], *arguments: Any, each: Sequence[tuple[Any, ...]] = ()) -> dict[str, Answer[T]]:
        """Calls `function` on every node at the same time; `each` are further arguments, node by node."""
        own = list(each) or [()] * len(self.names)
        if not self._probes:
            return {HERE: Probe().call(function, *arguments, *own[0])}
        calls = [probe.call.remote(function, *arguments, *more) for probe, more in zip(self._probes.values(), own, strict=True)]
        return dict(zip(self.names, self._gathered(calls), strict=True))

    def _gathered(self, calls: list[Any]) -> list[Answer[Any]]:
        deadline, answers = time.monotonic() + ANSWER_TIMEOUT_S, []
        for call in calls:
            try:
                answers.append(ray.get(call, timeout=max(0.1, deadline - time.monotonic())))
            except GetTimeoutError:
                answers.append(Answer(None, f"no answer within {ANSWER_TIMEOUT_S:g} s"))
            except RayError as error:
                answers.append(Answer(None, _one_line(error)))
        return answers

    def facts(self, folders: Sequence[str]) -> tuple[dict[str, NodeFacts], dict[str, tuple[float, float]], list[Finding]]:
        """(facts, clock offsets with their uncertainty, a finding for every node that did not answer), by node."""
        facts, findings = {}, []
        for name, answer in self.ask(node_facts, list(folders)).items():
            if answer.value is None:
                findings.append(Finding("problem", "node", name, answer.error, "look at its raylet's log; restart its `ray start`"))
            else:
                facts[name] = answer.value
        offsets: dict[str, tuple[float, float]] = {}
        for name, probe in self._probes.items():
            if name in facts:
                before = time.time()
                there = self._gathered([probe.call.remote(time.time)])[0].value
                after = time.time()
                if there is not None:
                    offsets[name] = (there - (before + after) / 2, (after - before) / 2)
        return facts, offsets, findings

    def ports(self) -> list[Finding]:
        """Whether every node reaches a fresh port of every other: what workers need of each other, and firewalls forbid."""
        if len(self._probes) < 2:
            return []
        doors: dict[str, tuple[str, int]] = {}
        for name, probe in self._probes.items():
            try:
                doors[name] = ray.get(probe.listen.remote(), timeout=ANSWER_TIMEOUT_S)
            except RayError:
                continue  # a node that does not answer is a finding already
        findings = []
        for name, answer in self.ask(_knock_all, doors).items():
            for other, why in (answer.value or {}).items():
                findings.append(Finding("problem", "ports", name, f"cannot reach {other}: {why}", "open all TCP ports between the nodes"))
        for probe in self._probes.values():
            probe.deaf.remote()
        return findings or [Finding("ok", "ports", EVERYWHERE, f"each of {len(doors)} nodes reaches a fresh port of every other")]

    def close(self) -> None:
        for probe in self._probes.values():
            ray.kill(probe)


def share_on_cluster(asked: Resources) -> Share:
    """What one worker may take on the cluster this process is joined to: Ray counts memory, but not what GPUs have; nodes are asked."""
    if not asked.gpus_per_worker:
        return share_of_nodes(asked, [NodeMemory(node.name, node.memory_gib, node.holds(asked)) for node in alive_nodes()])
    nodes = Nodes(joined=True)
    try:
        shown = nodes.ask(gpus)
    finally:
        nodes.close()
    counted = {name: Node(name, told.cpus, told.gpus) for name, told in nodes.counted.items()}
    return share_of_nodes(
        asked, [NodeMemory(name, node.memory_gib, node.holds(asked), shown[name].value or ()) for name, node in counted.items()]
    )


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name(node: Mapping[str, Any], taken: Mapping[str, Counted]) -> str:
    """The address; with a piece of its id where several raylets share one."""
    address = str(node["NodeManagerAddress"])
    return address if address not in taken else f"{address}#{node['NodeID'][:6]}"


def _knock_all(doors: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """What is wrong with each door that does not open."""
    shut = {}
    for name, door in doors.items():
        try:
            with closing(socket.create_connection(door, timeout=KNOCK_S)):
                pass
        except OSError as error:
            shut[name] = str(error)
    return shut


def _one_line(error: BaseException) -> str:
    if isinstance(error, FtcoreError):
        return ": ".join(filter(None, (error.what, error.got)))
    return f"{type(error).__name__}: {next((line.strip() for line in str(error).splitlines() if line.strip()), '')}"[:300]
