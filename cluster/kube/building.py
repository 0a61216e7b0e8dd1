"""Building: a folder with a kustomization, built as `kubectl apply -k` would, offline; and where in its sources a flaw of the result lies.

In: a folder, kustomize or kubectl on PATH. Out: the built Documents, and for each flaw the source file and line where they can be told.
Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.kube.documents import Document, parse
from cluster.kube.flaws import Flaw
from cluster.kube.schema import under
from ftcore.errors import ClusterError, ConfigError

NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
REMOTE = re.compile(r"://|^git@|^[\w-]+(\.[\w-]+)*\.(com|org|io|net|dev)[/:]|\?(ref|version)=|\.git(//|\?|$)")
TIMEOUT_S = 120
# Keys of a kustomization that name files or folders, as text or under `path`.
SOURCES = ("resources", "bases", "components", "patches", "patchesStrategicMerge", "crds", "configurations")


@dataclass(frozen=True)
class Built:
    documents: tuple[Document | Flaw, ...]
    said: tuple[str, ...]
    """What the builder warned of."""
    sources: tuple[Document, ...]

    def place(self, flaw: Flaw) -> Flaw:
        """The flaw with the file and line it comes from; as it is where several sources could be meant.

        Of several documents of this kind and name (a base and its patch) it is the one that wrote this very value.
        """
        same = [source for source in self.sources if source.title == flaw.document]
        built = next((document for document in self.documents if isinstance(document, Document) and document.title == flaw.document), None)
        value = dict(_flat(built.tree, "")).get(flaw.path) if built else None
        wrote = [source for source in same if flaw.path in source.lines and dict(_flat(source.tree, "")).get(flaw.path) == value]
        meant = wrote if len(wrote) == 1 else same
        return replace(flaw, file=meant[0].file, line=meant[0].line(flaw.path)) if len(meant) == 1 else flaw


def kustomization(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def is_component(file: Path) -> bool:
    """A part of other kustomizations, which cannot be built by itself."""
    return any(
        document.kind == "Component" for document in parse(file.read_text(encoding="utf-8"), str(file)) if isinstance(document, Document)
    )


def build(folder: Path) -> Built:
    """Raises ConfigError for what is remote or cannot be built, ClusterError where nothing can build."""
    files = dict.fromkeys(_files(folder, set()))
    command = _builder(folder)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            "the kustomization was not built in time", where=folder, got=f"{TIMEOUT_S} s", remedy=" ".join(command)
        ) from error
    if done.returncode:
        got = done.stderr.strip()[-800:]
        raise ConfigError("the kustomization cannot be built", where=folder, got=got, remedy=f"until it builds: {' '.join(command)}")
    documents = tuple(parse(done.stdout, f"{folder} (built)"))
    sources = [document for file in files for document in _documents(file)]
    return Built(documents, tuple(line for line in done.stderr.splitlines() if line.strip()), tuple(sources))


def _builder(folder: Path) -> Sequence[str]:
    for program, words in (("kustomize", ("build",)), ("kubectl", ("kustomize",))):
        found = shutil.which(program)
        if found:
            return (found, *words, str(folder))
    raise ClusterError(
        "a folder with a kustomization has to be built first",
        where=folder,
        got="neither kustomize nor kubectl on PATH",
        remedy=f"install one of them, or build it elsewhere and lint what comes out: kustomize build {folder} > built.yaml",
    )


def _documents(file: Path) -> Iterator[Document]:
    if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
        yield from (found for found in parse(file.read_text(encoding="utf-8"), str(file)) if isinstance(found, Document))


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The local files that a kustomization is made of, through the folders it names."""
    file = kustomization(folder)
    if file is None or folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for document in _documents(file) if file.suffix else parse(file.read_text(encoding="utf-8"), str(file)):
        if isinstance(document, Document):
            for path, name in _named(document):
                if REMOTE.search(name) and not (folder / name).exists():
                    raise ConfigError(
                        "a kustomization asks for something remote; the linter works offline",
                        where=f"{file}:{document.line(path)} {path}",
                        got=name,
                        wanted="a file or folder beside it",
                        remedy="download it into the repository, at a fixed version, and name the file here",
                    )
                inner = Path(os.path.normpath(folder / name))
                if inner.is_dir():
                    yield from _files(inner, seen)
                else:
                    yield inner


def _named(document: Document) -> Iterator[tuple[str, str]]:
    for key in SOURCES:
        entries = document.tree.get(key)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            name = entry.get("path") if isinstance(entry, dict) else entry
            if isinstance(name, str) and "\n" not in name:
                yield f"{key}[{number}]", name


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, under(path, str(key)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}[{number}]")
