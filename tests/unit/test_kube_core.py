"""Kubernetes' own kinds, against the schemas of one Kubernetes version."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.kube.core import check, known_version, versions
from cluster.kube.documents import Document
from ftcore.errors import ConfigError
from tests.kube_texts import DEPLOYMENT, changed, documents, flaws_of

POD = "spec.template.spec.containers[0]"
FAULTS = {
    "a misspelt field": ("  replicas: 1", "  replica: 1", "unknown-field", "spec.replica", "fields", "`replicas`?"),
    "text for a number": ("  replicas: 1", '  replicas: "1"', "type", "spec.replicas", "an integer", "quotes away"),
    "what has to be there": (
        "  selector:\n    matchLabels:\n      app: admin\n", "", "required", "spec.selector", "an object", "add `selector`"
    ),
    "a port without its number": (
        "            - containerPort: 8000", "            - name: web", "required", f"{POD}.ports[0].containerPort", "an integer", "add"
    ),
    "a number too large": ("  replicas: 1", "  replicas: 3000000000", "format", "spec.replicas", "an int32", ""),
    "a unit that does not exist": ("memory: 1Gi", "memory: 1GB", "pattern", f"{POD}.resources.limits.memory", "like 500m, 2 or 4Gi", ""),
    "another version of the kind": ("apiVersion: apps/v1", "apiVersion: apps/v1beta1", "kind", "apiVersion", "apps/v1", ""),
    "another group's kind": ("apiVersion: apps/v1", "apiVersion: v1", "kind", "apiVersion", "apps/v1", ""),
    "a misspelt kind": ("kind: Deployment", "kind: Deploymnt", "kind", "kind", "a kind of Kubernetes", "`Deployment`?"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_its_place_what_is_wanted_and_what_to_do(name: str) -> None:
    old, new, rule, path, wanted, remedy = FAULTS[name]
    text, line = changed(DEPLOYMENT, old, new)
    (flaw,) = flaws_of(text)
    assert (flaw.level, flaw.rule, flaw.path) == ("error", rule, path)
    assert wanted in flaw.wanted and remedy in flaw.remedy
    assert flaw.line == (line if new else 5)


def test_a_secret_that_is_not_base64_is_told_and_one_in_lines_is_not() -> None:
    head = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\ndata:\n"
    (flaw,) = flaws_of(head + "  token: hello!\n")
    assert (flaw.rule, flaw.path, flaw.wanted) == ("format", "data.token", "base64")
    assert "hello" not in str(flaw)  # what is said lands in CI logs
    assert flaws_of(head + "  token: |\n    aGVs\n    bG8=\n") == []


def test_null_is_a_field_left_out() -> None:
    assert flaws_of(changed(DEPLOYMENT, "  replicas: 1", "  replicas: null")[0]) == []
    (flaw,) = flaws_of(changed(DEPLOYMENT, "            - containerPort: 8000", "            - containerPort: null")[0])
    assert (flaw.rule, flaw.path) == ("required", f"{POD}.ports[0].containerPort")


def test_an_amount_may_be_a_number() -> None:
    assert flaws_of(changed(DEPLOYMENT, "memory: 1Gi", "cpu: 0.5")[0]) == []


def test_a_kind_that_is_not_kubernetes_own_is_nobodys() -> None:
    (document,) = documents("apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\nmetadata: {name: a}\n")
    assert check(document, versions()[-1]) is None


def test_a_version_chooses_its_schemas() -> None:
    """An image as a volume came with 1.31."""
    text = changed(DEPLOYMENT, "      containers:\n", "      volumes: [{name: a, image: {reference: b}}]\n      containers:\n")[0]
    (document,) = documents(text)
    assert list(check(document, "1.34") or ()) == []
    assert [flaw.path for flaw in check(document, "1.30") or ()] == ["spec.template.spec.volumes[0].image"]


def test_versions_are_read_as_people_write_them() -> None:
    assert known_version("v1.34.2") == known_version("1.34") == "1.34" and known_version(None) == versions()[-1]
    with pytest.raises(ConfigError, match="no schemas of this Kubernetes"):
        known_version("1.9")


def mutated(tree: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """One place of a tree renamed, dropped or given a value of another type."""
    tree = deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk({key: value for key, value in tree.items() if key not in ("apiVersion", "kind", "metadata")})
    holder, key = random_.choice([(holder, key) for holder, key in places if holder is not tree])
    change = random_.choice(("drop", "rename", "type"))
    if change == "drop":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = random_.choice([7, "text", True, ["a"], {"a": "b"}])
    return tree


def test_the_verdict_is_that_of_the_package_that_ships_the_schemas() -> None:
    """Apart from what only we look at: formats and amounts. Dropping a key of a free map or a list's item changes nothing for both."""
    whole, generator = yaml.safe_load(DEPLOYMENT), random.Random(7)
    verdicts = []
    for _ in range(60):
        tree = mutated(whole, generator)
        ours = {flaw.rule for flaw in check(Document("m.yaml", 1, tree), versions()[-1]) or ()} - {"format", "pattern"}
        try:
            kubernetes_validate.validate(tree, versions()[-1], strict=True)
            theirs = True
        except kubernetes_validate.ValidationError:
            theirs = False
        assert (not ours) == theirs, (tree, ours)
        verdicts.append(theirs)
    assert 10 < sum(verdicts) < 55
