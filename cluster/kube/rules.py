"""Rules: what KubeRay's operator and good practice say beyond the schemas.

In: the Documents of one set of manifests, the operator's feature gates. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw


def check(documents: Sequence[Document], gates: Collection[str]) -> Iterator[Flaw]:
    yield from ()
