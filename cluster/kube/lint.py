"""Lint: manifests as strictly as an admission controller would take them, without a cluster.

    ftcore k8s lint k8s/overlays/prod            ftcore k8s lint mine.yaml --kubernetes 1.34 --crds ./crds --strict

In: files, folders, kustomizations. Out: every flaw with its place, what is there, what is wanted and what to do; exit code 0 clean
(warnings allowed), 1 flaws (with --strict warnings too), 2 a wrong command line or what cannot be read, 7 no kustomize, kubectl or cluster.
Runs in: a terminal, CI; imports no ray.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from cluster.kube import core, metadata, rules, schema
from cluster.kube.crds import Catalogue, from_cluster, kuberay, read_folder
from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw, Level, as_json, in_order
from cluster.kube.reading import Manifests, read
from cluster.kube.waivers import waived

RAY = "ray.io"


@dataclass(frozen=True)
class Against:
    """What manifests are checked against."""

    crds: Catalogue
    kubernetes: str
    gates: frozenset[str] = frozenset()
    """The operator's feature gates that are on."""


@dataclass(frozen=True)
class Report:
    flaws: tuple[Flaw, ...]
    notes: tuple[str, ...]
    kinds: dict[str, int]

    def count(self, level: str) -> int:
        return sum(flaw.level == level for flaw in self.flaws)


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.rules:
        width = max(map(len, rules.RULES))
        print("\n".join(f"{name:<{width}}  {reason}" for name, reason in sorted(rules.RULES.items())))
        return 0
    version, shipped = kuberay()
    extra = [crd for folder in options.crds for crd in read_folder(Path(folder))]
    extra += from_cluster() if options.cluster else []
    against = Against(Catalogue.of([*shipped, *extra]), core.known_version(options.kubernetes), frozenset(_words(options.gates)))
    report = without(lint([found for path in options.paths for found in read(Path(path))], against), _words(options.ignore))
    told = [f"KubeRay {version}", f"Kubernetes {against.kubernetes}", *(f"the CRDs of {folder}" for folder in options.crds)]
    told += ["the cluster's CRDs"] if options.cluster else []
    clean = not report.count("error") and not (options.strict and report.flaws)
    print(_as_json(report, told, clean) if options.json else _as_text(report, told))
    return 0 if clean else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ftcore k8s lint",
        description="Checks manifests offline. Exit code 0 clean, 1 flaws, 2 not readable, 7 no kustomize, kubectl or cluster.",
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="a file, a folder, or a folder with a kustomization (it is built)")
    parser.add_argument("--crds", metavar="DIR", action="append", default=[], help="also the CRDs in this folder; before those that ship")
    parser.add_argument("--cluster", action="store_true", help="also the CRDs of your cluster (kubectl get crd)")
    parser.add_argument("--kubernetes", metavar="V", help=f"a version of Kubernetes, like 1.34 (the newest: {core.versions()[-1]})")
    parser.add_argument("--gates", metavar="A,B", default="", help="feature gates that are on in your KubeRay operator")
    parser.add_argument("--ignore", metavar="RULE,...", default="", help="rules that are not asked, by the name in brackets")
    parser.add_argument("--strict", action="store_true", help="a warning, too, makes the exit code 1")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--rules", action="store_true", help="list the rules that no schema holds, and why each is there")
    options = parser.parse_args(argv)
    if not options.paths and not options.rules:
        parser.error("name a PATH")
    return options


def _words(listed: str) -> list[str]:
    return [word.strip() for word in listed.split(",") if word.strip()]


def lint(found: Iterable[Manifests], against: Against) -> Report:
    flaws: list[Flaw] = []
    notes: list[str] = []
    kinds: Counter[str] = Counter()
    unchecked: Counter[str] = Counter()
    for manifests in found:
        notes += manifests.notes
        kinds.update(document.kind or "no kind" for document in manifests.documents)
        unchecked.update(_title(document) for document in manifests.documents if by_schema(document, against) is None)
        left, why = waived(manifests.documents, _of_set(manifests.documents, against))
        notes += why
        flaws += [manifests.place(flaw) for flaw in (*manifests.flaws, *left)]
    notes += [
        f"not checked: {name}{f' x {number}' if number > 1 else ''} (no schema; --crds DIR)" for name, number in sorted(unchecked.items())
    ]
    return Report(tuple(in_order(flaws)), tuple(notes), dict(sorted(kinds.items())))


def _title(document: Document) -> str:
    return f"{document.api_version} {document.kind}"


def _of_set(documents: Sequence[Document], against: Against) -> Iterator[Flaw]:
    for document in documents:
        yield from metadata.check(document)
        yield from by_schema(document, against) or ()
    yield from metadata.twice(documents)
    yield from rules.check(documents, against.gates)


def by_schema(document: Document, against: Against) -> Iterator[Flaw] | None:
    """None: no schema of this kind is known, and nobody can say that there should be one."""
    group, _, _ = document.api_version.rpartition("/")
    if not document.kind or not document.api_version:
        return iter(())  # told by metadata
    crd = against.crds.find(document.api_version, document.kind)
    if crd is not None and not crd.is_deprecated:
        return schema.check(document, crd)
    if against.crds.of_group(group):
        return _elsewhere(document, against.crds, group)
    if any(crd.group == RAY for crd in against.crds.of_kind(document.kind)):
        return _elsewhere(document, against.crds, RAY)
    return core.check(document, against.kubernetes)


def _elsewhere(document: Document, crds: Catalogue, group: str) -> Iterator[Flaw]:
    """A kind that its group has in another version (whose schema then says what else has to change), or not at all."""
    served = [crd for crd in crds.of_group(group) if crd.kind == document.kind]
    lasting = [crd for crd in served if not crd.is_deprecated] or served
    if served:
        # A server still takes a deprecated version. KubeRay's operator reconciles v1, and 1.9 drops the others.
        level: Level = "warning" if group != RAY and crds.find(document.api_version, document.kind) else "error"
        wanted = " or ".join(sorted(crd.api_version for crd in lasting))
        remedy = f"write apiVersion: {lasting[-1].api_version}; what else that version wants is told beside this"
        yield document.flaw("kind", "apiVersion", got=document.api_version, wanted=wanted, remedy=remedy, level=level)
        yield from schema.check(document, lasting[-1])
        return
    names = sorted({crd.kind for crd in crds.of_group(group)})
    near = get_close_matches(document.kind, names, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else ""
    yield document.flaw("kind", "kind", got=_title(document), wanted=f"a kind of {group}: {', '.join(names)}", remedy=remedy)


def without(report: Report, ignored: Sequence[str]) -> Report:
    """What is ignored is counted, and what ignores nothing is told: a name that is not right would ignore nothing for ever."""
    counts = Counter(flaw.rule for flaw in report.flaws)
    notes = [f"--ignore {rule}: {counts[rule] or 'no'} flaws" for rule in ignored]
    return Report(tuple(flaw for flaw in report.flaws if flaw.rule not in ignored), (*report.notes, *notes), report.kinds)


def _as_text(report: Report, against: Sequence[str]) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in report.kinds.items())
    counts = f"{report.count('error')} errors, {report.count('warning')} warnings"
    last = f"documents checked: {sum(report.kinds.values())} ({kinds}) against {', '.join(against)}: {counts}"
    return "\n".join([*(str(flaw) for flaw in report.flaws), *report.notes, last])


def _as_json(report: Report, against: Sequence[str], clean: bool) -> str:
    counts = {level: report.count(level) for level in ("error", "warning")}
    whole = {
        "clean": clean,
        "counts": counts,
        "against": against,
        "kinds": report.kinds,
        "notes": report.notes,
        "flaws": as_json(report.flaws),
    }
    return json.dumps(whole, indent=1)
