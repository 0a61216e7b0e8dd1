"""A custom resource is judged as an API server would that makes it: each planted fault at its line, with what is wanted and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube.crds import Crd
from cluster.kube.documents import Document
from cluster.kube.schema import check, settled
from tests.kube_texts import DEPLOYMENT, RAY_JOB, changed, documents, flaws_of

HEAD = "spec.rayClusterSpec.headGroupSpec"
POD = f"{HEAD}.template.spec.containers[0]"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs[0]"
# (what is written, what stands there instead, rule, path, wanted, remedy)
FAULTS = {
    "a misspelt field": (
        "  backoffLimit: 1", "  backofLimit: 1", "unknown-field",
        "spec.backofLimit", "one of its fields", "`backoffLimit`?",
    ),
    "a field in the wrong case": (
        "    rayVersion:", "    rayversion:", "unknown-field", "spec.rayClusterSpec.rayversion", "one of its fields", "`rayVersion`?"
    ),
    "a field one level too high": (
        "        template:\n          spec:\n            containers:",
        "        nodeSelector: {a: b}\n        template:\n          spec:\n            containers:",
        "unknown-field", f"{WORKERS}.nodeSelector", "one of its fields", "",
    ),
    "a field of another object": (
        '        num-cpus: "0"', '        num-cpus: "0"\n      rayVersion: "2.60.0"',
        "unknown-field", f"{HEAD}.rayVersion", "one of its fields", "indentation: there is a field of this name in `spec.rayClusterSpec`",
    ),
    "text for a number": ("  backoffLimit: 1", '  backoffLimit: "1"', "type", "spec.backoffLimit", "an integer", "take the quotes away"),
    "text for a boolean": (
        "  shutdownAfterJobFinishes: true", '  shutdownAfterJobFinishes: "true"',
        "type", "spec.shutdownAfterJobFinishes", "a boolean", "take the quotes away",
    ),
    "a number for text": (
        '                  value: "1"', "                  value: 1", "type",
        f"{POD}.env[0].value", "a string", "in quotes",
    ),
    "a number for a Ray start parameter": (
        '        num-cpus: "0"', "        num-cpus: 0", "type", f"{HEAD}.rayStartParams.num-cpus", "a string", "in quotes",
    ),
    "a boolean for a number": ("        replicas: 1", "        replicas: yes", "type", f"{WORKERS}.replicas", "an integer", ""),
    "an object for a list": (
        "    workerGroupSpecs:\n      - groupName: workers", "    workerGroupSpecs:\n        groupName: workers",
        "type", "spec.rayClusterSpec.workerGroupSpecs", "an array", "`- `",
    ),
    "a part of a core without quotes": (
        "                  cpu: 1", "                  cpu: 0.5", "type",
        f"{POD}.resources.limits.cpu", "an integer or a string", "in quotes"
    ),
    "a unit that does not exist": (
        "                  memory: 5Gi", "                  memory: 5GB", "pattern",
        f"{POD}.resources.limits.memory", "like 500m, 2 or 4Gi", ""
    ),
    "a number too large for its format": (
        "  ttlSecondsAfterFinished: 600", "  ttlSecondsAfterFinished: 3000000000",
        "format", "spec.ttlSecondsAfterFinished", "an int32: -2147483648 to 2147483647", "",
    ),
    "less than the least": (
        "  backoffLimit: 1", "  backoffLimit: 1\n  deletionStrategy: {deletionRules: [{policy: DeleteSelf, condition: {jobStatus: FAILED, "
        "ttlSeconds: -1}}]}",
        "bounds", "spec.deletionStrategy.deletionRules[0].condition.ttlSeconds", "0 or more", "",
    ),
    "too few items": (
        "  backoffLimit: 1", "  backoffLimit: 1\n  deletionStrategy: {deletionRules: []}",
        "items", "spec.deletionStrategy.deletionRules", "at least 1 items, there are 0", "",
    ),
    "a choice that is none": (
        '    rayVersion: "2.60.0"', '    rayVersion: "2.60.0"\n    authOptions: {mode: tokens}',
        "enum", "spec.rayClusterSpec.authOptions.mode", 'one of "disabled", "token"', "",
    ),
    "a field that has to be there": (
        "      - groupName: workers\n        replicas: 1", "      - replicas: 1", "required",
        f"{WORKERS}.groupName", "a string", "add `groupName`"
    ),
    "null for a field that has to be there": (
        "      - groupName: workers", "      - groupName: null", "required", f"{WORKERS}.groupName", "a string", "add `groupName`"
    ),
    "a list that holds a key twice": (
        '                  value: "1"', '                  value: "1"\n                - {name: A, value: "2"}',
        "twice", f"{POD}.env[1]", "each name once", "item 0 has it already",
    ),
    "a key twice once the default is there": (
        "                  name: gcs", "                  name: gcs\n                - {containerPort: 6379, protocol: TCP}",
        "twice", f"{POD}.ports[1]", "each containerPort and protocol once", "item 0",
    ),
}  # fmt: skip


def test_the_manifests_to_change_are_clean() -> None:
    assert flaws_of(RAY_JOB) == [] and flaws_of(DEPLOYMENT) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_its_place_what_is_wanted_and_what_to_do(name: str) -> None:
    old, new, rule, path, wanted, remedy = FAULTS[name]
    text, line = changed(RAY_JOB, old, new)
    (flaw,) = flaws_of(text)
    assert (flaw.level, flaw.rule, flaw.path, flaw.document) == ("error", rule, path, "RayJob/train")
    assert wanted in flaw.wanted and remedy in flaw.remedy
    assert line <= flaw.line <= line + new.count("\n")


def test_all_flaws_are_told_at_once() -> None:
    text, _ = changed(RAY_JOB, "  backoffLimit: 1", '  backofLimit: 1\n  ttlSecondsAfterFinishd: "x"\n  suspend: 3')
    assert [flaw.path for flaw in flaws_of(text)] == ["spec.backofLimit", "spec.ttlSecondsAfterFinishd", "spec.suspend"]


def test_null_is_a_field_left_out() -> None:
    text, _ = changed(RAY_JOB, '        num-cpus: "0"', "        num-cpus: null")
    assert flaws_of(changed(text, "        replicas: 1", "        replicas: null")[0]) == []


def test_the_status_is_not_judged() -> None:
    assert flaws_of(RAY_JOB + "status:\n  jobStatus: 3\n") == []


def of(schema: dict[str, Any], value: object) -> list[tuple[str, str]]:
    """(rule, path) of a value under `spec` of a kind with this schema."""
    document = Document("m.yaml", 1, {"apiVersion": "a.b/v1", "kind": "A", "metadata": {"name": "a"}, "spec": value})
    crd = Crd("a.b", "v1", "A", {"type": "object", "properties": {"spec": schema}}, has_status=False, source="a test")
    return [(flaw.rule, flaw.path) for flaw in check(document, crd)]


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
SIMPLE: list[tuple[dict[str, Any], object, list[str]]] = [
    (WHOLE, 2.0, []),
    (WHOLE, 2.5, ["type"]),
    (WHOLE, True, ["type"]),
    (WHOLE, float("nan"), ["type"]),
    ({"type": "number"}, 2, []),
    ({**WHOLE, "format": "int64"}, 2**63 - 1, []),
    ({**WHOLE, "format": "int64"}, 2**63, ["format"]),
    ({**WHOLE, "minimum": 1, "maximum": 3}, 4, ["bounds"]),
    ({**WHOLE, "minimum": 1, "exclusiveMinimum": True}, 1, ["bounds"]),
    ({**WHOLE, "multipleOf": 4}, 6, ["bounds"]),
    ({**TEXT, "minLength": 1}, "", ["length"]),
    ({**TEXT, "maxLength": 2}, "äöü", ["length"]),
    ({**TEXT, "maxLength": 3}, "äöü", []),
    # RE2's `$` is the very end, and its \d is 0 to 9; Python's re says yes to both
    ({**TEXT, "pattern": "^a$"}, "a\n", ["pattern"]),
    ({**TEXT, "pattern": r"^\d+$"}, "٣", ["pattern"]),
    ({**TEXT, "pattern": "b"}, "abc", []),
    ({**TEXT, "format": "date-time"}, "2026-01-31T12:00:00Z", []),
    ({**TEXT, "format": "date-time"}, "2026-01-31", ["format"]),
    ({**TEXT, "format": "ipv4"}, "10.0.0.256", ["format"]),
    ({**TEXT, "format": "cidr"}, "10.0.0.0/33", ["format"]),
    ({**TEXT, "format": "nobody-knows-it"}, "x", []),
    ({"x-kubernetes-int-or-string": True}, "50%", []),
    ({"x-kubernetes-int-or-string": True}, 5, []),
    ({"x-kubernetes-int-or-string": True}, 0.5, ["type"]),
    ({"type": "array", "items": TEXT, "x-kubernetes-list-type": "set"}, ["a", "b", "a"], ["twice"]),
    ({"type": "array", "items": TEXT}, ["a", "a"], []),
    ({"type": "array", "items": TEXT}, ["a", None], ["type"]),
    ({"type": "array", "items": {**TEXT, "nullable": True}}, ["a", None], []),
    ({"type": "array", "items": TEXT, "maxItems": 1}, ["a", "b"], ["items"]),
    ({"type": "object", "additionalProperties": WHOLE}, {"a": 1, "b": "x"}, ["type"]),
    ({"type": "object", "additionalProperties": WHOLE, "maxProperties": 1}, {"a": 1, "b": 2}, ["items"]),
    ({"type": "object"}, {"a": 1}, ["unknown-field"]),
    ({"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"b": WHOLE}}, {"a": 1, "b": "x"}, ["type"]),
    ({**WHOLE, "nullable": True}, None, []),
    ({"type": "object", "properties": {"a": WHOLE, "b": WHOLE}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1}, []),
    ({"type": "object", "properties": {"a": WHOLE, "b": WHOLE}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {}, ["required"]),
    (
        {"type": "object", "properties": {"a": WHOLE, "b": WHOLE}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"a": 1, "b": 1},
        ["alternatives"],
    ),
    ({**TEXT, "not": {"enum": ["a"]}}, "a", ["alternatives"]),
    ({**TEXT, "allOf": [{"maxLength": 2}, {"pattern": "^a"}]}, "bcd", ["length", "pattern"]),
]


@pytest.mark.parametrize(("schema", "value", "rules"), SIMPLE)
def test_a_value_is_judged_by_its_schema(schema: dict[str, Any], value: object, rules: list[str]) -> None:
    assert [rule for rule, _ in of(schema, value)] == rules


def test_defaults_fill_what_is_missing_before_what_is_needed_is_asked() -> None:
    inner = {"type": "object", "required": ["mode"], "properties": {"mode": {"type": "string", "default": "a", "enum": ["a", "b"]}}}
    schema = {"type": "object", "properties": {"inner": inner, "made": {**inner, "default": {}}}}
    assert settled({"inner": {"mode": None}}, schema) == {"inner": {"mode": "a"}, "made": {"mode": "a"}}
    assert of(schema, {"inner": {}}) == []


def test_a_key_that_yaml_reads_as_a_number_is_text() -> None:
    text, _ = changed(RAY_JOB, "    team: nlp", '    8080: "x"')
    assert flaws_of(text) == [] and documents(text)[0].metadata["labels"] == {8080: "x"}


def test_rules_are_asked_only_once_types_and_needs_are_right() -> None:
    """As the API server does: a rule about what is missing would only say it again."""
    spec = {"type": "object", "required": ["x"], "properties": {"x": WHOLE}, "x-kubernetes-validations": [{"rule": "self.x > 3"}]}
    assert [of(spec, value) for value in ({}, {"x": 1}, {"x": 4})] == [[("required", "spec.x")], [("cel", "spec")], []]


def test_an_object_within_an_object_may_have_a_head() -> None:
    inner = {"type": "object", "x-kubernetes-embedded-resource": True, "properties": {"data": TEXT}}
    value = {"apiVersion": "v1", "kind": "A", "metadata": {"name": "a"}, "data": "x", "more": 1}
    assert of(inner, value) == [("unknown-field", "spec.more")]
