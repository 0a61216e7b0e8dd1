"""Names in practice: ports by which the operator finds Ray's doors, and generated names that are cut.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import root

# The names and defaults by which the operator makes services and probes (controllers/ray/utils/constant.go).
HEAD_PORTS = {6379: "gcs-server", 8265: "dashboard", 10001: "client", 8080: "metrics", 8000: "serve"}
WORKER_PORTS = {8080: "metrics", 8000: "serve"}
POD_PREFIX = 50
"""Characters of cluster and group that fit into a pod's name."""


@rule("port-names", "the operator looks for ports by name; one of another name is not in the services it makes")
def port_names(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for port in group.container["ports"]:
            number, name = port["containerPort"].number, port["name"].text
            expected = (HEAD_PORTS if group.is_head else WORKER_PORTS).get(number or 0)
            if expected and name != expected and name not in HEAD_PORTS.values():
                where = port["name"]
                yield where.warning(f"{expected}, for port {number}", f"call it {expected}")


@rule("generated-names", "pods are called by cluster and group; what is cut off is the part that tells groups apart")
def generated_names(scene: Scene) -> Iterator[Flaw]:
    for cluster, group in scene.groups:
        if group.is_head:
            # `<cluster>-head-xxxxx`, and the secret and the service account are called by the last 50 characters.
            if cluster.name_length > POD_PREFIX:
                yield (
                    root(cluster.spec.document)
                    .down("metadata", "name")
                    .warning(
                        f"at most {POD_PREFIX}, so that the names of pods, secret and account are not cut",
                        "shorten the name",
                        got=f"{cluster.name_length} characters for the cluster",
                    )
                )
        elif cluster.name_length + 1 + len(group.name) > POD_PREFIX:
            yield group.place["groupName"].warning(
                f"cluster and group in {POD_PREFIX} characters together",
                "shorten the group's name, or the object's",
                got=f"{cluster.name_length} and {len(group.name)} characters",
            )
