"""Jobs: what the operator refuses of a RayJob: no cluster, two clusters, a mode that does not go with a field, deadlines of nothing.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache

import yaml

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place, version

MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
CLUSTER_KEY = "ray.io/cluster"
METADATA_SINCE = (2, 6, 0)
MOST_VALUES = 100_000
"""In one text."""


@rule("job-cluster", "a RayJob brings its cluster, or names one that is there, and not both")
def job_cluster(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        selector, cluster = job.spec["clusterSelector"], job.spec["rayClusterSpec"]
        if not job.selects and not cluster.given:
            yield cluster.flaw(
                "rayClusterSpec or clusterSelector", "write the cluster that the job brings, or select one by ray.io/cluster"
            )
        if not job.selects:
            continue
        if not selector[CLUSTER_KEY].text:
            yield selector.flaw(f"the name of a RayCluster under {CLUSTER_KEY}", f"write {CLUSTER_KEY}: NAME")
        if cluster.given:
            yield cluster.warning(
                "no rayClusterSpec beside clusterSelector", "delete it: the job runs on the selected cluster, this one is never made"
            )


@rule("job-selected-cluster", "on a cluster that is there, the operator neither suspends nor retries")
def job_selected_cluster(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        if not job.selects:
            continue
        if job.spec["suspend"].on:
            yield job.spec["suspend"].flaw("no suspend with clusterSelector", "delete suspend, or bring a rayClusterSpec")
        if (job.spec["backoffLimit"].number or 0) > 0:
            yield job.spec["backoffLimit"].flaw("0 with clusterSelector", "set backoffLimit: 0, or bring a rayClusterSpec")
        if job.mode == "SidecarMode":
            yield job.spec["submissionMode"].flaw("K8sJobMode or HTTPMode with clusterSelector", "set submissionMode: K8sJobMode")


@rule("job-suspend", "a job that is suspended gives its cluster back, so it must be one that is shut down")
def job_suspend(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        if job.spec["suspend"].on and not job.spec["shutdownAfterJobFinishes"].on:
            yield job.spec["suspend"].flaw("shutdownAfterJobFinishes: true beside it", "set shutdownAfterJobFinishes: true")


@rule("submission-mode", "an unknown mode submits nothing, for ever; others refuse or ignore the submitter's fields")
def submission_mode(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        if job.mode not in MODES:
            yield job.spec["submissionMode"].flaw(f"one of {', '.join(MODES)}", "write one of them; the default is K8sJobMode")
        for name in ("submitterPodTemplate", "submitterConfig"):
            where = job.spec[name]
            if where.given and job.mode == "SidecarMode":
                yield where.flaw(f"no {name} with SidecarMode", f"delete {name}, or set submissionMode: K8sJobMode")
            elif where.given and job.mode in {"HTTPMode", "InteractiveMode"}:
                yield where.warning(f"no {name} with {job.mode}", "delete it: this mode starts no submitter")
        restart = job.spec.down("rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if job.mode == "SidecarMode" and restart.text not in {"", "Never"}:
            yield restart.flaw("Never, or nothing, with SidecarMode", "delete restartPolicy: the submitter must not start twice")


@rule("submitter-template", "the submitter is a Kubernetes Job: its pod has a container and does not restart always")
def submitter_template(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["submitterPodTemplate"]
        if not where.given or job.mode != "K8sJobMode":
            continue
        if not where.down("spec", "containers").value:
            yield where.down("spec", "containers").flaw("at least one container", "give the submitter a container with Ray's image")
        restart = where.down("spec", "restartPolicy")
        if restart.text not in {"Never", "OnFailure"}:
            yield restart.flaw("Never or OnFailure: the API server refuses a Job without", "set restartPolicy: Never")


@rule("entrypoint", "without a command there is nothing to submit; resources for it are JSON")
def entrypoint(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["entrypoint"]
        own_submit = job.mode == "K8sJobMode" and job.spec.down("submitterPodTemplate", "spec", "containers", 0, "command").value
        if not where.text.strip() and job.mode != "InteractiveMode" and not own_submit:
            yield where.flaw("the command of the job", "write entrypoint, or set submissionMode: InteractiveMode")
        where = job.spec["entrypointResources"]
        if where.text and not _is_object(where.text):
            yield where.flaw("""JSON, like '{"slot": 1}'""", "write an object of names and amounts")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@rule("job-metadata", "metadata of a submission needs a Ray that knows it, and a version that can be read")
def job_metadata(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec.down("rayClusterSpec", "rayVersion")
        ray = version(where.text)
        if job.spec["metadata"].value and where.text and (ray is None or ray < METADATA_SINCE):
            yield where.flaw("a version like 2.60.0, at least 2.6.0, for metadata", "write the version of Ray in the images")


@rule("backoff-limit", "tries are counted from 0, and a job that you submit yourself has none")
def backoff_limit(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        for where in (job.spec["backoffLimit"], job.spec["submitterConfig"]["backoffLimit"]):
            if where.number is not None and where.number < 0:
                yield where.flaw("0 or more", "write how often it may start again after a failure")
        where = job.spec["backoffLimit"]
        if (where.number or 0) > 0 and job.mode == "InteractiveMode":
            yield where.flaw("0 with InteractiveMode", "set backoffLimit: 0")


@rule("job-deadlines", "a deadline is a positive number of seconds")
def job_deadlines(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            where = job.spec[name]
            if where.number is not None and where.number <= 0:
                yield where.flaw("1 second or more", "write a positive number, or delete it")


@rule("job-ttl", "a cluster that is not shut down has no time to live after the job")
def job_ttl(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["ttlSecondsAfterFinished"]
        if where.number is None:
            continue
        if where.number < 0:
            yield where.flaw("0 seconds or more", "write a number that is not negative")
        elif where.number > 0 and not job.spec["shutdownAfterJobFinishes"].on:
            yield where.flaw("shutdownAfterJobFinishes: true beside it", "set shutdownAfterJobFinishes: true, or delete the ttl")


@rule("runtime-env", "runtimeEnvYAML is a text that must itself be YAML: an object of fields")
def runtime_env(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["runtimeEnvYAML"]
        if where.text.strip() and not isinstance(loaded(where), dict):
            yield where.flaw("YAML: an object like `working_dir: …`", "write it as a block: `runtimeEnvYAML: |` and the fields below")


@lru_cache(maxsize=256)
def _loaded(text: str) -> object:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date like 2024-13-45 raises ValueError
        return None
    waiting, seen = [value], 0
    while waiting:  # aliases of aliases: small to write, endless to walk
        inside = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            return None
        waiting += inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ()
    return value


def loaded(where: Place) -> object:
    """What YAML in a text says; None for what is no YAML. Nobody changes it: it is read once."""
    return _loaded(where.text)
