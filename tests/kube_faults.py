"""Planted faults: small changes of the good manifests, each with the rule that must find it, where, and what that rule must say.

Here the operator's rules; in kube_practice_faults those of practice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.kube_manifests import GONE, SERVE_CONFIG, container

CRON = "RayCronJob"
WORKER, HEAD = "spec workerGroupSpecs 0", "spec headGroupSpec"
CONTAINER = "template spec containers 0"
JOB = "spec rayClusterSpec"
SERVED = "spec rayClusterConfig"
FAULTS: list[Fault] = []


@dataclass(frozen=True)
class Fault:
    rule: str
    kind: str
    path: str
    value: Any
    wanted: str
    """A word of the flaw's `wanted`."""
    remedy: str
    at: str
    also: tuple[tuple[str, str, Any], ...]
    gates: tuple[str, ...]


def planter(into: list[Fault]) -> Callable[..., None]:
    def plant(rule: str, kind: str, path: str, value: Any, wanted: str, remedy: str, *also: tuple[str, str, Any], **rest: Any) -> None:
        """`at`: where the flaw is, if not where the change was made. `gates`: instead of RayCronJob's."""
        into.append(Fault(rule, kind, path, value, wanted, remedy, rest.get("at", path), also, rest.get("gates", (CRON,))))

    return plant


plant = planter(FAULTS)


def env(name: str, value: str = "x") -> dict[str, str]:
    return {"name": name, "value": value}


# Names.
plant("name-length", "RayCluster", "metadata name", "a" * 54, "53", "shorten")
plant("name-length", "RayJob", "metadata name", "a" * 48, "47", "shorten")
plant("name-length", "RayService", "metadata name", "a" * 48, "47", "shorten")
plant("name-length", CRON, "metadata name", "a" * 37, "36", "shorten")
plant("name-dns", "RayJob", "metadata name", "7b", "DNS-1035", "rename")
plant("initializing-timeout", "RayService", "metadata annotations ray.io/initializing-timeout", "-5m", "positive", "30m")
plant("head-service-name", "RayService", f"{SERVED} headGroupSpec headService metadata name", "door", "no name", "delete")
plant("group-names", "RayCluster", f"{WORKER} groupName", "headgroup", "once", "pods")
plant("generated-names", "RayCluster", f"{WORKER} groupName", "g" * 47, "50", "shorten")
plant("port-names", "RayCluster", f"{HEAD} {CONTAINER} ports 0 name", "redis", "gcs-server", "gcs-server")
# Groups.
plant("containers-present", "RayCluster", f"{WORKER} template spec containers", [], "container", "worker group 'small'")
plant("resources-twice", "RayCluster", f"{HEAD} resources", {"CPU": "0"}, "one place", "resources", at=f"{HEAD} rayStartParams num-cpus")
plant("start-params", "RayCluster", f"{WORKER} rayStartParams labels", "a=b", "no labels", "labels")
plant("start-params", "RayCluster", f"{WORKER} rayStartParams resources", "slot=4", "JSON", "quote")
plant("group-labels", "RayCluster", f"{WORKER} labels", {"pool": "not good"}, "label value", "change", at=f"{WORKER} labels pool")
plant("managed-labels", "RayCluster", f"{WORKER} template metadata labels ray.io/group", "mine", "operator's own", "delete")
plant(
    "managed-env", "RayCluster", f"{WORKER} {CONTAINER} env +", env("FQ_RAY_IP"), "operator's own", "wins", at=f"{WORKER} {CONTAINER} env 1"
)
plant("replica-bounds", "RayCluster", f"{WORKER} minReplicas", 3, "maxReplicas", "lower")
plant("replica-bounds", "RayCluster", f"{WORKER} maxReplicas", -1, "0 or more", "negative")
plant("replicas-clamped", "RayCluster", f"{WORKER} replicas", 5, "between", "nearest")
plant("num-of-hosts", "RayCluster", f"{WORKER} numOfHosts", 0, "1 host", "hosts")
plant("group-suspend", "RayCluster", f"{WORKER} suspend", True, "RayJobDeletionPolicy", "gate", gates=(CRON, "RayJobDeletionPolicy=false"))
# Autoscaler.
plant(
    "autoscaler-version",
    "RayCluster",
    f"{HEAD} {CONTAINER} env +",
    env("RAY_enable_autoscaler_v2", "1"),
    "enableInTreeAutoscaling",
    "version: v2",
    at=f"{HEAD} {CONTAINER} env 1 value",
)
SCALING = (
    ("RayCluster", "spec enableInTreeAutoscaling", True),
    ("RayCluster", "spec autoscalerOptions", {"version": "v2", "securityContext": container("a", "1Gi")["securityContext"]}),
)
plant("autoscaler-restart", "RayCluster", f"{WORKER} template spec restartPolicy", "Always", "Never", "delete", *SCALING)
plant("idle-timeout", "RayCluster", f"{WORKER} idleTimeoutSeconds", 60, "v2", "version: v2")
plant("group-priority", "RayCluster", f"{WORKER} priority", 1, "v2", "priority")
plant(
    "autoscaler-env",
    "RayCluster",
    "spec autoscalerOptions env",
    [env("KUBERAY_GEN_AUTOSCALER_START_CMD")],
    "KUBERAY_GEN",
    "delete",
    *SCALING,
    at="spec autoscalerOptions env 0",
)
plant("autoscaler-off", "RayCluster", "spec autoscalerOptions", {"version": "v2"}, "enableInTreeAutoscaling", "true")
# Fault tolerance of the GCS.
REDIS = ("RayCluster", "spec gcsFaultToleranceOptions", {"redisAddress": "redis:6379"})
plant("ft-annotation", "RayCluster", "metadata annotations ray.io/ft-enabled", "true", "alone", "annotation", REDIS)
plant(
    "ft-redis-address",
    "RayCluster",
    f"{HEAD} {CONTAINER} env +",
    env("RAY_REDIS_ADDRESS"),
    "redisAddress",
    "move",
    at=f"{HEAD} {CONTAINER} env 1",
)
plant("ft-redis-login", "RayCluster", f"{HEAD} rayStartParams redis-password", "$REDIS", "redisPassword", "secretKeyRef", REDIS)
plant("ft-rocksdb", "RayCluster", "spec gcsFaultToleranceOptions backend", "rocksdb", "gate", "turn the gate on")
plant("ft-storage", "RayCluster", "spec gcsFaultToleranceOptions storage", {"size": "1Gi"}, "redis", "rocksdb", REDIS)
# Doors.
plant("auth-version", "RayCluster", "spec rayVersion", "nightly", "2.52.0", "images")
plant(
    "auth-kubernetes",
    "RayCluster",
    "spec authOptions secretName",
    "ft-secrets",
    "secretName",
    "delete",
    ("RayCluster", "spec authOptions enableK8sTokenAuth", True),
)
plant("auth-missing", "RayCluster", "spec authOptions", GONE, "token", "secretName")
plant("network-policy", "RayCluster", "spec networkPolicy", {"mode": "DenyAll"}, "RayClusterNetworkPolicy", "gate")
plant("tls", "RayCluster", "spec tlsOptions", {"enabled": True}, "RayClusterMTLS", "cert-manager")
HISTORY = {"collectorOptions": {"image": "x:1", "env": [env("STORAGE_BACKEND", "S3")]}}
plant(
    "history-server",
    "RayCluster",
    "spec historyServerOptions",
    HISTORY,
    "S3_REGION",
    "Secret",
    at="spec historyServerOptions collectorOptions env",
    gates=(CRON, "RayClusterHistoryServer"),
)
# Jobs.
plant("job-cluster", "RayJob", JOB, GONE, "clusterSelector", "ray.io/cluster")
plant(
    "job-selected-cluster",
    "RayJob",
    "spec backoffLimit",
    2,
    "clusterSelector",
    "rayClusterSpec",
    ("RayJob", JOB, GONE),
    ("RayJob", "spec clusterSelector ray.io/cluster", "lab"),
)
plant(
    "job-suspend",
    "RayJob",
    "spec suspend",
    True,
    "shutdownAfterJobFinishes",
    "true",
    ("RayJob", "spec shutdownAfterJobFinishes", False),
    ("RayJob", "spec ttlSecondsAfterFinished", 0),
    ("RayJob", "spec deletionStrategy deletionRules", [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]),
)
plant("submission-mode", "RayJob", "spec submissionMode", "HttpMode", "HTTPMode", "default")
plant(
    "submission-mode", "RayJob", "spec submissionMode", "HTTPMode", "no submitterPodTemplate", "submitter", at="spec submitterPodTemplate"
)
plant("submitter-template", "RayJob", "spec submitterPodTemplate spec restartPolicy", GONE, "OnFailure", "Never")
plant("entrypoint", "RayJob", "spec entrypoint", GONE, "command", "InteractiveMode")
plant(
    "job-metadata",
    "RayJob",
    "spec metadata",
    {"a": "b"},
    "2.6.0",
    "version",
    ("RayJob", f"{JOB} rayVersion", "nightly"),
    ("RayJob", f"{JOB} authOptions", GONE),
    at=f"{JOB} rayVersion",
)
plant("backoff-limit", "RayJob", "spec backoffLimit", -1, "0 or more", "failure")
plant("job-deadlines", "RayJob", "spec activeDeadlineSeconds", 0, "1 second", "positive")
plant("job-ttl", CRON, "spec jobTemplate ttlSecondsAfterFinished", -1, "0 seconds", "negative")
plant("runtime-env", "RayJob", "spec runtimeEnvYAML", "no object", "YAML", "block")
plant("deletion-strategy", "RayJob", "spec deletionStrategy", {}, "deletionRules", "delete")
BOTH = {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteCluster"}}
plant(
    "deletion-policies",
    "RayJob",
    "spec deletionStrategy",
    BOTH,
    "DeleteNone",
    "one of the two",
    at="spec deletionStrategy onSuccess policy",
)
UNSHUT = (("RayJob", "spec shutdownAfterJobFinishes", False), ("RayJob", "spec ttlSecondsAfterFinished", 0))


def rules(*steps: tuple[str, int]) -> dict[str, Any]:
    return {"deletionRules": [{"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}} for policy, ttl in steps]}


plant(
    "deletion-rules",
    "RayJob",
    "spec deletionStrategy",
    rules(("DeleteSelf", 5), ("DeleteSelf", 9)),
    "once",
    "delete",
    *UNSHUT,
    at="spec deletionStrategy deletionRules 1",
)
plant(
    "deletion-order",
    "RayJob",
    "spec deletionStrategy",
    rules(("DeleteWorkers", 20), ("DeleteCluster", 5)),
    "20",
    "DeleteWorkers",
    *UNSHUT,
    at="spec deletionStrategy deletionRules 1 condition ttlSeconds",
)
plant("job-limits", "RayJob", "spec preRunningDeadlineSeconds", GONE, "number", "waits for ever")
plant("job-cleanup", "RayJob", "spec ttlSecondsAfterFinished", GONE, "seconds", "600")
SLEEPS = {"preStop": {"exec": {"command": ["sh", "-c", "kill -USR1 1; sleep 180"]}}}
plant(
    "grace-period",
    "RayCluster",
    f"{WORKER} {CONTAINER} lifecycle",
    SLEEPS,
    "180",
    "checkpoint",
    at=f"{WORKER} template spec terminationGracePeriodSeconds",
)
plant(
    "volatile-storage",
    "RayJob",
    f"{JOB} headGroupSpec template spec volumes",
    [{"name": "runs", "emptyDir": {}}],
    "lasts",
    "ReadWriteMany",
    ("RayJob", "spec entrypoint", "python sft.py output.runs=/runs/x"),
    ("RayJob", f"{JOB} headGroupSpec {CONTAINER} volumeMounts", [{"name": "runs", "mountPath": "/runs"}]),
    at=f"{JOB} headGroupSpec template spec volumes 0 emptyDir",
)
# Cron.
plant("cron-gate", CRON, "kind", CRON, "gate", "off by default", gates=())
plant("cron-schedule", CRON, "spec schedule", "0 25 * * *", "hour", "five fields")
plant("cron-time-zone", CRON, "spec timeZone", "Mars/Olympus", "IANA", "timeZone")
# Serving.
plant("cluster-upgrade", "RayService", f"{SERVED} upgradeStrategy type", "Recreate", "RayService", "delete")
plant("service-upgrade", "RayService", "spec upgradeStrategy type", "Rolling", "NewCluster", "default")
STEPS = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {"maxSurgePercent": 20, "stepSizePercent": 50, "intervalSeconds": 10, "gatewayClassName": "istio"},
}
SERVED_SCALING = (
    ("RayService", f"{SERVED} enableInTreeAutoscaling", True),
    ("RayService", f"{SERVED} autoscalerOptions", {"securityContext": container("a", "1Gi")["securityContext"]}),
)
plant(
    "incremental-upgrade",
    "RayService",
    "spec upgradeStrategy",
    STEPS,
    "maxSurgePercent",
    "lower",
    *SERVED_SCALING,
    at="spec upgradeStrategy clusterUpgradeOptions stepSizePercent",
)
plant("serve-config", "RayService", "spec serveConfigV2", "import_path: a:b", "applications", "below")
plant(
    "serve-port",
    "RayService",
    f"{SERVED} headGroupSpec {CONTAINER} ports 4 name",
    "http",
    "serve",
    "8000",
    at=f"{SERVED} headGroupSpec {CONTAINER} ports",
)
plant("serve-head", "RayService", "spec excludeHeadPodFromServeSvc", False, "true", "workers")
for name, line in (
    ("serve-one-per-node", "max_replicas_per_node: 1"),
    ("serve-queue", "max_queued_requests: 64"),
    ("serve-stopping", "graceful_shutdown_timeout_s: 60"),
):
    plant(name, "RayService", "spec serveConfigV2", SERVE_CONFIG.replace(line, "user_config: {}"), "main/engine", "", gates=(CRON,))
plant("serve-spread", "RayService", f"{SERVED} workerGroupSpecs 0 template spec topologySpreadConstraints", GONE, "hosts", "hostname")
# Ports.
plant(
    "dashboard-port",
    "RayJob",
    f"{JOB} headGroupSpec {CONTAINER} ports 1 name",
    "board",
    "dashboard",
    "8265",
    at=f"{JOB} headGroupSpec {CONTAINER} ports",
)
plant("port-params", "RayCluster", f"{HEAD} rayStartParams port", "6380", "6380", "port", at=f"{HEAD} {CONTAINER} ports 0 containerPort")
# What the operator ignores.
plant(
    "service-fields",
    "RayService",
    "spec serveService spec selector",
    {"a": "b"},
    "no selector",
    "operator",
    at="spec serveService spec selector",
)
plant("template-metadata", "RayCluster", f"{WORKER} template metadata namespace", "other", "no namespace", "delete")
plant("unused-fields", "RayService", "spec serviceUnhealthySecondThreshold", 900, "not read", "delete")
plant("ft-deletion-timeout", "RayCluster", "metadata annotations ray.io/gcs-ft-deletion-timeout", "5m", "seconds", "quotes")
plant(
    "rocksdb-upgrade",
    "RayService",
    f"{SERVED} gcsFaultToleranceOptions",
    {"backend": "rocksdb", "storage": {"claimName": "store"}},
    "None",
    "lock",
    at="spec upgradeStrategy type",
    gates=(CRON, "GCSFaultToleranceEmbeddedStorage"),
)
plant("secret-in-clear", "RayJob", "spec runtimeEnvYAML", "env_vars: {HF_TOKEN: hf_abc}", "no secret", "secretKeyRef")
MONITOR = {"selector": {"matchLabels": {"ray.io/node-type": "worker"}}}
plant("selects-nothing", "ServiceMonitor", "spec", MONITOR, "Service", "compare", at="spec selector")
plant(
    "overwritten-command",
    "RayCluster",
    "metadata annotations ray.io/overwrite-container-cmd",
    "true",
    "KUBERAY_GEN",
    "annotation",
    at=f"{WORKER} {CONTAINER} command",
)
