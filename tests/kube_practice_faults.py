"""Planted faults of the practice rules: small changes of the good manifests, see kube_faults."""

from __future__ import annotations

from tests.kube_faults import CONTAINER, HEAD, JOB, REDIS, SCALING, SERVED, WORKER, Fault, env, planter
from tests.kube_manifests import GONE, SERVE_CONFIG

PRACTICE: list[Fault] = []
plant = planter(PRACTICE)
NO_LEVEL = ("Namespace", "metadata labels", {})
GPU = {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": 1}
# Images, resources.
plant("image-tag", "RayCluster", f"{WORKER} {CONTAINER} image", "example.org:5000/ftcore", "tag", "version")
plant("image-version", "RayCluster", f"{WORKER} {CONTAINER} image", "ftcore:1.4.0-ray2.59.0", "2.60.0", "one version")
plant("head-num-cpus", "RayCluster", f"{HEAD} rayStartParams num-cpus", GONE, '"0"', "workers")
plant(
    "head-memory",
    "RayCluster",
    f"{HEAD} {CONTAINER} resources",
    {"limits": {"cpu": "2", "memory": "4Gi"}},
    "5Gi",
    "5Gi",
    at=f"{HEAD} {CONTAINER} resources limits memory",
)
plant("resources-missing", "RayCluster", f"{WORKER} {CONTAINER} resources", {}, "limits.memory", "requests")
plant("memory-request", "RayCluster", f"{WORKER} {CONTAINER} resources requests memory", "8Gi", "16Gi", "request")
plant("gpu-request", "RayCluster", f"{WORKER} {CONTAINER} resources requests nvidia.com/gpu", 1, "limits", "limits")
plant(
    "gpu-placement",
    "RayCluster",
    f"{WORKER} {CONTAINER} resources limits",
    GPU,
    "toleration",
    "NoSchedule",
    ("RayCluster", f"{WORKER} template spec nodeSelector", {"gpu": "a"}),
    at=f"{WORKER} template spec tolerations",
)
plant("start-params-differ", "RayCluster", f"{WORKER} rayStartParams num-cpus", "8", "2", "equal")
# Secrets.
plant(
    "secret-in-clear",
    "RayCluster",
    f"{WORKER} {CONTAINER} env 0",
    env("HF_TOKEN", "hf_abc"),
    "Secret",
    "secretKeyRef",
    at=f"{WORKER} {CONTAINER} env 0 value",
)
plant(
    "secret-in-clear",
    "RayCluster",
    "spec gcsFaultToleranceOptions redisPassword",
    {"value": "1234"},
    "Secret",
    "outside",
    REDIS,
    at="spec gcsFaultToleranceOptions redisPassword value",
)
plant("missing-secret", "ExternalSecret", "metadata name", "other", "Secret", "kubectl", at="")
plant("missing-reference", "RayCluster", f"{WORKER} template spec serviceAccountName", "ghost", "ServiceAccount", "before")
# Selectors.
plant("selects-nothing", "Service", "spec selector", {"app": "ghost"}, "labels", "ray.io/node-type")
plant(
    "selects-nothing", "NetworkPolicy", "spec podSelector matchLabels ray.io/node-type", "tail", "labels", "compare", at="spec podSelector"
)
plant(
    "disruption-budget",
    "PodDisruptionBudget",
    "spec",
    {"minAvailable": 8, "selector": {"matchLabels": {"ray.io/group": "small"}}},
    "8 pods",
    "drained",
    at="spec minAvailable",
)
plant(
    "budget-scale",
    "PodDisruptionBudget",
    "spec",
    {"maxUnavailable": 1, "selector": {"matchLabels": {"ray.io/group": "small"}}},
    "whole number",
    "minAvailable: N",
    at="spec maxUnavailable",
)
plant(
    "budget-scale",
    "PodDisruptionBudget",
    "spec",
    {"minAvailable": "50%", "selector": {"matchLabels": {"ray.io/group": "small"}}},
    "whole number",
    "evicted",
    at="spec minAvailable",
)
# Pod security.
plant("pod-security", "RayCluster", f"{WORKER} {CONTAINER} securityContext runAsNonRoot", False, "restricted", "runAsNonRoot")
plant("pod-security", "RayJob", "spec submitterPodTemplate", GONE, "template", "default has none")
plant("pod-security", "RayCluster", f"{HEAD} template spec hostNetwork", True, "false", "delete")
plant(
    "runs-as-root",
    "RayCluster",
    f"{WORKER} {CONTAINER} securityContext",
    {"runAsUser": 0},
    "root",
    "1000",
    NO_LEVEL,
    at=f"{WORKER} {CONTAINER} securityContext runAsUser",
)
# Queues.
plant("gang-queue", "RayJob", "metadata labels ray.io/gang-scheduling-enabled", "true", "queue", "volcano")
plant("gang-members", "RayJob", "metadata labels kai.scheduler/queue", "q", "KAI", "SidecarMode", at="spec submissionMode")
QUEUED = ("RayCluster", "metadata labels kueue.x-k8s.io/queue-name", "q")
plant("kueue", "RayCluster", "spec enableInTreeAutoscaling", True, "Kueue", "elastic", QUEUED, SCALING[1])
plant("kueue", "RayCluster", f"{WORKER} groupName", "head", "another name", "rename", QUEUED)
plant("kueue", "RayJob", "metadata labels kueue.x-k8s.io/queue-name", "q", "when there is room", "webhook", at="spec suspend")
# Storage.
SCRATCH = (
    (
        "RayService",
        f"{SERVED} workerGroupSpecs 0 template spec volumes",
        [{"name": "scratch", "emptyDir": {}}, {"name": "shared", "nfs": {}}],
    ),
    (
        "RayService",
        f"{SERVED} workerGroupSpecs 0 {CONTAINER} volumeMounts",
        [{"name": "shared", "mountPath": "/a"}, {"name": "scratch", "mountPath": "/a/b"}],
    ),
)
plant(
    "volatile-storage",
    "RayService",
    "spec serveConfigV2",
    SERVE_CONFIG.replace("s3://models/adapters", "/a/b/store"),
    "/a/b/store",
    "ReadWriteMany",
    *SCRATCH,
    NO_LEVEL,
    at=f"{SERVED} workerGroupSpecs 0 template spec volumes 0 emptyDir",
)
plant(
    "volatile-storage",
    "RayJob",
    "spec entrypoint",
    "ftcore adapters list --store=/models",
    "at /models",
    "s3://",
    at=f"{JOB} headGroupSpec {CONTAINER} volumeMounts",
)
