"""Names: those that the operator refuses, because pods, services and labels are named after them.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import GENERATED, Scene
from cluster.kube.trees import Place, go_duration_s

# The longest generated name, `<cluster>-serve-svc`, must stay within 63; RayJob and RayService add six characters to name their
# cluster, a RayCronJob eleven to name its RayJob (controllers/ray/utils/constant.go).
LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
DNS_1123 = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
INITIALIZING_TIMEOUT = "ray.io/initializing-timeout"


def _name(place: Place) -> tuple[Place, str]:
    """The place of an object's name and what the name will be like."""
    metadata = place["metadata"]
    if not metadata["name"].given and metadata["generateName"].text:
        return metadata["generateName"], metadata["generateName"].text + "x" * GENERATED
    return metadata["name"], metadata["name"].text


@rule("name-length", "names of pods and services are made from it, and they must fit 63 characters")
def name_length(scene: Scene) -> Iterator[Flaw]:
    for kind, longest in LENGTHS.items():
        for place in scene.ray(kind):
            where, name = _name(place)
            if len(name) > longest:
                yield where.flaw(
                    f"at most {longest} characters for a {kind}",
                    "shorten the name: the operator adds to it when it names clusters, pods and services",
                    got=f"{len(name)} characters",
                )


@rule("name-dns", "services are named after it, so it must be a DNS-1035 label")
def name_dns(scene: Scene) -> Iterator[Flaw]:
    for place in scene.ray(*LENGTHS):
        where, name = _name(place)
        if not DNS_1035.match(name):
            yield where.flaw(
                "a DNS-1035 label: lower case letters, digits and '-', a letter first, no '-' last",
                "rename it, like my-job-1",
            )


@rule("initializing-timeout", "the operator refuses a RayService whose timeout it cannot read")
def initializing_timeout(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        where = place.down("metadata", "annotations", INITIALIZING_TIMEOUT)
        if not where.text:
            continue
        seconds = go_duration_s(where.text)
        if seconds is None and re.match(r"^[+-]?\d+$", where.text):
            seconds = float(where.text)
        if seconds is None or seconds <= 0:
            yield where.flaw("a positive duration like 30m or 1h, or whole seconds", "write it like 30m")


@rule("head-service-name", "a RayService makes clusters one after another; one fixed name would be taken")
def head_service_name(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        where = place.down("spec", "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
        if where.text:
            yield where.flaw("no name of the head service in a RayService", "delete headService.metadata.name")


@rule("group-names", "the operator finds a group's pods by its name alone")
def group_names(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        seen = {"headgroup"}
        for group in cluster.workers:
            where = group.place["groupName"]
            if where.text in seen:
                yield where.flaw("each group's name once", "rename one: each group would take the other's pods for its own and delete them")
            seen.add(where.text)
            if len(where.text) > 63 or (where.text and not re.match(r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", where.text)):
                yield where.flaw("a label value of at most 63 characters", "rename it: pods carry it as the label ray.io/group")
            elif cluster.spec["networkPolicy"].given and not DNS_1123.match(where.text):
                yield where.flaw(
                    "a DNS-1123 label where networkPolicy is set: lower case letters, digits and '-'",
                    "rename it in lower case: it becomes part of a NetworkPolicy's name",
                )
