"""Images: which Ray runs must be readable from the manifest, and the same on every node.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.pods import pods
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import version


def tag(image: str) -> str:
    """`2.60.0-gpu` of `registry:5000/ray:2.60.0-gpu`; empty where there is none."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[2]


def ray_version(image: str) -> tuple[int, ...] | None:
    """The version that a tag shows: behind `ray` if that word is there, else the one it begins with."""
    found = re.search(r"ray[-_.]?v?(\d+\.\d+\.\d+)", tag(image)) or re.match(r"v?(\d+\.\d+\.\d+)", tag(image))
    return version(found[1]) if found else None


@rule("image-tag", "an image without a tag of its own is another one tomorrow")
def image_tag(scene: Scene) -> Iterator[Flaw]:
    for pod in pods(scene):
        for container in pod.containers:
            where = container["image"]
            if where.text and "@" not in where.text and tag(where.text) in {"", "latest"}:
                yield where.warning("a tag that stays, or a digest", "write the version, like :2.60.0, or @sha256:…")


@rule("image-version", "head, workers and rayVersion must be one version: Ray refuses nodes of another, and the operator trusts rayVersion")
def image_version(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        head = ray_version(cluster.head.container["image"].text)
        wanted, source = cluster.ray_version or head, "rayVersion" if cluster.ray_version else "the head's image"
        for group in cluster.groups:
            where = group.container["image"]
            found = ray_version(where.text)
            if found and wanted and found[:3] != wanted[:3]:
                yield where.warning(
                    f"Ray {'.'.join(map(str, wanted))}, as {source} says",
                    "use one version everywhere; the tag of an image of your own can say it, like app:1.4.0-ray2.60.0",
                )
        if head and not cluster.spec["rayVersion"].given:
            yield cluster.spec["rayVersion"].warning(
                f"{'.'.join(map(str, head))}, as the head's image says", "write rayVersion: the operator chooses probes and checks by it"
            )
