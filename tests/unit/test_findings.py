"""What doctor makes of facts: each planted fault is found on its node with a remedy; the exit code follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.findings import Counted, Finding, clocks, disks, machines, runnable, table, together, versions
from cluster.node_facts import NodeFacts, node_facts

GOOD = NodeFacts(
    versions={"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}, code="c0de" * 16, cpus=2, memory_gib=24, memory_free_gib=20,
    gpus=(), free_gib={"/runs": 50.0, "/tmp": 50.0}, seconds=0,
)  # fmt: skip
THREE = {"10.0.0.2": GOOD, "10.0.0.3": GOOD, "10.0.0.4": GOOD}


def test_equal_nodes_are_in_order() -> None:
    counted = {name: Counted(2, 0, 10) for name in THREE}
    found = [*versions(GOOD, THREE), *machines(THREE, counted), *disks(THREE, 5), *clocks(dict.fromkeys(THREE, (0.01, 0.02)))]
    assert {finding.level for finding in found} == {"ok"} and runnable(found, strict=True)


def test_another_torch_on_one_node_is_a_problem_of_that_node() -> None:
    other = replace(GOOD, versions={**GOOD.versions, "torch": "2.9.1"})
    [found] = versions(GOOD, {**THREE, "10.0.0.4": other})
    assert (found.level, found.node, found.text) == ("problem", "10.0.0.4", "torch 2.9.1, the driver has 2.13.0")
    assert "torch==2.13.0" in found.remedy


@pytest.mark.parametrize(("used", "level"), [((), "warning"), (("deepspeed",), "problem")])
def test_a_package_that_only_some_recipes_use_matters_where_it_is_used(used: tuple[str, ...], level: str) -> None:
    missing = replace(GOOD, versions={**GOOD.versions, "deepspeed": "none"})
    [found] = versions(GOOD, {"a": missing}, used)
    assert found.level == level


def test_other_sources_of_ours_are_a_problem() -> None:
    [found] = versions(GOOD, {**THREE, "10.0.0.3": replace(GOOD, code="beef" * 16)})
    assert (found.check, found.node, found.level) == ("our code", "10.0.0.3", "problem")


def test_gpus_that_ray_counts_and_the_machine_lacks_are_a_problem_and_unused_ones_a_warning() -> None:
    nodes = {"a": GOOD, "b": replace(GOOD, gpus=("H100", "H100"))}
    found = machines(nodes, {"a": Counted(2, 1, 10), "b": Counted(2, 1, 10)})
    assert [(finding.node, finding.level) for finding in found] == [("a", "problem"), ("b", "warning")]


def test_memory_that_is_nearly_used_up_is_a_warning() -> None:
    [found] = machines({"a": replace(GOOD, memory_free_gib=1.0)}, {"a": Counted(2, 0, 10)})
    assert (found.check, found.level) == ("memory", "warning") and runnable([found]) and not runnable([found], strict=True)


def test_a_full_disk_names_its_folders_once() -> None:
    [found] = disks({"a": GOOD}, 60)
    assert found.text == "50.0 GiB free at /runs, /tmp; 60 wanted"


@pytest.mark.parametrize(("ahead", "level"), [(0.5, "ok"), (-3.0, "warning"), (90.0, "problem")])
def test_a_clock_that_is_wrong_is_told_with_its_direction(ahead: float, level: str) -> None:
    [found] = clocks({"a": (ahead, 0.1)})
    assert found.level == level and (level == "ok" or ("ahead" in found.text) == (ahead > 0))


def test_a_slow_answer_is_not_taken_for_a_wrong_clock() -> None:
    [found] = clocks({"a": (3.0, 2.9)})
    assert found.level == "ok"


def test_what_all_nodes_share_is_one_line_and_problems_come_first() -> None:
    found = [Finding("ok", "clock", "all nodes", "fine"), *(Finding("problem", "disk", node, "full", "free it") for node in ("a", "b"))]
    merged = together(found, 2)
    assert [(finding.node, finding.level) for finding in merged] == [("all nodes", "problem"), ("all nodes", "ok")]
    assert table(merged).splitlines()[1].strip() == "-> free it"


def test_this_machine_tells_facts_of_itself() -> None:
    facts = node_facts(["/nowhere/at/all"])
    assert facts.versions["ray"] != "none" and len(facts.code) == 64 and facts.free_gib["/nowhere/at/all"] > 0
