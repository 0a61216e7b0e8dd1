"""References: what a manifest names and the folder does not hold: a pod that waits for it waits for ever.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.pods import Pod, pods, same_namespace
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

SECRET_MAKERS = ("Secret", "SealedSecret", "ExternalSecret", "Certificate")
"""Kinds after which a Secret exists; the last two name it in a field."""


def _holds(scene: Scene, namespace: str, name: str, *kinds: str) -> bool:
    for place in scene.of(*kinds):
        named = {place.document.name, place.down("spec", "secretName").text, place.down("spec", "target", "name").text}
        if name in named and same_namespace(namespace, place.document.namespace):
            return True
    return False


@rule("missing-reference", "a pod whose account, config or claim is not there does not start")
def missing_reference(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        for kind, where in _named(pod):
            if where.text and not _holds(scene, pod.namespace, where.text, kind):
                yield where.warning(f"a {kind} of this name in the folder", f"add the {kind}, or see that it is there before")
    for cluster in scene.clusters:
        where = cluster.spec.down("gcsFaultToleranceOptions", "storage", "claimName")
        if where.text and not _holds(scene, cluster.spec.document.namespace, where.text, "PersistentVolumeClaim"):
            yield where.warning("a PersistentVolumeClaim of this name in the folder", "add the claim, or see that it is there before")
    for job in scene.jobs:
        where = job.spec["clusterSelector"]["ray.io/cluster"]
        if where.text and not _holds(scene, job.spec.document.namespace, where.text, "RayCluster"):
            yield where.warning("a RayCluster of this name in the folder", "add the cluster, or see that it is there before")


def _named(pod: Pod) -> Iterator[tuple[str, Place]]:
    if pod.spec["serviceAccountName"].text != "default":
        yield "ServiceAccount", pod.spec["serviceAccountName"]
    for volume in pod.spec["volumes"]:
        yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        for holder in (volume["configMap"], *(source["configMap"] for source in volume["projected"]["sources"])):
            if not holder["optional"].on:
                yield "ConfigMap", holder["name"]
    for container in pod.containers:
        for holder in _env_sources(container, "configMap"):
            yield "ConfigMap", holder["name"]


def _env_sources(container: Place, kind: str) -> Iterator[Place]:
    """`kind`: configMap or secret."""
    for holder in (
        *(env["valueFrom"][f"{kind}KeyRef"] for env in container["env"]),
        *(source[f"{kind}Ref"] for source in container["envFrom"]),
    ):
        if not holder["optional"].on:
            yield holder


@rule("missing-secret", "secrets are not in the folder, as it should be; the pod waits until they are made")
def missing_secret(scene: Scene) -> Iterator[Flaw]:
    seen = set()
    for namespace, where in _secrets(scene):
        key = (where.document.file, where.document.number, where.text)
        own = any(cluster.token_auth and cluster.spec.document.name == where.text for cluster in scene.clusters)  # the operator makes it
        if where.text and not own and key not in seen and not _holds(scene, namespace, where.text, *SECRET_MAKERS):
            seen.add(key)  # once for each document: its pods all wait for the same one
            yield where.warning(
                "a Secret that must be there before",
                "make it (kubectl create secret), or add the ExternalSecret or SealedSecret that makes it",
            )


def _secrets(scene: Scene) -> Iterator[tuple[str, Place]]:
    for pod in pods(scene):
        for volume in pod.spec["volumes"]:
            holders = [(volume["secret"], "secretName"), *((source["secret"], "name") for source in volume["projected"]["sources"])]
            yield from ((pod.namespace, holder[key]) for holder, key in holders if not holder["optional"].on)
        for container in pod.containers:
            yield from ((pod.namespace, holder["name"]) for holder in _env_sources(container, "secret"))
        yield from ((pod.namespace, holder["name"]) for holder in pod.spec["imagePullSecrets"])
    for cluster in scene.clusters:
        namespace = cluster.spec.document.namespace
        yield namespace, cluster.spec.down("authOptions", "secretName")
        for name in ("redisPassword", "redisUsername"):
            yield namespace, cluster.spec.down("gcsFaultToleranceOptions", name, "valueFrom", "secretKeyRef", "name")
