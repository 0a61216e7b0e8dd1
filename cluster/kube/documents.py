"""Documents: YAML manifests as an API server gets them, each value with the line it was written on.

In: files, folders, folders to build with kustomize. Out: Documents, and flaws of what cannot be read. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.kube.flaws import Flaw, Level
from cluster.kube.scalars import Loader

MAX_PLACES = 200_000
"""Of one document. Aliases of aliases make billions; the API server, too, refuses them."""


@dataclass(frozen=True)
class Document:
    """One object of a manifest. `lines`: where each path was written, like `spec.replicas` -> 12."""

    file: str
    number: int
    """Which of the file's documents, from 1."""
    tree: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.tree.get("kind", ""))

    @property
    def api_version(self) -> str:
        return str(self.tree.get("apiVersion", ""))

    @property
    def metadata(self) -> dict[str, Any]:
        found = self.tree.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def name(self) -> str:
        return str(self.metadata.get("name") or self.metadata.get("generateName") or "")

    @property
    def namespace(self) -> str:
        return str(self.metadata.get("namespace") or "")

    @property
    def title(self) -> str:
        return f"{self.kind or 'no kind'}/{self.name}"

    def line(self, path: str) -> int:
        """Of the nearest place above that was written: what is missing has no line of its own."""
        while path and path not in self.lines:
            path = re.sub(r"(\.[^.\[\]]*|\[[^\]]*\]|^[^.\[\]]+)$", "", path)
        return self.lines.get(path, self.lines.get("", 0))

    def flaw(self, rule: str, path: str, *, got: object, wanted: str, remedy: str = "", level: Level = "error") -> Flaw:
        return Flaw(level, rule, self.file, self.line(path), self.title, path, str(got), wanted, remedy)


def parse(text: str, file: str) -> Iterator[Document | Flaw]:
    """The documents of one file; a Flaw for what is no object, has a key twice, or is no YAML (then nothing after it is read)."""
    loader = Loader(text)
    number = 0
    try:
        while loader.check_node():
            node, number = loader.get_node(), number + 1
            if node is None:
                break
            lines: dict[str, int] = {}
            twice = list(_walk(node, "", lines))
            tree = loader.construct_document(node)
            if tree is None:
                continue
            if not isinstance(tree, dict):
                yield Flaw(
                    "error", "yaml", file, node.start_mark.line + 1, "", "", type(tree).__name__, "an object with apiVersion and kind"
                )
                continue
            document = Document(file, number, tree, lines)
            for path, line in twice:
                yield Flaw("error", "yaml", file, line, document.title, path, "this key twice", "each key once", "keep one of them")
            yield document
    except RecursionError:
        yield Flaw("error", "yaml", file, 0, "", "", "a value that holds itself, or is nested too deep", "YAML")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = str(getattr(error, "problem", None) or error)
        yield Flaw("error", "yaml", file, mark.line + 1 if mark else 0, "", "", said, "YAML")
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: str, lines: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Notes the line of every value; yields the keys that stand twice in one mapping."""
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_PLACES:
        raise yaml.YAMLError(f"more than {MAX_PLACES} values in one document")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            inner = f"{path}.{name}" if path else name
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                yield inner, key.start_mark.line + 1
            seen.add(name)
            lines[inner] = key.start_mark.line + 1
            yield from _walk(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _walk(item, f"{path}[{number}]", lines)
