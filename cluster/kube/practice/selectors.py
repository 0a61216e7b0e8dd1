"""Selectors: Services, policies, budgets and monitors that look for pods by their labels, and find none.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from cluster.kube.flaws import Flaw
from cluster.kube.pods import Pod, carries, pods, same_namespace, selects, services
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

REMEDY = "compare with the labels of the pod templates and with those that the operator sets (ray.io/node-type, ray.io/group, …)"


def _here(place: Place, found: list[Pod]) -> list[Pod]:
    return [pod for pod in found if same_namespace(place.document.namespace, pod.namespace)]


@rule("selects-nothing", "a selector that finds no pod protects, balances and measures nothing, without a word")
def selects_nothing(scene: Scene) -> Iterator[Flaw]:
    found = list(pods(scene))
    for place in scene.of("Service"):
        where = place.down("spec", "selector")
        if where.value and not any(carries(where, pod) for pod in _here(place, found)):
            yield where.warning("labels of a pod in the folder", REMEDY)
    for place in scene.of("NetworkPolicy"):
        for where in (place.down("spec", "podSelector"), *_peers(place)):
            if where.value and not any(map(partial(selects, where), _here(place, found))):
                yield where.warning("labels of a pod in the folder", REMEDY)
    for place in scene.of("PodMonitor"):
        where = place.down("spec", "selector")
        near = found if place.down("spec", "namespaceSelector").given else _here(place, found)
        if where.value and not any(map(partial(selects, where), near)):
            yield where.warning("labels of a pod in the folder", REMEDY)
    for place in scene.of("ServiceMonitor"):
        where = place.down("spec", "selector")
        if where.value and not any(map(partial(selects, where), services(scene))):
            yield where.warning("labels of a Service in the folder, or of one that the operator makes", REMEDY)


def _peers(place: Place) -> Iterator[Place]:
    """The pods of the same namespace that a policy lets in or out."""
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for allowed in place.down("spec", direction):
            for peer in allowed[side]:
                if peer["podSelector"].given and not peer["namespaceSelector"].given:
                    yield peer["podSelector"]


@rule("budget-scale", "KubeRay's kinds have no scale subresource: a budget over their pods counts from minAvailable, as a number, alone")
def budget_scale(scene: Scene) -> Iterator[Flaw]:
    found = [pod for pod in pods(scene) if "ray.io/is-ray-node" in pod.labels]
    for place in scene.of("PodDisruptionBudget"):
        where, low, high = place.down("spec", "selector"), place.down("spec", "minAvailable"), place.down("spec", "maxUnavailable")
        if where.given and any(selects(where, pod) for pod in _here(place, found)):
            wrong = high if high.given else low if low.text.endswith("%") else None
            if wrong is not None:
                yield wrong.flaw(
                    "minAvailable with a whole number", "write minAvailable: N; as it is, none of these pods can ever be evicted"
                )


@rule("disruption-budget", "a budget that finds nothing protects nothing; one that spares no pod stops every drain of a node")
def disruption_budget(scene: Scene) -> Iterator[Flaw]:
    found = list(pods(scene))
    for place in scene.of("PodDisruptionBudget"):
        where, low, high = place.down("spec", "selector"), place.down("spec", "minAvailable"), place.down("spec", "maxUnavailable")
        chosen = [pod for pod in _here(place, found) if where.given and selects(where, pod)]  # an empty one selects all
        if not chosen:
            yield where.warning("labels of a pod in the folder", REMEDY)
            continue
        count = sum(pod.replicas for pod in chosen)
        if low.text == "100%" or (low.number is not None and low.number >= count):
            yield low.warning(f"less than the {count} pods that are there", "lower it; as it is, no node can be drained")
        if high.number == 0 or high.text == "0%":
            yield high.warning("1 or more", "write maxUnavailable: 1; as it is, no node can be drained")
