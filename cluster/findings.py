"""Findings: what a look at the nodes says about them: pure judgements over facts, each finding with its remedy, and their table.

In: NodeFacts by node. Out: Findings. Runs in: the driver; imports no ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.node_facts import NodeFacts

Level = Literal["ok", "warning", "problem"]
ORDER: tuple[Level, ...] = ("problem", "warning", "ok")
EVERYWHERE = "all nodes"
ONLY_WHERE_USED = ("deepspeed", "bitsandbytes")
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 1.0, 60.0
LOW_MEMORY_SHARE = 0.1


@dataclass(frozen=True)
class Finding:
    """One line of the table. `node` is an address, a list of them, or "all nodes"."""

    level: Level
    check: str
    node: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Counted:
    """What Ray believes a node has."""

    cpus: float
    gpus: float
    memory_gib: float


def runnable(findings: Iterable[Finding], *, strict: bool = False) -> bool:
    return not any(finding.level == "problem" or (strict and finding.level == "warning") for finding in findings)


def together(findings: Iterable[Finding], num_nodes: int) -> list[Finding]:
    """What is the same on several nodes as one finding, problems first."""
    by_text: dict[tuple[Level, str, str, str], list[str]] = {}
    for found in findings:
        by_text.setdefault((found.level, found.check, found.text, found.remedy), []).append(found.node)
    merged = []
    for (level, check, text, remedy), nodes in by_text.items():
        where = EVERYWHERE if len(nodes) == num_nodes > 1 else ", ".join(nodes)
        merged.append(Finding(level, check, where, text, remedy))
    return sorted(merged, key=lambda found: ORDER.index(found.level))


def table(findings: Sequence[Finding]) -> str:
    """Under a line that is not in order, what to do."""
    lines = []
    width = max((len(finding.check) for finding in findings), default=0)
    where = max((len(finding.node) for finding in findings), default=0)
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.check:<{width}}  {finding.node:<{where}}  {finding.text}")
        if finding.remedy and finding.level != "ok":
            lines.append(f"{'':<8} {'':<{width}}  {'':<{where}}  -> {finding.remedy}")
    return "\n".join(lines)


def versions(driver: NodeFacts, nodes: Mapping[str, NodeFacts], used: Collection[str] = ()) -> list[Finding]:
    """Every node must have the driver's versions: what is pickled here is opened there, and ranks must compute the same."""
    findings = []
    for name, wanted in driver.versions.items():
        for got, where in _others(wanted, {node: facts.versions.get(name, "none") for node, facts in nodes.items()}):
            level: Level = "warning" if name in ONLY_WHERE_USED and name not in used else "problem"
            text = f"{name} {got}, the driver has {wanted}"
            findings.append(Finding(level, "versions", where, text, f"install {name}=={wanted} there (pip install -c constraints.txt)"))
    for got, where in _others(driver.code, {node: facts.code for node, facts in nodes.items()}):
        findings.append(
            Finding("problem", "our code", where, f"ftcore's sources are {got[:12]}, the driver's {driver.code[:12]}",
                    "install the same ftcore there, or submit from a checkout, whose code travels along")
        )  # fmt: skip
    shown = ", ".join(f"{name} {driver.versions[name]}" for name in ("python", "ray", "torch") if name in driver.versions)
    return findings or [Finding("ok", "versions", EVERYWHERE, f"the driver's: {shown}, ...; code {driver.code[:12]}")]


def machines(nodes: Mapping[str, NodeFacts], counted: Mapping[str, Counted]) -> list[Finding]:
    """GPUs and memory as the machine has them against what Ray counts."""
    findings = []
    for node, facts in nodes.items():
        told = counted.get(node)
        if told is not None and told.gpus > len(facts.gpus):
            text = f"Ray counts {told.gpus:g} GPUs, the machine shows {len(facts.gpus)}"
            findings.append(Finding("problem", "GPUs", node, text, "restart its `ray start` without --num-gpus, or mend its driver"))
        elif told is not None and told.gpus < len(facts.gpus):
            text = f"Ray counts {told.gpus:g} GPUs of {len(facts.gpus)} that are there"
            findings.append(Finding("warning", "GPUs", node, text, "they stay unused; restart its `ray start` with --num-gpus"))
        if told is not None and facts.memory_gib and told.memory_gib > facts.memory_gib:
            text = f"Ray counts {told.memory_gib:.1f} GiB, the machine has {facts.memory_gib:.1f}"
            findings.append(Finding("problem", "memory", node, text, "restart its `ray start` without --memory"))
        if facts.memory_gib and facts.memory_free_gib < LOW_MEMORY_SHARE * facts.memory_gib:
            text = f"{facts.memory_free_gib:.1f} of {facts.memory_gib:.1f} GiB are free"
            findings.append(Finding("warning", "memory", node, text, "end what else runs there; Ray kills workers at 95 % in use"))
    if not findings:
        gpus, memory = sum(len(facts.gpus) for facts in nodes.values()), min(facts.memory_free_gib for facts in nodes.values())
        findings = [Finding("ok", "machines", EVERYWHERE, f"{gpus} GPUs in all, at least {memory:.1f} GiB of memory free on each")]
    return findings


def disks(nodes: Mapping[str, NodeFacts], wanted_gib: float) -> list[Finding]:
    findings = []
    for node, facts in nodes.items():
        low: dict[str, list[str]] = {}
        for folder, free in facts.free_gib.items():
            if free < wanted_gib:
                low.setdefault(f"{free:.1f}", []).append(folder)
        for free_text, folders in low.items():
            text = f"{free_text} GiB free at {', '.join(folders)}; {wanted_gib:g} wanted"
            findings.append(Finding("problem", "disk", node, text, "free space there or choose another place (output.*, data.cache)"))
    least = min((free for facts in nodes.values() for free in facts.free_gib.values()), default=0.0)
    return findings or [Finding("ok", "disk", EVERYWHERE, f"at least {least:.1f} GiB free at every folder")]


def clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """`offsets` are (seconds ahead of the driver's clock, how uncertain that is) by node."""
    findings = []
    for node, (ahead, unsure) in offsets.items():
        if abs(ahead) - unsure > CLOCK_WARNING_S:
            level: Level = "problem" if abs(ahead) - unsure > CLOCK_PROBLEM_S else "warning"
            text = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the driver's"
            findings.append(
                Finding(level, "clock", node, text, "let it keep time (chrony, ntp): object stores refuse requests signed too far off")
            )
    most = max((abs(ahead) for ahead, _ in offsets.values()), default=0.0)
    return findings or [Finding("ok", "clock", EVERYWHERE, f"at most {most * 1000:.0f} ms apart (as well as it can be told)")]


def _others(wanted: str, got: Mapping[str, str]) -> list[tuple[str, str]]:
    """(value, the nodes that have it) for values that are not the wanted one."""
    by_value: dict[str, list[str]] = {}
    for node, value in got.items():
        if value != wanted:
            by_value.setdefault(value, []).append(node)
    return [(value, ", ".join(nodes)) for value, nodes in by_value.items()]
