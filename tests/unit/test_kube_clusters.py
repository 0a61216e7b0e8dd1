"""Verdicts on clusters: what KubeRay's own tests of its checks refuse is refused by a rule, and what they accept is accepted.

The cases are those of ray-operator/controllers/ray/utils/validation_test.go of v1.7.0, retold as changes of a smallest manifest. Not
retold: the two tables about an object's status, which no manifest carries, and bounds that are not written, which the API server fills in.
"""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube.documents import Document
from cluster.kube.rules import check
from tests.kube_cases import Case, base, env, refused, worker

CASES: list[Case] = []
BOX = "headGroupSpec template spec containers 0"
V2, V1, AUTO = {"version": "v2"}, {"version": "v1"}, {"enableInTreeAutoscaling": True}


def case(title: str, kind: str, good: bool, changes: dict[str, Any], *gates: str) -> None:
    CASES.append((title, kind, good, changes, gates))


def of_cluster(good: bool, changes: dict[str, Any], *gates: str, title: str = "") -> None:
    """`changes` from `spec` on."""
    case(title or ", ".join(changes), "RayCluster", good, {f"spec {path}": value for path, value in changes.items()}, *gates)


# Fault tolerance of the GCS.
STORE, FT = "GCSFaultToleranceEmbeddedStorage", "gcsFaultToleranceOptions"
ANNOTATED, SPACE = "metadata annotations ray.io/ft-enabled", "metadata annotations ray.io/external-storage-namespace"
REDIS = {"redisAddress": "redis:6379"}
for value in ("true", "false"):
    case(f"both, {value}", "RayCluster", False, {ANNOTATED: value, f"spec {FT}": {}})
of_cluster(True, {FT: REDIS})
case("no fault tolerance", "RayCluster", True, {})
ADDRESS = env(RAY_REDIS_ADDRESS="redis:6379")
case("address, annotation false", "RayCluster", False, {ANNOTATED: "false", f"spec {BOX} env": ADDRESS})
case("address, annotation true", "RayCluster", True, {ANNOTATED: "true", f"spec {BOX} env": ADDRESS})
of_cluster(False, {FT: {}, f"{BOX} env": ADDRESS})
of_cluster(False, {f"{BOX} env": ADDRESS})
case("namespace twice", "RayCluster", False, {SPACE: "ns", f"spec {FT}": REDIS})
of_cluster(True, {FT: {"backend": "redis"}})
of_cluster(False, {FT: {"backend": "redis", "storage": {"size": "1Gi"}}}, title="redis with storage")
ROCKS = {"backend": "rocksdb"}
of_cluster(True, {FT: ROCKS}, STORE, title="rocksdb")
of_cluster(False, {FT: ROCKS}, title="rocksdb without its gate")
of_cluster(True, {FT: ROCKS | {"storage": {"size": "2Gi"}}}, STORE, title="rocksdb with storage")
of_cluster(False, {FT: ROCKS | REDIS}, STORE, title="rocksdb with an address")
of_cluster(False, {FT: ROCKS | {"externalStorageNamespace": "ns"}}, STORE, title="rocksdb with a namespace")
of_cluster(False, {FT: ROCKS | {"storage": {"claimName": "c", "size": "1Gi"}}}, STORE, title="a claim and a size")
of_cluster(False, {FT: ROCKS, f"{BOX} env": env(RAY_gcs_storage="rocksdb")}, STORE)
of_cluster(False, {FT: ROCKS, f"{BOX} volumeMounts": [{"name": "mine", "mountPath": "/data/gcs"}]}, STORE, title="the store's path")
of_cluster(False, {FT: ROCKS, f"{BOX} volumeMounts": [{"name": "gcs-storage", "mountPath": "/else"}]}, STORE, title="the store's mount")
of_cluster(False, {FT: ROCKS, "headGroupSpec template spec volumes": [{"name": "gcs-storage"}]}, STORE, title="the store's volume")
of_cluster(False, {FT: {}, "headGroupSpec rayStartParams redis-password": "p"})
of_cluster(False, {FT: {}, f"{BOX} env": env(REDIS_PASSWORD="p")})
of_cluster(True, {FT: REDIS | {"redisPassword": {"value": "p"}}}, title="a password in its field")
of_cluster(False, {"headGroupSpec rayStartParams redis-username": "u"})
of_cluster(False, {f"{BOX} env": env(REDIS_USERNAME="u")}, title="a user in the environment")
of_cluster(True, {FT: REDIS | {"redisUsername": {"value": "u"}}}, title="a user in its field")

# Names.
for kind, longest in {"RayCluster": 53, "RayJob": 47, "RayService": 47}.items():
    case(f"{kind} too long", kind, False, {"metadata name": "a" * (longest + 1)})
    case(f"{kind} as long as can be", kind, True, {"metadata name": "a" * longest})
    case(f"{kind} of digits", kind, False, {"metadata name": "1" * longest})
for value, good in {"5m": True, "300": True, "0": False, "-100": False, "-5m": False, "invalid": False}.items():
    case(f"initializing {value}", "RayService", good, {"metadata name": "valid", "metadata annotations ray.io/initializing-timeout": value})

# Groups.
of_cluster(False, {"headGroupSpec template spec containers": []})
of_cluster(False, {"workerGroupSpecs": [worker(template={"spec": {"containers": []}})]}, title="a worker without a container")
of_cluster(True, {"workerGroupSpecs": [worker()]}, title="head and worker with a container")
OFF = "RayJobDeletionPolicy=false"
of_cluster(False, {"workerGroupSpecs": [worker(suspend=True)]}, OFF, title="suspended without the gate")
of_cluster(True, {"workerGroupSpecs": [worker(suspend=True)]}, title="suspended")
of_cluster(False, AUTO | {"workerGroupSpecs": [worker(suspend=True)]}, title="suspended with autoscaling")
of_cluster(False, {"headGroupSpec rayStartParams num-cpus": "2", "headGroupSpec resources": {"CPU": "2"}})
of_cluster(
    False, {"workerGroupSpecs": [worker(rayStartParams={"num-gpus": "1"}, resources={"GPU": "1"})]}, title="a worker's resources twice"
)
of_cluster(True, {"headGroupSpec rayStartParams num-cpus": "2"})
of_cluster(True, {"workerGroupSpecs": [worker(resources={"CPU": "4"})]}, title="a worker's resources once")
of_cluster(False, {"headGroupSpec rayStartParams labels": "a=b"})
of_cluster(False, {"workerGroupSpecs": [worker(rayStartParams={"labels": "a=b"})]}, title="a worker's labels among parameters")
of_cluster(True, {"headGroupSpec labels": {"ray.io/zone": "a-1"}})
of_cluster(False, {"headGroupSpec labels": {"bad key!": "v"}}, title="a bad label key")
of_cluster(False, {"headGroupSpec labels": {"zone": "bad value!"}}, title="a bad label value")
of_cluster(False, {"workerGroupSpecs": [worker(minReplicas=5, maxReplicas=1)]}, title="bounds crossed")
of_cluster(True, {"workerGroupSpecs": [worker(replicas=0, minReplicas=1)]}, title="replicas below the bound")
of_cluster(False, {"workerGroupSpecs": [worker(minReplicas=-1)]}, title="fewest below zero")
of_cluster(False, {"workerGroupSpecs": [worker(maxReplicas=-1)]}, title="most below zero")
of_cluster(True, AUTO | {"workerGroupSpecs": [worker(minReplicas=None, maxReplicas=None)]}, title="autoscaling needs no bounds")

# Autoscaler.
for value in ("1", "true"):
    of_cluster(
        False, {"enableInTreeAutoscaling": False, f"{BOX} env": env(RAY_enable_autoscaler_v2=value)}, title=f"v2 by {value}, but off"
    )
of_cluster(False, AUTO | {"autoscalerOptions": V2, f"{BOX} env": env(RAY_enable_autoscaler_v2="true")}, title="v2 said twice")
RESTART = "headGroupSpec template spec restartPolicy"
of_cluster(False, AUTO | {"autoscalerOptions": V2, RESTART: "Always"}, title="v2, the head restarts")
of_cluster(False, AUTO | {"autoscalerOptions": V2, "workerGroupSpecs": [worker(restart="Always")]}, title="v2, a worker restarts")
of_cluster(True, AUTO | {"autoscalerOptions": V2, "workerGroupSpecs": [worker(restart="Never")]}, title="v2, nothing restarts")
of_cluster(True, AUTO | {"autoscalerOptions": V1, "workerGroupSpecs": [worker(restart="Always")]}, title="v1, a worker restarts: a warning")
of_cluster(True, AUTO | {"autoscalerOptions": V1, "workerGroupSpecs": [worker(restart="Never")]}, title="v1, nothing restarts")
START = env(KUBERAY_GEN_AUTOSCALER_START_CMD="ray")
of_cluster(False, AUTO | {"autoscalerOptions": {"args": ["mine"], "env": START}}, title="the start command, with args")
of_cluster(False, AUTO | {"autoscalerOptions": {"env": START}}, title="the start command, without args")
BY_ENV = {f"{BOX} env": env(RAY_enable_autoscaler_v2="1")}
BY_WRONG_ENV = {f"{BOX} env": env(RAY_enable_autoscaler_v2="false")}
for field, more in {"idleTimeoutSeconds": {}, "priority": {"rayVersion": "2.56.0"}}.items():
    group = {"workerGroupSpecs": [worker(**{field: 60})]} | more
    of_cluster(True, AUTO | {"autoscalerOptions": V2} | group, title=f"{field}, v2")
    of_cluster(True, AUTO | BY_ENV | group, title=f"{field}, v2 by variable")
    of_cluster(False, AUTO | group, title=f"{field}, no v2")
    of_cluster(False, AUTO | BY_WRONG_ENV | group, title=f"{field}, v2 by variable off")
    of_cluster(True, AUTO | {"workerGroupSpecs": [worker()]} | more, title=f"no {field}")
of_cluster(True, AUTO | {"autoscalerOptions": V2, "workerGroupSpecs": [worker(idleTimeoutSeconds=0)]}, title="idle 0")
of_cluster(False, AUTO | {"autoscalerOptions": V2, "workerGroupSpecs": [worker(idleTimeoutSeconds=-10)]}, title="idle below 0")
for options in (V2, V1, {}):
    of_cluster(True, AUTO | {"autoscalerOptions": options | {"idleTimeoutSeconds": 120}}, title=f"all idle, {options}")
of_cluster(True, AUTO | {"autoscalerOptions": {"idleTimeoutSeconds": 0}}, title="all idle 0")
of_cluster(False, AUTO | {"autoscalerOptions": {"idleTimeoutSeconds": -10}}, title="all idle below 0")
of_cluster(True, AUTO | {"autoscalerOptions": V1}, title="v1 alone")
of_cluster(True, AUTO, title="no options")
of_cluster(True, AUTO | {"rayVersion": "2.56.0", "workerGroupSpecs": [worker(priority=0)]}, title="priority 0 without v2")
for value in ("", "invalid", "2.55.0"):
    group = {"rayVersion": value, "autoscalerOptions": V2, "workerGroupSpecs": [worker(priority=1)]}
    of_cluster(False, AUTO | group, title=f"priority with Ray {value!r}")

# Authentication.
TOKEN, KUBE = {"mode": "token"}, {"mode": "token", "enableK8sTokenAuth": True}
for ray, options, good in (
    ("2.52.0", TOKEN, True),
    ("2.52.0", KUBE, False),
    ("2.55.0", KUBE, True),
    ("3.0.0", TOKEN, True),
    ("3.0.0", KUBE, True),
    ("2.50.0", TOKEN, False),
    ("invalid", TOKEN, False),
    ("", TOKEN, False),
    ("2.55.0", KUBE | {"secretName": "s"}, False),
    ("2.55.0", TOKEN | {"enableK8sTokenAuth": False, "secretName": "s"}, True),
    ("2.55.0", {"enableK8sTokenAuth": True}, False),
):
    of_cluster(good, {"rayVersion": ray, "authOptions": options}, title=f"Ray {ray!r}, {options}")
for kind, inside in {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.items():
    case(f"{kind}: Kubernetes' token", kind, False, {f"spec {inside} rayVersion": "2.55.0", f"spec {inside} authOptions": KUBE})


@pytest.mark.parametrize(("title", "kind", "good", "changes", "gates"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_a_cluster_is_refused_and_accepted_as_by_the_operator(
    title: str, kind: str, good: bool, changes: dict[str, Any], gates: tuple[str, ...]
) -> None:
    found = refused(kind, changes, gates)
    assert bool(found) is not good, [str(flaw) for flaw in found] or f"{title}: accepted"


def test_bounds_that_are_not_written_are_a_warning() -> None:
    # The operator's test refuses them; the API server writes 0 and 2147483647 in before the operator looks.
    tree = base("RayCluster")
    tree["spec"]["workerGroupSpecs"] = [worker(minReplicas=None)]
    assert [flaw.level for flaw in check([Document("x.yaml", 1, tree)]) if flaw.rule == "replica-bounds"] == ["warning"]
