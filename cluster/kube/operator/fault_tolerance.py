"""Fault tolerance of the GCS: one way to ask for it, and none of the fields that the operator fills in itself.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Cluster, Scene
from cluster.kube.trees import Place

FT_ENABLED, FT_NAMESPACE = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
FT_DELETION = "ray.io/gcs-ft-deletion-timeout"
USER_SINCE = (2, 41, 0)
STORE_ENV = ("RAY_gcs_storage", "RAY_gcs_storage_path")
STORE_VOLUME, STORE_PATH = "gcs-storage", "/data/gcs"


def _options(cluster: Cluster) -> Place:
    return cluster.spec["gcsFaultToleranceOptions"]


@rule("ft-annotation", "fault tolerance is asked for by gcsFaultToleranceOptions; the older annotations may not stand beside it")
def ft_annotation(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        if not _options(cluster).given:
            continue
        where = cluster.annotations[FT_ENABLED]
        if where.text:
            yield where.flaw("gcsFaultToleranceOptions alone", "delete the annotation")
        where = cluster.annotations[FT_NAMESPACE]
        if where.text:
            yield where.flaw(
                "gcsFaultToleranceOptions.externalStorageNamespace instead", "move the namespace there and delete the annotation"
            )


@rule("ft-deletion-timeout", "a timeout that cannot be read is silently the default, five minutes")
def ft_deletion_timeout(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.annotations[FT_DELETION]
        if where.given and not (where.text.isdigit() and int(where.text)):
            yield where.warning("whole seconds, 1 or more", "write the seconds in quotes")


@rule("ft-redis-address", "the operator hands Redis' address to the head itself")
def ft_redis_address(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        where = cluster.head.container["env"].named("RAY_REDIS_ADDRESS")
        annotated = cluster.annotations[FT_ENABLED].text.lower() == "true"
        if where.given and (_options(cluster).given or not annotated):
            yield where.flaw(
                "gcsFaultToleranceOptions.redisAddress instead", "move the address there and delete the variable", got="RAY_REDIS_ADDRESS"
            )


@rule("ft-redis-login", "Redis' user and password stand in gcsFaultToleranceOptions, from a Secret")
def ft_redis_login(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        env, params, user = cluster.head.container["env"], cluster.head.params, _options(cluster)["redisUsername"]
        if user.given and cluster.ray_version is not None and cluster.ray_version < USER_SINCE:
            yield user.warning("Ray 2.41.0 or later for a user of Redis", "raise rayVersion and the images, or delete redisUsername")
        # The user is refused everywhere else; the password only beside the options.
        fields = {"redisUsername": ("redis-username", "REDIS_USERNAME")}
        if _options(cluster).given:
            fields["redisPassword"] = ("redis-password", "REDIS_PASSWORD")
        for field, (param, name) in fields.items():
            wanted, remedy = f"gcsFaultToleranceOptions.{field} instead", "move it there, with valueFrom.secretKeyRef"
            if params[param].text:
                yield params[param].flaw(wanted, remedy, got=param)
            if env.named(name).given:
                yield env.named(name).flaw(wanted, remedy, got=name)


@rule("ft-rocksdb", "the store on a volume has its own fields and needs the feature gate GCSFaultToleranceEmbeddedStorage")
def ft_rocksdb(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        options = _options(cluster)
        if options["backend"].text != "rocksdb":
            continue
        if not scene.enabled("GCSFaultToleranceEmbeddedStorage"):
            yield options["backend"].flaw(
                "the feature gate GCSFaultToleranceEmbeddedStorage", "turn the gate on in the operator, or use backend redis"
            )
        for name in REDIS_FIELDS:
            if options[name].value not in (None, ""):
                yield options[name].flaw("no field of Redis with backend rocksdb", f"delete {name}")
        storage = options["storage"]
        if storage["claimName"].text:
            for name in ("size", "storageClassName", "accessModes"):
                if storage[name].value not in (None, []):
                    yield storage[name].flaw("claimName alone, or the fields of a new claim", f"delete {name}, or claimName")
        yield from _reserved(cluster)


def _reserved(cluster: Cluster) -> Iterator[Flaw]:
    """What the operator adds to the head itself and may not be there before."""
    remedy = "delete it: the operator mounts the store itself"
    for name in STORE_ENV:
        where = cluster.head.container["env"].named(name)
        if where.given:
            yield where.flaw("a variable that is not the operator's own", remedy, got=name)
    for mount in cluster.head.container["volumeMounts"]:
        if mount["mountPath"].text == STORE_PATH or mount["name"].text == STORE_VOLUME:
            yield mount.flaw(f"no mount called {STORE_VOLUME} or at {STORE_PATH}", remedy)
    for volume in cluster.head.pod["volumes"]:
        if volume["name"].text == STORE_VOLUME:
            yield volume.flaw(f"no volume called {STORE_VOLUME}", remedy)


@rule("ft-storage", "storage belongs to the backend rocksdb; Redis keeps nothing there")
def ft_storage(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        options = _options(cluster)
        if options["storage"].given and options["backend"].text != "rocksdb":
            yield options["storage"].flaw("no storage with backend redis", "delete storage, or set backend: rocksdb")
