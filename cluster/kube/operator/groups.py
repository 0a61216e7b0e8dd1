"""Groups: the head's and the workers' containers, resources, labels and replicas, as the operator checks and changes them.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
OWN_LABELS = ("ray.io/cluster", "ray.io/group", "ray.io/node-type")
OWN_ENV = (
    "RAY_CLUSTER_NAME",
    "RAY_CLUSTER_NAMESPACE",
    "RAY_CLOUD_INSTANCE_ID",
    "RAY_NODE_TYPE_NAME",
    "KUBERAY_GEN_RAY_START_CMD",
    "FQ_RAY_IP",
)
_NAME = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")


@rule("containers-present", "the first container runs Ray; without one there is nothing to start")
def containers_present(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        where = group.pod["containers"]
        if not isinstance(where.value, list) or not where.value:
            yield where.flaw("at least one container", f"give {group.title} a container with Ray's image")


@rule("resources-twice", "Ray's resources come from rayStartParams or from `resources`, never from both")
def resources_twice(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        if group.place["resources"].value and isinstance(group.place["resources"].value, dict):
            for name in RESOURCE_PARAMS:
                if group.params[name].text:
                    yield group.params[name].flaw(
                        f"resources of {group.title} in one place only",
                        "move it into the group's `resources`, or delete that field",
                    )


@rule("start-params", "labels have a field of their own, `resources` must be JSON, and the operator sets `block` itself")
def start_params(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        where = group.params["labels"]
        if where.given:
            yield where.flaw("no labels among rayStartParams", "move them to the group's `labels`")
        where = group.params["resources"]
        if where.text and not _is_amounts(where.text):
            yield where.flaw("""JSON in quotes, like '"{\\"slot\\": 4}"'""", "quote it so that the shell hands JSON to ray start")
        where = group.params["block"]
        if where.text and where.text.lower() != "true":
            yield where.warning("true: the operator sets it so in any case", "delete it")


def _is_amounts(text: str) -> bool:
    try:
        found = json.loads(text.strip("'\"` ").replace('\\"', '"'))
    except ValueError:
        return False
    return isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values())


@rule("group-labels", "a group's labels become labels of its pods, so they follow Kubernetes' syntax")
def group_labels(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for key, where in group.place["labels"].entries():
            if not _is_label_key(key):
                yield where.flaw("a label key: [prefix/]name of at most 63 letters, digits, '-', '_', '.'", "rename the label", got=key)
            if where.text and (len(where.text) > 63 or not _NAME.match(where.text)):
                yield where.flaw("a label value: at most 63 letters, digits, '-', '_', '.'", "change the value")


def _is_label_key(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > 253 or not _SUBDOMAIN.match(prefix)):
        return False
    return len(name) <= 63 and bool(_NAME.match(name))


@rule("managed-labels", "the operator writes these labels itself and drops the manifest's value")
def managed_labels(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for labels in (group.place["labels"], group.template["metadata"]["labels"]):
            for key in OWN_LABELS:
                if labels[key].given:
                    yield labels[key].warning("a label that is not the operator's own", "delete it: the operator sets its own value")


@rule("managed-env", "the operator sets these variables itself; a second value is overruled")
def managed_env(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for name in OWN_ENV:
            where = group.container["env"].named(name)
            if where.given:
                yield where.warning(
                    "a variable that is not the operator's own", "delete it: the operator's value comes after and wins", got=name
                )


@rule("replica-bounds", "the operator refuses bounds that are negative or crossed, and none without autoscaling")
def replica_bounds(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        if group.is_head:
            continue
        low, high = group.place["minReplicas"], group.place["maxReplicas"]
        for where in (low, high):
            if where.number is not None and where.number < 0:
                yield where.flaw("0 or more replicas", "write a number that is not negative")
            elif not where.given and not cluster.autoscaling:
                # The operator refuses it, but the API server fills in 0 and 2147483647 before the operator looks.
                yield where.warning(
                    "both minReplicas and maxReplicas where nothing scales", "write both: the schema's defaults are 0 and 2147483647"
                )
        if low.number is not None and high.number is not None and low.number > high.number >= 0:
            yield low.flaw(f"at most maxReplicas, {high.number}", "lower minReplicas or raise maxReplicas")


@rule("replicas-clamped", "replicas outside the bounds are silently moved to the nearest bound")
def replicas_clamped(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        if group.is_head or not group.place["replicas"].given:
            continue
        where, low, high = group.place["replicas"], group.place["minReplicas"].number, group.place["maxReplicas"].number
        if where.number is None:
            continue
        if (low is not None and where.number < low) or (high is not None and where.number > high):
            yield where.warning(
                f"between {0 if low is None else low} and {'any number' if high is None else high}",
                "write the number that you want: the operator silently takes the nearest bound",
            )


@rule("num-of-hosts", "a replica of no host is no worker: the group stays empty without a word")
def num_of_hosts(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        where: Place = group.place["numOfHosts"]
        if where.number is not None and where.number < 1:
            yield where.flaw("1 host or more for each replica", "delete it, or write how many hosts one replica takes")


@rule("group-suspend", "a worker group can be suspended only without autoscaling and with the feature gate RayJobDeletionPolicy")
def group_suspend(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        where = group.place["suspend"]
        if group.is_head or not where.on:
            continue
        if cluster.autoscaling:
            yield where.flaw(
                "no suspended group with autoscaling", "set minReplicas and maxReplicas to 0, or turn enableInTreeAutoscaling off"
            )
        elif not scene.enabled("RayJobDeletionPolicy"):
            yield where.flaw("the feature gate RayJobDeletionPolicy", "turn the gate on in the operator, or delete suspend")
