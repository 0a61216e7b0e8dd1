"""Scheduling: queues and gangs of Kueue, Volcano, YuniKorn and KAI, which are asked for by labels alone.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Job, Scene
from cluster.kube.trees import Place, root

GANG = "ray.io/gang-scheduling-enabled"
KUEUE, KUEUE_ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
VOLCANO, VOLCANO_TIER = "volcano.sh/queue-name", "volcano.sh/network-topology-highest-tier-allowed"
YUNIKORN, YUNIKORN_APP = "yunikorn.apache.org/queue", "yunikorn.apache.org/app-id"
KAI = "kai.scheduler/queue"
KUEUE_PODSETS = 8
"""Kinds of pods in a Workload: the head, and seven worker groups."""


def _labels(place: Place) -> Place:
    return place["metadata"]["labels"]


@rule("gang-queue", "a gang without a queue is put into the default one, or waits for ever")
def gang_queue(scene: Scene) -> Iterator[Flaw]:
    for place in scene.ray("RayCluster", "RayJob", "RayService", "RayCronJob"):
        labels = _labels(place)
        if labels[GANG].given and not any(labels[name].text for name in (VOLCANO, YUNIKORN, KAI)):
            yield labels[GANG].warning(
                f"a queue beside it: {VOLCANO}, {YUNIKORN} or {KAI}", f"add the queue's label, like {VOLCANO}: training"
            )


@rule("gang-members", "what the batch schedulers refuse: jobs on a cluster that is there, a submitter that comes later, half a label")
def gang_members(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        labels = _labels(root(job.spec.document))
        if job.selects and (labels[GANG].given or labels[VOLCANO].given):
            yield job.spec["clusterSelector"].flaw(
                "a rayClusterSpec for a gang", "bring the cluster: Volcano cannot gang a cluster that is there"
            )
        if labels[KAI].given and job.mode == "K8sJobMode":
            where = job.spec["submissionMode"]
            yield where.flaw(
                "another mode with KAI",
                "set submissionMode: SidecarMode or HTTPMode: the submitter comes too late for the gang",
                got=job.mode,
            )
    for place in scene.ray("RayCluster", "RayJob"):
        labels = _labels(place)
        tier = labels[VOLCANO_TIER]
        if tier.given and not tier.text.lstrip("-").isdigit():
            yield tier.flaw("a whole number", "write the tier as a number in quotes")
        if labels[YUNIKORN].given != labels[YUNIKORN_APP].given:
            where = labels[YUNIKORN_APP] if labels[YUNIKORN].given else labels[YUNIKORN]
            yield where.warning("both of YuniKorn's labels", f"write {YUNIKORN} and {YUNIKORN_APP}")


@rule("kueue", "what Kueue's webhook refuses or passes by: a size that changes, a cluster that is there, one that stays")
def kueue(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        place = root(cluster.spec.document)
        if not _labels(place)[KUEUE].given or cluster.kind not in {"RayCluster", "RayJob"}:
            continue
        elastic = place.down("metadata", "annotations", KUEUE_ELASTIC).text == "true"
        where = cluster.spec["enableInTreeAutoscaling"]
        if where.on and not elastic:
            remedy = f'delete it, or annotate {KUEUE_ELASTIC}: "true" with the gate ElasticJobsViaWorkloadSlices'
            yield where.flaw("no autoscaling in a queue of Kueue", remedy)
        where = cluster.spec["workerGroupSpecs"]
        if len(cluster.workers) + 1 > KUEUE_PODSETS:
            yield where.warning(f"at most {KUEUE_PODSETS - 1} worker groups", "merge groups: most versions of Kueue refuse more")
        for group in cluster.workers:
            if group.name == "head":
                yield group.place["groupName"].flaw("another name: Kueue calls the head so", "rename the group")
    for job in scene.jobs:
        if _labels(root(job.spec.document))[KUEUE].given and job.spec.document.kind == "RayJob":
            yield from _queued(job)


def _queued(job: Job) -> Iterator[Flaw]:
    if job.selects:
        where, remedy = job.spec["clusterSelector"], "bring a rayClusterSpec alone"
        if job.cluster:
            yield where.flaw("no clusterSelector in a queue of Kueue", remedy)
        else:
            yield where.warning("a rayClusterSpec: Kueue passes a job on a selected cluster by", remedy)
        return
    if not job.spec["suspend"].on:
        yield job.spec["suspend"].warning(
            "true: Kueue starts the job when there is room", "set suspend: true, so that it waits even if Kueue's webhook is down"
        )
    if not job.spec["shutdownAfterJobFinishes"].on:
        yield job.spec["shutdownAfterJobFinishes"].flaw("true in a queue of Kueue", "set it: Kueue refuses a job that keeps its cluster")
