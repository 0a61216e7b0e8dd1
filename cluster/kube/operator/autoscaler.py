"""Autoscaler: version, restart policies, idle times and priorities that the operator refuses or overrules.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import AUTOSCALER_V2_ENV, Scene
from cluster.kube.trees import version

PRIORITY_SINCE = (2, 56, 0)
START_ENV = "KUBERAY_GEN_AUTOSCALER_START_CMD"


@rule("autoscaler-version", "autoscaler v2 is chosen in one place, and only where autoscaling is on")
def autoscaler_version(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.head.container["env"].named(AUTOSCALER_V2_ENV)
        if not where.given:
            continue
        if not cluster.autoscaling and where["value"].text in {"1", "true"}:
            yield where["value"].flaw(
                "enableInTreeAutoscaling: true beside it", "set enableInTreeAutoscaling and autoscalerOptions.version: v2"
            )
        elif cluster.autoscaling and cluster.spec["autoscalerOptions"]["version"].given:
            yield where.flaw("autoscalerOptions.version alone", f"delete the variable {AUTOSCALER_V2_ENV}", got=AUTOSCALER_V2_ENV)


@rule("autoscaler-restart", "the autoscaler replaces pods itself: one that restarts is counted twice")
def autoscaler_restart(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        where = group.pod["restartPolicy"]
        if not cluster.autoscaling or not where.text or where.text == "Never":
            continue
        if cluster.autoscaler == "v2":
            yield where.flaw("Never, or nothing, with autoscaler v2", "delete restartPolicy")
        elif cluster.autoscaler == "v1" and not group.is_head:
            yield where.warning("Never, or nothing, with autoscaler v1", "delete restartPolicy: the operator sends a warning event")


@rule("idle-timeout", "idle seconds are not negative, and a group has its own only with autoscaler v2")
def idle_timeout(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.spec["autoscalerOptions"]["idleTimeoutSeconds"]
        if where.number is not None and where.number < 0:
            yield where.flaw("0 seconds or more", "write a number that is not negative")
    for cluster, group in scene.groups:
        where = group.place["idleTimeoutSeconds"]
        if group.is_head or where.number is None:
            continue
        if where.number < 0:
            yield where.flaw("0 seconds or more", "write a number that is not negative")
        elif not cluster.autoscaler_v2:
            yield where.flaw("autoscaler v2", "set autoscalerOptions.version: v2, or use autoscalerOptions.idleTimeoutSeconds")


@rule("group-priority", "priorities of groups came with Ray 2.56 and autoscaler v2")
def group_priority(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        where = group.place["priority"]
        if group.is_head or not where.number:
            continue
        written = cluster.spec["rayVersion"].text
        ray = version(written)
        if ray is None or ray < PRIORITY_SINCE:
            yield where.flaw(
                "rayVersion 2.56.0 or later",
                "raise rayVersion and the images, or delete priority",
                got=f"{where.number} with rayVersion {written!r}",
            )
        elif not cluster.autoscaler_v2:
            yield where.flaw("autoscaler v2", "set autoscalerOptions.version: v2, or delete priority")


@rule("autoscaler-env", "the operator puts its own start command there; a second one would win unseen")
def autoscaler_env(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.spec["autoscalerOptions"]["env"].named(START_ENV)
        if where.given:
            yield where.flaw(f"no {START_ENV}", "delete it; autoscalerOptions.args may use $" + START_ENV, got=START_ENV)


@rule("autoscaler-off", "options of an autoscaler that is not on do nothing")
def autoscaler_off(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.spec["autoscalerOptions"]
        if where.given and not cluster.autoscaling:
            yield where.warning("enableInTreeAutoscaling: true beside it", "set enableInTreeAutoscaling: true, or delete autoscalerOptions")
