"""Ignored: fields that the schemas take and the operator overwrites or does not read.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.operator.serving import INCREMENTAL
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

START = "KUBERAY_GEN_RAY_START_CMD"


@rule("service-fields", "of a service that a manifest brings, the operator overwrites selector and namespace")
def service_fields(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        custom = place.down("spec", "serveService")
        yield from _overwritten(custom)
        if custom.given and place.down("spec", "upgradeStrategy", "type").text == INCREMENTAL:
            yield custom.warning(f"no serveService with {INCREMENTAL}", "delete it: the operator makes its own for each cluster")
    for cluster in scene.clusters:
        yield from _overwritten(cluster.head.place["headService"])


def _overwritten(service: Place) -> Iterator[Flaw]:
    if service["spec"]["selector"].given:
        yield service["spec"]["selector"].warning("no selector", "delete it: the operator writes its own")
    if service["metadata"]["namespace"].given:
        yield service["metadata"]["namespace"].warning("no namespace", "delete it: the service stands where its object stands")


@rule("template-metadata", "pods stand in the namespace of their object, and workers have generated names")
def template_metadata(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        metadata = group.template["metadata"]
        if metadata["namespace"].given:
            yield metadata["namespace"].warning("no namespace in a pod template", "delete it: the operator overwrites it")
        if metadata["name"].given and not group.is_head:
            yield metadata["name"].warning("no name in a pod template", "delete it: the operator generates names")


@rule("unused-fields", "fields that stand in the schema for old manifests' sake and do nothing, or go")
def unused_fields(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        for name in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
            where = place["spec"][name]
            if where.given:
                yield where.warning("nothing: it is not read any more", "delete it")
    for job in scene.jobs:
        for name in ("onSuccess", "onFailure"):
            where = job.spec["deletionStrategy"][name]
            if where.given:
                yield where.warning("deletionRules: the field is deprecated", "write a rule with condition.jobStatus instead")


@rule(
    "overwritten-command", "with the annotation ray.io/overwrite-container-cmd the operator starts no Ray: the container's own command must"
)
def overwritten_command(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        own = group.template["metadata"]["annotations"]["ray.io/overwrite-container-cmd"].text.lower() == "true"
        where = group.container["command"]
        written = " ".join(item.text for key in ("command", "args") for item in group.container[key])
        if (own or cluster.overwrites_command) and START not in written and "ray start" not in written:
            yield where.warning(f"a command that runs ${START}", "run it at the end of the command, or delete the annotation")
