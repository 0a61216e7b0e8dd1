"""Metadata: what every object's head must be: apiVersion, kind, names, labels and annotations; and that no object stands there twice.

In: Documents. Out: Flaws. Runs in: a terminal; imports no ray. The rules are those of apimachinery's validation of names and labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw, Level
from cluster.kube.values import shown

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
API_VERSION = re.compile(r"([a-z0-9.-]+/)?v\d+((alpha|beta)\d+)?")
MAX_LABEL, MAX_SUBDOMAIN, MAX_ANNOTATIONS_BYTES = 63, 253, 256 * 1024
RBAC = ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
TEXT_FIELDS = ("name", "generateName", "namespace")
# What a person writes, then what the server does: it takes both, and overwrites the second.
FIELDS = (
    *TEXT_FIELDS, "labels", "annotations", "finalizers", "ownerReferences",
    "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "generation", "managedFields", "resourceVersion", "selfLink",
    "uid",
)  # fmt: skip


def check(document: Document) -> Iterator[Flaw]:
    yield from _head(document)
    metadata = document.tree.get("metadata")
    if not isinstance(metadata, dict):
        yield document.flaw("metadata", "metadata", got=shown(metadata), wanted="an object with a name", remedy="add metadata.name")
        return
    yield from _unknown(document, metadata)
    yield from _names(document, metadata)
    yield from labels(document, metadata, "metadata")
    yield from _in_templates(document, document.tree, "")


def _head(document: Document) -> Iterator[Flaw]:
    for key, like in (("apiVersion", "ray.io/v1"), ("kind", "RayCluster")):
        value = document.tree.get(key)
        if not isinstance(value, str) or not value:
            yield document.flaw("head", key, got=shown(value) if key in document.tree else "nothing", wanted=f"text, like {like}")
    value = document.tree.get("apiVersion")
    if isinstance(value, str) and value and not API_VERSION.fullmatch(value):
        yield document.flaw("head", "apiVersion", got=value, wanted="GROUP/VERSION or VERSION, like ray.io/v1 or v1")


def _unknown(document: Document, metadata: Mapping[str, Any]) -> Iterator[Flaw]:
    for key in metadata:
        if key not in FIELDS:
            near = get_close_matches(str(key), FIELDS, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else "take it out, or put it under labels or annotations"
            yield document.flaw("unknown-field", f"metadata.{key}", got=key, wanted="one of its fields", remedy=remedy)


def _names(document: Document, metadata: Mapping[str, Any]) -> Iterator[Flaw]:
    given = {key: metadata[key] for key in TEXT_FIELDS if metadata.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            yield document.flaw("type", f"metadata.{key}", got=shown(value), wanted="a string", remedy="write it in quotes")
    texts = {key: value for key, value in given.items() if isinstance(value, str) and value}
    if not any(given.get(key) not in (None, "") for key in ("name", "generateName")):
        yield document.flaw("name", "metadata.name", got="nothing", wanted="a name, or a generateName", remedy="add metadata.name")
    for key in ("name", "generateName"):
        if key in texts:
            # What is generated gets five letters more, so the dash before them may be the last.
            text = texts[key] if key == "name" else re.sub(r"-$", "a", texts[key])
            wanted = _wanted_name(document, text)
            if wanted:
                yield document.flaw("name", f"metadata.{key}", got=shown(texts[key]), wanted=wanted, remedy=_renamed(texts[key]))
    if "namespace" in texts and not _fits(LABEL, texts["namespace"], MAX_LABEL):
        wanted = f"small letters, digits and `-` inside, at most {MAX_LABEL}"
        yield document.flaw("name", "metadata.namespace", got=shown(texts["namespace"]), wanted=wanted, remedy=_renamed(texts["namespace"]))


def _fits(pattern: re.Pattern[str], text: str, most: int) -> bool:
    return len(text) <= most and bool(pattern.fullmatch(text))


def _wanted_name(document: Document, name: str) -> str:
    """What a name of this kind must be; empty where it is so."""
    if document.kind in RBAC and document.api_version.startswith("rbac."):
        return "" if name not in (".", "..") and not set(name) & {"/", "%"} else "a name without `/` and `%`"
    if document.kind == "Service" and document.api_version == "v1":
        return "" if _fits(LABEL_1035, name, MAX_LABEL) else f"a letter, then small letters, digits and `-` inside, at most {MAX_LABEL}"
    if document.kind == "Namespace" and document.api_version == "v1":
        return "" if _fits(LABEL, name, MAX_LABEL) else f"small letters, digits and `-` inside, at most {MAX_LABEL}"
    if _fits(SUBDOMAIN, name, MAX_SUBDOMAIN):
        return ""
    return f"small letters, digits, `-` and `.` inside, at most {MAX_SUBDOMAIN} characters, there are {len(name)}"


def _renamed(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_LABEL].rstrip("-")
    return f"for example `{plain}`" if plain and plain != name else ""


def labels(document: Document, metadata: Mapping[str, Any], path: str, *, has_schema: bool = False) -> Iterator[Flaw]:
    """Labels and annotations: of an object, or of the pods that a template makes, whose types the schema has judged."""
    for key in ("labels", "annotations"):
        found = metadata.get(key)
        if found is None:
            continue
        if not isinstance(found, dict):
            if not has_schema:
                yield document.flaw("type", f"{path}.{key}", got=shown(found), wanted="an object of texts")
            continue
        for name, value in found.items():
            if isinstance(value, str) or not has_schema:
                yield from _label(document, str(name), value, f"{path}.{key}", is_label=key == "labels")
    notes = metadata.get("annotations")
    if isinstance(notes, dict):
        size = sum(len(str(part).encode()) for pair in notes.items() for part in pair)
        if size > MAX_ANNOTATIONS_BYTES:
            wanted = f"at most {MAX_ANNOTATIONS_BYTES} bytes together"
            yield document.flaw("annotation", f"{path}.annotations", got=f"{size} bytes", wanted=wanted, remedy="use a ConfigMap")


def _label(document: Document, name: str, value: object, path: str, *, is_label: bool) -> Iterator[Flaw]:
    rule, place = "label" if is_label else "annotation", f"{path}.{name}"
    prefix, slash, last = name.rpartition("/")
    if (slash and not _fits(SUBDOMAIN, prefix.lower() if not is_label else prefix, MAX_SUBDOMAIN)) or not _fits(QUALIFIED, last, MAX_LABEL):
        wanted = f"[PREFIX/]NAME: a DNS name before the one `/`, then at most {MAX_LABEL} letters, digits, `-`, `_`, `.` inside"
        yield document.flaw(rule, place, got=shown(name), wanted=wanted)
    if value is None:
        return  # read as empty text
    if not isinstance(value, str):
        yield document.flaw("type", place, got=shown(value), wanted="a string", remedy=f"write it in quotes: {name}: {shown(shown(value))}")
    elif is_label and value and not _fits(QUALIFIED, value, MAX_LABEL):
        wanted = f"at most {MAX_LABEL} letters and digits, `-`, `_`, `.` inside, there are {len(value)}"
        yield document.flaw(rule, place, got=shown(value), wanted=wanted, remedy="what is longer or freer belongs into an annotation")


def _in_templates(document: Document, value: Any, path: str) -> Iterator[Flaw]:
    """Pod templates within: no schema holds the form of their labels, and what is wrong there shows only when no pod comes up."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _in_templates(document, item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            place = f"{path}.{key}" if path else str(key)
            if isinstance(inner, dict) and path and key == "metadata" and "spec" in value:
                yield from labels(document, inner, place, has_schema=True)
            elif not (key == "metadata" and not path):
                yield from _in_templates(document, inner, place)


def twice(documents: Sequence[Document]) -> Iterator[Flaw]:
    """Objects of one kind, namespace and name in one set: the last would win, silently. Between files of a folder it is a warning: it may
    hold alternatives, which nobody applies together."""
    seen: dict[tuple[str, str, str, str], Document] = {}
    for document in documents:
        if not document.metadata.get("name"):
            continue
        group = document.api_version.rpartition("/")[0]
        key = (group, document.kind, document.namespace, document.name)
        first = seen.setdefault(key, document)
        if first is not document:
            got = f"{document.title} again, first in {first.file}:{first.line('metadata.name')}"
            level: Level = "error" if first.file == document.file else "warning"
            remedy = "rename one of the two, or take it out"
            yield document.flaw(
                "duplicate", "metadata.name", got=got, wanted="each kind, namespace and name once", remedy=remedy, level=level
            )
