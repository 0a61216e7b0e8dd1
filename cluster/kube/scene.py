"""The scene: all documents that are linted together, seen as the operator sees them: clusters, their groups, jobs, services, pods.

In: Documents, feature gates. Out: views that rules walk over. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.kube.documents import Document
from cluster.kube.trees import Place, root, version

# KubeRay 1.7.0's feature gates and whether each is on (ray-operator/pkg/features).
GATES = {
    "RayClusterStatusConditions": True,
    "RayJobDeletionPolicy": True,
    "RayMultiHostIndexing": True,
    "RayServiceIncrementalUpgrade": True,
    "RayCronJob": False,
    "SidecarSubmitterRestart": False,
    "RayClusterNetworkPolicy": False,
    "GCSFaultToleranceEmbeddedStorage": False,
    "RayClusterMTLS": False,
    "RayClusterHistoryServer": False,
    "KubernetesWAS": False,
}
GENERATED = 5
"""Characters that the API server adds to a generateName."""
AUTOSCALER_V2_ENV = "RAY_enable_autoscaler_v2"


@dataclass(frozen=True)
class Group:
    """The head or one worker group."""

    place: Place
    is_head: bool

    @property
    def name(self) -> str:
        return "headgroup" if self.is_head else self.place["groupName"].text

    @property
    def title(self) -> str:
        return "the head" if self.is_head else f"worker group {self.name!r}"

    @property
    def params(self) -> Place:
        return self.place["rayStartParams"]

    @property
    def template(self) -> Place:
        return self.place["template"]

    @property
    def pod(self) -> Place:
        return self.template["spec"]

    @property
    def container(self) -> Place:
        """The one that runs Ray: always the first."""
        return self.pod["containers"][0]

    @property
    def most_replicas(self) -> int:
        """Pods of this group at once, as far as the manifest says."""
        if self.is_head:
            return 1
        bounds = [self.place[name].number for name in ("replicas", "minReplicas")]
        return max([number for number in bounds if number is not None], default=0) * (self.place["numOfHosts"].number or 1)


@dataclass(frozen=True)
class Cluster:
    """A RayClusterSpec, wherever it stands. `annotations`: of the object that the operator reads them from."""

    spec: Place
    annotations: Place
    kind: str

    @cached_property
    def head(self) -> Group:
        return Group(self.spec["headGroupSpec"], is_head=True)

    @cached_property
    def workers(self) -> list[Group]:
        return [Group(place, is_head=False) for place in self.spec["workerGroupSpecs"]]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    @property
    def ray_version(self) -> tuple[int, ...] | None:
        return version(self.spec["rayVersion"].text)

    @property
    def autoscaling(self) -> bool:
        return self.spec["enableInTreeAutoscaling"].on

    @property
    def autoscaler(self) -> str:
        """`v1`, `v2` or nothing, as the options say it."""
        return self.spec["autoscalerOptions"]["version"].text

    @property
    def autoscaler_v2(self) -> bool:
        """By the options, or by the older environment variable."""
        return self.autoscaler == "v2" or self.head.container["env"].named(AUTOSCALER_V2_ENV)["value"].text in {"1", "true"}

    @property
    def token_auth(self) -> bool:
        return self.spec.down("authOptions", "mode").text == "token"

    @property
    def overwrites_command(self) -> bool:
        """The operator leaves the containers' commands as they are."""
        return self.annotations["ray.io/overwrite-container-cmd"].text.lower() == "true"

    @property
    def name_length(self) -> int:
        """Of the RayCluster's name: RayJob and RayService add `-` and five characters to theirs, a RayCronJob eleven more."""
        generated = 0 if self.spec.document.metadata.get("name") else GENERATED
        return len(self.spec.document.name) + generated + {"RayJob": 6, "RayService": 6, "RayCronJob": 17}.get(self.kind, 0)


@dataclass(frozen=True)
class Job:
    """A RayJobSpec: of a RayJob, or a RayCronJob's template."""

    spec: Place
    annotations: Place

    @property
    def cluster(self) -> Cluster | None:
        inside = self.spec["rayClusterSpec"]
        return Cluster(inside, self.annotations, self.spec.document.kind) if inside.given else None

    @property
    def selects(self) -> bool:
        """Runs on a cluster that is there already."""
        return bool(self.spec["clusterSelector"].value)

    @property
    def mode(self) -> str:
        return self.spec["submissionMode"].text or "K8sJobMode"

    @property
    def autoscaling(self) -> bool:
        return self.cluster is not None and self.cluster.autoscaling


class Scene:
    """`gates`: names, or `Name=true` and `Name=false` as the operator's own flag takes them."""

    def __init__(self, documents: Sequence[Document], gates: Collection[str] = ()) -> None:
        self.documents, self.gates = documents, set(gates)

    def enabled(self, gate: str) -> bool:
        if f"{gate}=false" in self.gates:
            return False
        return GATES.get(gate, False) or bool({gate, f"{gate}=true"} & self.gates)

    def of(self, *kinds: str) -> Iterator[Place]:
        """The roots of all documents of these kinds."""
        return (root(document) for document in self.documents if document.kind in kinds)

    def ray(self, *kinds: str) -> Iterator[Place]:
        return (place for place in self.of(*kinds) if place.document.api_version.startswith("ray.io/"))

    @cached_property
    def services(self) -> list[Place]:
        return list(self.ray("RayService"))

    @cached_property
    def jobs(self) -> list[Job]:
        plain = [Job(place["spec"], place["metadata"]["annotations"]) for place in self.ray("RayJob")]
        # The operator checks a template as a job without metadata.
        return plain + [Job(place["spec"]["jobTemplate"], Place(place.document, "", None)) for place in self.ray("RayCronJob")]

    @cached_property
    def clusters(self) -> list[Cluster]:
        alone = [Cluster(place["spec"], place["metadata"]["annotations"], "RayCluster") for place in self.ray("RayCluster")]
        served = [Cluster(place["spec"]["rayClusterConfig"], place["metadata"]["annotations"], "RayService") for place in self.services]
        return alone + [job.cluster for job in self.jobs if job.cluster] + served

    @property
    def groups(self) -> Iterator[tuple[Cluster, Group]]:
        return ((cluster, group) for cluster in self.clusters for group in cluster.groups)
