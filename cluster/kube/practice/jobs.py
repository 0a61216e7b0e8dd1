"""Jobs in practice: that they end, clean up after themselves, have time to stop, and leave nothing where it is lost.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.operator.serving import applications
from cluster.kube.pods import pods
from cluster.kube.rulebook import rule
from cluster.kube.scene import Cluster, Group, Scene
from cluster.kube.trees import Place, root

LIMITS = {
    "activeDeadlineSeconds": "a job that hangs holds its GPUs for ever",
    "preRunningDeadlineSeconds": "a job whose pods find no room, or whose image is missing, waits for ever",
    "backoffLimit": "without it a lost head is the end of the run; 0 says that you want so",
}
DEFAULT_GRACE_S = 30
_LASTING = re.compile(r"(?:^|[\s'\"])(?:output\.runs|output\.store|store|runs|--store|--runs)[=\s]+['\"]?(/[^\s'\"]+)")
_WORKING_DIR = re.compile(r"--working-dir[=\s]+['\"]?(/[^\s'\"]+)")
_LASTING_ENV = re.compile(r"^FTCORE_(?:\w+_)?(?:STORE|HOME|RUNS|OUTPUT)$")
_LASTING_KEYS = {"store", "runs"}


@rule("job-limits", "a RayJob says how long it may run, wait, and how often it tries")
def job_limits(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        for name, reason in LIMITS.items():
            where = job.spec[name]
            if not where.given and not (name == "backoffLimit" and job.mode == "InteractiveMode"):
                yield where.warning("a number", f"write {name}: {reason}")


@rule("job-cleanup", "a cluster that outlives its job keeps its nodes")
def job_cleanup(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        if job.selects or job.spec["deletionStrategy"].given:
            continue
        shut, ttl = job.spec["shutdownAfterJobFinishes"], job.spec["ttlSecondsAfterFinished"]
        if not shut.on:
            yield shut.warning("true", "set shutdownAfterJobFinishes: true and ttlSecondsAfterFinished, or write deletionRules")
        elif not ttl.given:
            yield ttl.warning("seconds in which logs can still be read", "write ttlSecondsAfterFinished: 600, or what you need")


@rule("grace-period", "a pod is killed at the end of its grace period, whatever preStop still does")
def grace_period(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        where = pod.spec["terminationGracePeriodSeconds"]
        grace = DEFAULT_GRACE_S if where.number is None else where.number
        for container in pod.containers:
            hook = container["lifecycle"]["preStop"]
            needs = max([hook["sleep"]["seconds"].number or 0, *map(int, re.findall(r"\bsleep (\d{1,6})\b", _command(hook["exec"])))])
            if needs >= grace:
                yield where.warning(
                    f"more than the {needs} s that preStop waits", "raise it: time to seal a checkpoint comes after preStop"
                )
            elif hook.given and not where.given:
                yield where.warning("its own value beside a preStop", f"write it: the default is {DEFAULT_GRACE_S} s")


def _command(holder: Place) -> str:
    return " ".join(item.text for key in ("command", "args") for item in holder[key])


@rule("volatile-storage", "runs and adapters on an emptyDir are gone with the pod, and the other nodes never see them")
def volatile_storage(scene: Scene) -> Iterator[Flaw]:
    # An error: training succeeds, and what it made is not there.
    for cluster in scene.clusters:
        for path in sorted(_lasting(cluster)):
            for group in cluster.groups:
                yield from _not_lasting(group, path)
        for path in sorted(set(_WORKING_DIR.findall(" ".join(_texts(cluster))))):
            empty = _mounted(cluster.head, path)["emptyDir"]
            if empty.given:
                yield empty.warning(
                    f"a volume that lasts, or the image, for the code at {path}", "put the code into the image", got="an emptyDir"
                )


def _lasting(cluster: Cluster) -> set[str]:
    """Folders that must outlive a pod, as commands, variables and arguments name them."""
    found = {path for text in _texts(cluster) for path in _LASTING.findall(text)}
    for group in cluster.groups:
        found |= {env["value"].text for env in group.container["env"] if _LASTING_ENV.match(env["name"].text)}
    for app in applications(root(cluster.spec.document)["spec"]["serveConfigV2"]):
        found |= set(_arguments(app.get("args")))
    return {path.rstrip("/") for path in found if path.startswith("/")}


def _texts(cluster: Cluster) -> Iterator[str]:
    """The job's entrypoint, if there is one, and the containers' commands."""
    spec = root(cluster.spec.document)["spec"]
    yield (spec["jobTemplate"] if cluster.kind == "RayCronJob" else spec)["entrypoint"].text
    yield from (_command(group.container) for group in cluster.groups)


def _arguments(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inside in value.items():
            if key in _LASTING_KEYS and isinstance(inside, str):
                yield inside
            yield from _arguments(inside)


def _not_lasting(group: Group, path: str) -> Iterator[Flaw]:
    remedy = "put it on s3:// or on a claim that all nodes mount (ReadWriteMany)"
    volume = _mounted(group, path)
    if volume["emptyDir"].given:
        yield volume["emptyDir"].flaw(f"a volume that lasts, for {path}", remedy, got="an emptyDir")
    elif not volume.given and group.container.given:
        yield group.container["volumeMounts"].flaw(f"a volume that lasts at {path}", remedy, got="nothing mounted there")


def _mounted(group: Group, path: str) -> Place:
    """The volume that holds a path of Ray's container: of the mounts above it, the nearest one's."""
    above = [
        mount
        for mount in group.container["volumeMounts"]
        if mount["mountPath"].text and f"{path}/".startswith(f"{mount['mountPath'].text.rstrip('/')}/")
    ]
    nearest = max(above, key=lambda mount: len(mount["mountPath"].text), default=None)
    return group.pod["volumes"].named(nearest["name"].text if nearest else "")
