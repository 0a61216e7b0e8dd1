"""Jobs: a RayJob of an overlay made into the RayJob of one run: its workers packed into pods, its recipe beside it.

In: the overlay's RayJob, a run. Out: the objects to create, or a ConfigError where the overlay's nodes cannot hold them.
Runs in: a terminal; imports no ray.

What nodes the overlay is for stands in its RayJob's annotations: `ftcore/nodes` (how many) and `ftcore/node` (what one of them has).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.kube.trees import quantity
from cluster.kube.waivers import WAIVE
from ftcore.errors import ConfigError
from ftcore.memory import GIB
from ftcore.recipe import Resources

NODES, NODE = "ftcore/nodes", "ftcore/node"
GPU = "nvidia.com/gpu"
QUEUE = "kueue.x-k8s.io/queue-name"
RECIPE_AT = "/etc/ftcore"
MAX_NAME = 47
"""Of a RayJob: what the operator makes of it may have 63."""
RAY_GIB = 2.0
"""For Ray's own processes and the objects that rows pass through, beside what the workers take."""


@dataclass(frozen=True)
class Nodes:
    """What an overlay is made for."""

    number: int
    cpu: float
    memory_gib: float
    gpus: float
    kind: str = ""
    """Of its GPUs, as `ftcore plan --gpu` names it; empty where nobody said."""


@dataclass(frozen=True)
class Pods:
    """Workers of one run in pods that are all alike."""

    least: int
    most: int
    workers_each: int
    cpu: float
    memory_gib: int
    gpus: float

    def __str__(self) -> str:
        count = f"{self.most} pod{'s' * (self.most != 1)}" if self.least == self.most else f"{self.least} to {self.most} pods"
        gpus = f", {self.gpus:g} GPU{'s' * (self.gpus != 1)}" if self.gpus else ""
        return f"{count} of {self.workers_each} worker{'s' * (self.workers_each != 1)}: {self.cpu:g} CPUs, {self.memory_gib} GiB{gpus} each"


@dataclass(frozen=True)
class Run:
    """What is put into a RayJob."""

    name: str
    entrypoint: str
    files: Mapping[str, str]
    """Name -> text, read at RECIPE_AT by the driver."""
    pods: Pods


def nodes_of(job: Mapping[str, Any], where: str) -> Nodes:
    """Raises ConfigError where the overlay does not say what its nodes have."""
    notes = job.get("metadata", {}).get("annotations", {})
    wanted = f"annotations {NODES}: a number, and {NODE} like `{{cpu: 32, memory: 128Gi, gpus: 8, gpu: H100}}`"
    try:
        one = yaml.safe_load(notes[NODE])
        return Nodes(int(notes[NODES]), float(one["cpu"]), gib(str(one["memory"])), float(one.get("gpus", 0)), str(one.get("gpu", "")))
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        got = str(notes.get(NODE, "nothing")) if isinstance(notes, dict) else "nothing"
        raise ConfigError("this overlay does not say what its nodes have", where=where, got=got, wanted=wanted) from error


def gib(text: str) -> float:
    """Of a quantity of memory, like 64Gi or 1500M. Raises ValueError."""
    found = quantity(text)
    if found is None:
        raise ValueError(f"no quantity of memory: {text}")
    return found / GIB


def packed(asked: Resources, worker_gib: float, nodes: Nodes) -> Pods:
    """As many workers to a pod as one node holds: they share its links between GPUs. Raises ConfigError where they cannot all stand."""
    limits = [
        (nodes.gpus, asked.gpus_per_worker, "GPUs", "an overlay with GPUs (--overlay gpu), or a smaller resources.gpus_per_worker"),
        (nodes.cpu, asked.cpus_per_worker, "CPUs", "an overlay with larger nodes, or a smaller resources.cpus_per_worker"),
        (nodes.memory_gib - RAY_GIB, worker_gib, "GiB of memory", "an overlay with larger nodes; `ftcore plan` tells what takes less"),
    ]
    limits = [limit for limit in limits if limit[1]]
    for have, want, what, remedy in limits:
        if want > have:
            raise ConfigError(
                "no node of this overlay holds a worker", where="resources", got=f"{max(have, 0):g} {what} a node",
                wanted=f"{want:.4g} a worker", remedy=remedy,
            )  # fmt: skip
    fit = min(int(have / want + 1e-9) for have, want, _, _ in limits)
    most = asked.max_workers
    each = {"STRICT_SPREAD": 1, "SPREAD": min(fit, -(-most // nodes.number))}.get(asked.placement, min(fit, most))
    each = -(-most // -(-most // each))  # even: 9 workers of at most 8 a node are 5 and 4, not 8 and 1
    pods = -(-most // each)
    if pods > nodes.number:
        what = f"{nodes.number * fit * asked.gpus_per_worker:g} GPUs" if asked.gpus_per_worker else f"room for {nodes.number * fit} workers"
        wants = f"{most * asked.gpus_per_worker:g} GPUs" if asked.gpus_per_worker else f"{most} workers"
        raise ConfigError(
            "this overlay's nodes cannot hold all workers", where="resources.workers",
            got=f"{nodes.number} nodes, {what} in all{', one worker a node' * (asked.placement == 'STRICT_SPREAD')}", wanted=wants,
            remedy=f"resources.workers={nodes.number * each}; or say in the overlay what its nodes have ({NODES}, {NODE})",
        )  # fmt: skip
    memory = math.ceil(each * worker_gib + RAY_GIB)
    return Pods(-(-asked.min_workers // each), pods, each, math.ceil(each * asked.cpus_per_worker), memory, each * asked.gpus_per_worker)


def rendered(job: Mapping[str, Any], run: Run) -> list[dict[str, Any]]:
    """A ConfigMap with the run's files, and the RayJob."""
    made: dict[str, Any] = copy.deepcopy(dict(job))
    meta, spec = made["metadata"], made["spec"]
    meta["name"] = run.name
    notes = {name: value for name, value in meta.get("annotations", {}).items() if name not in (NODES, NODE)}
    seen = [part.strip() for part in notes.get(WAIVE, "").split(";") if part.strip() and not part.strip().startswith("kueue:")]
    meta["annotations"] = notes | {WAIVE: "; ".join([*seen, "missing-reference: the overlay's own"])}
    files = f"{run.name}-recipe"
    spec["entrypoint"] = run.entrypoint
    if QUEUE in meta.get("labels", {}):
        spec["suspend"] = True  # until there is room
    cluster = spec["rayClusterSpec"]
    _mount(cluster["headGroupSpec"]["template"]["spec"], files)
    [group] = cluster["workerGroupSpecs"]
    group |= {"replicas": run.pods.most, "minReplicas": run.pods.least, "maxReplicas": run.pods.most}
    amounts = {"cpu": f"{run.pods.cpu:g}", "memory": f"{run.pods.memory_gib}Gi"} | ({GPU: f"{run.pods.gpus:g}"} if run.pods.gpus else {})
    group["template"]["spec"]["containers"][0]["resources"] = {"requests": amounts, "limits": dict(amounts)}
    labels, space = dict(meta.get("labels", {})), {"namespace": meta["namespace"]} if "namespace" in meta else {}
    kept = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": files, **space, "labels": labels}, "data": dict(run.files)}
    return [kept, made]


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it was written."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def as_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=140)


def _mount(pod: dict[str, Any], name: str) -> None:
    pod.setdefault("volumes", []).append({"name": "recipe", "configMap": {"name": name}})
    pod["containers"][0].setdefault("volumeMounts", []).append({"name": "recipe", "mountPath": RECIPE_AT, "readOnly": True})


def mounts_of(job: Mapping[str, Any]) -> list[str]:
    """Where the head has files: its volumes' paths, and the image's own folder."""
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return ["/app", *(mount["mountPath"] for mount in container.get("volumeMounts", []))]


def job_name(text: str) -> str:
    """A name that the operator takes: a DNS-1035 label of at most MAX_NAME characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:MAX_NAME].rstrip("-")
