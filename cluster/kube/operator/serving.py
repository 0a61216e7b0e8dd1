"""Serving: upgrades of RayServices and RayClusters, and the Serve config that stands in a text.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.kube.flaws import Flaw
from cluster.kube.operator.jobs import loaded
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place, root

INCREMENTAL = "NewClusterWithIncrementalUpgrade"
SERVICE_UPGRADES = (INCREMENTAL, "NewCluster", "None")
CLUSTER_UPGRADES = ("Recreate", "None")
ORIGIN = "ray.io/originated-from-crd"


@rule("cluster-upgrade", "a plain RayCluster is made anew or left; one that a RayJob or RayService made takes no strategy")
def cluster_upgrade(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.spec["upgradeStrategy"]["type"]
        if not where.given:
            continue
        maker = cluster.kind
        if maker == "RayCluster":
            maker = root(cluster.spec.document).down("metadata", "labels", ORIGIN).text
        if maker in {"RayJob", "RayService", "RayCronJob"}:
            yield where.flaw(
                f"no upgradeStrategy in the cluster of a {maker}", "delete it: the operator would refuse the cluster that it makes"
            )
        elif where.text not in CLUSTER_UPGRADES:
            yield where.flaw(f"one of {', '.join(CLUSTER_UPGRADES)}", "write Recreate or None")


@rule("service-upgrade", "a RayService is upgraded in one of three ways, and its old cluster waits no negative time")
def service_upgrade(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        where = place.down("spec", "upgradeStrategy", "type")
        if where.given and where.text not in SERVICE_UPGRADES:
            yield where.flaw(f"one of {', '.join(SERVICE_UPGRADES)}", "write NewCluster, the default, or NewClusterWithIncrementalUpgrade")
        if where.text == INCREMENTAL and not scene.enabled("RayServiceIncrementalUpgrade"):
            yield where.flaw(
                "the feature gate RayServiceIncrementalUpgrade", "turn the gate on: without it the upgrade is silently a plain NewCluster"
            )
        where = place.down("spec", "rayClusterDeletionDelaySeconds")
        if where.number is not None and where.number < 0:
            yield where.flaw("0 seconds or more", "write a number that is not negative")


@rule("incremental-upgrade", "an upgrade in steps needs autoscaling, a gateway, and steps no larger than the surge")
def incremental_upgrade(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        strategy = place.down("spec", "upgradeStrategy")
        if strategy["type"].text != INCREMENTAL or not scene.enabled("RayServiceIncrementalUpgrade"):
            continue
        autoscaling = place.down("spec", "rayClusterConfig", "enableInTreeAutoscaling")
        if not autoscaling.on:
            yield autoscaling.flaw("true for an upgrade in steps", "set enableInTreeAutoscaling: true")
        options = strategy["clusterUpgradeOptions"]
        if not options.given:
            yield options.flaw("stepSizePercent, intervalSeconds and gatewayClassName", "write clusterUpgradeOptions")
            continue
        step, surge, interval = options["stepSizePercent"], options["maxSurgePercent"], options["intervalSeconds"]
        most = 100 if surge.number is None else surge.number
        if not 0 <= most <= 100:
            yield surge.flaw("0 to 100", "write a percentage; 100 is the default")
        if step.number is None or not 0 <= step.number <= 100:
            yield step.flaw("0 to 100", "write a percentage")
        elif step.number > most:
            yield step.flaw(f"at most maxSurgePercent, {most}", "lower the step or raise the surge")
        if interval.number is None or interval.number <= 0:
            yield interval.flaw("1 second or more", "write the seconds between two steps")
        if not options["gatewayClassName"].text:
            yield options["gatewayClassName"].flaw("the name of a GatewayClass", "write the class that your cluster's gateway has")


@rule("serve-config", "serveConfigV2 is a text that must itself be a Serve config of several applications")
def serve_config(scene: Scene) -> Iterator[Flaw]:
    for place in scene.services:
        where = place.down("spec", "serveConfigV2")
        if not where.text.strip():
            yield where.warning("a Serve config", "write serveConfigV2: without it nothing is served and the service never gets ready")
            continue
        config = loaded(where)
        found = applications(where)
        if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
            yield where.flaw("YAML with a list `applications`", "write `serveConfigV2: |` and `applications:` with one entry each below")
        for name in ("name", "route_prefix"):
            values = [app.get(name) for app in found if app.get(name) is not None]
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                yield where.flaw(f"each application's {name} once", "rename one of them", got=f"{', '.join(twice)} twice")
        for number, app in enumerate(found, 1):
            if not re.search(r"\w[:.]\w", str(app.get("import_path", ""))):
                yield where.flaw(
                    "an import_path like package.module:app for each application", "write import_path", got=f"none in application {number}"
                )


def applications(where: Place) -> list[dict[str, Any]]:
    """The applications of a Serve config; none where it cannot be read."""
    config = loaded(where)
    listed = config.get("applications") if isinstance(config, dict) else None
    return [app for app in listed if isinstance(app, dict)] if isinstance(listed, list) else []
