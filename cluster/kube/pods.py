"""Pods: every pod that a folder of manifests leads to, with the labels it will carry, and the selectors that look for them.

In: a Scene. Out: Pods. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.kube.scene import Cluster, Group, Job, Scene
from cluster.kube.trees import Place, root

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
HEAD_SERVICE = ("ray.io/cluster", "ray.io/node-type", "ray.io/identifier", "app.kubernetes.io/name", "app.kubernetes.io/created-by")
Labels = Mapping[str, str | None]
"""None is a value that is only known in the cluster: a generated name."""


@dataclass(frozen=True)
class Pod:
    """A pod template. `spec` and `metadata`: its places. `cluster`, `group`: of Ray's own pods only."""

    spec: Place
    metadata: Place
    labels: Labels
    replicas: int
    cluster: Cluster | None = None
    group: Group | None = None

    @property
    def namespace(self) -> str:
        return self.spec.document.namespace

    @property
    def containers(self) -> list[Place]:
        return [*self.spec["containers"], *self.spec["initContainers"]]


def pods(scene: Scene) -> Iterator[Pod]:
    for place in scene.of("Pod"):
        yield Pod(place["spec"], place["metadata"], _written(place["metadata"]["labels"]), 1)
    for place in scene.of(*WORKLOADS):
        yield _of(place.down("spec", "template"), place.down("spec", "replicas").number)
    for place in scene.of("CronJob"):
        yield _of(place.down("spec", "jobTemplate", "spec", "template"), 1)
    yield from ray_pods(scene)
    for job in scene.jobs:
        template = job.spec["submitterPodTemplate"]
        if template.given:
            yield Pod(template["spec"], template["metadata"], submitter_labels(job) | _written(template["metadata"]["labels"]), 1)


def ray_pods(scene: Scene) -> Iterator[Pod]:
    for cluster, group in scene.groups:
        template = group.template
        own = ray_labels(cluster, group)
        written = _written(template["metadata"]["labels"]) | _written(group.place["labels"])
        yield Pod(template["spec"], template["metadata"], written | own, group.most_replicas, cluster, group)


def ray_labels(cluster: Cluster, group: Group) -> dict[str, str | None]:
    """What the operator writes on a pod itself (controllers/ray/common/pod.go, labelPod)."""
    node, alone = "head" if group.is_head else "worker", cluster.kind == "RayCluster"
    name = cluster.spec.document.name if alone else None
    labels: dict[str, str | None] = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": name,
        "ray.io/node-type": node,
        "ray.io/group": group.name,
        "ray.io/identifier": f"{name}-{node}" if alone else None,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return labels | ({"ray.io/serve": None} if cluster.kind == "RayService" else {})


def submitter_labels(job: Job) -> dict[str, str | None]:
    name = job.spec.document.name if job.spec.document.kind == "RayJob" else None
    return {
        "ray.io/originated-from-cr-name": name,
        "ray.io/originated-from-crd": "RayJob",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "job-name": name,
        "batch.kubernetes.io/job-name": name,
    }


def _of(template: Place, replicas: int | None) -> Pod:
    labels = _written(template["metadata"]["labels"])
    return Pod(template["spec"], template["metadata"], labels, 1 if replicas is None else replicas)


def _written(labels: Place) -> dict[str, str | None]:
    return {key: value.text for key, value in labels.entries()}


@dataclass(frozen=True)
class Labelled:
    """What a selector looks at."""

    labels: Labels


def services(scene: Scene) -> Iterator[Labelled]:
    """Those in the folder, and the head and serve services that the operator makes (controllers/ray/common/service.go)."""
    for place in scene.of("Service"):
        yield Labelled(_written(place["metadata"]["labels"]))
    for cluster in scene.clusters:
        labels = dict(ray_labels(cluster, cluster.head))
        yield Labelled({name: labels[name] for name in HEAD_SERVICE})
        if cluster.kind == "RayService":
            name = cluster.spec.document.name
            own = {"ray.io/originated-from-cr-name": name, "ray.io/originated-from-crd": "RayService"}
            yield Labelled(own | {"ray.io/serve": f"{name}-serve"})
            yield Labelled(own | {"ray.io/node-type": "head", "ray.io/identifier": f"{name}-head"})


def selects(selector: Place, pod: Pod | Labelled) -> bool:
    """A LabelSelector with matchLabels and matchExpressions; one that is empty selects all."""
    if not all(_has(pod.labels, key, {value.text}) for key, value in selector["matchLabels"].entries()):
        return False
    for expression in selector["matchExpressions"]:
        key, values = expression["key"].text, {value.text for value in expression["values"]}
        match expression["operator"].text:
            case "In" if not _has(pod.labels, key, values):
                return False
            case "NotIn" if key in pod.labels and pod.labels[key] in values:
                return False
            case "Exists" if key not in pod.labels:
                return False
            case "DoesNotExist" if key in pod.labels:
                return False
    return True


def carries(labels: Place, pod: Pod) -> bool:
    """A Service's plain selector."""
    return all(_has(pod.labels, key, {value.text}) for key, value in labels.entries())


def _has(labels: Labels, key: str, values: set[str]) -> bool:
    return key in labels and (labels[key] is None or labels[key] in values)


def same_namespace(one: str, other: str) -> bool:
    """A manifest without a namespace may go anywhere."""
    return not one or not other or one == other


def pod_security(scene: Scene, pod: Pod) -> str:
    """The level that the pod's namespace enforces, if the namespace is in the folder."""
    for place in scene.of("Namespace"):
        if place.document.name == pod.namespace or (not pod.namespace and len(list(scene.of("Namespace"))) == 1):
            return root(place.document).down("metadata", "labels", "pod-security.kubernetes.io/enforce").text
    return ""
