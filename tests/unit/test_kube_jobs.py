"""Verdicts on jobs, services, doors and the history server, as in KubeRay's own tests: see test_kube_clusters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kube_cases import Case, env, refused, worker

CASES: list[Case] = []
BOX = "spec headGroupSpec template spec containers 0"
SELECTED = {"spec rayClusterSpec": None, "spec clusterSelector": {"ray.io/cluster": "lab"}}
OTHER = {"spec rayClusterSpec": None, "spec clusterSelector": {"key": "value"}}
AUTO = {"spec rayClusterSpec enableInTreeAutoscaling": True}


def case(title: str, kind: str, good: bool, changes: dict[str, Any], *gates: str) -> None:
    CASES.append((title, kind, good, changes, gates))


def job(title: str, good: bool, changes: dict[str, Any] | None = None, **fields: Any) -> None:
    case(title, "RayJob", good, (changes or {}) | {f"spec {name}": value for name, value in fields.items()})


# Jobs.
job("valid", True, suspend=True, shutdownAfterJobFinishes=True)
job("no cluster", False, rayClusterSpec=None)
job("suspended, not shut down", False, suspend=True, shutdownAfterJobFinishes=False)
job("suspended on a selected cluster", False, OTHER, suspend=True, shutdownAfterJobFinishes=True)
job("no runtime environment", False, runtimeEnvYAML="invalid_yaml_str")
job("tries below zero", False, backoffLimit=-1)
for tries, good in {1: False, 0: True, None: True}.items():
    job(f"interactive, {tries} tries", good, submissionMode="InteractiveMode", backoffLimit=tries)
job("a ttl, not shut down", False, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=5)
job("a ttl", True, shutdownAfterJobFinishes=True, ttlSecondsAfterFinished=5)
job("a ttl below zero", False, shutdownAfterJobFinishes=True, ttlSecondsAfterFinished=-5)
SIDECAR = {"spec submissionMode": "SidecarMode"}
job("sidecar", True, SIDECAR)
job("sidecar with a template", False, SIDECAR, submitterPodTemplate={"spec": {}})
job("sidecar with a config", False, SIDECAR, submitterConfig={"backoffLimit": 1})
job("sidecar, the head restarts", False, SIDECAR | {"spec rayClusterSpec headGroupSpec template spec restartPolicy": "Always"})
job("sidecar on a selected cluster", False, SIDECAR | SELECTED)
job("an empty selector", False, rayClusterSpec=None, clusterSelector={})
job("a selector of no name", False, rayClusterSpec=None, clusterSelector={"ray.io/cluster": ""})
job("a selector", True, SELECTED)
job("tries on a selected cluster", False, SELECTED, backoffLimit=1)
job("a head without a container", False, {"spec rayClusterSpec headGroupSpec": {}})
for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
    job(f"{field} of nothing", False, {f"spec {field}": 0})

# What is deleted when.


def legacy(success: str | None, failure: str | None) -> dict[str, Any]:
    both = {"onSuccess": success, "onFailure": failure}
    return {name: {"policy": value} if value else {} for name, value in both.items() if value is not None}


for policy in ("DeleteCluster", "DeleteWorkers"):
    job(f"{policy} of a selected cluster", False, OTHER, deletionStrategy=legacy(policy, policy))
job("workers that scale", False, AUTO, deletionStrategy=legacy("DeleteWorkers", "DeleteWorkers"))
job("the cluster", True, deletionStrategy=legacy("DeleteCluster", "DeleteCluster"), shutdownAfterJobFinishes=True)
job("no strategy", True, shutdownAfterJobFinishes=True)
job("nothing, but shut down", False, deletionStrategy=legacy("DeleteNone", "DeleteNone"), shutdownAfterJobFinishes=True)
for title, success, failure in (
    ("no success", None, "DeleteNone"),
    ("no failure", "DeleteNone", None),
    ("a success without a policy", "", "DeleteNone"),
    ("a failure without a policy", "DeleteNone", ""),
):
    job(title, False, deletionStrategy=legacy(success, failure))


def rules(*steps: tuple[str, int, str]) -> dict[str, Any]:
    """Of (policy, seconds, states like `jobStatus=FAILED`)."""
    found = [(policy, ttl, dict(state.split("=") for state in states.split())) for policy, ttl, states in steps]
    return {"deletionRules": [{"policy": policy, "condition": {"ttlSeconds": ttl} | states} for policy, ttl, states in found]}


GOOD, BAD, GONE = "jobStatus=SUCCEEDED", "jobStatus=FAILED", "jobDeploymentStatus=Failed"
W, C, S = "DeleteWorkers", "DeleteCluster", "DeleteSelf"
job("one rule", True, deletionStrategy=rules((S, 10, GOOD)))
job("a rule, and shut down", False, deletionStrategy=rules((S, 10, GOOD)), shutdownAfterJobFinishes=True)
job("a rule, and the old way", False, deletionStrategy=rules((S, 10, GOOD)) | {"onSuccess": {"policy": C}})
job("an empty strategy", False, deletionStrategy={})
job("no rules", False, deletionStrategy={"deletionRules": []})
job("a rule twice", False, deletionStrategy=rules((S, 10, GOOD), (S, 20, GOOD)))
job("a rule below zero", False, deletionStrategy=rules((S, -10, GOOD)))
job("workers of a selected cluster", False, OTHER, deletionStrategy=rules((W, 10, GOOD)))
job("a selected cluster", False, OTHER, deletionStrategy=rules((C, 10, GOOD)))
job("rules, workers that scale", False, AUTO, deletionStrategy=rules((W, 10, GOOD)))
job("the cluster before the workers", False, deletionStrategy=rules((W, 20, GOOD), (C, 10, GOOD)))
job("the job before the cluster", False, deletionStrategy=rules((C, 20, GOOD), (S, 10, GOOD)))
job("all in order", True, deletionStrategy=rules((W, 10, GOOD), (C, 20, GOOD), (S, 30, GOOD), (S, 0, BAD)))
job("by the deployment's state", True, deletionStrategy=rules((C, 10, GONE), (S, 20, GONE)))
job("both states", False, deletionStrategy=rules((C, 10, f"{BAD} {GONE}")))
job("no state", False, deletionStrategy=rules((C, 10, "")))
job("the deployment's state twice", False, deletionStrategy=rules((C, 10, GONE), (C, 20, GONE)))
job("states mixed", True, deletionStrategy=rules((W, 10, BAD), (C, 20, GONE)))
job("the cluster first, by the deployment's state", False, deletionStrategy=rules((W, 20, GONE), (C, 10, GONE)))

# Services.
case("service", "RayService", True, {})
case("the head service's name", "RayService", False, {"spec rayClusterConfig headGroupSpec headService metadata name": "door"})
case("an unknown upgrade", "RayService", False, {"spec upgradeStrategy type": "invalidStrategy"})
case("a service's head without a container", "RayService", False, {"spec rayClusterConfig": {}})
case("a delay below zero", "RayService", False, {"spec rayClusterDeletionDelaySeconds": -1})
STEPS = {"maxSurgePercent": 50, "stepSizePercent": 50, "intervalSeconds": 10, "gatewayClassName": "istio"}
for title, options, scaling in (
    ("", STEPS, True),
    ("without autoscaling", STEPS, False),
    ("without options", None, True),
    ("surge over 100", STEPS | {"maxSurgePercent": 200}, True),
    ("no step", STEPS | {"stepSizePercent": None}, True),
    ("step over surge", STEPS | {"stepSizePercent": 75}, True),
    ("no interval", STEPS | {"intervalSeconds": 0}, True),
    ("no gateway", STEPS | {"gatewayClassName": ""}, True),
):
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    changes = {"spec upgradeStrategy": strategy, "spec rayClusterConfig enableInTreeAutoscaling": scaling}
    case(f"upgrade in steps {title}", "RayService", not title, changes)
for kind, good in {"": True, "None": True, "Recreate": True, "Invalid": False}.items():
    case(f"cluster upgrade {kind}", "RayCluster", good, {"spec upgradeStrategy type": kind or None})
for maker in ("RayJob", "RayService"):
    made = {"spec upgradeStrategy type": "Recreate", "metadata labels ray.io/originated-from-crd": maker}
    case(f"cluster upgrade by a {maker}", "RayCluster", False, made)

# Cron.
CRON = "RayCronJob"
for title, good, changes in (
    ("valid", True, {}),
    ("no schedule", False, {"spec schedule": "invalid cron"}),
    ("an empty template", False, {"spec jobTemplate": {}}),
    ("no containers", False, {"spec jobTemplate rayClusterSpec headGroupSpec": {}}),
    ("a zone", True, {"spec schedule": "0 9 * * *", "spec timeZone": "Asia/Taipei"}),
    ("UTC", True, {"spec timeZone": "UTC"}),
    ("no zone", False, {"spec timeZone": "Invalid/Zone"}),
    ("TZ", False, {"spec schedule": "TZ=UTC */5 * * * *"}),
    ("CRON_TZ", False, {"spec schedule": "CRON_TZ=UTC */5 * * * *"}),
    ("a long name", False, {"metadata name": "a" * 37}),
):
    case(f"cron, {title}", CRON, good, changes, CRON)

# Network policies.
POLICY, NET = "spec networkPolicy", "RayClusterNetworkPolicy"
IN, OUT = {"ingressRules": [{}]}, {"egressRules": [{}]}
GROUP = {"spec workerGroupSpecs": [worker()]}
for mode, rule in (("DenyAllEgress", IN), ("DenyAllIngress", OUT)):
    for part in ("head", "worker"):
        case(f"{mode}, {part}", "RayCluster", False, {POLICY: {"mode": mode, part: rule}}, NET)
    case(f"{mode}, a group", "RayCluster", False, GROUP | {POLICY: {"mode": mode, "workerGroups": [{"groupName": "wg"} | rule]}}, NET)
case("both directions", "RayCluster", True, {POLICY: {"mode": "DenyAll", "head": IN | OUT, "worker": IN | OUT}}, NET)
case("an unknown group", "RayCluster", False, GROUP | {POLICY: {"workerGroups": [{"groupName": "ghost"}]}}, NET)
case("a known group", "RayCluster", True, GROUP | {POLICY: {"workerGroups": [{"groupName": "wg"} | IN]}}, NET)
case(
    "a group in capitals", "RayCluster", False, {POLICY: {"mode": "DenyAll"}, "spec workerGroupSpecs": [worker(groupName="GPU-Group")]}, NET
)
case("a mode alone", "RayCluster", True, {POLICY: {"mode": "DenyAll"}}, NET)
case("a policy without its gate", "RayCluster", False, GROUP | {POLICY: {"mode": "DenyAll"}})

# TLS.
MTLS, TLS = "RayClusterMTLS", {"spec tlsOptions": {"enabled": True}}
case("TLS", "RayCluster", True, TLS, MTLS)
case("TLS off", "RayCluster", True, {"spec tlsOptions": {"enabled": False}}, MTLS)
case("TLS without its gate", "RayCluster", False, TLS)
MOUNTS = {"name": [{"name": "ray-tls", "mountPath": "/some/path"}], "path": [{"name": "mine", "mountPath": "/etc/ray/tls"}]}
for name in ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
    case(f"TLS, {name} on the head", "RayCluster", False, TLS | {f"{BOX} env": env(**{name: "1"})}, MTLS)
    case(f"TLS, {name} on a worker", "RayCluster", False, TLS | {"spec workerGroupSpecs": [worker(box={"env": env(**{name: "1"})})]}, MTLS)
for title, mounts in MOUNTS.items():
    case(f"TLS, {title} on the head", "RayCluster", False, TLS | {f"{BOX} volumeMounts": mounts}, MTLS)
    case(f"TLS, {title} on a worker", "RayCluster", False, TLS | {"spec workerGroupSpecs": [worker(box={"volumeMounts": mounts})]}, MTLS)
    scaler = {"spec enableInTreeAutoscaling": True, "spec autoscalerOptions": {"volumeMounts": mounts}}
    case(f"TLS, {title} on the autoscaler", "RayCluster", False, TLS | scaler, MTLS)
case("TLS, another mount", "RayCluster", True, TLS | {f"{BOX} volumeMounts": [{"name": "mine", "mountPath": "/mine"}]}, MTLS)

# The history server.
HISTORY, SERVER = "spec historyServerOptions", "RayClusterHistoryServer"
GCS = {"STORAGE_BACKEND": "GCS", "GCS_BUCKET": "b"}
OSS = {"OSS_BUCKET": "b", "OSS_ENDPOINT": "e", "OSS_REGION": "r"}
AZURE = {"STORAGE_BACKEND": "AZUREBLOB"}
for good, values in (
    (True, GCS),
    (False, {"STORAGE_BACKEND": "GCS"}),
    (True, {"STORAGE_BACKEND": "S3", "S3_BUCKET": "b", "S3_ENDPOINT": "e", "S3_REGION": "r"}),
    (False, {"STORAGE_BACKEND": "S3", "S3_BUCKET": "b", "S3_ENDPOINT": "e"}),
    (True, AZURE | {"AZURE_STORAGE_AUTH_MODE": "connection_string", "AZURE_STORAGE_CONNECTION_STRING": "c"}),
    (True, AZURE | {"AZURE_STORAGE_AUTH_MODE": "workload_identity", "AZURE_STORAGE_ACCOUNT_URL": "https://x"}),
    (False, AZURE | {"AZURE_STORAGE_AUTH_MODE": "connection_string"}),
    (False, AZURE),
    (True, {"STORAGE_BACKEND": "ALIYUNOSS"} | OSS),
    (False, {"STORAGE_BACKEND": "ALIYUNOSS"} | {name: "x" for name in OSS if name != "OSS_REGION"}),
    (True, {"STORAGE_BACKEND": "CUSTOM_BACKEND"}),
    (False, {}),
    (False, GCS | {"POD_IP": "10.0.0.1"}),
    (False, GCS | {"EVENTS_PORT": "9000"}),
):
    case(
        f"history, {list(values.items())}",
        "RayCluster",
        good,
        {HISTORY: {"collectorOptions": {"image": "c:1", "env": env(**values)}}},
        SERVER,
    )
KEPT = {HISTORY: {"collectorOptions": {"image": "c:1", "env": env(**GCS)}}}
SECRET = {"name": "GCS_BUCKET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
case(
    "history, by a secret",
    "RayCluster",
    True,
    {HISTORY: {"collectorOptions": {"image": "c:1", "env": [*env(STORAGE_BACKEND="GCS"), SECRET]}}},
    SERVER,
)
case("history, no collector", "RayCluster", False, {HISTORY: {}}, SERVER)
case("history, no image", "RayCluster", False, {HISTORY: {"collectorOptions": {"env": env(**GCS)}}}, SERVER)
case("history without its gate", "RayCluster", False, KEPT)
case("history, the head's own", "RayCluster", False, KEPT | {f"{BOX} name": "ray-history-collector"}, SERVER)
case(
    "history, a worker's own",
    "RayCluster",
    False,
    KEPT | {"spec workerGroupSpecs": [worker(box={"name": "ray-history-collector"})]},
    SERVER,
)


@pytest.mark.parametrize(("title", "kind", "good", "changes", "gates"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_an_object_is_refused_and_accepted_as_by_the_operator(
    title: str, kind: str, good: bool, changes: dict[str, Any], gates: tuple[str, ...]
) -> None:
    found = refused(kind, changes, gates)
    assert bool(found) is not good, [str(flaw) for flaw in found] or f"{title}: accepted"
