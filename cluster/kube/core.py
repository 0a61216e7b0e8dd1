"""Core: Kubernetes' own kinds against the schemas of one Kubernetes version, strictly: what the server would drop is refused.

In: a Document, a version. Out: Flaws; None for a kind that is not Kubernetes' own. Runs in: a terminal; imports no ray.

The schemas are those that kubernetes-validate ships. The walk that reads CRDs reads them, so that every flaw has its place, its wanted and
its nearest name, and all flaws are told (the package's own `validate` tells one); a test holds that both come to the same verdicts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.kube.crds import Schema
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from cluster.kube.schema import Walk, plain
from ftcore.errors import ConfigError

QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
# resource.Quantity's own grammar; the schemas say only "text or number".
QUANTITY_PATTERN = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"


@cache
def _home() -> Path:
    """Where kubernetes-validate keeps its schemas; found without importing it, as that takes long."""
    spec = find_spec("kubernetes_validate")
    if spec is None or spec.origin is None:
        raise ConfigError("Kubernetes' schemas are not installed", got="no module kubernetes_validate", remedy="pip install 'ftcore[k8s]'")
    return Path(spec.origin).parent / "kubernetes-json-schema"


@cache
def versions() -> tuple[str, ...]:
    """Like 1.34; the newest last."""
    found = (re.fullmatch(r"v(\d+)\.(\d+)\.0-local-strict", path.name) for path in _home().iterdir())
    return tuple(f"{major}.{minor}" for major, minor in sorted((int(match[1]), int(match[2])) for match in found if match))


def known_version(asked: str | None) -> str:
    """Raises ConfigError for a version whose schemas are not there."""
    if asked is None:
        return versions()[-1]
    short = ".".join(asked.removeprefix("v").split(".")[:2])
    if short not in versions():
        raise ConfigError("no schemas of this Kubernetes", where="--kubernetes", got=asked, wanted=", ".join(versions()))
    return short


def _folder(version: str) -> Path:
    return _home() / f"v{version}.0-local-strict"


@cache
def _definitions(version: str) -> dict[str, Schema]:
    defined = json.loads((_folder(version) / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    number_or_text = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": QUANTITY_PATTERN}]}
    return {**defined, QUANTITY: number_or_text}


@cache
def _kinds(version: str) -> dict[tuple[str, str], str]:
    """(apiVersion, kind) -> definition, of everything that can be made: it has metadata of its own."""
    found = {}
    for name, schema in _definitions(version).items():
        for made in schema.get("x-kubernetes-group-version-kind") or ():
            reference = ((schema.get("properties") or {}).get("metadata") or {}).get("$ref", "")
            if reference.endswith("ObjectMeta"):
                found[(f"{made['group']}/{made['version']}".removeprefix("/"), made["kind"])] = name
    return found


def check(document: Document, version: str) -> Iterator[Flaw] | None:
    kinds = _kinds(version)
    definition = kinds.get((document.api_version, document.kind))
    if definition is not None:
        return _against(document, version, definition)
    if _group(document.api_version) in {_group(api_version) for api_version, _ in kinds}:
        return iter([_no_such(document, kinds, version)])
    return None


def _group(api_version: str) -> str:
    return api_version.rpartition("/")[0]


def _no_such(document: Document, kinds: Iterable[tuple[str, str]], version: str) -> Flaw:
    """A kind that its group does not have, or has in another version, or that another group has."""
    wanted, remedy = f"a kind of Kubernetes {version}", ""
    homes = [api_version for api_version, kind in kinds if kind == document.kind]
    same_group = [home for home in homes if _group(home) == _group(document.api_version)]
    if homes:
        return document.flaw("kind", "apiVersion", got=document.api_version, wanted=" or ".join(same_group or homes), remedy=remedy)
    near = get_close_matches(document.kind, {kind for _, kind in kinds}, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else ""
    return document.flaw("kind", "kind", got=f"{document.api_version} {document.kind}", wanted=wanted, remedy=remedy)


def _against(document: Document, version: str, definition: str) -> Iterator[Flaw]:
    definitions = _definitions(version)
    walk = Walk(document, definitions, is_structural=False)
    schema = {**definitions[definition], "properties": {**definitions[definition]["properties"], "metadata": {}}}
    tree = _without_nulls(plain(document.tree))
    yield from walk.unknown(tree, schema, "", ())
    yield from walk.values(tree, schema, "")


def _without_nulls(value: Any) -> Any:
    """A field that is null is one that was left out."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
