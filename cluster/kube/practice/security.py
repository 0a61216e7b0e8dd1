"""Pod security: what a namespace with the level `restricted` or `baseline` refuses, the containers that the operator adds among it.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray. Source: the Pod Security Standards of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.pods import Pod, pod_security, pods
from cluster.kube.rulebook import rule
from cluster.kube.scene import Job, Scene
from cluster.kube.trees import Place

HOST = ("hostNetwork", "hostPID", "hostIPC")
BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
    *("NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""All that `restricted` lets in."""
CONTEXT = "{allowPrivilegeEscalation: false, runAsNonRoot: true, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}"


@rule("pod-security", "the API server refuses the pod: the operator tries again and again, and the object waits without a word")
def pod_security_refused(scene: Scene) -> Iterator[Flaw]:
    # An error: nothing of it shows but an event at the object that made the pod.
    for pod in pods(scene):
        level = pod_security(scene, pod)
        if level in {"baseline", "restricted"}:
            yield from _baseline(pod)
        if level == "restricted":
            yield from _restricted(pod)
    for pod in _with_added(scene):
        if pod_security(scene, pod) == "restricted":
            yield from _added(scene, pod)


def _baseline(pod: Pod) -> Iterator[Flaw]:
    for name in HOST:
        if pod.spec[name].on:
            yield pod.spec[name].flaw("false: the namespace's pod security refuses it", f"delete {name}")
    for volume in pod.spec["volumes"]:
        if volume["hostPath"].given:
            yield volume["hostPath"].flaw("no hostPath: the namespace's pod security refuses it", "use a claim")
    for container in pod.containers:
        if container["securityContext"]["privileged"].on:
            yield container["securityContext"]["privileged"].flaw("false: the namespace's pod security refuses it", "delete privileged")
        for added in container["securityContext"]["capabilities"]["add"]:
            if added.text not in BASELINE_CAPABILITIES:
                yield added.flaw("no added capability: the namespace's pod security refuses it", "delete it")
        for port in container["ports"]:
            if port["hostPort"].number:
                yield port["hostPort"].flaw("no hostPort: the namespace's pod security refuses it", "delete it")


def _restricted(pod: Pod) -> Iterator[Flaw]:
    if not pod.spec["containers"].value:
        return
    for volume in pod.spec["volumes"]:
        for kind, where in volume.entries():
            if kind not in VOLUMES | {"name", "hostPath"}:
                yield where.flaw("a volume that `restricted` lets in", f"use one of {', '.join(sorted(VOLUMES))}", got=kind)
    both = pod.spec["securityContext"]
    for container in pod.containers:
        yield from _context(container["securityContext"], both)


def _context(own: Place, both: Place) -> Iterator[Flaw]:
    """A container's security context, under its pod's."""
    remedy = f"set {CONTEXT}"
    if own["allowPrivilegeEscalation"].value is not False:
        yield own["allowPrivilegeEscalation"].flaw("false in a namespace of level restricted", remedy)
    if "ALL" not in [item.text for item in own["capabilities"]["drop"]]:
        yield own["capabilities"]["drop"].flaw("[ALL] in a namespace of level restricted", remedy)
    if not (own["runAsNonRoot"] if own["runAsNonRoot"].given else both["runAsNonRoot"]).on:
        yield own["runAsNonRoot"].flaw("true in a namespace of level restricted", remedy)
    profile = own["seccompProfile"]["type"] if own["seccompProfile"]["type"].given else both["seccompProfile"]["type"]
    if profile.text not in {"RuntimeDefault", "Localhost"}:
        yield own["seccompProfile"].flaw("RuntimeDefault in a namespace of level restricted", remedy, got=profile.text or "nothing")
    for added in own["capabilities"]["add"]:
        if added.text in BASELINE_CAPABILITIES - {"NET_BIND_SERVICE"}:
            yield added.flaw("NET_BIND_SERVICE at most in a namespace of level restricted", "delete it")
    for context in (own, both):
        if context["runAsUser"].number == 0:
            yield context["runAsUser"].flaw("a user that is not root in a namespace of level restricted", "set runAsUser: 1000")


def _with_added(scene: Scene) -> Iterator[Pod]:
    return (pod for pod in pods(scene) if pod.group is not None and pod.group.is_head)


def _added(scene: Scene, head: Pod) -> Iterator[Flaw]:
    """Containers that the operator adds: the autoscaler takes a security context from its options, the submitters take none."""
    assert head.cluster is not None
    if head.cluster.autoscaling:
        yield from _context(head.cluster.spec["autoscalerOptions"]["securityContext"], head.spec["securityContext"])
    for job in scene.jobs:
        if job.cluster and job.cluster.spec.document is head.cluster.spec.document:
            yield from _submitter(job)


def _submitter(job: Job) -> Iterator[Flaw]:
    if job.mode == "SidecarMode":
        yield job.spec["submissionMode"].flaw(
            "K8sJobMode or HTTPMode in a namespace of level restricted",
            "the sidecar has no security context: use K8sJobMode with a submitterPodTemplate",
        )
    if job.mode == "K8sJobMode" and not job.spec["submitterPodTemplate"].given:
        yield job.spec["submitterPodTemplate"].flaw(
            "a template with a security context in a namespace of level restricted",
            f"write submitterPodTemplate with {CONTEXT}: the default has none",
        )


@rule("runs-as-root", "a container that is root, or more, is one bug away from the node")
def runs_as_root(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        if pod_security(scene, pod) in {"baseline", "restricted"}:
            continue  # an error there already
        for container in pod.containers:
            own, both = container["securityContext"], pod.spec["securityContext"]
            if own["privileged"].on:
                yield own["privileged"].warning("false", "delete privileged; a device plugin gives GPUs without it")
            user = own["runAsUser"] if own["runAsUser"].given else both["runAsUser"]
            if user.number == 0:
                yield user.warning("a user that is not root", "set runAsUser: 1000 and runAsNonRoot: true")
            elif not (own["runAsNonRoot"].on or both["runAsNonRoot"].on or user.number):
                yield own["runAsNonRoot"].warning("true", f"set securityContext: {CONTEXT}")
