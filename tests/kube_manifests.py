"""One good manifest of each kind, as Documents, and small changes to them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from cluster.kube.documents import Document

SAFE = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
GONE = object()
"""As a change's value: nothing stands there any more."""
SERVE_CONFIG = """
applications:
  - name: main
    import_path: serving.app:build
    route_prefix: /
    args: {store: "s3://models/adapters"}
    deployments:
      - name: engine
        num_replicas: 2
        max_replicas_per_node: 1
        max_queued_requests: 64
        health_check_period_s: 5
        health_check_timeout_s: 30
        graceful_shutdown_timeout_s: 60
"""


def container(name: str, memory: str, ports: dict[str, int] | None = None) -> dict[str, Any]:
    amounts = {"cpu": "2", "memory": memory}
    return {
        "name": name,
        "image": "example.org/ftcore:2.60.0",
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ft-secrets", "key": "hf"}}}],
        "ports": [{"name": key, "containerPort": value} for key, value in (ports or {}).items()],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": deepcopy(SAFE),
    }


def cluster_spec() -> dict[str, Any]:
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
    spread = [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}]
    return {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": {"serviceAccountName": "ft", "containers": [container("ray-head", "8Gi", ports)]}},
        },
        "workerGroupSpecs": [
            {
                "groupName": "small",
                "replicas": 2,
                "minReplicas": 2,
                "maxReplicas": 2,
                "numOfHosts": 1,
                "rayStartParams": {},
                "template": {
                    "spec": {
                        "serviceAccountName": "ft",
                        "terminationGracePeriodSeconds": 120,
                        "topologySpreadConstraints": spread,
                        "containers": [container("ray-worker", "16Gi", {"metrics": 8080})],
                    }
                },
            }
        ],
    }


def job_spec() -> dict[str, Any]:
    submitter = {"restartPolicy": "Never", "containers": [container("submit", "1Gi")]}
    return {
        "entrypoint": "python pipelines/sft.py sft.yaml output.runs=s3://models/runs",
        "backoffLimit": 1,
        "activeDeadlineSeconds": 86400,
        "preRunningDeadlineSeconds": 900,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "runtimeEnvYAML": "env_vars: {A: b}",
        "submitterPodTemplate": {"spec": submitter},
        "rayClusterSpec": cluster_spec(),
    }


def trees() -> dict[str, dict[str, Any]]:
    """By kind. All stand in one namespace that lets in restricted pods only."""
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    head = {"podSelector": {"matchLabels": {"ray.io/node-type": "head"}}}
    return {
        "Namespace": {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ft", "labels": enforce}},
        "ServiceAccount": _named("v1", "ServiceAccount", "ft"),
        "ExternalSecret": _named("external-secrets.io/v1", "ExternalSecret", "ft-secrets"),
        "NetworkPolicy": _named("networking.k8s.io/v1", "NetworkPolicy", "head", spec=head),
        "Service": _named("v1", "Service", "doors", spec={"selector": {"ray.io/node-type": "head"}, "ports": [{"port": 8265}]}),
        "PodDisruptionBudget": _named(
            "policy/v1",
            "PodDisruptionBudget",
            "workers",
            spec={"minAvailable": 1, "selector": {"matchLabels": {"ray.io/group": "small"}}},
        ),
        "ServiceMonitor": _named("monitoring.coreos.com/v1", "ServiceMonitor", "heads", spec={"selector": head["podSelector"]}),
        "RayCluster": _named("ray.io/v1", "RayCluster", "lab", spec=cluster_spec()),
        "RayJob": _named("ray.io/v1", "RayJob", "sft", spec=job_spec()),
        "RayCronJob": _named(
            "ray.io/v1",
            "RayCronJob",
            "nightly",
            spec={"schedule": "0 3 * * mon-fri", "timeZone": "Europe/Vienna", "jobTemplate": job_spec()},
        ),
        "RayService": _named(
            "ray.io/v1",
            "RayService",
            "serve",
            spec={"excludeHeadPodFromServeSvc": True, "serveConfigV2": SERVE_CONFIG, "rayClusterConfig": cluster_spec()},
        ),
    }


def _named(version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "ft"}, **rest}


def documents(*changes: tuple[str, str, Any]) -> list[Document]:
    """The good ones with each change made: (kind, path with blanks between its keys, value)."""
    found = trees()
    for kind, path, value in changes:
        put(found[kind], path, value)
    return [Document("folder.yaml", number, tree) for number, tree in enumerate(found.values(), 1)]


def put(tree: Any, path: str, value: Any) -> None:
    """Makes what is missing on the way; `+` is the end of a list."""
    *way, last = path.split()
    for key, after in zip(way, path.split()[1:], strict=True):
        if isinstance(tree, list):
            tree = tree[int(key)]
        else:
            tree = tree.setdefault(key, [] if after == "+" else {})
    if last == "+":
        tree.append(deepcopy(value))
    elif isinstance(tree, list):
        tree[int(last)] = deepcopy(value)
    elif value is GONE:
        tree.pop(last)
    else:
        tree[last] = deepcopy(value)


def spelled(path: str) -> str:
    """The path as a flaw writes it."""
    return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in path.split()).removeprefix(".")
