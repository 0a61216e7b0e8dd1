"""Label: `ftcore label`: people say which of two answers is better, or score both; how far they agree; rows to train on.

In: an evaluation's folder and two systems, or a file of pairs; keys. Out: a folder of labels (see `judgements`).
Runs in: a person's terminal; no torch, no ray.
"""

from __future__ import annotations

import argparse
import getpass
from collections import Counter
from collections.abc import Mapping, Sequence

from ftcore.errors import ConfigError
from ftcore.evals.tables import as_text
from ftcore.feedback.agreement import agreements, codes_of
from ftcore.feedback.desk import Desk
from ftcore.feedback.judgements import Judgement, RaterFile, read_judgements
from ftcore.feedback.page import serve
from ftcore.feedback.pairs import Pairs, evaluated_pairs, file_pairs, written_pairs
from ftcore.feedback.preferences import PREFERENCES, preferred, write_preferences
from ftcore.feedback.terminal import sit
from ftcore.parts import claim
from ftcore.storage import Folder

JOB = "label.json"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ftcore label", description="which of two answers is better? in the terminal or on a page")
    parser.add_argument(
        "words", metavar="SOURCE", nargs="*", help="a folder of `ftcore evaluate` and two of its systems, or a file of {prompt, a, b}; "
        "left out: the pairs that --out was begun with",
    )  # fmt: skip
    parser.add_argument("--out", default="labels", help="a local folder; raters who share it judge the same pairs (default: labels)")
    parser.add_argument("--rater", default="", help="who judges (default: your login name)")
    parser.add_argument("--scores", action="store_true", help="score each answer 1 to 5; the higher one is the preferred one")
    parser.add_argument("--page", action="store_true", help="on a page for this machine's browser, not in the terminal")
    parser.add_argument("--port", type=int, default=0, help="of the page (default: any that is free)")
    parser.add_argument("--agreement", nargs="+", metavar="FILE", default=[], help="how far these raters agree: their files, or a folder")
    options = parser.parse_args(list(arguments))
    if options.agreement:
        print(told(read_judgements(options.agreement)))
        return 0
    if "://" in options.out:
        raise ConfigError("judgements are appended, which such storage cannot do", where="--out", got=options.out, wanted="a local folder")
    folder = Folder(options.out)
    found = _pairs(options.words, folder)
    claim(folder, JOB, {"pairs": found.digest, "kind": "scores" if options.scores else "preferences"}, "this folder holds other labels")
    if options.words:
        found.write(folder)
    for reason, count in found.left_out.items():
        print(f"{count:,} rows left out: {reason}")
    _sitting(found, folder, options)
    return 0


def _pairs(words: Sequence[str], folder: Folder) -> Pairs:
    if not words:
        return written_pairs(folder)
    if len(words) == 1:
        return file_pairs(words[0])
    if len(words) != 3:
        raise ConfigError("which answers?", got=" ".join(words), wanted="ftcore label RESULTS SYSTEM SYSTEM, or ftcore label PAIRS.jsonl")
    return evaluated_pairs(words[0], words[1], words[2])


def _sitting(found: Pairs, folder: Folder, options: argparse.Namespace) -> None:
    file = RaterFile(folder.path, options.rater or getpass.getuser().lower())
    file.open()
    try:
        desk = Desk(found.pairs, file, scored=options.scores)
        if options.page:
            serve(desk, options.port)
        else:
            sit(desk)
    finally:
        file.close()
        everybody = read_judgements([str(folder)])
        rows = preferred(found.pairs, everybody)
        write_preferences(folder, rows)
        print(f"\n{len(file.kept):,} of {len(found.pairs):,} pairs judged by {file.rater}, {desk.made:,} of them now: {file.path}")
        print(f"{len(rows.rows):,} preferences of {len(everybody):,} raters: {folder.path / PREFERENCES}")
        for reason, count in rows.left_out.items():
            print(f"{count:,} pairs without preference: {reason}")


def told(judgements: Mapping[str, Sequence[Judgement]]) -> str:
    """How far some raters agree, as a table. Raises ConfigError for fewer than two."""
    if len(judgements) < 2:
        raise ConfigError("agreement takes two raters", where="--agreement", got=", ".join(judgements), wanted="two files, or a folder")
    everything = [judgement for each in judgements.values() for judgement in each]
    scored = any(judgement.scores for judgement in everything)
    if scored and not all(judgement.scores or judgement.choice == "skip" for judgement in everything):
        raise ConfigError("scores and preferences are no one scale", where="--agreement", wanted="files of one folder of labels")
    codes = codes_of(judgements, scored=scored)
    raters = ", ".join(f"{rater} ({len(each):,})" for rater, each in sorted(judgements.items()))
    rows: list[tuple[str, ...]] = [("measure", "value", "95 % interval", "answers" if scored else "pairs")]
    rows += [measure.cells() for measure in agreements(codes, scored=scored)]
    firsts = Counter((judgement.choice == "a") == (judgement.shown == "ab") for judgement in everything if judgement.choice in ("a", "b"))
    bias = f"the answer that stood first was preferred {firsts[True]:,} of {firsts.total():,} times"
    return "\n".join([raters, "", as_text(rows), "", bias])
