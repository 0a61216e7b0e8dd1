"""Manifests: each rule finds the one fault that is planted into good manifests, at its place, and nothing in the good ones."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.kube.documents import Document, parse
from cluster.kube.rules import RULES, check
from tests.kube_faults import CRON, FAULTS, Fault
from tests.kube_manifests import documents, put, spelled, trees
from tests.kube_practice_faults import PRACTICE

ALL = FAULTS + PRACTICE
COMPANIONS = {
    "name-length": "generated-names",
    "replica-bounds": "replicas-clamped",
    "deletion-policies": "unused-fields",
    "serve-port": "port-names",
    "dashboard-port": "port-names",
    "rocksdb-upgrade": "missing-reference",
}
"""What is true of the same fault."""


def test_the_good_manifests_have_no_flaw() -> None:
    assert [str(flaw) for flaw in check(documents(), [CRON])] == []


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: f"{fault.rule}:{fault.kind}")
def test_a_planted_fault_is_found_at_its_place_with_a_remedy(fault: Fault) -> None:
    changed = documents(*fault.also, (fault.kind, fault.path, fault.value))
    found = [flaw for flaw in check(changed, fault.gates) if flaw.rule == fault.rule]
    if fault.at:
        found = [flaw for flaw in found if flaw.path == spelled(fault.at) and flaw.document.startswith(f"{fault.kind}/")]
    assert [flaw for flaw in found if fault.wanted in flaw.wanted and fault.remedy in flaw.remedy], found


def test_a_planted_fault_is_the_only_thing_that_is_found() -> None:
    for fault in ALL:
        flaws = list(check(documents(*fault.also, (fault.kind, fault.path, fault.value)), fault.gates))
        assert {flaw.rule for flaw in flaws} <= {fault.rule, COMPANIONS.get(fault.rule, "")}, (fault, [str(flaw) for flaw in flaws])


def test_every_rule_is_planted_at_least_once_and_says_why_it_is_there() -> None:
    assert {fault.rule for fault in ALL} == set(RULES)
    assert all(reason and "\n" not in reason for reason in RULES.values())


def test_a_flaw_knows_the_line_it_is_written_on() -> None:
    text = "apiVersion: ray.io/v1\nkind: RayService\nmetadata:\n  name: Bad_Name\nspec:\n  rayClusterConfig: {}\n"
    (document,) = [item for item in parse(text, "a.yaml") if isinstance(item, Document)]
    lines = {flaw.rule: flaw.line for flaw in check([document])}
    assert (lines["name-dns"], lines["containers-present"], lines["serve-head"]) == (4, 6, 5)


def test_no_rule_raises_on_trees_of_wrong_types() -> None:
    chance = random.Random(6)
    for _ in range(60):
        tree = trees()
        for kind in tree:
            for path in chance.sample(sorted(_paths(tree[kind])), k=min(3, len(list(_paths(tree[kind]))))):
                try:
                    put(
                        tree[kind],
                        path,
                        chance.choice([None, 0, -1, 1.5, True, "", "x", [], {}, [None], [[]], {"a": 1}, {1: 2}, float("inf")]),
                    )
                except (TypeError, AttributeError, IndexError, ValueError, KeyError):
                    continue  # a change above it has taken the place away
        list(check([Document("f.yaml", 1, one) for one in tree.values()]))


def test_no_rule_raises_on_trees_of_known_keys_in_any_order() -> None:
    chance = random.Random(7)
    keys = sorted({key for tree in trees().values() for path in _paths(tree) for key in path.split() if not key.isdigit()})
    leaves = [None, 0, -1, 2.5, True, "", "x", "Never", "rocksdb", "v2", "token", "a: [b", "2.60.0", "/x", "ray.io/v1"]

    def grow(depth: int) -> Any:
        if depth == 0 or chance.random() < 0.2:
            return chance.choice(leaves)
        if chance.random() < 0.3:
            return [grow(depth - 1) for _ in range(chance.randrange(4))]
        return {key: grow(depth - 1) for key in chance.sample(keys, k=12)}

    for _ in range(15):
        found = [{"apiVersion": "ray.io/v1", "kind": kind, "metadata": grow(3), "spec": grow(4)} for kind in trees()]
        list(check([Document("f.yaml", 1, tree) for tree in found], [CRON]))


def test_a_text_that_never_ends_is_no_yaml() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in pairwise("abcdefghi"))
    for text in (bomb, "a: &a [*a]", "[" * 5000):
        flaws = list(check(documents(("RayService", "spec serveConfigV2", text), ("RayJob", "spec runtimeEnvYAML", text)), [CRON]))
        assert {flaw.rule for flaw in flaws if flaw.level == "error"} == {"serve-config", "runtime-env"}


def _paths(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        inner = f"{path} {key}".strip()
        yield inner
        yield from _paths(value, inner)


SAMPLES = os.environ.get("FTCORE_KUBERAY_SAMPLES", "")
ALLOWED = {
    "secret-in-clear": "samples carry their secrets",
    "cron-gate": "off by default in 1.7.0",
    "ft-rocksdb": "its gate is off by default",
    "history-server": "its gate is off by default",
    "tls": "its gate is off by default",
    "network-policy": "its gate is off by default",
}


@pytest.mark.skipif(not SAMPLES, reason="FTCORE_KUBERAY_SAMPLES names no folder of KubeRay's samples")
def test_kuberays_own_samples_are_refused_for_stated_reasons_only() -> None:
    files = sorted(Path(SAMPLES).rglob("*.yaml"))
    assert files
    for file in files:
        parsed = [item for item in parse(file.read_text(encoding="utf-8"), str(file)) if isinstance(item, Document)]
        errors = [flaw for flaw in check(parsed) if flaw.level == "error" and flaw.rule not in ALLOWED]
        assert not errors, "\n".join(map(str, errors))
        gates = {"RayCronJob", "GCSFaultToleranceEmbeddedStorage", "RayClusterHistoryServer", "RayClusterMTLS", "RayClusterNetworkPolicy"}
        assert {flaw.rule for flaw in check(parsed, gates) if flaw.level == "error"} <= {"secret-in-clear"}
