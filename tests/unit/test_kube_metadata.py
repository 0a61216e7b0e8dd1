"""What every object's head must be: names, labels, annotations, and each object once."""

from __future__ import annotations

import pytest

from cluster.kube.metadata import check, twice
from tests.kube_texts import DEPLOYMENT, RAY_JOB, changed, documents, flaws_of

LONG = "a" * 64
FAULTS = {
    "a name with capitals": ("  name: train", "  name: Train_1", "name", "metadata.name", "small letters", "`train-1`"),
    "a name too long": ("  name: train", f"  name: {'a' * 254}", "name", "metadata.name", "at most 253 characters, there are 254", ""),
    "a name that is a number": ("  name: train", "  name: 123", "type", "metadata.name", "a string", "in quotes"),
    "no name": ("  name: train\n", "", "name", "metadata.name", "a name, or a generateName", "add metadata.name"),
    "an empty name": ("  name: train", '  name: ""', "name", "metadata.name", "a name, or a generateName", "add metadata.name"),
    "a generated name that ends in a dot": (
        "  name: train", "  generateName: train.", "name",
        "metadata.generateName", "small letters", "",
    ),
    "a namespace with a dot": ("  name: train", "  name: train\n  namespace: a.b", "name", "metadata.namespace", "at most 63", "`a-b`"),
    "a field that is none": ("  annotations:", "  annotation:", "unknown-field", "metadata.annotation", "fields", "`annotations`?"),
    "a label that is a boolean": ("    team: nlp", "    team: true", "type", "metadata.labels.team", "a string", 'team: "true"'),
    "a label with a space": ("    team: nlp", "    team: n l p", "label", "metadata.labels.team", "at most 63", "annotation"),
    "a label too long": ("    team: nlp", f"    team: {LONG}", "label", "metadata.labels.team", "there are 64", "annotation"),
    "a label's key with two slashes": ("    team: nlp", "    a/b/c: x", "label", "metadata.labels.a/b/c", "[PREFIX/]NAME", ""),
    "an annotation that is a number": (
        'why: "first run"', "why: 1", "type", "metadata.annotations.example.org/why", "a string", 'example.org/why: "1"'
    ),
    "annotations too large": ('"first run"', "x" * 262144, "annotation", "metadata.annotations", "at most 262144 bytes", "ConfigMap"),
    "a pod's label that no pod may have": (
        "            tier: head", "            tier: head!", "label",
        "spec.rayClusterSpec.headGroupSpec.template.metadata.labels.tier", "at most 63", "",
    ),
    "no kind": ("kind: RayJob\n", "", "head", "kind", "like RayCluster", ""),
    "an apiVersion that is none": ("apiVersion: ray.io/v1", "apiVersion: ray.io/1", "head", "apiVersion", "GROUP/VERSION", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_its_place_what_is_wanted_and_what_to_do(name: str) -> None:
    old, new, rule, path, wanted, remedy = FAULTS[name]
    text, _ = changed(RAY_JOB, old, new)
    (document,) = documents(text)
    (flaw,) = check(document)
    assert (flaw.level, flaw.rule, flaw.path) == ("error", rule, path)
    assert wanted in flaw.wanted and remedy in flaw.remedy
    assert not new or text.splitlines()[flaw.line - 1].strip() in (
        *(line.strip() for line in new.splitlines()),
        "annotations:",
        f"example.org/{new}",
    )


@pytest.mark.parametrize(
    ("name", "kind", "api_version", "good"),
    [
        ("system:a", "Role", "rbac.authorization.k8s.io/v1", True),
        ("a/b", "Role", "rbac.authorization.k8s.io/v1", False),
        ("1a", "Service", "v1", False),
        ("a.b", "Service", "v1", False),
        ("1a", "Namespace", "v1", True),
        ("a.b", "Namespace", "v1", False),
        ("a.b", "ConfigMap", "v1", True),
        ("a" * 253, "RayCluster", "ray.io/v1", True),
        ("-a", "RayCluster", "ray.io/v1", False),
        ("a\n", "ConfigMap", "v1", False),
    ],
)
def test_each_kind_has_its_own_rule_for_names(name: str, kind: str, api_version: str, good: bool) -> None:
    (document,) = documents(f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: {name!r}}}\n".replace("'", '"'))
    assert [flaw.path for flaw in check(document)] == ([] if good else ["metadata.name"])


def test_a_label_of_a_template_that_is_no_text_is_told_once() -> None:
    (flaw,) = flaws_of(changed(RAY_JOB, "            tier: head", "            tier: true")[0])
    assert (flaw.rule, flaw.path) == ("type", "spec.rayClusterSpec.headGroupSpec.template.metadata.labels.tier")


def test_a_generated_name_may_end_in_a_dash() -> None:
    assert flaws_of(changed(RAY_JOB, "  name: train", "  generateName: train-")[0]) == []


def test_an_empty_label_is_one() -> None:
    assert flaws_of(changed(RAY_JOB, "    team: nlp", '    team: ""\n    other:')[0]) == []


def test_metadata_that_is_no_object_is_told() -> None:
    (document,) = documents("apiVersion: v1\nkind: Secret\nmetadata: [a]\n")
    assert [(flaw.rule, flaw.got) for flaw in check(document)] == [("metadata", '["a"]')]


def test_one_object_stands_once_in_a_file() -> None:
    found = documents(f"{RAY_JOB}---\n{DEPLOYMENT}---\n{RAY_JOB}")
    (flaw,) = twice(found)
    assert (flaw.level, flaw.rule, flaw.path, flaw.document) == ("error", "duplicate", "metadata.name", "RayJob/train")
    assert "first in m.yaml:4" in flaw.got and flaw.line == 4 + RAY_JOB.count("\n") + DEPLOYMENT.count("\n") + 2
    assert "rename" in flaw.remedy


def test_between_files_of_a_folder_that_is_a_warning() -> None:
    (flaw,) = twice([*documents(RAY_JOB, "a.yaml"), *documents(RAY_JOB, "b.yaml")])
    assert flaw.level == "warning" and "a.yaml:4" in flaw.got


def test_another_namespace_or_group_is_another_object() -> None:
    elsewhere = changed(RAY_JOB, "  name: train", "  name: train\n  namespace: other")[0]
    other_group = changed(RAY_JOB, "apiVersion: ray.io/v1", "apiVersion: other.io/v1")[0]
    another_version = changed(RAY_JOB, "apiVersion: ray.io/v1", "apiVersion: ray.io/v1alpha1")[0]
    assert list(twice(documents(f"{RAY_JOB}---\n{elsewhere}---\n{other_group}"))) == []
    assert len(list(twice(documents(f"{RAY_JOB}---\n{another_version}")))) == 1
