"""Security: token authentication, network policy and TLS of a RayCluster, as the operator checks them.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

TOKEN_SINCE, KUBERNETES_TOKEN_SINCE = (2, 52, 0), (2, 55, 0)
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
TLS_VOLUME, TLS_PATH = "ray-tls", "/etc/ray/tls"
# Mode -> the rules that it does not read, because it leaves that direction open.
UNREAD = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}


@rule("auth-version", "Ray knows tokens since 2.52.0; an older one would run open")
def auth_version(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        ray = cluster.ray_version
        if cluster.token_auth and (ray is None or ray < TOKEN_SINCE):
            yield cluster.spec["rayVersion"].flaw(
                "2.52.0 or later, for authOptions.mode token", "write the version of Ray in the images; 2.52.0 is the first"
            )


@rule("auth-kubernetes", "Kubernetes' own tokens: mode token, Ray 2.55.0, no secret, and only in a plain RayCluster")
def auth_kubernetes(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        options = cluster.spec["authOptions"]
        where = options["enableK8sTokenAuth"]
        if not where.on:
            continue
        if cluster.kind != "RayCluster":
            yield where.flaw(
                f"a Ray token from a secret: a {cluster.kind} cannot use Kubernetes' tokens", "delete enableK8sTokenAuth, set secretName"
            )
        if not cluster.token_auth:
            yield where.flaw("authOptions.mode: token beside it", "set mode: token")
        elif cluster.ray_version is not None and cluster.ray_version < KUBERNETES_TOKEN_SINCE:
            yield cluster.spec["rayVersion"].flaw("2.55.0 or later, for enableK8sTokenAuth", "raise rayVersion and the images")
        if cluster.token_auth and options["secretName"].text:
            yield options["secretName"].flaw("no secretName beside enableK8sTokenAuth", "delete one of the two")


@rule("network-policy", "rules for a direction that the mode leaves open are refused, as are groups that do not exist")
def network_policy(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        policy = cluster.spec["networkPolicy"]
        if not policy.given:
            continue
        if not scene.enabled("RayClusterNetworkPolicy"):
            yield policy.flaw(
                "the feature gate RayClusterNetworkPolicy", "turn the gate on in the operator, or write NetworkPolicy objects"
            )
        mode, names = policy["mode"].text or "DenyAll", {group.name for group in cluster.workers}
        for part in (policy["head"], policy["worker"], *policy["workerGroups"]):
            unread = part[UNREAD.get(mode, "")]
            if unread.value:
                yield unread.flaw(f"none with mode {mode}, which leaves that direction open", "delete them, or set mode: DenyAll")
        for part in policy["workerGroups"]:
            if part["groupName"].text not in names:
                yield part["groupName"].flaw(f"one of the worker groups {sorted(names)}", "write the name of a group that exists")


@rule("tls", "with tlsOptions the operator brings certificates and variables itself")
def tls(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        options = cluster.spec["tlsOptions"]
        if options.given and not scene.enabled("RayClusterMTLS"):
            yield options.flaw("the feature gate RayClusterMTLS", "turn the gate on in the operator, and install cert-manager")
        if not options["enabled"].on:
            continue
        scaler = cluster.spec["autoscalerOptions"]
        for holder in (*(group.container for group in cluster.groups), scaler):
            yield from _tls_twice(holder)


def _tls_twice(holder: Place) -> Iterator[Flaw]:
    for name in TLS_ENV:
        where = holder["env"].named(name)
        if where.given:
            yield where.flaw("a variable that is not the operator's own", "delete it: tlsOptions sets it", got=name)
    for mount in holder["volumeMounts"]:
        if mount["name"].text == TLS_VOLUME or mount["mountPath"].text.rstrip("/") == TLS_PATH:
            yield mount.flaw(f"no mount called {TLS_VOLUME} or at {TLS_PATH}", "delete it: tlsOptions mounts the certificates")
