"""Schema: a custom resource against its CRD, in the order of an API server that makes it: nulls, defaults, unknown fields, values, rules.

In: a Document and its Crd. Out: Flaws. Runs in: a terminal; imports no ray.

The same walk checks core kinds, whose schemas are JSON Schema with references: `Walk.is_structural` says which of the two it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from cluster.kube.cel import broken
from cluster.kube.crds import Crd, Schema
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from cluster.kube.values import Wrong, described, shown, wrong_type, wrongs

OPEN = "x-kubernetes-preserve-unknown-fields"
EMBEDDED = "x-kubernetes-embedded-resource"
HEAD = ("apiVersion", "kind", "metadata")
# After one of these the API server asks no CEL rule: a rule may rely on what is missing or of another type.
BLOCKING = {"type", "required", "length", "items", "yaml"}


def check(document: Document, crd: Crd) -> Iterator[Flaw]:
    """`metadata` is judged by cluster.kube.metadata; here only what the CRD itself says of it."""
    schema = with_metadata_open(crd.schema)
    # The API server drops the status when it makes an object, and judges the rest.
    written = {key: value for key, value in plain(document.tree).items() if key != "status" or not crd.has_status}
    tree = settled(written, schema)
    flaws = [*Walk(document).unknown(written, schema, "", ()), *Walk(document).values(tree, schema, "")]
    yield from flaws
    if not any(flaw.rule in BLOCKING for flaw in flaws):
        yield from rules(document, tree, schema, "")


def with_metadata_open(schema: Schema) -> Schema:
    """apiVersion, kind and metadata are every object's, also where its CRD names none of them."""
    given = schema.get("properties") or {}
    always = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    metadata = {"type": "object", **(given.get("metadata") or {}), OPEN: True}
    return {**schema, "properties": {**always, **given, "metadata": metadata}}


def plain(value: Any) -> Any:
    """As JSON has it: keys are text."""
    if isinstance(value, dict):
        return {(str(key).lower() if isinstance(key, bool) else str(key)): plain(inner) for key, inner in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def under(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def child(schema: Schema, key: str) -> Schema | None:
    """The schema of a field or of a map's value; None where the schema says nothing of it."""
    properties = schema.get("properties") or {}
    if key in properties:
        return properties[key]
    more = schema.get("additionalProperties")
    return more if isinstance(more, dict) else None


def settled(value: Any, schema: Schema) -> Any:
    """Nulls gone where null is not allowed, then defaults filled in; the same value otherwise."""
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            found = child(schema, key)
            if found is None:
                kept[key] = inner
            elif inner is not None or found.get("nullable"):
                kept[key] = settled(inner, found)
        for name, prop in (schema.get("properties") or {}).items():
            if name not in kept and "default" in prop:
                kept[name] = settled(deepcopy(prop["default"]), prop)
        return kept
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        items = schema["items"]
        default = None if items.get("nullable") else items.get("default")
        return [settled(deepcopy(default) if item is None else item, items) for item in value]
    return value


@dataclass(frozen=True)
class Walk:
    """Over one document, with the definitions that its schema refers to."""

    document: Document
    definitions: Mapping[str, Schema] = field(default_factory=dict)
    is_structural: bool = True
    """A CRD's: a field that no schema names is unknown. JSON Schema: only where additionalProperties is false."""

    def resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        return schema

    def unknown(self, value: Any, schema: Schema, path: str, above: tuple[tuple[str, Schema], ...]) -> Iterator[Flaw]:
        """Fields that the API server would drop, and refuses under strict validation. `above`: the objects that hold this one."""
        schema = self.resolved(schema)
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            for number, item in enumerate(value):
                yield from self.unknown(item, schema["items"], f"{path}[{number}]", above)
        if not isinstance(value, dict):
            return
        for key, inner in value.items():
            found = child(schema, key)
            if found is not None:
                yield from self.unknown(inner, found, under(path, key), (*above, (path, schema)))
            elif self._is_closed(schema) and not (schema.get(EMBEDDED) and key in HEAD):
                names = list(schema.get("properties") or {})
                wanted = "one of its fields" if names else "no field at all"
                remedy = self._cure(key, names, schema, path, above)
                yield self.document.flaw("unknown-field", under(path, key), got=key, wanted=wanted, remedy=remedy)

    def _is_closed(self, schema: Schema) -> bool:
        if not self.is_structural:
            return schema.get("additionalProperties") is False
        is_object = schema.get("type") == "object" or "properties" in schema
        return is_object and not schema.get(OPEN) and not schema.get("additionalProperties")

    def _cure(self, key: str, names: list[str], schema: Schema, path: str, above: tuple[tuple[str, Schema], ...]) -> str:
        """The nearest name here, else the place near by that has a field of this name: an indentation that slipped."""
        lower = {name.lower(): name for name in names}
        near = get_close_matches(key.lower(), lower, n=1, cutoff=0.75)
        if near:
            return f"did you mean `{lower[near[0]]}`?"
        places = [under(path, name) for name in names if key in (self.resolved(schema["properties"][name]).get("properties") or {})]
        places += [place or "the top" for place, holder in reversed(above) if key in (holder.get("properties") or {})]
        if places:
            return "check its indentation: there is a field of this name in " + " and ".join(f"`{place}`" for place in places[:3])
        near = get_close_matches(key.lower(), lower, n=1, cutoff=0.6)
        return f"did you mean `{lower[near[0]]}`?" if near else "take it out, or correct its name: it would be dropped"

    def values(self, value: Any, schema: Schema, path: str) -> Iterator[Flaw]:
        schema = self.resolved(schema)
        if value is None and schema.get("nullable"):
            return
        wrong = wrong_type(value, schema)
        if wrong:
            yield self._flaw(wrong, value, path)
            return
        yield from (self._flaw(each, value, path) for each in wrongs(value, schema))
        yield from self._logic(value, schema, path)
        if isinstance(value, dict):
            yield from self._object(value, schema, path)
        elif isinstance(value, list):
            if isinstance(schema.get("items"), dict):
                for number, item in enumerate(value):
                    yield from self.values(item, schema["items"], f"{path}[{number}]")
            if self.is_structural:
                yield from self._twice(value, schema, path)

    def _flaw(self, wrong: Wrong, value: object, path: str) -> Flaw:
        is_secret = self.document.kind == "Secret" and path.startswith(("data.", "stringData."))
        got = "a value that is not shown" if is_secret else shown(value)
        return self.document.flaw(wrong.rule, path, got=got, wanted=wrong.wanted, remedy=wrong.remedy)

    def _object(self, value: Mapping[str, Any], schema: Schema, path: str) -> Iterator[Flaw]:
        for name in schema.get("required") or ():
            if name not in value:
                wanted = described(self.resolved((schema.get("properties") or {}).get(name) or {}))
                yield self.document.flaw("required", under(path, name), got="nothing", wanted=wanted, remedy=f"add `{name}`")
        for key, inner in value.items():
            found = child(schema, key)
            if found is not None:
                yield from self.values(inner, found, under(path, key))

    def _logic(self, value: Any, schema: Schema, path: str) -> Iterator[Flaw]:
        """Of several alternatives; what breaks all is told by the one that comes nearest, in its type first."""
        for part in schema.get("allOf") or ():
            yield from self.values(value, part, path)
        for key in ("anyOf", "oneOf"):
            verdicts = [list(self.values(value, part, path)) for part in schema.get(key) or ()]
            num_met = sum(not flaws for flaws in verdicts)
            if verdicts and not num_met:
                yield from min(verdicts, key=lambda flaws: (any(flaw.rule == "type" and flaw.path == path for flaw in flaws), len(flaws)))
            elif key == "oneOf" and num_met > 1:
                yield self.document.flaw(
                    "alternatives", path, got=shown(value), wanted=f"one alternative of {len(verdicts)}, {num_met} fit"
                )
        if "not" in schema and not list(self.values(value, schema["not"], path)):
            yield self.document.flaw("alternatives", path, got=shown(value), wanted=f"anything but {shown(schema['not'])}")

    def _twice(self, items: list[Any], schema: Schema, path: str) -> Iterator[Flaw]:
        """A list that is a set, or a map by some keys: nothing stands in it twice. Lists are short: compared pair by pair."""
        how = schema.get("x-kubernetes-list-type")
        keys = schema.get("x-kubernetes-list-map-keys") or ()
        if how not in ("set", "map"):
            return
        seen: list[Any] = []
        for number, item in enumerate(items):
            known = {key: item.get(key) for key in keys} if how == "map" and isinstance(item, dict) else item
            if known in seen:
                wanted = f"each {' and '.join(keys) or 'value'} once in this list"
                remedy = f"item {seen.index(known)} has it already: keep one, or rename one"
                yield self.document.flaw("twice", f"{path}[{number}]", got=shown(known), wanted=wanted, remedy=remedy)
            seen.append(known)


def rules(document: Document, value: Any, schema: Schema, path: str) -> Iterator[Flaw]:
    """The CRD's own rules in CEL, wherever they stand."""
    if value is None:
        return
    if schema.get("x-kubernetes-validations"):
        yield from broken(document, value, schema, path)
    if isinstance(value, dict):
        for key, inner in value.items():
            found = child(schema, key)
            if found is not None:
                yield from rules(document, inner, found, under(path, key))
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, item in enumerate(value):
            yield from rules(document, item, schema["items"], f"{path}[{number}]")
