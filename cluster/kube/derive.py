"""Derive: CRDs to the compact form that ships: fields, types, bounds, rules; no descriptive text, and every equal sub-schema once.

    python -m cluster.kube.derive ../shared/kuberay            (writes cluster/kube/kuberay.json)

In: a folder with the CRDs of one KubeRay release and its SOURCE.txt. Out: one JSON file, the same bytes for the same sources.
Runs in: a developer's terminal, when KubeRay's version moves; imports no ray.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.kube.crds import SHIPPED, Crd, Schema, read_folder
from ftcore.errors import ConfigError

# Only text for people, or for clients that print tables.
TEXT = ("description", "title", "example", "externalDocs")
WANTED_VERSION = "v1"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise ConfigError("one folder is wanted", got=arguments, wanted="python -m cluster.kube.derive CRD_DIR")
    text = compact(Path(arguments[0]))
    SHIPPED.write_text(text, encoding="utf-8")
    print(f"{SHIPPED}: {len(text) / 1024:.0f} KiB, {text.count(chr(10))} lines")
    return 0


def compact(folder: Path) -> str:
    """The file's text. Versions other than v1 are left out: the operator reconciles none of them."""
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.yaml"))}
    nodes = Nodes()
    kinds = [_kind(crd, nodes) for crd in read_folder(folder) if crd.version == WANTED_VERSION]
    head = {"kuberay": _release(folder), "sources": sources}
    lines = [
        *(f'"{key}": {_json(value)},' for key, value in head.items()),
        f'"kinds": [\n{_rows(kinds)}\n],',
        f'"nodes": [\n{_rows(nodes.all)}\n]',
    ]
    return "{\n" + "\n".join(lines) + "\n}\n"


def _release(folder: Path) -> str:
    note = folder / "SOURCE.txt"
    found = re.search(r"\bv(\d+\.\d+\.\d+)\b", note.read_text(encoding="utf-8") if note.is_file() else "")
    if not found:
        raise ConfigError("the CRDs do not say of which KubeRay they are", where=note, wanted="a line with its tag, like v1.7.0")
    return found[1]


def _kind(crd: Crd, nodes: Nodes) -> dict[str, Any]:
    names = {"group": crd.group, "version": crd.version, "kind": crd.kind, "has_status": crd.has_status}
    return {**names, "schema": nodes.number(crd.schema)}


class Nodes:
    """Every distinct sub-schema once; a schema names its children by their numbers, which are lower than its own."""

    def __init__(self) -> None:
        self.all: list[Schema] = []
        self._numbers: dict[str, int] = {}

    def number(self, schema: Mapping[str, Any]) -> int:
        node = {key: value for key, value in schema.items() if key not in TEXT}
        if "properties" in node:
            node["properties"] = {name: self.number(child) for name, child in sorted(node["properties"].items())}
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                node[key] = self.number(node[key])
        written = _json(node)
        if written not in self._numbers:
            self._numbers[written] = len(self.all)
            self.all.append(node)
        return self._numbers[written]


def _rows(items: list[Any]) -> str:
    return ",\n".join(_json(item) for item in items)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


if __name__ == "__main__":
    sys.exit(main())
