"""CEL: the rules that a CRD holds itself (x-kubernetes-validations), evaluated for one value of a new object.

In: a value after defaulting, its schema. Out: a Flaw for each rule that is not met. Runs in: a terminal; imports no ray.

Transition rules (`oldSelf`) compare with the object before an update; a new object has none, and they are left out as the API server does.
The library has CEL's standard functions. A rule with one of Kubernetes' own (quantity, url, ip) or an optional (`self.?a`) is told as not
checked, never guessed. Where `has(self.a.b)` finds no `a` it says false; the API server would fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import celpy
from celpy import celtypes

from cluster.kube.crds import Schema
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from cluster.kube.values import shown

OLD = re.compile(r"\boldSelf\b")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Names that CEL keeps for itself: a field of that name is `__name__` in a rule.
RESERVED = {
    *("true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import", "let", "loop"),
    *("package", "namespace", "return", "var", "void", "while"),
}
ESCAPES = (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__"))
# What the library says of a function it does not have, or of types it does not compare: no verdict on the value.
NOT_OURS = ("undeclared reference", "no matching overload", "no such overload")
# Beside its own: what its types raise for a number, a time or a duration that they cannot hold.
FAILURES = (celpy.CELEvalError, celpy.CELParseError, ValueError, ArithmeticError, TypeError)
ENVIRONMENT = celpy.Environment()


def broken(document: Document, value: Any, schema: Schema, path: str) -> Iterator[Flaw]:
    """`path` is where the schema stands that holds the rules; a rule's `fieldPath` leads on from there."""
    for rule in schema["x-kubernetes-validations"]:
        text = rule["rule"].strip()
        if OLD.search(text):
            continue
        where = (path + str(rule.get("fieldPath") or "")).removeprefix(".")
        try:
            context = {"self": as_cel(value, schema)}
            met = bool(_program(text).evaluate(context))
        except FAILURES as error:
            yield _failed(document, where, text, value, error)
            continue
        if not met:
            yield document.flaw("cel", where, got=shown(value), wanted=_message(rule, context), remedy=f"the CRD's rule is {text}")


def _failed(document: Document, where: str, text: str, value: Any, error: Exception) -> Flaw:
    """A rule that cannot be answered for this value is not met; one that this library cannot answer is not checked."""
    if isinstance(error, celpy.CELEvalError) and not any(words in str(error) for words in NOT_OURS):
        said = str(error.args[0] if error.args else error).strip()
        return document.flaw("cel", where, got=f"{shown(value)}: {said}", wanted=f"a value of which this can be said: {text}")
    wanted, remedy = "a rule in CEL's standard functions", "the API server will decide; `kubectl apply --dry-run=server` asks it"
    return document.flaw("cel-not-checked", where, got=text, wanted=wanted, remedy=remedy, level="warning")


def _message(rule: Mapping[str, Any], context: celpy.Context) -> str:
    if rule.get("messageExpression"):
        try:
            return str(_program(rule["messageExpression"].strip()).evaluate(context))
        except FAILURES:
            return str(rule.get("message") or rule["rule"])  # as the API server falls back
    return str(rule.get("message") or rule["rule"]).strip()


@cache
def _program(text: str) -> celpy.Runner:
    return ENVIRONMENT.program(ENVIRONMENT.compile(text))


def as_cel(value: Any, schema: Schema) -> Any:
    """A value typed by its schema: `3` is a double where the schema says number; an object has the fields its schema names, no others."""
    if isinstance(value, dict):
        properties = schema.get("properties")
        if properties is None:
            inner = schema.get("additionalProperties")
            child = inner if isinstance(inner, dict) else {}
            return celtypes.MapType({celtypes.StringType(key): as_cel(item, child) for key, item in value.items()})
        names = {name: _escaped(name) for name in properties if name in value}
        return celtypes.MapType(
            {celtypes.StringType(seen): as_cel(value[name], properties[name]) for name, seen in names.items() if IDENTIFIER.fullmatch(seen)}
        )
    if isinstance(value, list):
        items = schema.get("items")
        return celtypes.ListType([as_cel(item, items if isinstance(items, dict) else {}) for item in value])
    if isinstance(value, bool):
        return celtypes.BoolType(value)
    if isinstance(value, int | float) and (schema.get("type") == "number" or value != int(value)):
        return celtypes.DoubleType(value)
    if isinstance(value, int | float):
        return celtypes.IntType(int(value))
    if isinstance(value, str) and schema.get("format") == "date-time":
        return celtypes.TimestampType(value)
    if isinstance(value, str) and schema.get("format") == "duration":
        return celtypes.DurationType(value)
    return None if value is None else celtypes.StringType(value)


def _escaped(name: str) -> str:
    """As a rule has to write a field's name."""
    if name in RESERVED:
        return f"__{name}__"
    for found, written in ESCAPES:
        name = name.replace(found, written)
    return name
