"""Waivers: warnings that an object's author has seen and answers for, in an annotation of the object itself.

    metadata: {annotations: {ftcore/waive: "missing-secret: made by hand, see README.md; RULE: WHY"}}

In: documents and their flaws. Out: the flaws that are left, and a note for each waiver. Runs in: a terminal; imports no ray.

An error cannot be waived: what is refused stays refused. A waiver without a reason, of no rule, or that waives nothing is a flaw itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cluster.kube.documents import Document
from cluster.kube.flaws import Flaw

WAIVE = "ftcore/waive"
PATH = f"metadata.annotations.{WAIVE}"


def waived(documents: Sequence[Document], flaws: Iterable[Flaw]) -> tuple[list[Flaw], list[str]]:
    """(What is left, what was waived and why)."""
    kept, counts = list[Flaw](), Counter[tuple[str, int, str]]()
    said: dict[tuple[str, str], list[tuple[Document, dict[str, str]]]] = {}
    for document in documents:
        reasons, wrong = _reasons(document)
        kept += wrong
        if reasons:
            said.setdefault((document.file, document.title), []).append((document, reasons))
    for flaw in flaws:
        holder = next((each for each in said.get((flaw.file, flaw.document), ()) if flaw.rule in each[1]), None)
        if holder and flaw.level == "warning":
            counts[holder[0].file, holder[0].number, flaw.rule] += 1
        else:
            kept.append(flaw)
    notes = list[str]()
    for document, reasons in (each for same in said.values() for each in same):
        for rule, reason in reasons.items():
            number = counts[document.file, document.number, rule]
            if number:
                notes.append(f"waived: {document.title} {rule}{f' x {number}' if number > 1 else ''}: {reason}")
            else:
                kept.append(_flaw(document, f"{rule}, of which there is none here", "a rule that warns of this object", "take it away"))
    return kept, notes


def _reasons(document: Document) -> tuple[dict[str, str], list[Flaw]]:
    """Rule -> why, and what is wrong with the annotation."""
    notes = document.metadata.get("annotations")
    text = notes.get(WAIVE) if isinstance(notes, dict) else None
    if text is None:
        return {}, []
    found, wrong = dict[str, str](), list[Flaw]()
    for part in filter(str.strip, str(text).split(";")):
        rule, _, reason = (word.strip() for word in part.partition(":"))
        if reason:
            found[rule] = reason
        else:
            wrong.append(_flaw(document, f"{rule} without a reason", "RULE: WHY; RULE: WHY", "write the reason behind the rule"))
    return found, wrong


def _flaw(document: Document, got: str, wanted: str, remedy: str) -> Flaw:
    return document.flaw("waiver", PATH, got=got, wanted=wanted, remedy=remedy, level="warning")
