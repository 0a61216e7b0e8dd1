"""Smallest manifests that KubeRay's operator accepts, changes of them, and what its rules find."""

from __future__ import annotations

from typing import Any

from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import TABLE
from cluster.kube.rules import check
from tests.kube_manifests import put

Case = tuple[str, str, bool, dict[str, Any], tuple[str, ...]]
"""A title, the kind, whether the operator accepts it, the changes of the smallest manifest, and the feature gates."""


def env(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def head() -> dict[str, Any]:
    return {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray"}]}}}


def worker(**rest: Any) -> dict[str, Any]:
    spec = {"containers": [{"name": "ray", **rest.pop("box", {})}]}
    restart = rest.pop("restart", None)
    return {
        "groupName": "wg",
        "minReplicas": 0,
        "maxReplicas": 5,
        "rayStartParams": {},
        "template": {"spec": spec | ({"restartPolicy": restart} if restart else {})},
        **rest,
    }


def base(kind: str) -> dict[str, Any]:
    cluster = {"headGroupSpec": head()}
    spec: dict[str, Any] = {
        "RayCluster": cluster,
        "RayJob": {"entrypoint": "python a.py", "rayClusterSpec": cluster},
        "RayService": {"rayClusterConfig": cluster},
        "RayCronJob": {"schedule": "*/5 * * * *", "jobTemplate": {"entrypoint": "python a.py", "rayClusterSpec": cluster}},
    }[kind]
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "x"}, "spec": spec}


def refused(kind: str, changes: dict[str, Any], gates: tuple[str, ...]) -> list[Flaw]:
    tree = base(kind)
    for path, value in changes.items():
        put(tree, path, value)
    operator = {name for name, rule in TABLE.items() if rule.look.__module__.startswith("cluster.kube.operator.")}
    return [flaw for flaw in check([Document("x.yaml", 1, tree)], gates) if flaw.level == "error" and flaw.rule in operator]
