"""`ftcore audit`: the audit log's segments, whether they are whole, and what each tenant used.

In: a store. Out: tables, JSON lines, an exit code. Runs in: a person's terminal; no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcore.card import printable
from ftcore.errors import ConfigError, FtcoreError, IntegrityError
from ftcore.storage import Folder, canonical_json
from serving.audit import HOME, OPEN, Seal, day_of, read_lines, read_segment, spool_of
from serving.published_keys import published_keys

Line = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ftcore audit", description="what was asked, by whom, and what became of it; no content")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("list", "every segment, sealed or still open on this machine"), ("verify", "check every line, seal and signature"),
        ("usage", "requests and tokens of each tenant"), ("lines", "every line, as JSON"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=summary)
        command.add_argument("store", help="the adapter store: a folder, s3:// or another fsspec path")
        command.add_argument(
            "--spool", default="", metavar="FOLDER", help="where segments are open on this machine, if audit_spool was set"
        )
        command.add_argument(
            "--keys", type=Path, metavar="KEYS.json", help="public keys, as GET /v1/receipt-keys gave them; else the store's"
        )
    parsed = parser.parse_args(list(arguments))
    keys = _saved_keys(parsed.keys) if parsed.keys is not None else published_keys(parsed.store)
    if parsed.command == "verify":
        return _verify(Folder(parsed.store) / HOME, keys)
    segments = [*_sealed(Folder(parsed.store) / HOME, keys), *_open(spool_of(parsed.store, parsed.spool))]
    if parsed.command == "list":
        for segment, seal, lines in segments:
            state = "open" if seal is None else "sealed" if seal.ended else "sealed; its process was killed"
            print(f"{segment}  {len(_entries(lines)):>8} lines  {state}")
    elif parsed.command == "lines":
        for _, _, lines in segments:
            for line in _entries(lines):
                print(json.dumps(line))
    else:
        _print_usage([line for _, _, lines in segments for line in lines if "outcome" in line])
    return 0


def _verify(folder: Folder, keys: Mapping[str, str]) -> int:
    """Reads everything and tells every problem, then raises the first."""
    problems: list[FtcoreError] = []
    found: dict[str, tuple[Seal, list[Line]]] = {}
    for segment in _names(folder):
        try:
            found[segment] = read_segment(folder, segment, keys)
        except FtcoreError as error:
            problems.append(error)
    for segment, (seal, lines) in found.items():
        last = found[seal.before][1][-1] if seal.before in found else None
        if seal.before and (last is None or hashlib.sha256(canonical_json(last)).hexdigest() != lines[0]["chain"]):
            problems.append(
                IntegrityError("the audit segment before this one is gone, or not the one it follows", where=segment, wanted=seal.before)
            )
    for problem in problems:
        print(f"NOT SOUND  {problem.what}  {problem.where}")
    if problems:
        raise problems[0]
    num_killed = sum(not seal.ended for seal, _ in found.values())
    killed = f"; {num_killed} of a process that was killed" if num_killed else ""
    print(f"sound: {len(found)} segments, {sum(len(_entries(lines)) for _, lines in found.values())} lines{killed}")
    return 0


def _names(folder: Folder) -> list[str]:
    """Segments of which there is anything: what lacks its other half is found when it is read."""
    keys = (Path(key) for key in folder.files())
    return sorted({key.stem for key in keys if key.parent.name not in (OPEN, "") and day_of(key.stem) == key.parent.name})


def _sealed(folder: Folder, keys: Mapping[str, str]) -> Iterator[tuple[str, Seal | None, list[Line]]]:
    for segment in _names(folder):
        yield segment, *read_segment(folder, segment, keys)


def _open(spool: Path) -> Iterator[tuple[str, Seal | None, list[Line]]]:
    for path in sorted(spool.glob("*.jsonl")):
        raw = path.read_bytes()
        yield path.stem, None, read_lines(raw[: raw.rfind(b"\n") + 1], str(path))


def _entries(lines: Sequence[Line]) -> list[Line]:
    """Answers and changes, without what begins and ends a segment."""
    return [line for line in lines if "outcome" in line or "change" in line]


def _print_usage(lines: Sequence[Line]) -> None:
    totals: dict[str, Counter[str]] = {}
    for line in lines:
        total = totals.setdefault(line["tenant"], Counter())
        total.update({"requests": 1, line["outcome"]: 1, "prompt": line["prompt_tokens"], "completion": line["completion_tokens"]})
    columns = ("requests", "prompt", "completion", "aborted", "refused", "failed")
    print(f"{'tenant':<32}" + "".join(f"{name:>14}" for name in columns))
    for tenant, total in sorted(totals.items()):
        print(f"{printable(tenant):<32}" + "".join(f"{total[name]:>14}" for name in columns))


def _saved_keys(path: Path) -> dict[str, str]:
    try:
        return {row["id"]: row["pem"] for row in json.loads(path.read_bytes())["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "this is not a list of keys", where=path, got=str(error)[:200], wanted="the body of GET /v1/receipt-keys"
        ) from error
