"""History server: what its collector must be told, and what the operator tells it.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

CONTAINER = "ray-history-collector"
OWN_ENV = ("POD_IP", "FQ_RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_ROLE", "OWNER_KIND", "OWNER_NAME", "EVENTS_PORT")
NEEDED = {"GCS": ("GCS_BUCKET",), "S3": ("S3_REGION",), "ALIYUNOSS": ("OSS_BUCKET", "OSS_ENDPOINT", "OSS_REGION")}
AZURE_CONNECTION, AZURE_URL = "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_URL"


@rule("history-server", "the collector is refused without an image, a backend and what that backend needs")
def history_server(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        options = cluster.spec["historyServerOptions"]
        if not options.given:
            continue
        if not scene.enabled("RayClusterHistoryServer"):
            yield options.flaw(
                "the feature gate RayClusterHistoryServer", "turn the gate on in the operator, or delete historyServerOptions"
            )
        collector = options["collectorOptions"]
        if not collector.given:
            yield collector.flaw("an image and a storage backend", "write collectorOptions")
            continue
        if not collector["image"].text:
            yield collector["image"].flaw("an image", "write the collector's image")
        yield from _env(collector["env"])
        for group in cluster.groups:
            for container in group.pod["containers"]:
                if container["name"].text == CONTAINER:
                    yield container["name"].flaw(
                        "another name: the operator adds a container of this one", "rename the container, or delete it"
                    )


def _env(env: Place) -> Iterator[Flaw]:
    for name in OWN_ENV:
        if env.named(name).given:
            yield env.named(name).flaw("a variable that is not the operator's own", "delete it: the operator sets it", got=name)
    backend = env.named("STORAGE_BACKEND")["value"].text
    if not backend:
        yield env.flaw("STORAGE_BACKEND with its value written out", "add STORAGE_BACKEND: GCS, S3, AZUREBLOB or ALIYUNOSS")
    for names in _needed(env, backend.upper()):
        if not any(_has(env, name) for name in names):
            yield env.flaw(f"{' or '.join(names)} for the backend {backend}", f"add {names[0]}, or a reference to a Secret")


def _needed(env: Place, backend: str) -> list[tuple[str, ...]]:
    """For each thing that is needed, the variables of which one must be there."""
    if backend != "AZUREBLOB":
        return [(name,) for name in NEEDED.get(backend, ())]
    mode = env.named("AZURE_STORAGE_AUTH_MODE")["value"].text.strip().lower()
    if mode == "connection_string":
        return [(AZURE_CONNECTION,)]
    return [(AZURE_URL,)] if mode in {"workload_identity", "default"} else [(AZURE_CONNECTION, AZURE_URL)]


def _has(env: Place, name: str) -> bool:
    found = env.named(name)
    return bool(found["value"].text) or found["valueFrom"].given
