"""Resources: what Ray counts, what Kubernetes grants, and where the two differ.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.pods import pods, ray_pods
from cluster.kube.rulebook import rule
from cluster.kube.scene import Group, Scene
from cluster.kube.trees import Place

HEAD_MEMORY_GIB = 5
GIB = 1024.0**3


def gpus(amounts: Place) -> Place | None:
    """The place of the first GPU among limits or requests."""
    for key, where in amounts.entries():
        if (key.endswith("gpu") or key.startswith("nvidia.com/mig-")) and where.amount:
            return where
    return None


@rule("head-num-cpus", "a head that takes tasks dies of them, and the cluster with it")
def head_num_cpus(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where, other = cluster.head.params["num-cpus"], cluster.head.place["resources"]["CPU"]
        if where.text != "0" and other.text != "0":
            yield where.warning('num-cpus: "0" on the head', 'write rayStartParams: {num-cpus: "0"}; tasks then run on workers only')


@rule("head-memory", "the GCS, the dashboard and drivers live on the head; with less it is killed under load")
def head_memory(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        resources = cluster.head.container["resources"]
        where = resources["limits"]["memory"] if resources["limits"]["memory"].given else resources["requests"]["memory"]
        if where.amount is not None and where.amount < HEAD_MEMORY_GIB * GIB:
            yield where.warning(f"{HEAD_MEMORY_GIB}Gi or more on the head", f"set requests and limits of memory to {HEAD_MEMORY_GIB}Gi")


@rule("resources-missing", "without requests the scheduler guesses, without a memory limit the node dies instead of the pod")
def resources_missing(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        for container in pod.spec["containers"]:
            where = container["resources"]
            cpu = where["requests"]["cpu"].given or where["limits"]["cpu"].given
            if not cpu or not where["limits"]["memory"].given:
                missing = "limits.memory" if cpu else "requests.cpu"
                yield where.warning(
                    "requests.cpu and limits.memory",
                    "write requests and limits: Ray takes its own resources from them",
                    got=f"no {missing}",
                )


@rule("memory-request", "Ray counts the limit; what is not also requested may not be there")
def memory_request(scene: Scene) -> Iterator[Flaw]:
    for pod in ray_pods(scene):
        resources = pod.spec["containers"][0]["resources"]
        wanted, where = resources["limits"]["memory"], resources["requests"]["memory"]
        if wanted.amount is not None and where.amount is not None and where.amount != wanted.amount:
            yield where.warning(f"{wanted.value}, as limits.memory", "request what you limit")


@rule("gpu-request", "GPUs are limits; a request of another number is refused")
def gpu_request(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        for container in pod.containers:
            asked = gpus(container["resources"]["requests"])
            granted = gpus(container["resources"]["limits"])
            if asked and (granted is None or granted.amount != asked.amount):
                yield asked.flaw("the same number under limits", "write the GPUs under limits; requests follow")


@rule("gpu-placement", "a pod with a GPU must be allowed on GPU nodes, and only there")
def gpu_placement(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        if not any(gpus(container["resources"]["limits"]) for container in pod.containers):
            continue
        if not pod.spec["tolerations"].value:
            yield pod.spec["tolerations"].warning(
                "a toleration of the GPU nodes' taint", "add {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
            )
        if not pod.spec["nodeSelector"].value and not pod.spec["affinity"]["nodeAffinity"].value:
            yield pod.spec["nodeSelector"].warning("a nodeSelector or a node affinity", "select the nodes by the GPU's model or pool")


@rule("start-params-differ", "what Ray is told it has and what the container may use must be the same")
def start_params_differ(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for where, told in _told(group):
            granted = _granted(group, where.path.rpartition(".")[2].lower())
            if granted is not None and told != granted:
                yield where.warning(
                    f"{granted}, as the container's limits say", "delete it: the operator takes it from the limits, or make them equal"
                )


def _told(group: Group) -> Iterator[tuple[Place, int]]:
    """Amounts written for Ray, but for the head's 0 CPUs, which are on purpose."""
    for where in (
        *(group.params[name] for name in ("num-cpus", "num-gpus", "memory")),
        *(group.place["resources"][name] for name in ("CPU", "GPU", "memory")),
    ):
        amount = where.amount
        if amount is not None and not (group.is_head and amount == 0):
            yield where, round(amount)


def _granted(group: Group, name: str) -> int | None:
    resources = group.container["resources"]
    if "gpu" in name:
        found = gpus(resources["limits"])
        return round(found.amount or 0) if found else (0 if resources["limits"].given else None)
    if "cpu" in name:
        cpu = resources["limits"]["cpu"].amount or resources["requests"]["cpu"].amount
        return math.ceil(cpu) if cpu is not None else None
    memory = resources["limits"]["memory"].amount
    return math.ceil(memory) if memory is not None else None
