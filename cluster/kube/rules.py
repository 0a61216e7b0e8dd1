"""Rules: what KubeRay's operator holds against a manifest that no schema says, and what practice advises.

In: Documents, the feature gates that are on beside the default. Out: Flaws, and the table of rules. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from cluster.kube import operator, practice, rulebook
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw
from cluster.kube.scene import Scene

for _package in (operator, practice):
    for _file in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_file.name}")

RULES: dict[str, str] = {name: found.reason for name, found in rulebook.TABLE.items()}


def check(documents: Sequence[Document], gates: Collection[str] = ()) -> Iterator[Flaw]:
    """All flaws of documents that are linted together; none of the rules raises on a tree that the schemas refuse."""
    scene = Scene(documents, gates)
    for name, found in rulebook.TABLE.items():
        for flaw in found.look(scene):
            yield replace(flaw, rule=name)
