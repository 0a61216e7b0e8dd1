"""The rules that a CRD holds in CEL: told with the CRD's own message, left out where there is nothing to compare, never guessed."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube.cel import broken
from cluster.kube.crds import kuberay
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from tests.kube_texts import RAY_JOB, changed, flaws_of

DELETION = "spec.deletionStrategy"
JOB_RULES = {
    "another manager": ("managedBy: me", "spec.managedBy", "the managedBy field value must be either"),
    "half a policy": ("deletionStrategy: {onSuccess: {policy: DeleteCluster}}", DELETION, "requires either BOTH onSuccess and onFailure"),
    "old and new policies": (
        "deletionStrategy: {onSuccess: {policy: DeleteCluster}, onFailure: {policy: DeleteSelf}, "
        "deletionRules: [{policy: DeleteSelf, condition: {jobStatus: FAILED}}]}",
        DELETION,
        "cannot be used together within the same deletionStrategy",
    ),
    "two states at once": (
        "deletionStrategy: {deletionRules: [{policy: DeleteSelf, condition: {jobStatus: FAILED, jobDeploymentStatus: Failed}}]}",
        f"{DELETION}.deletionRules[0].condition",
        "cannot be used together within the same deletion condition",
    ),
    "no state": (
        "deletionStrategy: {deletionRules: [{policy: DeleteSelf, condition: {ttlSeconds: 3}}]}",
        f"{DELETION}.deletionRules[0].condition",
        "requires either the JobStatus or the JobDeploymentStatus",
    ),
}


@pytest.mark.parametrize("name", JOB_RULES)
def test_a_rule_of_the_crd_is_told_in_its_own_words(name: str) -> None:
    written, path, wanted = JOB_RULES[name]
    text, line = changed(RAY_JOB, "  backoffLimit: 1", f"  {written}")
    (flaw,) = flaws_of(text)
    assert (flaw.rule, flaw.path, flaw.line, flaw.level) == ("cel", path, line, "error")
    assert wanted in flaw.wanted and "the CRD's rule is" in flaw.remedy


def test_what_keeps_the_rules_is_clean() -> None:
    for written in (
        "managedBy: kueue.x-k8s.io/multikueue",
        "deletionStrategy: {onSuccess: {policy: DeleteCluster}, onFailure: {policy: DeleteSelf}}",
        "deletionStrategy: {deletionRules: [{policy: DeleteSelf, condition: {jobStatus: FAILED}}]}",
    ):
        assert flaws_of(changed(RAY_JOB, "  backoffLimit: 1", f"  {written}")[0]) == []


def rules_in(schema: dict[str, Any]) -> set[str]:
    own = {rule["rule"] for rule in schema.get("x-kubernetes-validations") or ()}
    more = [schema.get("items"), schema.get("additionalProperties"), *(schema.get("properties") or {}).values()]
    return own.union(*(rules_in(child) for child in more if isinstance(child, dict)))


def test_every_rule_of_kuberay_is_one_that_is_evaluated_or_compares_with_before() -> None:
    rules = set().union(*(rules_in(crd.schema) for crd in kuberay()[1]))
    assert len(rules) == 6 and {rule for rule in rules if "oldSelf" in rule} == {"self == oldSelf"}
    for rule in rules:
        assert [flaw for flaw in judged(rule, "x" if rule.startswith("self in") else {}) if flaw.rule == "cel-not-checked"] == []


def judged(rule: str, value: object, schema: dict[str, Any] | None = None, **more: str) -> list[Flaw]:
    document = Document("m.yaml", 1, {"kind": "A", "metadata": {"name": "a"}})
    return list(broken(document, value, {**(schema or {}), "x-kubernetes-validations": [{"rule": rule, **more}]}, "spec"))


NAMED = {"type": "object", "properties": {name: {"type": "string"} for name in ("a-b", "a.b", "namespace", "a__b", "x")}}
NUMBER = {"properties": {"x": {"type": "number"}}}
TIME = {"properties": {"x": {"type": "string", "format": "date-time"}}}
MET: list[tuple[str, object, dict[str, Any]]] = [
    ("size(self.x) == 2", {"x": "äö"}, {}),
    ("self.x.matches('^[0-9]+$')", {"x": "12"}, {}),
    ("self.all(key, size(key) < 3)", {"ab": "c"}, {}),
    ("self.exists(item, item.n == 'a')", [{"n": "a"}], {}),
    ("!has(self.x) || self.x > 1.5", {"x": 2}, NUMBER),
    ("self.x > timestamp('2020-01-01T00:00:00Z')", {"x": "2026-01-01T00:00:00Z"}, TIME),
    ("self.a__dash__b == '1' && self.a__dot__b == '2'", {"a-b": "1", "a.b": "2"}, NAMED),
    ("self.__namespace__ == '1' && self.a__underscores__b == '2'", {"namespace": "1", "a__b": "2"}, NAMED),
    ("self.missing == 1 || true", {}, {}),
]


@pytest.mark.parametrize(("rule", "value", "schema"), MET)
def test_a_rule_reads_values_as_the_schema_types_them(rule: str, value: object, schema: dict[str, Any]) -> None:
    assert judged(rule, value, schema) == []
    assert [flaw.rule for flaw in judged(f"!({rule})", value, schema)] == ["cel"]


def test_a_transition_rule_is_left_out_for_a_new_object() -> None:
    assert judged("self == oldSelf", "x") == []


@pytest.mark.parametrize("rule", ["isQuantity(self.x)", "self.?x.orValue('') == ''", "url(self.x).getHost() == 'a'"])
def test_a_rule_beyond_the_standard_functions_is_told_as_not_checked(rule: str) -> None:
    (flaw,) = judged(rule, {"x": "1"})
    assert (flaw.rule, flaw.level, flaw.got) == ("cel-not-checked", "warning", rule)
    assert "--dry-run=server" in flaw.remedy


@pytest.mark.parametrize(
    ("value", "schema"),
    [(2**70, {"type": "integer"}), (float("inf"), {}), ("soon", {"type": "string", "format": "date-time"})],
)
def test_a_value_that_no_cel_type_holds_is_told_as_not_checked(value: object, schema: dict[str, Any]) -> None:
    assert [flaw.rule for flaw in judged("self.x == self.x", {"x": value}, {"properties": {"x": schema}})] == ["cel-not-checked"]


def test_a_rule_that_fails_is_a_flaw_as_it_is_for_the_api_server() -> None:
    (flaw,) = judged("self.x == 1", {})
    assert (flaw.rule, flaw.level) == ("cel", "error") and "x" in flaw.got


def test_a_rule_says_its_message_and_its_place_as_the_crd_asks() -> None:
    (flaw,) = judged("self.x == 1", {"x": 2}, messageExpression="'x is ' + string(self.x)", fieldPath=".x")
    assert (flaw.wanted, flaw.path) == ("x is 2", "spec.x")
