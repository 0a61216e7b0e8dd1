"""CRDs: the custom kinds a manifest may hold, each with its schema: the ones that ship, a folder's, a cluster's.

In: the compact form (cluster.kube.derive writes it), YAML or JSON of CustomResourceDefinitions, `kubectl get crd -o json`. Out: Crds.
Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ftcore.errors import ClusterError, ConfigError

Schema = dict[str, Any]
SHIPPED = Path(__file__).with_name("kuberay.json")
# libyaml's reader, where PyYAML was built with it: a CRD has a megabyte, and is ten times slower to read without.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KUBECTL_TIMEOUT_S = 60


@dataclass(frozen=True)
class Crd:
    """One served version of one custom kind."""

    group: str
    version: str
    kind: str
    schema: Schema
    has_status: bool
    """The API server drops `status` when such an object is made."""
    source: str
    is_deprecated: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"


@dataclass(frozen=True)
class Catalogue:
    """Every custom kind that is known, by apiVersion and kind; what comes later replaces what came before."""

    by_name: Mapping[tuple[str, str], Crd]

    @classmethod
    def of(cls, crds: Iterable[Crd]) -> Catalogue:
        return cls({(crd.api_version, crd.kind): crd for crd in crds})

    def find(self, api_version: str, kind: str) -> Crd | None:
        return self.by_name.get((api_version, kind))

    def of_group(self, group: str) -> list[Crd]:
        return [crd for crd in self.by_name.values() if crd.group == group]

    def of_kind(self, kind: str) -> list[Crd]:
        return [crd for crd in self.by_name.values() if crd.kind == kind]


@cache
def kuberay() -> tuple[str, tuple[Crd, ...]]:
    """The version of KubeRay and its kinds, from the compact form: node N may name only nodes before it, so one pass unfolds all."""
    compact = json.loads(SHIPPED.read_text(encoding="utf-8"))
    nodes: list[Schema] = []
    for node in compact["nodes"]:
        nodes.append(_unfolded(node, nodes))
    source = f"KubeRay {compact['kuberay']}"
    return compact["kuberay"], tuple(Crd(**{**kind, "schema": nodes[kind["schema"]]}, source=source) for kind in compact["kinds"])


def _unfolded(node: Schema, nodes: list[Schema]) -> Schema:
    whole = dict(node)
    if "properties" in node:
        whole["properties"] = {name: nodes[number] for name, number in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if type(node.get(key)) is int:
            whole[key] = nodes[node[key]]
    return whole


def read_folder(folder: Path) -> list[Crd]:
    """Every CustomResourceDefinition in a folder's YAML and JSON files, at any depth.

    Raises ConfigError for a folder without any, and for a file that is no YAML.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".json")) if folder.is_dir() else []
    found = [crd for path in files for crd in crds_of(_loaded(path), str(path))]
    if not found:
        got = f"{len(files)} files, none with a CustomResourceDefinition of apiextensions.k8s.io/v1" if folder.is_dir() else "no folder"
        raise ConfigError("no CRDs to check against", where=folder, got=got, remedy="name the folder that holds them: --crds DIR")
    return found


def _loaded(path: Path) -> list[Any]:
    try:
        return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "a file of CRDs cannot be read", where=path, got=error, remedy="correct it, or move it out of the folder"
        ) from error


def crds_of(documents: Iterable[Any], source: str) -> Iterator[Crd]:
    """The served versions in CRDs, and in Lists of them; anything else is passed over."""
    for document in documents:
        if not isinstance(document, dict):
            continue
        if isinstance(document.get("items"), list):
            yield from crds_of(document["items"], source)
        elif document.get("kind") == "CustomResourceDefinition" and document.get("apiVersion") == "apiextensions.k8s.io/v1":
            yield from _versions(document, source)


def _versions(document: Mapping[str, Any], source: str) -> Iterator[Crd]:
    try:
        spec = document["spec"]
        for version in spec["versions"]:
            if version["served"]:
                schema = version["schema"]["openAPIV3Schema"]
                has_status = "status" in (version.get("subresources") or {})
                yield Crd(
                    spec["group"], version["name"], spec["names"]["kind"], schema, has_status, source, bool(version.get("deprecated"))
                )
    except (KeyError, TypeError) as error:
        raise ConfigError("a CustomResourceDefinition is not complete", where=source, got=f"no {error}") from error


def from_cluster() -> list[Crd]:
    """What the cluster of the current kubectl context knows. Raises ClusterError where it cannot be asked."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ClusterError("--cluster needs kubectl", got="no kubectl on PATH", remedy="install it, or name a folder of CRDs: --crds DIR")
    command = [kubectl, "get", "crd", "-o", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=KUBECTL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            "the cluster does not answer", where=" ".join(command), got=f"nothing in {KUBECTL_TIMEOUT_S} s", remedy="kubectl cluster-info"
        ) from error
    if done.returncode:
        got = (done.stderr or done.stdout).strip()[-500:]
        raise ClusterError("the cluster's CRDs cannot be read", where=" ".join(command), got=got, remedy="kubectl config current-context")
    try:
        return list(crds_of([json.loads(done.stdout)], "the cluster"))
    except json.JSONDecodeError as error:
        raise ClusterError("the cluster's CRDs cannot be read", where=" ".join(command), got=str(error), wanted="JSON") from error
