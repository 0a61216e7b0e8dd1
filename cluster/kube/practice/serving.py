"""Serving in practice: replicas on nodes of their own, queues with an end, and time to stop.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.kube.flaws import Flaw
from cluster.kube.operator.serving import applications
from cluster.kube.rulebook import rule
from cluster.kube.scene import Cluster, Scene
from cluster.kube.trees import Place

STOPPING = ("health_check_period_s", "health_check_timeout_s", "graceful_shutdown_timeout_s")


@rule("serve-head", "requests that go through the head's proxy end when the head does")
def serve_head(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        where = place.down("spec", "excludeHeadPodFromServeSvc")
        if not where.on:
            yield where.warning("true", "set excludeHeadPodFromServeSvc: true, so that only workers take requests")


def _deployments(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """The deployments that a config lists, each with a title."""
    for app in applications(place.down("spec", "serveConfigV2")):
        listed = app.get("deployments")
        for deployment in listed if isinstance(listed, list) else []:
            if isinstance(deployment, dict):
                yield f"{app.get('name', 'default')}/{deployment.get('name', '?')}", deployment


def most_replicas(deployment: dict[str, Any]) -> int:
    """As many as there may be; 1 where nothing is said."""
    scaling = deployment.get("autoscaling_config")
    numbers = [
        deployment.get("num_replicas"),
        *(scaling.get(name) for name in ("min_replicas", "max_replicas") if isinstance(scaling, dict)),
    ]
    return max([number for number in numbers if isinstance(number, int)], default=1)


@rule("serve-one-per-node", "replicas that share a node are lost together")
def serve_one_per_node(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        for title, deployment in _deployments(place):
            if most_replicas(deployment) > 1 and not deployment.get("max_replicas_per_node"):
                yield place.down("spec", "serveConfigV2").warning(
                    f"max_replicas_per_node for {title}",
                    "add max_replicas_per_node: 1",
                    got=f"{most_replicas(deployment)} replicas anywhere",
                )


@rule("serve-queue", "a queue without an end turns load into time-outs instead of a quick refusal")
def serve_queue(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        for title, deployment in _deployments(place):
            queued = deployment.get("max_queued_requests")
            if not isinstance(queued, int) or queued < 0:
                yield place.down("spec", "serveConfigV2").warning(
                    f"max_queued_requests for {title}",
                    "add max_queued_requests: what can be answered within a client's patience",
                    got=str(queued or "no limit"),
                )


@rule("serve-stopping", "how fast a dead replica is found, and how long a live one may finish, is said and not guessed")
def serve_stopping(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        for title, deployment in _deployments(place):
            missing = [name for name in STOPPING if name not in deployment]
            if missing:
                yield place.down("spec", "serveConfigV2").warning(
                    f"{', '.join(STOPPING)} for {title}",
                    "write them; the shutdown must last longer than the longest answer",
                    got=f"no {', '.join(missing)}",
                )


@rule("serve-spread", "two serving pods on one node are lost together")
def serve_spread(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        if cluster.kind != "RayService":
            continue
        for group in cluster.workers:
            spread = group.pod["topologySpreadConstraints"]
            if _several(cluster, group.place) and not spread.value and not group.pod["affinity"]["podAntiAffinity"].value:
                yield spread.warning(
                    "a spread over hosts, or an anti-affinity",
                    "add topologySpreadConstraints over kubernetes.io/hostname with the label ray.io/group",
                )


def _several(cluster: Cluster, place: Place) -> bool:
    names = ("replicas", "minReplicas", "maxReplicas") if cluster.autoscaling else ("replicas", "minReplicas")
    return max((place[name].number or 0 for name in names), default=0) >= 2


@rule("rocksdb-upgrade", "a store on one claim has one writer: the new cluster of an upgrade waits for the old one, and that for the new")
def rocksdb_upgrade(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        options, strategy = (
            place.down("spec", "rayClusterConfig", "gcsFaultToleranceOptions"),
            place.down("spec", "upgradeStrategy", "type"),
        )
        if options["backend"].text == "rocksdb" and options["storage"]["claimName"].text and strategy.text != "None":
            yield strategy.warning(
                "None with a claim of one's own",
                "set upgradeStrategy.type: None, drop claimName, or use Redis: RocksDB's lock stops the upgrade",
            )
