"""Reading: what a person names, as sets of documents: a file, a folder of manifests, a kustomization; what is left out is told.

In: a path. Out: one Manifests for each set that is applied together. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.kube.building import NAMES, build, is_component, kustomization
from cluster.kube.documents import Document, parse
from cluster.kube.flaws import Flaw
from ftcore.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Manifests:
    """What is applied together: no object may stand in it twice."""

    name: str
    documents: tuple[Document, ...]
    flaws: tuple[Flaw, ...] = ()
    """Of what could not be read."""
    notes: tuple[str, ...] = ()
    place: Callable[[Flaw], Flaw] = lambda flaw: flaw
    """From a line of what was built to the line it comes from."""


def read(path: Path) -> list[Manifests]:
    """A folder with a kustomization is built; without, its files are read at any depth, and kustomizations beneath built each by itself.

    Raises ConfigError where there is nothing to check.
    """
    if path.is_file():
        found = [_of_files(str(path), [path], is_named=True)]
    elif not path.is_dir():
        raise ConfigError("nothing to lint", where=path, got="no such file or folder")
    elif kustomization(path):
        found = [_built(path)]
    else:
        files, folders, left = _split(path)
        found = [_of_files(str(path), files), *(_built(folder) for folder in folders), Manifests(str(path), (), (), tuple(left))]
    if not any(each.documents or each.flaws for each in found):
        notes = "; ".join(note for each in found for note in each.notes)
        wanted = "at least one manifest in *.yaml, *.yml or *.json"
        raise ConfigError("nothing to lint", where=path, got=notes or "no manifest", wanted=wanted)
    return [each for each in found if each.documents or each.flaws or each.notes]


def _split(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Files of manifests, folders to build, and what is left out. Folders that begin with a dot are not looked into."""
    files: list[Path] = []
    folders: list[Path] = []
    left: list[str] = []
    for place, inner, names in os.walk(folder):
        here = Path(place)
        file = kustomization(here)
        if file:
            if is_component(file):
                left.append(f"left out: {file} (a Component is built by those who use it)")
            else:
                folders.append(here)
            inner.clear()
            continue
        if (here / "Chart.yaml").is_file():
            left.append(f"left out: {here} (a Helm chart: lint what `helm template` writes)")
            inner.clear()
            continue
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        files += sorted(here / name for name in names if name.endswith(SUFFIXES) and name not in NAMES)
    return files, folders, left


def _built(folder: Path) -> Manifests:
    built = build(folder)
    documents, flaws = _sorted_out(built.documents)
    return Manifests(str(folder), documents, flaws, tuple(f"{folder}: {line}" for line in built.said), built.place)


def _of_files(name: str, files: list[Path], *, is_named: bool = False) -> Manifests:
    documents: list[Document] = []
    flaws: list[Flaw] = []
    notes: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            flaws.append(Flaw("error", "yaml", str(file), 0, "", "", str(error), "a file of UTF-8 text"))
            continue
        found, wrong = _sorted_out(tuple(parse(text, str(file))))
        if wrong and "{{" in text:
            notes.append(f"left out: {file} (a template: lint what it becomes)")
        elif not is_named and not any({"apiVersion", "kind"} & set(document.tree) for document in found) and not (wrong and not found):
            notes.append(f"left out: {file} (no manifest: neither apiVersion nor kind)")
        else:
            documents += found
            flaws += wrong
    return Manifests(name, tuple(documents), tuple(flaws), tuple(notes))


def _sorted_out(read: tuple[Document | Flaw, ...]) -> tuple[tuple[Document, ...], tuple[Flaw, ...]]:
    documents = [inner for found in read if isinstance(found, Document) for inner in _opened(found)]
    return tuple(documents), tuple(found for found in read if isinstance(found, Flaw))


def _opened(document: Document) -> Iterator[Document]:
    """A List as its items: kubectl applies each by itself."""
    items = document.tree.get("items")
    if document.api_version != "v1" or document.kind != "List" or not isinstance(items, list):
        yield document
        return
    for number, item in enumerate(items):
        if isinstance(item, dict):
            place = f"items[{number}]"
            inside = {path[len(place) :].removeprefix("."): line for path, line in document.lines.items() if _is_in(path, place)}
            yield from _opened(Document(document.file, document.number, item, inside))


def _is_in(path: str, place: str) -> bool:
    return path == place or path.startswith(place + ".")
